"""A folder with an ONNX decoder, as far as every runtime that opens it must know: what a file from outside may hold.

ONNX is protobuf: a message is a row of fields, each a varint key (number << 3 | wire type) and a value. Only the way to
the tensors is walked, over a memory map and with a stack of our own: a hostile file costs neither memory nor recursion
depth, which a full protobuf parse does not promise. Field numbers: onnx.proto (onnx/onnx, IR version 10).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import protobuf
from edgelora.errors import ModelError

GRAPH = "model.onnx"
SETTINGS = "genai_config.json"
AGAIN = "export the model again, or fetch the file again"

_TENSOR = "TensorProto"
_CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: _TENSOR, 6: "GraphProto", 10: _TENSOR, 11: "GraphProto", 22: "SparseTensorProto", 23: "SparseTensorProto"},
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
}
_BITS = dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8) | dict.fromkeys((4, 5, 10, 16), 16) | dict.fromkeys((1, 6, 12), 32)
_BITS |= dict.fromkeys((7, 11, 13, 14), 64) | {15: 128} | dict.fromkeys((21, 22, 23), 4) | dict.fromkeys((25, 26), 2)
_STRING = 8
_MAX_DEPTH = 100  # as protobuf's own parsers
_MAX_RANK = 64
_MAX_CACHE = 1 << 18  # values a token and layer, key or value; the largest open models have 16,384
_MAX_LAYERS = 1024


def check_folder(folder: Path) -> None:
    """Refuse an ONNX folder whose graph is damaged or whose tensors reach outside the folder; ModelError says where.

    Every tensor's bytes must be there: external data under a plain file name of this folder (no path, no link), offset
    and length within the file, as many bytes as shape and type say. Memory: constant. No weights are read.
    """
    graph = folder / GRAPH
    if not graph.is_file():
        raise ModelError(f"{folder} holds no {GRAPH}", "name the folder that `edgelora export --format onnx` wrote")
    sizes: dict[str, int] = {}
    try:
        with graph.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            count = 0
            for start, end in _tensor_spans(data):
                _check_tensor(data, start, end, folder, sizes)
                count += 1
            if not count:
                raise ValueError("it holds no tensors")
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{graph} is truncated or not an ONNX file: {error}", AGAIN) from error


def _tensor_spans(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(start, end) of every TensorProto, wherever it hides: initializers, attributes, subgraphs, functions."""
    stack = [("ModelProto", _fields(data, 0, len(data)))]
    while stack:
        message, fields = stack[-1]
        for number, value in fields:
            child = _CHILDREN[message].get(number)
            if child is None or isinstance(value, int):
                continue
            if child == _TENSOR:
                yield value
            elif len(stack) == _MAX_DEPTH:
                raise ValueError(f"messages are nested more than {_MAX_DEPTH} deep")
            else:
                stack.append((child, _fields(data, *value)))
                break
        else:
            stack.pop()


def _check_tensor(data: mmap.mmap, start: int, end: int, folder: Path, sizes: dict[str, int]) -> None:
    dims: list[int] = []
    external: dict[str, str] = {}
    kind, stored, name = 0, None, "?"
    for number, value in _fields(data, start, end):
        if number == 1:
            dims += [value] if isinstance(value, int) else _packed(data, *value)
            if len(dims) > _MAX_RANK:
                raise ValueError(f"a tensor of more than {_MAX_RANK} dimensions")
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, tuple):
            name = data[value[0] : min(value[1], value[0] + 200)].decode("utf-8", "replace")
        elif number == 9 and isinstance(value, tuple):
            stored = value[1] - value[0]
        elif number == 13 and isinstance(value, tuple):
            texts = {n: v for n, v in _fields(data, *value) if isinstance(v, tuple)}
            pair = {n: data[a : min(b, a + 4096)].decode("utf-8", "replace") for n, (a, b) in texts.items()}
            if pair.get(1) in ("location", "offset", "length"):
                external[pair[1]] = pair.get(2, "")
    if kind == _STRING and not external:
        return
    if kind not in _BITS or any(d >= 1 << 63 for d in dims):
        raise ModelError(f"{folder / GRAPH}: tensor {name!r} has type {kind} and shape {dims[:8]}, which ONNX does not know", AGAIN)
    count = math.prod(dims)
    needed = (count * _BITS[kind] + 7) // 8
    if external:
        _check_external(external, needed, name, folder, sizes)
    elif needed != stored if stored is not None else count > 2 * (end - start):  # typed fields: a byte holds two values at most
        raise ModelError(f"{folder / GRAPH}: tensor {name!r} of shape {dims[:8]} does not fit its {stored or end - start} bytes", AGAIN)


def _check_external(entries: dict[str, str], needed: int, name: str, folder: Path, sizes: dict[str, int]) -> None:
    location = entries.get("location", "")
    if not location or location in (".", "..") or set(location) & set("/\\:\0"):
        raise ModelError(
            f"{folder / GRAPH}: tensor {name!r} wants its data from {location!r}, outside the folder",
            "do not use this file; fetch the model again from a source you trust",
        )
    if location not in sizes:
        path = folder / location
        if path.is_symlink() or not path.is_file():
            raise ModelError(f"{folder / GRAPH}: the data file {location!r} of tensor {name!r} is missing or a link", AGAIN)
        sizes[location] = path.stat().st_size
    offset, length = int(entries.get("offset", "0")), int(entries.get("length", needed))
    if length != needed or offset < 0 or offset + length > sizes[location]:
        raise ModelError(
            f"{folder / GRAPH}: tensor {name!r} needs {needed} bytes, its entry names bytes {offset} to {offset + length}"
            f" of {location!r}, which has {sizes[location]}",
            AGAIN,
        )


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(field number, value) of one message: an int for numbers, (start, end) for bytes; ValueError when damaged."""
    for field in protobuf.fields(data, start, end):
        yield field.number, (field.begin, field.end) if field.value is None else field.value


def _packed(data: mmap.mmap, start: int, end: int) -> list[int]:
    values: list[int] = []
    while start < end and len(values) <= _MAX_RANK:
        value, start = protobuf.varint(data, start, end)
        values.append(value)
    return values


def shares_cache(folder: Path) -> bool:
    """Whether the graph's attention writes the cache in place: it names the operator that does."""
    with (folder / GRAPH).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"GroupQueryAttention") >= 0


def settings(folder: Path) -> dict[str, Any]:
    """What genai_config.json says; empty where that file is missing. ModelError when it is no JSON object."""
    path = folder / SETTINGS
    try:
        with path.open("rb") as stream:
            values = json.loads(stream.read(1 << 20))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", AGAIN) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is damaged: it holds no object", AGAIN)
    return values


def context_length(folder: Path) -> int:
    """Tokens the rotary tables reach, from genai_config.json; 0 where that file is missing (plain ONNX Runtime needs none)."""
    values = settings(folder)
    if not values:
        return 0
    model = values.get("model")
    length = model.get("context_length") if isinstance(model, dict) else None
    if type(length) is not int or length < 1:
        raise ModelError(f"{folder / SETTINGS} is damaged: context_length is {length!r}", AGAIN)
    return length


def check_cache(folder: Path, heads: int, dimension: int, layers: int = 1) -> None:
    """Refuse a cache so large that memory would run out before the first token: a damaged or hostile file."""
    if not (0 < heads * dimension <= _MAX_CACHE and heads > 0 and 0 < layers <= _MAX_LAYERS):
        raise ModelError(
            f"{folder / GRAPH} wants a cache of {heads} heads of {dimension} values in {layers} layer{'s' * (layers != 1)}",
            "no decoder is like that: " + AGAIN,
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise, float32 in and out; the largest logit is taken off first, the sum runs in float64."""
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted
