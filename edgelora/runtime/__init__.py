"""Runtimes, one file each: what runs an exported file on the user's device. A runtime is a module with:

    REQUIRES: tuple[str, ...]               # importable modules it needs
    def version() -> str                    # 'llama.cpp 0.3.36 (llama-cpp-python)'
    def open(path: Path, threads: int) -> Session
    def bytes_per_token(path: Path) -> int  # optional: bytes of weights that decoding one token reads
    ENVIRONMENT: str                        # optional: the entry of edgelora.environments.ENVIRONMENTS it lives in (see `elsewhere`)
    def start() -> Callable[[Path, int], Session]   # with one: `open` in two steps, the library imported after the first

A Session is as narrow as it can be, so that a later runtime behind a cable can serve it too. One whose runtime lives in a
process of its own tells its `process_id`: memory and processor time are measured there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, cast

from edgelora.errors import ModelError, Unsupported

if TYPE_CHECKING:
    import numpy as np

RUNTIMES = {
    "llama.cpp": "edgelora.runtime.llama_cpp",
    "onnxruntime": "edgelora.runtime.onnx_runtime",
    "onnxruntime-genai": "edgelora.runtime.onnx_genai",
    "executorch": "edgelora.runtime.executorch",
    "litert-lm": "edgelora.runtime.litert_lm",
    "mnn": "edgelora.runtime.mnn",
    "torch": "edgelora.runtime.torch_reference",
    "wllama": "edgelora.runtime.wllama",
    "onnxruntime-web": "edgelora.runtime.onnx_browser",
}
IN_BROWSER = {"llama.cpp": "wllama", "onnxruntime": "onnxruntime-web"}  # what opens the same file in Chromium
_BY_SUFFIX = {".gguf": "llama.cpp", ".pte": "executorch", ".litertlm": "litert-lm"}


class Session(Protocol):
    """An opened model. Every call starts from an empty context.

    What the file itself says is part of it: `chat_template` (Jinja text or None), `special_tokens` (the texts of
    `bos_token` and `eos_token`, those that exist) and `stop_ids` (the ids that end an answer).
    """

    @property
    def chat_template(self) -> str | None: ...

    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def tokenize(self, text: str) -> list[int]:
        """Ids by the runtime's own tokenizer, special tokens parsed, none added."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out, bytes that are no UTF-8 replaced."""

    def score(self, ids: Sequence[int], first: int = 0) -> np.ndarray:
        """Log-probabilities, float32, shape (len(ids) - first, vocabulary): row i is the prediction of what follows ids[first + i]."""

    def score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities of each answer's tokens after `prompt`, float32, shape (len(answer),) each; the prompt is read once."""

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        """Greedy continuation, one id at a time, ending before a stop id. The first id is yielded when the prompt was read."""

    def close(self) -> None:
        """Free the model. Safe to call twice."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class RuntimeModule(Protocol):
    REQUIRES: tuple[str, ...]

    def version(self) -> str: ...

    def open(self, path: Path, threads: int) -> Session: ...


def runtime(name: str) -> RuntimeModule:
    """The runtime of that name in RUNTIMES; ToolMissing when a package it needs is absent or broken."""
    from edgelora import doctor

    return cast(RuntimeModule, doctor.load(RUNTIMES[name]))


def runtimes_of(path: Path) -> tuple[str, ...]:
    """Every runtime that opens `path` outside of a browser, the one that `runtime_of` names first."""
    first = runtime_of(path)
    described = (path / "genai_config.json").is_file()  # what onnxruntime-genai wants to know; other exporters leave it out
    return (first, "onnxruntime-genai") if first == "onnxruntime" and described else (first,)


def browser_of(path: Path) -> str:
    """The name of the runtime that opens `path` in Chromium; Unsupported when none does."""
    first = runtime_of(path)
    if first not in IN_BROWSER:
        raise Unsupported(f"{path.name} is run by {first}, and no browser has that", "export it with --format gguf or onnx")
    return IN_BROWSER[first]


def runtime_of(path: Path) -> str:
    """The name of the runtime that opens `path`: a .gguf, .pte or .litertlm file, or a folder of ONNX, MNN or Hugging Face."""
    if path.is_file() and path.suffix in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix]
    if (path / "model.onnx").is_file():
        return "onnxruntime"
    if (path / "llm.mnn").is_file():
        return "mnn"
    if (path / "config.json").is_file():
        return "torch"
    raise ModelError(
        f"{path} is not a model that can be run here" if path.exists() else f"model not found: {path}",
        "name a .gguf, .pte or .litertlm file, a folder with model.onnx or llm.mnn, or one with config.json and *.safetensors",
    )
