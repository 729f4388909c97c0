"""What each type of each matrix costs: real rounding errors, weighed by how the answers depend on the matrix.

For GGUF the errors are those of the bytes that would be written: ggml's own quantizer with its importance weights, or the one
that makes up for its errors (`compensate`).
"""

from __future__ import annotations

import numpy as np

from edgelora.quant import ggml, grid
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import EMBEDDING, Curvature
from edgelora.quant.ggml import Type

_WEIGHTS = 1 << 21  # of a larger matrix costs are judged on some rows: every row is rounded by itself, and each type rounds them all
_SEED = 20251126

# From 2.6 to 8.5 bits a weight. Those with blocks of 256 serve rows that are a multiple of it.
CANDIDATES = (
    Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.Q4_0, Type.IQ4_NL, Type.Q4_K, Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0
)  # fmt: skip


def candidates(columns: int) -> tuple[Type, ...]:
    """The types that a matrix with rows of `columns` weights may take; F16 alone where none fits."""
    return tuple(kind for kind in CANDIDATES if columns % ggml.block_size(kind) == 0) or (Type.F16,)


def costs(name: str, values: np.ndarray, curvature: Curvature, rounding: Rounding, together: int = 1) -> dict[Type, float]:
    """Predicted KL divergence, nats an answer token, of storing a matrix (float32, shape (rows, columns)) as each candidate.

    Where the weights lie near a type's own grid (a base that was published in 4 bits), rounding to it, and to finer grids
    that contain it, takes away what training has changed: that is no noise, and the same in all matrices, of which there are `together`.
    Of a large matrix of the layers, if it has nothing of the kind, rows are drawn by how much the answers depend on them.
    """
    common = taken_back(name, values, curvature)
    if common is None and name.startswith("blk.") and values.size > _WEIGHTS:
        curvature, rows = curvature.drawn(name, _WEIGHTS // values.shape[1], _SEED)
        values = values[rows]
    return {
        kind: cost(name, values, rounding.quantize(name, values, kind), kind, curvature, common, together)
        for kind in candidates(values.shape[1])
    }


def taken_back(name: str, values: np.ndarray, curvature: Curvature) -> np.ndarray | None:
    """What the answers would see of a matrix's change by training if it were taken back; None where its weights lie near no grid."""
    change = grid.taken_back(values) if name.startswith("blk.") else None
    return None if change is None else curvature.seen(name, change)


def cost(
    name: str, values: np.ndarray, packed: np.ndarray, kind: Type, curvature: Curvature, common: np.ndarray | None, together: int
) -> float:
    """The same for one type, of which `packed` are the bytes; `common` comes from `taken_back`."""
    return error_cost(name, values, ggml.dequantize(packed, kind) - values, curvature, common, together)


def error_cost(name: str, values: np.ndarray, errors: np.ndarray, curvature: Curvature, common: np.ndarray | None, together: int) -> float:
    """The same for whatever stores the matrix: `errors`, of the shape of `values`, are what it is off by."""
    found = 0.0
    if name == curvature.head:
        found += curvature.head_cost(values, errors)
    if name == EMBEDDING:
        found += curvature.lookup_cost(errors)
    if name.startswith("blk."):
        found += curvature.cost(name, errors, common, together)
    return found
