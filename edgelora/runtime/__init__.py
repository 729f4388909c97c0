"""Runtimes, one file each: what runs an exported file on the user's device. A runtime is a module with:

    REQUIRES: tuple[str, ...]               # importable modules it needs
    def version() -> str                    # 'llama.cpp 0.3.36 (llama-cpp-python)'
    def open(path: Path, threads: int) -> Session

A Session is as narrow as it can be, so that a later runtime behind a cable can serve it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

RUNTIMES = {
    "llama.cpp": "edgelora.runtime.llama_cpp",
    "onnxruntime": "edgelora.runtime.onnx_runtime",
    "torch": "edgelora.runtime.torch_reference",
}


class Session(Protocol):
    """An opened model. Every call starts from an empty context unless it says otherwise."""

    def tokenize(self, text: str) -> list[int]:
        """Ids by the runtime's own tokenizer, special tokens parsed, none added."""

    def score(self, ids: Sequence[int], first: int = 0) -> np.ndarray:
        """Log-probabilities, float32, shape (len(ids) - first, vocabulary): row i is the prediction of what follows ids[first + i]."""

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        """Greedy continuation, one id at a time, ending before a stop id. The first id is yielded when the prompt was read."""

    def close(self) -> None:
        """Free the model. Safe to call twice."""

    def __enter__(self) -> Session: ...

    def __exit__(self, *exc: object) -> None: ...


class RuntimeModule(Protocol):
    REQUIRES: tuple[str, ...]

    def version(self) -> str: ...

    def open(self, path: Path, threads: int) -> Session: ...
