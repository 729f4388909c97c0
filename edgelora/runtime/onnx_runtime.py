"""ONNX Runtime on the CPU: a decoder graph with key and value inputs, as onnxruntime-genai's model builder writes it.

    input_ids, attention_mask [, position_ids], past_key_values.N.key / .value  ->  logits, present.N.key / .value

Past and present share one buffer that holds the whole sequence, so a decoded token appends to it in place instead of
copying the cache (GroupQueryAttention's documented buffer sharing). Neither torch, transformers nor onnx is imported:
a bench measures the memory of this process, and that should be the runtime's own.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.runtime.text import FolderText

REQUIRES = ("onnxruntime", "tokenizers")

GRAPH = "model.onnx"
_CHUNK = 128  # tokens read at once: bounds the logits held to 128 rows (25 MB at a vocabulary of 49k)
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_AGAIN = "export the model again, or fetch the file again"


def version() -> str:
    return f"onnxruntime {ort.__version__}"


def open(path: Path, threads: int) -> OnnxSession:
    """Open an exported folder (model.onnx, its data file, tokenizer.json) on the CPU with `threads` threads.

    Raises ModelError when the folder is damaged or not what it claims, Unsupported when the graph wants inputs that
    a text decoder does not have.
    """
    return OnnxSession(path, threads)


class OnnxSession(FolderText):
    """See edgelora.runtime.Session."""

    def __init__(self, folder: Path, threads: int) -> None:
        check_folder(folder)
        super().__init__(folder)
        self._session: ort.InferenceSession | None = _load(folder / GRAPH, threads)
        self._cache = _cache_shapes(self._session)
        self._positions = any(i.name == "position_ids" for i in self._session.get_inputs())
        self._context = _context_length(folder)

    def score(self, ids: Sequence[int], first: int = 0) -> np.ndarray:
        """See Session.score. Reads the sequence in chunks, so that beyond the result only one chunk's logits are held."""
        feed = self._feeder(len(ids))
        rows: np.ndarray | None = None
        for start in range(0, len(ids), _CHUNK):
            logits = feed(ids[start : start + _CHUNK])
            if rows is None:
                rows = np.empty((len(ids) - first, logits.shape[1]), np.float32)
            wanted = logits[max(0, first - start) :]
            if len(wanted):
                begin = max(start, first) - first
                rows[begin : begin + len(wanted)] = _log_softmax(wanted)
        assert rows is not None  # _feeder refuses an empty sequence
        return rows

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        """See Session.generate."""
        if max_new_tokens < 1:
            return
        feed = self._feeder(len(ids) + max_new_tokens - 1)
        for start in range(0, len(ids), _CHUNK):
            logits = feed(ids[start : start + _CHUNK])
        ends = set(stop)
        for left in range(max_new_tokens, 0, -1):
            token = int(logits[-1].argmax())
            if token in ends:
                return
            yield token
            if left > 1:
                logits = feed([token])

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> OnnxSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _feeder(self, capacity: int) -> Any:
        """An empty context for `capacity` tokens: feed(ids) appends them and returns their logits, (len(ids), vocabulary)."""
        session = self._session
        if session is None:
            raise EdgeloraError("the model was closed", "open it again")
        if capacity < 1:
            raise Unsupported("an empty sequence cannot be continued", "give at least one token, for instance the begin token")
        if self._context and capacity > self._context:
            raise Unsupported(
                f"{capacity} tokens do not fit into the {self._context} that {self._folder.name} was exported for", "give a shorter text"
            )
        binding = session.io_binding()
        for name, (heads, dim, dtype) in self._cache.items():
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, capacity, dim), dtype))
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        logits_at = len(self._cache)  # outputs come in the order they were bound
        read = 0

        def feed(ids: Sequence[int]) -> np.ndarray:
            nonlocal read
            start, read = read, read + len(ids)
            binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
            binding.bind_cpu_input("attention_mask", np.ones((1, read), np.int64))
            if self._positions:
                binding.bind_cpu_input("position_ids", np.arange(start, read, dtype=np.int64)[None])
            binding.bind_output("logits", "cpu")
            with _as_model_error(self._folder):
                session.run_with_iobinding(binding)
            logits: np.ndarray = binding.get_outputs()[logits_at].numpy()[0]
            return logits

        return feed


def _load(graph: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what matters arrives as an exception
    # Threads that wait by spinning take the processor from whoever else runs, a phone's user interface included.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _as_model_error(graph.parent):
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _cache_shapes(session: ort.InferenceSession) -> dict[str, tuple[int, int, Any]]:
    """Name -> (key/value heads, head dimension, dtype) of every past input; Unsupported for anything unknown."""
    shapes = {}
    for value in session.get_inputs():
        if value.name in ("input_ids", "attention_mask", "position_ids"):
            continue
        if not _PAST.fullmatch(value.name):
            raise Unsupported(f"unknown input {value.name!r} of the ONNX graph", "only text decoders written by `edgelora export` are run")
        shape = value.shape
        if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int) or value.type not in _DTYPES:
            expected = "(batch, heads, tokens, dimension) with numbers for heads and dimension"
            raise Unsupported(f"input {value.name!r} has shape {shape} of {value.type}, not {expected}", _AGAIN)
        shapes[value.name] = (shape[1], shape[3], _DTYPES[value.type])
    outputs = {o.name for o in session.get_outputs()}
    wanted = {"logits", *(name.replace("past_key_values", "present") for name in shapes)}
    if not shapes or not wanted <= outputs:
        lacking = min(wanted - outputs, default="past_key_values.0.key")
        raise Unsupported(f"the ONNX graph has no {lacking!r}", "only decoders with a key/value cache are run")
    return shapes


def _context_length(folder: Path) -> int:
    """Tokens the rotary tables reach, from genai_config.json; 0 where that file is missing (it is optional here)."""
    path = folder / "genai_config.json"
    try:
        with path.open("rb") as stream:
            length = json.loads(stream.read(1 << 20))["model"]["context_length"]
    except FileNotFoundError:
        return 0
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", _AGAIN) from error
    if type(length) is not int or length < 1:
        raise ModelError(f"{path} is damaged: context_length is {length!r}", _AGAIN)
    return length


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise, float32 in and out; the largest logit is taken off first, the sum runs in float64."""
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


@contextlib.contextmanager
def _as_model_error(folder: Path) -> Iterator[None]:
    """ONNX Runtime's exceptions have no common public base; all of them mean that this file cannot be run."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelError(f"ONNX Runtime {ort.__version__} cannot run {folder.name}/{GRAPH}: {text[:400]}", _AGAIN) from error


# --- what a file from outside may hold ------------------------------------------------------------------------------
#
# ONNX is protobuf: a message is a row of fields, each a varint key (number << 3 | wire type) and a value. Only the way
# to the tensors is walked, over a memory map and with a stack of our own: a hostile file costs neither memory nor
# recursion depth, which a full protobuf parse does not promise. Field numbers: onnx.proto (onnx/onnx, IR version 10).

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
        raise ModelError(f"{graph} is truncated or not an ONNX file: {error}", _AGAIN) from error


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
        raise ModelError(f"{folder / GRAPH}: tensor {name!r} has type {kind} and shape {dims[:8]}, which ONNX does not know", _AGAIN)
    count = math.prod(dims)
    needed = (count * _BITS[kind] + 7) // 8
    if external:
        _check_external(external, needed, name, folder, sizes)
    elif needed != stored if stored is not None else count > 2 * (end - start):  # typed fields: a byte holds two values at most
        raise ModelError(f"{folder / GRAPH}: tensor {name!r} of shape {dims[:8]} does not fit its {stored or end - start} bytes", _AGAIN)


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
            raise ModelError(f"{folder / GRAPH}: the data file {location!r} of tensor {name!r} is missing or a link", _AGAIN)
        sizes[location] = path.stat().st_size
    offset, length = int(entries.get("offset", "0")), int(entries.get("length", needed))
    if length != needed or offset < 0 or offset + length > sizes[location]:
        raise ModelError(
            f"{folder / GRAPH}: tensor {name!r} needs {needed} bytes, its entry names bytes {offset} to {offset + length}"
            f" of {location!r}, which has {sizes[location]}",
            _AGAIN,
        )


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(field number, value) of one message: an int for numbers, (start, end) for bytes; ValueError when damaged."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        value: int | tuple[int, int]
        if wire == 0:
            value, at = _varint(data, at, end)
        elif wire == 2:
            length, at = _varint(data, at, end)
            value, at = (at, at + length), at + length
        elif wire in (1, 5):
            value, at = (at, at + (8 if wire == 1 else 4)), at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if at > end or number == 0:
            raise ValueError(f"a field ends behind byte {end}")
        yield number, value


def _packed(data: mmap.mmap, start: int, end: int) -> list[int]:
    values: list[int] = []
    while start < end and len(values) <= _MAX_RANK:
        value, start = _varint(data, start, end)
        values.append(value)
    return values


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError(f"it ends inside a number at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number of more than ten bytes at byte {at}")
