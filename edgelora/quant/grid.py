"""Whether a base's weights already lie on the grid of a block type, and how much of a change each type keeps.

A base that was once stored as Q4_1 and written out in 16 bits is rounded back to the very same Q4_1 blocks. A small
change made by fine-tuning then falls between the grid's points and is rounded away, while the file looks lossless.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgelora.quant import ggml
from edgelora.quant.ggml import Type

# Types whose grid a change can be lost on; above 8 bits nothing is lost, the lattices of the IQ types stay on no base.
_GRIDS = (
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.IQ4_NL,
    Type.MXFP4,
    Type.Q2_K,
    Type.Q3_K,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
    Type.Q8_0,
)
_ON_GRID = 0.5  # error of the rows as they are, in shares of what the same values make in another order
_NEAR_GRID = 0.85  # the same, of weights that training has moved a little; of weights on no grid it is 0.98 and more
_MATRICES, _ROWS = 12, 32  # sampled
_SMALLEST = 1e-12


class Rows(Protocol):
    """Weights that can be read by rows, for instance edgelora.weights.Checkpoint."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Grid:
    """`share` of the sampled matrices lie on the grid of `type`, with a relative rounding error of `error` on average."""

    type: Type
    share: float
    error: float


def recognize(base: Rows, names: Mapping[str, str]) -> Grid | None:
    """The grid that most of the sampled matrices lie on, None when there is none.

    `names`: GGUF name -> name in `base`, of the matrices to look at. A matrix lies on a grid when rounding it to that
    type changes it far less than rounding the same values after shuffling each row, which takes them off any grid.
    """
    random = np.random.default_rng(0)
    votes: dict[Type, list[float]] = {}
    sampled = list(_sampled(base, names))
    for _, values in sampled:
        ratio, type = _nearest_grid(values, random)
        if ratio < _ON_GRID:
            votes.setdefault(type, []).append(_error(values, type))
    if not votes:
        return None
    type = max(votes, key=lambda type: len(votes[type]))
    return Grid(type, len(votes[type]) / len(sampled), float(np.mean(votes[type])))


def taken_back(values: np.ndarray) -> np.ndarray | None:
    """What training has changed in a matrix (float32, shape (rows, columns)) that lies near a grid, as rounding to that grid takes it back.

    The shape of `values`; None for a matrix near no grid, and for one that lies on it still: nothing can be taken back there.
    """
    first, last = _range(values.shape)
    ratio, type = _nearest_grid(values[first:last], np.random.default_rng(0))
    if ratio >= _NEAR_GRID:
        return None
    change = _rounded(values, type) - values
    return change if np.linalg.norm(change) > _SMALLEST else None


def _nearest_grid(values: np.ndarray, random: np.random.Generator) -> tuple[float, Type]:
    """The error of rounding to the grid that fits best, in shares of what the same values make in another order."""
    shuffled = random.permuted(values, axis=1)
    fitting = [type for type in _GRIDS if values.shape[1] % ggml.block_size(type) == 0]
    return min(((_error(values, type) / max(_error(shuffled, type), _SMALLEST), type) for type in fitting), default=(1.0, Type.F32))


def kept(base: Rows, merged: Rows, names: Mapping[str, str], types: Mapping[str, Type]) -> float | None:
    """The share of a change that quantization keeps: the change between the two quantized, projected on the change itself.

    `types`: GGUF name -> type. None when nothing changed in the sampled matrices.
    """
    along = size = 0.0
    for name, before in _sampled(base, names):
        first, last = _range(base.shapes[names[name]])
        after = merged.rows(names[name], first, last)
        change = (after - before).astype(np.float64)
        along += float(((_rounded(after, types[name]) - _rounded(before, types[name])) * change).sum())
        size += float((change**2).sum())
    return along / size if size > _SMALLEST else None


def _sampled(base: Rows, names: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Some rows of some matrices, spread over all."""
    listed = sorted(names)
    step = max(1, len(listed) // _MATRICES)
    for name in listed[::step]:
        first, last = _range(base.shapes[names[name]])
        yield name, base.rows(names[name], first, last)


def _range(shape: Sequence[int]) -> tuple[int, int]:
    middle = max(0, shape[0] // 2 - _ROWS // 2)
    return middle, min(shape[0], middle + _ROWS)


def _rounded(values: np.ndarray, type: Type) -> np.ndarray:
    flat = np.ones(values.shape[1], dtype=np.float32) if ggml.needs_importance(type) else None
    return ggml.dequantize(ggml.quantize(values, type, flat), type)


def _error(values: np.ndarray, type: Type) -> float:
    """Relative: root mean square of what rounding changes, in shares of that of the values."""
    return float(np.linalg.norm(_rounded(values, type) - values)) / max(float(np.linalg.norm(values)), _SMALLEST)
