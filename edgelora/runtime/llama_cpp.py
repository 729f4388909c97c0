"""llama.cpp on the CPU, through llama-cpp-python's bindings of its C API (llama.h).

The high-level ``Llama`` class keeps the logits of a whole sequence and asks for all or none of them; the C API lets us
ask for just the rows that are scored. The settings are llama.cpp's own (an F16 key-value cache, weights memory-mapped and,
where memory has room for the copy, repacked for this processor) with one exception: its flash attention rounds otherwise
below 64 tokens at once than above, so that a score would depend on how the text was cut into batches (by a KL of 0.004 on
a Q4_1 model). Scores are taken without it; `generate` runs as users run it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import llama_cpp
import numpy as np

from edgelora import machine
from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.gguf_header import Array, Header, base_of, read_header
from edgelora.runtime.answers import tree
from edgelora.size import traffic

REQUIRES = ("llama_cpp", "numpy")

_BATCH = 512  # tokens handed over at once: llama.cpp's own n_ubatch, so prompts are read at the speed that users see
_SCORE_BYTES = 64 << 20  # of logits that llama.cpp holds at once while scoring
_SMALLEST_CONTEXT = 256  # tokens
_ERROR, _CONTINUED = 4, 5  # ggml_log_level in ggml.h
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS in llama-hparams.h
_OVERFLOW = -(1 << 31)  # llama_tokenize: more tokens than an int32 counts

# llama.cpp has one log for the whole process. We keep its last errors instead of letting it write on stderr; ctypes
# demands that the callback outlives every call into the library.
_errors: deque[str] = deque(maxlen=20)
_levels = [0]  # of the line that a continuation continues


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes | None, _: object) -> None:
    line = (text or b"").decode("utf-8", "replace")
    if level == _CONTINUED:
        if _levels[0] == _ERROR and _errors:
            _errors[-1] += line
        return
    _levels[0] = level
    if level == _ERROR:
        _errors.append(line)


def version() -> str:
    return f"llama.cpp {llama_cpp.llama_version().decode()} (llama-cpp-python {llama_cpp.__version__})"


def open(path: Path, threads: int) -> LlamaSession:
    """Open a GGUF file, or a GGUF adapter on the base that lies beside it.

    ModelError names what llama.cpp (or our own look at the header) found wrong with it.
    """
    base = base_of(path)
    return LlamaSession(base or path, threads, path if base else None)


def open_vocabulary(path: Path) -> Vocabulary:
    """Open the tokenizer of a GGUF file without its weights; errors as `open`."""
    return Vocabulary(path)


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; see `edgelora.size.traffic`."""
    return traffic.bytes_per_token(path)


class Vocabulary:
    """A GGUF file's tokenizer as llama.cpp runs it, and what the file says about conversations."""

    def __init__(self, path: Path, vocab_only: bool = True) -> None:
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._calls = 0
        self._header = _checked(path)
        llama_cpp.llama_log_set(_log, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        # Repacking copies the weights out of the memory map. Where there is no room for that they are read as they lie.
        params.use_extra_bufts = path.stat().st_size < machine.available_memory_bytes() // 2
        _errors.clear()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path}: {_cause()}", "export it again, or check it with another GGUF reader")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.chat_template = self._header.chat_template
        self.special_tokens = self._special_tokens()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which llama.cpp ends an answer, the end-of-sequence token first. A call for every token: made when asked for."""
        self._check_open()
        first = [llama_cpp.llama_vocab_eos(self._vocab), llama_cpp.llama_vocab_eot(self._vocab)]
        ends = [i for i in range(self._n_vocab) if llama_cpp.llama_vocab_is_eog(self._vocab, i)]
        return tuple(i for i in dict.fromkeys([*first, *ends]) if i >= 0)

    @property
    def begin_id(self) -> int | None:
        """The id that llama.cpp's own programs put in front of every text, as this file asks them to; None where it does not."""
        self._check_open()
        return int(llama_cpp.llama_vocab_bos(self._vocab)) if llama_cpp.llama_vocab_get_add_bos(self._vocab) else None

    def tokenize(self, text: str) -> list[int]:
        self._check_open()
        data = text.encode()
        room = len(data) + 8  # a token is a byte at least; some vocabularies put a blank in front
        while True:
            ids = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, False, True)
            if 0 <= count <= room:
                return list(ids[:count])
            if count == _OVERFLOW:
                raise Unsupported(f"llama.cpp cannot tokenize {len(data)} bytes at once", "split the text")
            room = -count

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """See Session.detokenize; with `special` the special tokens are written out, so that the text reads back as these ids."""
        self._check_open()
        self._check_ids(ids)
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 8
        while True:
            text = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_detokenize(self._vocab, tokens, len(ids), text, room, False, special)
            if 0 <= count <= room:
                return text.raw[:count].decode("utf-8", "replace")
            room = -count

    def close(self) -> None:
        self._calls += 1
        if self._batch:
            llama_cpp.llama_batch_free(self._batch)
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit the library may be gone before us
            self.close()

    def _special_tokens(self) -> dict[str, str]:
        """Only those that the file names: llama.cpp makes up ids for those it does not."""
        ids = {"bos_token": llama_cpp.llama_vocab_bos(self._vocab), "eos_token": llama_cpp.llama_vocab_eos(self._vocab)}
        named = {name: i for name, i in ids.items() if f"tokenizer.ggml.{name}_id" in self._header.metadata and 0 <= i < self._n_vocab}
        return {name: llama_cpp.llama_vocab_get_text(self._vocab, i).decode("utf-8", "replace") for name, i in named.items()}

    def _check_open(self) -> None:
        if not self._model:
            raise EdgeloraError("this llama.cpp session is closed", "open the file again")

    def _check_ids(self, ids: Sequence[int]) -> None:
        strange = next((i for i in ids if not 0 <= i < self._n_vocab), None)
        if strange is not None:
            raise Unsupported(
                f"the id {strange} is not in the vocabulary (0 to {self._n_vocab - 1})", "tokenize with this model's own tokenizer"
            )


class LlamaSession(Vocabulary):
    """A GGUF model in llama.cpp; see `edgelora.runtime.Session`.

    The key-value cache starts small, grows by doubling to what a call needs, and ends at the length the model was
    trained for: a longer text is Unsupported. Another call while `generate` is iterated ends that iteration with an error.
    """

    def __init__(self, path: Path, threads: int, adapter: Path | None = None) -> None:
        super().__init__(path, vocab_only=False)
        self._threads = threads
        self._adapter: Any = None
        if adapter is not None:
            _errors.clear()
            self._adapter = llama_cpp.llama_adapter_lora_init(self._model, str(adapter).encode())
            if not self._adapter:
                self.close()
                raise ModelError(f"llama.cpp cannot put {adapter} on {path.name}: {_cause()}", "use the base that it was trained on")
        self._room = (0, 0, 0)  # tokens the context holds, its flash_attn_type, its sequences
        if llama_cpp.llama_model_has_encoder(self._model) or not llama_cpp.llama_model_has_decoder(self._model):
            self.close()
            raise Unsupported(f"{path} is not a decoder-only language model", "choose a causal language model")
        self._longest = llama_cpp.llama_model_n_ctx_train(self._model)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, llama_cpp.llama_max_parallel_sequences())

    def score(self, ids: Sequence[int], first: int = 0) -> np.ndarray:
        if not 0 <= first <= len(ids):
            raise ValueError(f"first is {first}, expected 0 to {len(ids)}")
        self._begin(ids, len(ids), llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        rows = np.empty((len(ids) - first, self._n_vocab), dtype=np.float32)
        at_once = max(1, min(_BATCH, _SCORE_BYTES // (4 * self._n_vocab)))
        start = 0
        while start < len(ids):
            # tokens without logits are cheap: take as many as a batch holds, but stop where the scored ones begin
            end = min(start + _BATCH, first) if start < first else min(start + at_once, len(ids))
            self._decode(ids[start:end], start, logits_from=first)
            for position in range(max(first, start), end):
                rows[position - first] = self._logits(position - start)
            start = end
        return _log_softmax(rows)

    def score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See Session.score_answers. An answer is a sequence of llama.cpp; a token that several begin with belongs to each of them."""
        most = llama_cpp.llama_max_parallel_sequences()
        return [scores for start in range(0, len(answers), most) for scores in self._score_answers(prompt, answers[start : start + most])]

    def _score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        branches = tree(answers)
        inner = branches.inner
        for answer in answers:
            self._check_ids(answer)
        self._begin(prompt, len(prompt) + len(inner), llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, sequences=len(answers))
        for start in range(0, len(prompt), _BATCH):
            self._decode(prompt[start : start + _BATCH], start, logits_from=len(prompt) - 1)
        first = _log_softmax(self._logits(-1)[None].copy())[0]  # the next batch overwrites llama.cpp's own
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(1, len(answers)):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        found = np.empty(len(branches.tokens), np.float32)
        owners: list[list[int]] = [[] for _ in branches.tokens]
        children: dict[int, list[int]] = {}
        for sequence, path in enumerate(branches.paths):
            for node in path:
                owners[node].append(sequence)
        for node, parent in enumerate(branches.parents):
            children.setdefault(parent, []).append(node)
        at_once = max(1, min(_BATCH, _SCORE_BYTES // (4 * self._n_vocab)))
        for start in range(0, len(inner), at_once):
            nodes = inner[start : start + at_once]
            self._decode_nodes([(branches.tokens[node], len(prompt) + branches.depth(node), owners[node]) for node in nodes])
            for row, node in enumerate(nodes):
                scores = _log_softmax(self._logits(row)[None])[0]
                found[children[node]] = scores[[branches.tokens[child] for child in children[node]]]
        found[children[-1]] = first[[branches.tokens[child] for child in children[-1]]]
        return [found[list(path)] for path in branches.paths]

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        self._begin(ids, len(ids) + max(0, max_new_tokens - 1), llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO)
        return self._continue(ids, max_new_tokens, frozenset(stop), self._calls)

    def _continue(self, ids: Sequence[int], max_new_tokens: int, stop: frozenset[int], call: int) -> Iterator[int]:
        fresh = ids
        for made in range(max_new_tokens):
            if call != self._calls:
                raise EdgeloraError("this session was used or closed in the middle of generate()", "finish one call before the next")
            for start in range(0, len(fresh), _BATCH):
                before = len(ids) + made - len(fresh)
                self._decode(fresh[start : start + _BATCH], before + start, logits_from=len(ids) + made - 1)
            token = int(np.argmax(self._logits(-1)))
            if token in stop:
                return
            yield token
            fresh = [token]

    def _begin(self, ids: Sequence[int], tokens: int, flash: int, sequences: int = 1) -> None:
        """Check a call's input, make room for `tokens` and forget what was there before."""
        self._check_open()
        self._calls += 1
        if not ids:
            raise Unsupported("an empty sequence cannot be continued", "give at least one token, for instance the begin token")
        self._check_ids(ids)
        if tokens > self._longest:
            raise Unsupported(f"{tokens} tokens do not fit the model's context of {self._longest}", "give a shorter text")
        if tokens > self._room[0] or flash != self._room[1] or sequences > self._room[2]:
            self._make_room(tokens, flash, sequences)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _make_room(self, tokens: int, flash: int, sequences: int) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context, self._room = None, (0, 0, 0)
        size = min(self._longest, max(_SMALLEST_CONTEXT, 1 << (tokens - 1).bit_length()))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = size
        params.n_seq_max = sequences
        params.kv_unified = True  # sequences share the tokens that they have in common
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = flash
        _errors.clear()
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelError(f"llama.cpp cannot make a context of {size} tokens: {_cause()}", "use a shorter text, or free some memory")
        if self._adapter:  # freed with the model
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))
        self._room = (size, flash, sequences)

    def _decode(self, ids: Sequence[int], start: int, logits_from: int) -> None:
        """Read at most _BATCH `ids` at positions from `start` on; logits are computed for positions >= `logits_from` alone."""
        self._run([(token, start + i, [0], start + i >= logits_from) for i, token in enumerate(ids)])

    def _decode_nodes(self, nodes: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Read at most _BATCH tokens given as (token, position, sequences), and compute logits for each."""
        self._run([(*node, True) for node in nodes])

    def _run(self, tokens: Sequence[tuple[int, int, Sequence[int], bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequences, wanted) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = len(sequences)
            for place, sequence in enumerate(sequences):
                batch.seq_id[i][place] = sequence
            batch.logits[i] = wanted
        _errors.clear()
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise EdgeloraError(
                f"llama.cpp failed to read {len(tokens)} tokens (status {status}): {_cause()}", "free some memory, or use a shorter text"
            )

    def _logits(self, row: int) -> np.ndarray:
        """The logits of the batch's row (-1: the last that has any), shape (vocabulary,): a view, valid until the next `_decode`."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), shape=(self._n_vocab,))


def _checked(path: Path) -> Header:
    """The header, seen to hold nothing on which llama.cpp would abort the whole process instead of reporting an error.

    An unchanged file is looked at once a process, so that opening it again takes only as long as llama.cpp does.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "name a GGUF file that you may read") from error
    return _checked_content(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _checked_content(path: Path, size: int, mtime_ns: int) -> Header:
    header = read_header(path)
    values = header.metadata
    arch = values.get("general.architecture")
    layers, tokens = values.get(f"{arch}.block_count"), values.get("tokenizer.ggml.tokens")
    why = ""
    if type(layers) is not int or not 0 < layers <= _MAX_LAYERS:
        why = f"{arch}.block_count is {layers!r}, not 1 to {_MAX_LAYERS}"
    elif isinstance(tokens, Array) and len(set(tokens)) != len(tokens):
        why = "its vocabulary holds a token twice"
    for key, value in values.items():
        if (isinstance(value, float) and (not math.isfinite(value) or (key.endswith("epsilon") and value < 0))) or (
            type(value) is int and key.startswith(f"{arch}.") and value >= 1 << 31
        ):
            why = f"{key} is {value}"
    for tensor in header.tensors:
        if tensor.name.endswith("norm.weight") and tensor.type not in ("F32", "F16", "BF16"):
            why = f"the tensor {tensor.name!r} is of type {tensor.type}"
    if why:
        raise ModelError(f"{path} is no usable language model: {why}", "export or download it again")
    return header


def _cause() -> str:
    """The first error line of the last call: what follows it in llama.cpp's log is only the way back up."""
    return " ".join(_errors[0].split()) if _errors else "it gives no reason"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In place and row by row, so that a long text needs no second copy; the sum is taken in float64."""
    for row in logits:
        row -= row.max()
        row -= np.log(np.exp(row).sum(dtype=np.float64))
    return logits
