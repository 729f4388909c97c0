"""ONNX Runtime with its own generation loop: onnxruntime-genai, which runs the same exported folder on phones and PCs.

The loop, the sampling and the key-value cache are the library's, in C++; `edgelora.runtime.onnx_runtime` drives the graph
from Python instead. Tokens are those of the folder's tokenizer.json in both.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.runtime.answers import in_order
from edgelora.runtime.onnx_folder import AGAIN, GRAPH, SETTINGS, check_cache, check_folder, context_length, log_softmax, settings
from edgelora.runtime.text import FolderText
from edgelora.size import traffic

REQUIRES = ("onnxruntime_genai", "tokenizers")

_CHUNK = 128  # tokens scored at once: bounds the logits held to 128 rows (25 MB at a vocabulary of 49k)
# Of a session's options those that a decoder for the CPU may bring along. Others load shared libraries or write files.
_HARMLESS = {"log_id", "log_severity_level", "provider_options", "intra_op_num_threads", "inter_op_num_threads", "graph_optimization_level"}


def version() -> str:
    return f"onnxruntime-genai {og.__version__}"


def open(path: Path, threads: int) -> GenaiSession:
    """Open an exported folder on the CPU with `threads` threads.

    ModelError when the folder is damaged or not what it claims; Unsupported when its settings ask for more than a text
    decoder on the CPU (another provider, custom operators, further graphs).
    """
    return GenaiSession(path, threads)


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; see `edgelora.size.traffic`."""
    return traffic.bytes_per_token(path)


class GenaiSession(FolderText):
    """See edgelora.runtime.Session."""

    def __init__(self, folder: Path, threads: int) -> None:
        check_folder(folder)
        last = _vocabulary(folder) - 1  # the library wants an id that ends; our caller says which really do
        super().__init__(folder)
        self._calls = 0
        self._context = context_length(folder)
        # Waiting threads sleep, as in `onnx_runtime`: they would take the processor from whoever else runs.
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "session.intra_op.allow_spinning": "0"}
        with self._as_model_error():
            config = og.Config(str(folder))
            config.clear_providers()
            config.overlay(json.dumps({"model": {"eos_token_id": [last], "decoder": {"session_options": options}}}))
            self._model: og.Model | None = og.Model(config)

    def score(self, ids: Sequence[int], first: int = 0) -> np.ndarray:
        """See Session.score. Reads the sequence in chunks, so that beyond the result only one chunk's logits are held."""
        if not 0 <= first <= len(ids):
            raise ValueError(f"first is {first}, expected 0 to {len(ids)}")
        generator = self._generator(ids, len(ids))
        rows: np.ndarray | None = None
        for start in range(0, len(ids), _CHUNK):
            with self._as_model_error():
                generator.append_tokens(np.array(ids[start : start + _CHUNK], np.int32))
                logits = generator.get_output("logits")[0]
            if rows is None:
                rows = np.empty((len(ids) - first, logits.shape[1]), np.float32)
            wanted = logits[max(0, first - start) :]
            if len(wanted):
                begin = max(start, first) - first
                rows[begin : begin + len(wanted)] = log_softmax(wanted)
        assert rows is not None  # _generator refuses an empty sequence
        return rows

    def score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See Session.score_answers."""
        generator = self._generator(prompt, len(prompt) + max(map(len, answers)))

        def feed(ids: Sequence[int]) -> np.ndarray:
            with self._as_model_error():
                generator.append_tokens(np.array(ids, np.int32))
                return log_softmax(generator.get_output("logits")[0])

        def feed_at(ids: Sequence[int], at: int) -> np.ndarray:
            with self._as_model_error():
                generator.rewind_to(len(prompt) + at)
            return feed(ids)

        for start in range(0, len(prompt), _CHUNK):
            last = feed(prompt[start : start + _CHUNK])[-1:]
        return in_order(last, answers, feed_at)

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        """See Session.generate."""
        if max_new_tokens < 1:
            return iter(())
        generator = self._generator(ids, len(ids) + max_new_tokens)
        return self._continue(generator, ids, max_new_tokens, frozenset(stop), self._calls)

    def library_tokenize(self, text: str) -> list[int]:
        """Ids by the library's own tokenizer, which apps in other languages use; `tokenize` is that of tokenizer.json itself."""
        with self._as_model_error():
            return [int(i) for i in og.Tokenizer(self._model).encode(text)]

    def library_render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The conversation by the library's own template engine, up to where the assistant begins."""
        text = json.dumps([{"role": role, "content": content} for role, content in messages])
        with self._as_model_error():
            return str(og.Tokenizer(self._model).apply_chat_template(text, add_generation_prompt=True))

    def close(self) -> None:
        self._calls += 1
        self._model = None

    def __enter__(self) -> GenaiSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _continue(self, generator: Any, ids: Sequence[int], most: int, stop: frozenset[int], call: int) -> Iterator[int]:
        with self._as_model_error():
            generator.append_tokens(np.array(ids, np.int32))
        made = 0
        while made < most:
            if call != self._calls:
                raise EdgeloraError("this session was used or closed in the middle of generate()", "finish one call before the next")
            with self._as_model_error():
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
            if token in stop:
                return
            yield token
            made += 1
            if made < most and generator.is_done():  # it met its own end: take the token back and read it as a prompt
                with self._as_model_error():
                    generator.rewind_to(len(ids) + made - 1)
                    generator.append_tokens(np.array([token], np.int32))

    def _generator(self, ids: Sequence[int], capacity: int) -> Any:
        """A generator with an empty context for `capacity` tokens, which takes the likeliest token and changes no logit."""
        if self._model is None:
            raise EdgeloraError("the model was closed", "open it again")
        self._calls += 1
        if not ids:
            raise Unsupported("an empty sequence cannot be continued", "give at least one token, for instance the begin token")
        if capacity > self._context:
            raise Unsupported(
                f"{capacity} tokens do not fit into the {self._context} that {self._folder.name} was exported for", "give a shorter text"
            )
        with self._as_model_error():
            params = og.GeneratorParams(self._model)
            plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
            params.set_search_options(max_length=capacity, min_length=0, **plain)
            return og.Generator(self._model, params)

    @contextlib.contextmanager
    def _as_model_error(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # the library raises RuntimeError and its own kinds
            cause = " ".join(str(error).split())[:400]
            raise ModelError(f"{version()} cannot run {self._folder.name}/{GRAPH}: {cause}", AGAIN) from error


def _vocabulary(folder: Path) -> int:
    """Tokens that genai_config.json names; refuses one that asks for anything but this folder's own graph on the CPU."""
    path = folder / SETTINGS
    values = settings(folder)
    if not values:
        raise ModelError(f"{folder} holds no {SETTINGS}", "export the model again, or run it with plain onnxruntime")
    model = values.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    options = decoder.get("session_options") if isinstance(decoder, dict) else None
    vocabulary = model.get("vocab_size") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict) or not isinstance(options, dict) or type(vocabulary) is not int:
        raise ModelError(f"{path} is damaged: it describes no decoder", AGAIN)
    heads, size, layers = (decoder.get(name) for name in ("num_key_value_heads", "head_size", "num_hidden_layers"))
    if not (type(heads) is type(size) is type(layers) is int):
        raise ModelError(f"{path} is damaged: its decoder has {heads} heads of {size} values in {layers} layers", AGAIN)
    check_cache(folder, heads, size, layers)
    strange = [f"model.{name}" for name, value in model.items() if isinstance(value, dict) and name != "decoder"]
    strange += [f"session option {name}" for name in options if name not in _HARMLESS]
    strange += ["pipeline"] if "pipeline" in decoder else []
    strange += ["provider_options"] if options.get("provider_options") else []
    strange += [f"graph {decoder.get('filename')!r}"] if decoder.get("filename") != GRAPH else []
    if strange:
        raise Unsupported(f"{path} asks for {strange[0]}", f"only a decoder in {GRAPH} on the CPU is run")
    return vocabulary
