"""One GGUF file run by chosen kernels of llama.cpp, x86-64's or arm64's, and how far apart what they say is."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_QEMU = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")


def logits(runner: Path, backend: str, file: Path, ids: Sequence[int]) -> np.ndarray:
    """float64, shape (ids, vocabulary), by one set of kernels, with one thread; `runner` is a folder of `device_tools.packaged_runner`."""
    command = [*(_QEMU if backend.startswith("arm") else ()), str(runner / "llama-bench"), "--logits", str(file), "1", *map(str, ids)]
    environment = {"LD_LIBRARY_PATH": str(runner), "BACKEND": str(runner / f"libggml-cpu-{backend}.so"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(len(ids), -1).astype(np.float64)


def apart(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """KL from the reference, nats a position (mean and worst); the largest change of a logit in standard deviations of the reference's
    logits at its position; share of positions with the same first choice.
    """
    ours, theirs = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (reference, other))
    nats = (np.exp(ours) * (ours - theirs)).sum(1)
    moved = np.abs(reference - other) / reference.std(1, keepdims=True)
    same = (reference.argmax(1) == other.argmax(1)).mean()
    return {"kl": float(nats.mean()), "kl_worst": float(nats.max()), "moved": float(moved.max()), "top1": float(same)}
