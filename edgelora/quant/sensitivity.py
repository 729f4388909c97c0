"""What each GGUF type of each matrix costs: real rounding errors, weighed by how the answers depend on the matrix.

The errors are those of the bytes that would be written: ggml's own quantizer with its importance weights, or the one
that makes up for its errors (`compensate`).
"""

from __future__ import annotations

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


def costs(name: str, values: np.ndarray, curvature: Curvature, rounding: Rounding) -> dict[Type, float]:
    """Predicted KL divergence, nats an answer token, of storing a matrix (float32, shape (rows, columns)) as each candidate."""
    found = {}
    for kind in candidates(values.shape[1]):
        errors = ggml.dequantize(rounding.quantize(name, values, kind), kind) - values
        cost = 0.0
        if name == curvature.head:
            cost += curvature.head_cost(values, errors)
        if name == EMBEDDING:
            cost += curvature.lookup_cost(errors)
        if name.startswith("blk."):
            cost += curvature.cost(name, errors)
        found[kind] = cost
    return found
