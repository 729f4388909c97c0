"""MNN, Alibaba's runtime for phones: a folder of llm.mnn and its settings on the CPU, in an environment of its own.

Tokenizer and template engine are MNN's own, written anew in C++: what it splits and renders is what an app gets.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

from edgelora import environments
from edgelora.runtime import elsewhere

REQUIRES = ("numpy",)
ENVIRONMENT = "mnn"


def version() -> str:
    return f"MNN {environments.versions(ENVIRONMENT)['MNN']}"


def start() -> elsewhere.Opener:
    """A process with MNN imported; see `edgelora.runtime`."""
    return elsewhere.start(ENVIRONMENT, lambda path: path, MnnSession)


def open(path: Path, threads: int) -> MnnSession:
    """Open an MNN folder on the CPU with `threads` threads. ModelError when it is damaged."""
    return cast(MnnSession, start()(path, threads))


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads: all of them; a table of its own, which only lends a row, is another file."""
    return (path / "llm.mnn.weight").stat().st_size


class MnnSession(elsewhere.OwnText):
    """See edgelora.runtime.Session."""

    def tokenize(self, text: str) -> list[int]:
        return self.library_tokenize(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """By a table of MNN's own pieces, here: while an answer is being made its process hears nothing else."""
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", "replace")

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [base64.b64decode(piece) for piece in self._text["pieces"]]
