"""GGUF files within a size: which types a matrix may have, what they cost, and the file of a plan. See `edgelora.export` for the shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.errors import ModelError
from edgelora.export import gguf
from edgelora.progress import Progress
from edgelora.quant import ggml, sensitivity
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import Curvature, Moments
from edgelora.quant.ggml import Type
from edgelora.quant.size_plan import Plan
from edgelora.weights import Checkpoint

MEASURED = "curvature"
COMPETING = ("compensated", "nearest")
ENDING = ".gguf"
STANDS_FOR = "f16"
SETTINGS: tuple[str, ...] = ()
PACKAGES = ("gguf", "llama-cpp-python")
# A file is named in llama.cpp's header after the type that most of its bytes have.
_NAMES = {
    Type.Q2_K: "q2_k", Type.Q3_K: "q3_k_m", Type.IQ4_XS: "iq4_xs", Type.Q4_0: "q4_0", Type.IQ4_NL: "iq4_nl", Type.Q4_K: "q4_k_m",
    Type.Q4_1: "q4_1", Type.Q5_0: "q5_0", Type.Q5_K: "q5_k_m", Type.Q5_1: "q5_1", Type.Q6_K: "q6_k", Type.Q8_0: "q8_0", Type.F16: "f16",
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """A matrix of the file under its GGUF name."""

    name: str
    stored: gguf.Matrix

    @property
    def weights(self) -> int:
        return math.prod(self.stored.shape)

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.name,)

    def options(self) -> dict[str, tuple[int, float]]:
        return {kind.name: (self.stored.bytes(kind), ggml.bits(kind)) for kind in sensitivity.candidates(self.stored.shape[-1])}

    def costs(self, found: Curvature, rounding: Rounding, together: int) -> dict[str, float]:
        costs = sensitivity.costs(self.name, self.stored.read(), found, rounding, together)
        return {kind.name: cost for kind, cost in costs.items()}


def matrices(model: Path, name: str, weights: Checkpoint | None = None) -> tuple[int, dict[str, Matrix]]:
    fixed, found = gguf.matrices(model, name, weights)
    return fixed, {key: Matrix(key, stored) for key, stored in found.items()}


def mixture(model: Path, name: str, plan: Plan, weights: Checkpoint | None = None) -> dict[str, Any]:
    return gguf.mixture(model, *_types(plan, gguf.matrices(model, name, weights)[1], {}), weights)


@dataclass(frozen=True)
class Writer:
    described: Path
    name: str
    weights: Checkpoint
    threads: int
    fixed_bytes: int
    stored: Mapping[str, gguf.Matrix]

    def write(self, plan: Plan, moments: Moments, rounding: Rounding, place: Path, progress: Progress) -> Path:
        unknown = next((kind for kind in plan.types.values() if kind not in Type.__members__), None)
        if unknown:
            raise ModelError(f"the plan holds the unknown type {unknown!r}", "make a plan with --max-size")
        kind, importance, tensor_types = _types(plan, self.stored, moments.importance())
        written = gguf.write(
            self.described, kind, place, self.name, progress, importance, tensor_types, self.weights, rounding, self.threads
        )
        return written.rename(place / f"{self.name}.gguf")

    def widest(self, place: Path) -> Path:
        return gguf.write(self.described, "f16", place, "widest", lambda share, text: None, weights=self.weights, threads=self.threads)


def open(described: Path, name: str, weights: Checkpoint, scratch: Path, threads: int, progress: Progress) -> Writer:
    return Writer(described, name, weights, threads, *gguf.matrices(described, name, weights))


def _types(
    plan: Plan, matrices: Mapping[str, gguf.Matrix], importance: dict[str, np.ndarray]
) -> tuple[str, dict[str, np.ndarray], list[str]]:
    """A plan as `gguf.write` takes it: llama.cpp's name of the type that most bytes have, and every tensor's type by hand."""
    totals: dict[str, int] = {}
    for key, kind in plan.types.items():
        totals[kind] = totals.get(kind, 0) + matrices[key].bytes(Type[kind])
    main = _NAMES.get(Type[max(totals, key=lambda kind: totals[kind])], "f16")
    return main, importance, [f"^{key.replace('.', '[.]')}$={kind.lower()}" for key, kind in plan.types.items()]
