"""The layout of a GGUF file (little-endian; ggml, docs/gguf.md):

"GGUF" version=3 | counts of tensors and keys | keys | name, shape, type, offset of each tensor | pad | tensors, each padded
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType

from edgelora.quant import ggml

ALIGNMENT = 32


@dataclass(frozen=True)
class Tensor:
    """What the header says of a tensor; `shape` in C order, so the last number is the row length."""

    name: str
    shape: tuple[int, ...]
    type: ggml.Type

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * ggml.row_bytes(self.type, self.shape[-1])


def header(metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
    """Everything before the tensors' bytes, which start at the next multiple of ALIGNMENT and are each padded to one."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts.append(_string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset))
        offset += padded(tensor.bytes)
    return b"".join(parts)


def file_bytes(metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> int:
    """The size of the whole file."""
    return padded(len(header(metadata, tensors))) + sum(padded(tensor.bytes) for tensor in tensors)


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Type and value; whole numbers are unsigned 32-bit, in arrays signed, as llama.cpp reads them."""
    if isinstance(value, list):
        kind = _kind(value[0]) if not isinstance(value[0], int) or isinstance(value[0], bool) else GGUFValueType.INT32
        return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + b"".join(_scalar(item, kind) for item in value)
    return struct.pack("<I", _kind(value)) + _scalar(value, _kind(value))


def _kind(value: Any) -> GGUFValueType:
    kinds = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    return kinds[type(value)]


def _scalar(value: Any, kind: GGUFValueType) -> bytes:
    if kind == GGUFValueType.STRING:
        return _string(value)
    formats = {GGUFValueType.BOOL: "<?", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.FLOAT32: "<f"}
    return struct.pack(formats[kind], value)
