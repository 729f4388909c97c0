"""ExecuTorch, PyTorch's runtime for phones: a .pte file whose matrices XNNPACK multiplies, in an environment of its own.

Tokenizer and template lie beside the file, as apps ship them; the ids at which answers end stand in the file.
"""

from __future__ import annotations

from pathlib import Path

from edgelora import environments
from edgelora.runtime import elsewhere
from edgelora.size import traffic

REQUIRES = ("numpy", "tokenizers")
ENVIRONMENT = "executorch"


def version() -> str:
    return f"ExecuTorch {environments.versions(ENVIRONMENT)['executorch']}"


def start() -> elsewhere.Opener:
    """A process with ExecuTorch imported; see `edgelora.runtime`."""
    return elsewhere.start(ENVIRONMENT, lambda path: path.parent, ExecuTorchSession)


def open(path: Path, threads: int) -> elsewhere.Session:
    """Open a .pte file on the CPU with `threads` threads. ModelError when it is damaged or was written for another runtime."""
    return start()(path, threads)


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; see `edgelora.size.traffic`."""
    return traffic.bytes_per_token(path)


class ExecuTorchSession(elsewhere.Session):
    """See edgelora.runtime.Session. Ids are those of ExecuTorch's own tokenizer, written in C++, which apps will get."""

    def tokenize(self, text: str) -> list[int]:
        return self.library_tokenize(text)
