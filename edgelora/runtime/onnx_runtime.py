"""ONNX Runtime on the CPU: a decoder graph with key and value inputs, as onnxruntime-genai's model builder writes it.

    input_ids, attention_mask [, position_ids], past_key_values.N.key / .value  ->  logits, present.N.key / .value

Past and present share one buffer that holds the whole sequence, so a decoded token appends to it in place instead of
copying the cache (GroupQueryAttention's documented buffer sharing). Graphs without that operator, as optimum exports
them, get the cache as they left it and hand out a longer one. Neither torch, transformers nor onnx is imported:
a bench measures the memory of this process, and that should be the runtime's own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.runtime.answers import in_order
from edgelora.runtime.onnx_folder import AGAIN, GRAPH, check_cache, check_folder, context_length, log_softmax, shares_cache
from edgelora.runtime.text import FolderText
from edgelora.size import traffic

REQUIRES = ("onnxruntime", "tokenizers")

_CHUNK = 128  # tokens read at once: bounds the logits held to 128 rows (25 MB at a vocabulary of 49k)
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def version() -> str:
    return f"onnxruntime {ort.__version__}"


def open(path: Path, threads: int) -> OnnxSession:
    """Open an exported folder (model.onnx, its data file, tokenizer.json) on the CPU with `threads` threads.

    Raises ModelError when the folder is damaged or not what it claims, Unsupported when the graph wants inputs that
    a text decoder does not have.
    """
    return OnnxSession(path, threads)


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; see `edgelora.size.traffic`."""
    return traffic.bytes_per_token(path)


class OnnxSession(FolderText):
    """See edgelora.runtime.Session."""

    def __init__(self, folder: Path, threads: int) -> None:
        check_folder(folder)
        super().__init__(folder)
        self._session: ort.InferenceSession | None = _load(folder / GRAPH, threads)
        self._cache = _cache_shapes(self._session)
        for heads, dimension, _ in self._cache.values():
            check_cache(folder, heads, dimension, len(self._cache) // 2)
        self._cache_kind = _Shared if shares_cache(folder) else _Growing
        self._positions = any(i.name == "position_ids" for i in self._session.get_inputs())
        self._context = context_length(folder)

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
                rows[begin : begin + len(wanted)] = log_softmax(wanted)
        assert rows is not None  # _feeder refuses an empty sequence
        return rows

    def score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See Session.score_answers."""
        feed = self._feeder(len(prompt) + max(map(len, answers)) - 1)
        for start in range(0, len(prompt), _CHUNK):
            last = feed(prompt[start : start + _CHUNK])[-1:]
        return in_order(log_softmax(last), answers, lambda ids, at: log_softmax(feed(ids, len(prompt) + at)))

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
        """An empty context for `capacity` tokens: feed(ids) appends them and returns their logits, (len(ids), vocabulary).

        feed(ids, at) forgets what stands from position `at` on first.
        """
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
        cache = self._cache_kind(self._cache, capacity)
        read = 0

        def feed(ids: Sequence[int], at: int | None = None) -> np.ndarray:
            nonlocal read
            start = read if at is None else at
            read = start + len(ids)
            cache.bind(binding, start)
            binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
            binding.bind_cpu_input("attention_mask", np.ones((1, read), np.int64))
            if self._positions:
                binding.bind_cpu_input("position_ids", np.arange(start, read, dtype=np.int64)[None])
            binding.bind_output("logits", "cpu")
            with _as_model_error(self._folder):
                session.run_with_iobinding(binding)
            *caches, logits = binding.get_outputs()  # in the order they were bound
            cache.keep(caches)
            found: np.ndarray = logits.numpy()[0]
            return found

        return feed


Shapes = dict[str, tuple[int, int, Any]]  # past input -> (key/value heads, head dimension, dtype)


class _Shared:
    """Buffers for the whole sequence, past and present at once; what lies behind the current position is never looked at."""

    def __init__(self, shapes: Shapes, capacity: int) -> None:
        self._buffers = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, capacity, dim), dtype))
            for name, (heads, dim, dtype) in shapes.items()
        }
        self._bound = False

    def bind(self, binding: Any, start: int) -> None:
        if not self._bound:
            for name, buffer in self._buffers.items():
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(_present(name), buffer)
        self._bound = True

    def keep(self, caches: Sequence[Any]) -> None:
        """They were written in place."""


class _Growing:
    """What the graph handed out last, which is what it wants to be given next."""

    def __init__(self, shapes: Shapes, capacity: int) -> None:
        self._past = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, dim), dtype)) for name, (heads, dim, dtype) in shapes.items()
        }
        self._length = 0

    def bind(self, binding: Any, start: int) -> None:
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        for name, past in self._past.items():
            kept = past if start == self._length else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(past.numpy()[:, :, :start]))
            binding.bind_ortvalue_input(name, kept)
            binding.bind_output(_present(name), "cpu")

    def keep(self, caches: Sequence[Any]) -> None:
        self._past = dict(zip(self._past, caches, strict=True))
        self._length = int(caches[0].shape()[2])


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


def _load(graph: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what matters arrives as an exception
    # Threads that wait by spinning take the processor from whoever else runs, a phone's user interface included.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _as_model_error(graph.parent):
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _cache_shapes(session: ort.InferenceSession) -> Shapes:
    """The shape of every past input; Unsupported for anything unknown."""
    shapes = {}
    for value in session.get_inputs():
        if value.name in ("input_ids", "attention_mask", "position_ids"):
            continue
        if not _PAST.fullmatch(value.name):
            raise Unsupported(f"unknown input {value.name!r} of the ONNX graph", "only text decoders written by `edgelora export` are run")
        shape = value.shape
        if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int) or value.type not in _DTYPES:
            expected = "(batch, heads, tokens, dimension) with numbers for heads and dimension"
            raise Unsupported(f"input {value.name!r} has shape {shape} of {value.type}, not {expected}", AGAIN)
        shapes[value.name] = (shape[1], shape[3], _DTYPES[value.type])
    outputs = {o.name for o in session.get_outputs()}
    wanted = {"logits", *map(_present, shapes)}
    if not shapes or not wanted <= outputs:
        lacking = min(wanted - outputs, default="past_key_values.0.key")
        raise Unsupported(f"the ONNX graph has no {lacking!r}", "only decoders with a key/value cache are run")
    return shapes


@contextlib.contextmanager
def _as_model_error(folder: Path) -> Iterator[None]:
    """ONNX Runtime's exceptions have no common public base; all of them mean that this file cannot be run."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelError(f"ONNX Runtime {ort.__version__} cannot run {folder.name}/{GRAPH}: {text[:400]}", AGAIN) from error
