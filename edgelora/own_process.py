"""What a process that runs this very edgelora finds in its environment: one that we start, or this one."""

from __future__ import annotations

import os
from pathlib import Path

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")

# oneDNN keeps 1,024 kernels, and torch as many of its own, each made for one shape: with rows of all lengths there is no end to shapes. A layer's
# passes over one batch need some 40.
_CACHES = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "128")


def environment() -> dict[str, str]:
    """Ours, and where edgelora is imported from: that may be its checkout."""
    source = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))}


def keep_few_kernels() -> None:
    """Before a training on the processor multiplies anything: a gigabyte less in the end (bench/NOTES.md). What is set already stays."""
    for name, count in _CACHES.items():
        os.environ.setdefault(name, count)
