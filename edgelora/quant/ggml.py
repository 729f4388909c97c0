"""ggml's own block quantizers, through ctypes: the bytes are those that llama.cpp writes.

The library is the libggml-base that llama-cpp-python carries. Types are `gguf.GGMLQuantizationType`;
a block of `block_size` weights of a row is stored in a fixed number of bytes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edgelora.errors import ModelError, ToolMissing

_FLOATS = ctypes.POINTER(ctypes.c_float)


def block_size(type: GGMLQuantizationType) -> int:
    """Weights in one block: rows must be a multiple of it."""
    return GGML_QUANT_SIZES[type][0]


def row_bytes(type: GGMLQuantizationType, columns: int) -> int:
    """Bytes of one row of `columns` weights."""
    size, stored = GGML_QUANT_SIZES[type]
    if columns % size:
        raise ValueError(f"{columns} columns are not a multiple of {type.name}'s block of {size}")
    return columns // size * stored


def quantize(values: np.ndarray, type: GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize rows.

    `values`: float32, shape (rows, columns), finite. `importance`: float32, shape (columns,), the mean square of what
    each column is multiplied with (llama.cpp's importance matrix). Returns uint8, shape (rows, row_bytes(type, columns)).
    Rows do not depend on one another, so a tensor can be done in row ranges.

    Raises ModelError when a value does not fit the type (the check is ggml's own `ggml_validate_row_data`).
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
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return ggml
