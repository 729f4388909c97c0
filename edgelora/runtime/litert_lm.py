"""LiteRT-LM, Google's runtime for phones: a .litertlm file on the CPU (XNNPACK), in an environment of its own.

LiteRT-LM gives no predictions and takes no tokens, so LiteRT, the library beneath it, runs the file's graph as LiteRT-LM does;
greedy answers of both are the same text (a test). Tokenizer and template are those inside the file.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, cast

from edgelora import environments
from edgelora.errors import ModelError
from edgelora.runtime import elsewhere
from edgelora.runtime.text import FolderText
from edgelora.size import traffic

REQUIRES = ("numpy", "tokenizers")
ENVIRONMENT = "litert"


def version() -> str:
    versions = environments.versions(ENVIRONMENT)
    return f"LiteRT-LM {versions['litert-lm-api']} (LiteRT {versions['ai-edge-litert']})"


def start() -> elsewhere.Opener:
    """A process with both libraries imported; see `edgelora.runtime`."""
    return elsewhere.start(ENVIRONMENT, lambda path: path.parent, LiteRtSession)


def open(path: Path, threads: int) -> LiteRtSession:
    """Open a .litertlm file on the CPU with `threads` threads. ModelError when it is damaged or no text model."""
    return cast(LiteRtSession, start()(path, threads))


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; see `edgelora.size.traffic`."""
    return traffic.bytes_per_token(path)


class LiteRtSession(elsewhere.OwnText):
    """See edgelora.runtime.Session. Tokens are those of the tokenizer.json inside the file, which LiteRT-LM's engine reads too."""

    def tokenize(self, text: str) -> list[int]:
        return FolderText.tokenize(self, text)  # not by the engine: it would hold the model a second time

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(self._text["tokenizer"])
        except Exception as error:  # the Rust side raises bare Exception
            raise ModelError(f"the tokenizer in {self._path.name} cannot be read: {error}", "export the model again") from error
