"""Exported ONNX folders in a browser: onnxruntime-web's build for the CPU (its build for WebGPU lacks GatherBlockQuantized)."""

from __future__ import annotations

from pathlib import Path

from edgelora.runtime import browser
from edgelora.runtime.browser import BrowserSession, Page
from edgelora.runtime.onnx_folder import GRAPH, check_folder
from edgelora.runtime.text import FolderText
from edgelora.size import traffic

REQUIRES = ("numpy", "tokenizers")


def version() -> str:
    return f"onnxruntime-web {browser.library('onnxruntime-web')}"


def open(path: Path, threads: int, context: int = browser.CONTEXT) -> BrowserSession:
    """Open an exported folder in a new Chromium; the cache grows with the text, whatever `context` says.

    ModelError when the folder is damaged or the graph is none that onnxruntime-web runs; errors of `browser.Page`.
    """
    check_folder(path)
    text = FolderText(path)
    data = sorted(file.name for file in path.glob(f"{GRAPH}*") if file.name != GRAPH)
    page = Page("onnxruntime", {"ort": "onnxruntime-web/dist"}, path)
    return BrowserSession(page, text, text.detokenize, {"files": [GRAPH, *data], "threads": threads})


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; see `edgelora.size.traffic`."""
    return traffic.bytes_per_token(path)
