"""GGUF files in a browser: wllama, llama.cpp compiled to WebAssembly. Tokens are those of llama.cpp itself, which reads the same file.

wllama takes prompts as text alone and tells the likeliest tokens' probabilities, not the whole vocabulary's; see `browser`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgelora.errors import Unsupported
from edgelora.gguf_header import base_of
from edgelora.runtime import browser, llama_cpp
from edgelora.runtime.browser import BrowserSession, Page
from edgelora.size import traffic

REQUIRES = ("llama_cpp", "numpy")

_LARGEST = 2_000_000_000  # bytes: wllama's own limit for one file


def version() -> str:
    return f"wllama {browser.library('@wllama/wllama')}"


def open(path: Path, threads: int, context: int = browser.CONTEXT) -> BrowserSession:
    """Open a GGUF file in a new Chromium with room for `context` tokens.

    ModelError with llama.cpp's words when it cannot be read; Unsupported for an adapter or a file beyond 2 GB; errors of `browser.Page`.
    """
    if base_of(path):
        raise Unsupported(f"{path.name} is an adapter, and wllama is given one file", "export the merged model")
    if path.stat().st_size > _LARGEST:
        raise Unsupported(f"{path.name} has {path.stat().st_size / 1e9:.1f} GB, and a browser reads 2 GB", "take a smaller type")
    vocabulary = llama_cpp.open_vocabulary(path)
    begin = vocabulary.begin_id

    def spell(ids: Sequence[int]) -> str:
        """wllama puts the begin token in front itself where the file says so."""
        return vocabulary.detokenize(ids[1:] if begin is not None and ids[:1] == [begin] else ids, special=True)

    page = Page("wllama", {"wllama": "@wllama/wllama/esm"}, path)
    return BrowserSession(page, vocabulary, spell, {"threads": threads, "context": context})


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; see `edgelora.size.traffic`."""
    return traffic.bytes_per_token(path)
