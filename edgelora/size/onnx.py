"""The parts of an ONNX file, by walking protobuf's wire format: no message is built, no weight is read.

    ModelProto    7: graph
    GraphProto    1: node   5: initializer
    TensorProto   2: data_type   4, 5, 6, 7, 10, 11: typed data   8: name   9: raw_data   13: external_data   14: data_location
    StringStringEntryProto   1: key   2: value

Source: onnx/onnx.proto of https://github.com/onnx/onnx and the protobuf encoding guide.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from edgelora.errors import ModelError
from edgelora.protobuf import fields
from edgelora.size import METADATA, Part, group_of

Place = tuple[str, int]  # a file's name relative to the graph's, offset in bytes

_GRAPH, _INITIALIZER = 7, 5
_TYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 8: "string", 9: "bool", 10: "F16", 11: "F64",
    12: "U32", 13: "U64", 16: "BF16", 17: "F8_E4M3", 21: "U4", 22: "I4", 23: "F4_E2M1",
}  # fmt: skip
_DATA_FIELDS = (4, 5, 6, 7, 9, 10, 11)
_MAX_NAME = 1 << 16  # bytes
_MAX_TENSORS = 1 << 18


def parts(path: Path) -> tuple[Part, ...]:
    """Every initializer that holds its data in this file, and all other bytes as the graph."""
    inside = [part for part, place in _initializers(path) if place is None]
    rest = path.stat().st_size - sum(part.n_bytes for part in inside)
    return (*inside, Part("graph", METADATA, "protobuf", rest))


def external(path: Path) -> list[tuple[Part, Place]]:
    """Initializers whose data lies in another file, and where; several may share the same bytes, as tied embeddings do."""
    return [(part, place) for part, place in _initializers(path) if place is not None]


def _initializers(path: Path) -> list[tuple[Part, Place | None]]:
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = []
            for number, begin, end, _ in fields(data, 0, len(data)):
                if number == _GRAPH and end > begin:
                    for inner, first, last, _ in fields(data, begin, end):
                        if inner == _INITIALIZER:
                            found.append(_tensor(data, first, last))
                            if len(found) > _MAX_TENSORS:
                                raise ValueError(f"more than {_MAX_TENSORS} initializers")
            if not any(field.number == _GRAPH for field in fields(data, 0, len(data))):
                raise ValueError("it holds no graph")
            return found
    except ValueError as error:
        raise ModelError(f"{path} is no usable ONNX file: {error}", "download or export it again") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", "name a file that you may read") from error


def _tensor(data: mmap.mmap, begin: int, end: int) -> tuple[Part, Place | None]:
    name, kind, held = "", "?", 0
    outside: dict[str, str] = {}
    for number, first, last, value in fields(data, begin, end):
        if number == 8:
            name = _text(data, first, last)
        elif number == 2:
            kind = _TYPES.get(value, "?") if value is not None else "?"
        elif number in _DATA_FIELDS:
            held += last - first
        elif number == 13:
            entry = {inner: _text(data, a, b) for inner, a, b, _ in fields(data, first, last) if inner in (1, 2)}
            outside[entry.get(1, "")] = entry.get(2, "")
    if "location" in outside:
        numbers = [outside.get(key) or "0" for key in ("offset", "length")]
        if not all(n.isdecimal() and n.isascii() and len(n) <= 18 for n in numbers):
            raise ValueError(f"the tensor {name[:60]!r} claims to lie at {numbers[0][:30]!r}, {numbers[1][:30]!r} bytes long")
        offset, length = map(int, numbers)
        return Part(name, group_of(name), kind, length), (outside["location"], offset)
    return Part(name, group_of(name), kind, held), None


def _text(data: mmap.mmap, begin: int, end: int) -> str:
    if end - begin > _MAX_NAME:
        raise ValueError(f"a name at byte {begin} is {end - begin} bytes long")
    return data[begin:end].decode("utf-8", "replace")
