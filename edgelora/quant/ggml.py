"""ggml's own block quantizers, through ctypes: the bytes are those that llama.cpp writes.

The library is the libggml-base that llama-cpp-python carries. A type stores a block of `block_size` weights of a row
in a fixed number of bytes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from enum import IntEnum
from pathlib import Path

import numpy as np

from edgelora.errors import ModelError, ToolMissing
from edgelora.gguf_header import BLOCKS

_FLOATS = ctypes.POINTER(ctypes.c_float)


class Type(IntEnum):
    """ggml's number for every type that it can quantize to (ggml.h, enum ggml_type)."""

    F32 = 0
    F16 = 1
    BF16 = 30
    Q8_0 = 8
    Q6_K = 14
    Q5_K = 13
    Q5_1 = 7
    Q5_0 = 6
    Q4_K = 12
    Q4_1 = 3
    Q4_0 = 2
    IQ4_NL = 20
    IQ4_XS = 23
    NVFP4 = 40
    MXFP4 = 39
    Q3_K = 11
    IQ3_S = 21
    IQ3_XXS = 18
    Q2_K = 10
    IQ2_S = 22
    IQ2_XS = 17
    IQ2_XXS = 16
    Q2_0 = 42
    TQ2_0 = 35
    IQ1_M = 29
    TQ1_0 = 34
    IQ1_S = 19
    Q1_0 = 41


# ggml's quantizers of these leave the importance matrix aside (ggml-quants.c).
UNWEIGHTED = frozenset({Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.NVFP4, Type.MXFP4, Type.Q2_0, Type.TQ2_0, Type.TQ1_0, Type.Q1_0})


def block_size(type: Type) -> int:
    """Weights in one block: rows must be a multiple of it."""
    return BLOCKS[type][1]


def bits(type: Type) -> float:
    """Bits that one weight takes."""
    _, size, stored = BLOCKS[type]
    return 8 * stored / size


def row_bytes(type: Type, columns: int) -> int:
    """Bytes of one row of `columns` weights."""
    _, size, stored = BLOCKS[type]
    if columns % size:
        raise ValueError(f"{columns} columns are not a multiple of {type.name}'s block of {size}")
    return columns // size * stored


def quantize(values: np.ndarray, type: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize rows.

    `values`: float32, shape (rows, columns), finite. `importance`: float32, shape (columns,), the mean square of what
    each column is multiplied with (llama.cpp's importance matrix). Returns uint8, shape (rows, row_bytes(type, columns)).
    Rows do not depend on one another, so a tensor can be done in row ranges.

    Raises ModelError when a value does not fit the type (the check is ggml's own `ggml_validate_row_data`) and for a
    type that ggml quantizes only by importance.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, columns = values.shape
    packed = np.empty((rows, row_bytes(type, columns)), dtype=np.uint8)
    weights = None
    if importance is not None:
        if importance.shape != (columns,):
            raise ValueError(f"importance of shape {importance.shape} does not fit {columns} columns")
        weights = np.ascontiguousarray(importance, dtype=np.float32).ctypes.data_as(_FLOATS)
    ggml = _library()
    if weights is None and needs_importance(type):  # it would end the process
        raise ModelError(f"{type.name} needs an importance matrix", "measure one on training rows, or choose a type of 3 bits or more")
    written = ggml.ggml_quantize_chunk(type, values.ctypes.data_as(_FLOATS), packed.ctypes.data, 0, rows, columns, weights)
    if written != packed.nbytes:
        raise ModelError(
            f"ggml wrote {written} bytes of {type.name} where {packed.nbytes} were expected", "reinstall gguf and llama-cpp-python"
        )
    if not ggml.ggml_validate_row_data(type, packed.ctypes.data, packed.nbytes):
        raise ModelError(
            f"values up to {np.abs(values).max():.3g} do not fit {type.name}", "choose f32 or bf16, or train with a lower learning rate"
        )
    return packed


def needs_importance(type: Type) -> bool:
    """Whether ggml quantizes to this type only with an importance matrix."""
    return bool(_library().ggml_quantize_requires_imatrix(type))


def dequantize(packed: np.ndarray, type: Type) -> np.ndarray:
    """The values that `quantize` kept: uint8, shape (rows, row bytes), in; float32, shape (rows, columns), out."""
    packed = np.ascontiguousarray(packed)
    if type == Type.F32:
        return packed.view(np.float32)
    _, size, stored = BLOCKS[type]
    values = np.empty((len(packed), packed.shape[1] // stored * size), dtype=np.float32)
    traits = _library().ggml_get_type_traits(type).contents
    traits.to_float(packed.ctypes.data, values.ctypes.data_as(_FLOATS), values.size)
    return values


class _Traits(ctypes.Structure):
    """The beginning of ggml.h's struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, _FLOATS, ctypes.c_int64)),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ToolMissing("llama-cpp-python is not installed", "pip install llama-cpp-python")
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(sys.platform, "libggml-base.so")
    path = Path(found.origin).parent / "lib" / name
    try:
        ggml = ctypes.CDLL(str(path))
    except OSError as error:
        raise ToolMissing(f"cannot load {path}: {error}", "reinstall llama-cpp-python") from error
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS]
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    ggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return ggml
