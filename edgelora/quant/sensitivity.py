"""What each GGUF type of each matrix costs: real rounding errors, weighed by how the answers depend on the matrix.

The errors are those of the bytes that would be written: ggml's own quantizer with its importance weights, or the one
that makes up for its errors (`compensate`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgelora.quant import ggml
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import EMBEDDING, Curvature
from edgelora.quant.ggml import Type

# From 2.6 to 8.5 bits a weight. Those with blocks of 256 serve rows that are a multiple of it.
CANDIDATES = (
    Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.Q4_0, Type.IQ4_NL, Type.Q4_K, Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0
)  # fmt: skip


def candidates(columns: int) -> tuple[Type, ...]:
    """The types that a matrix with rows of `columns` weights may take; F16 alone where none fits."""
    return tuple(kind for kind in CANDIDATES if columns % ggml.block_size(kind) == 0) or (Type.F16,)


def costs(name: str, values: np.ndarray, curvature: Curvature, rounding: Rounding, together: int = 1) -> dict[Type, float]:
    """Predicted KL divergence, nats an answer token, of storing a matrix (float32, shape (rows, columns)) as each candidate.

    Costs of matrices add up where their errors are independent, as rounding errors are. Where the weights lie near a
    type's own grid (a base that was published in 4 bits), rounding to it takes away what training has changed: that is no
    noise, in every matrix it points the same way, and the loss grows with the square of the sum. Such a cost is counted `together`
    times, the number of matrices: by Cauchy's inequality no choice can cost more.
    """
    found, lost = {}, {}
    for kind in candidates(values.shape[1]):
        errors = ggml.dequantize(rounding.quantize(name, values, kind), kind) - values
        lost[kind] = float(np.square(errors, dtype=np.float64).sum())
        cost = 0.0
        if name == curvature.head:
            cost += curvature.head_cost(values, errors)
        if name == EMBEDDING:
            cost += curvature.lookup_cost(errors)
        if name.startswith("blk."):
            cost += curvature.cost(name, errors)
        found[kind] = cost
    return {kind: cost * (together if own_grid(kind, lost) else 1) for kind, cost in found.items()}


def own_grid(kind: Type, lost: Mapping[Type, float]) -> bool:
    """Whether a type loses (a sum of squares) clearly less than one with half a bit more."""
    return any(ggml.bits(other) >= ggml.bits(kind) + 0.5 and 1.25 * lost[kind] < lost[other] for other in lost)
