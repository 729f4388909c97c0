"""Rounding that makes up for its own error: what a column loses, the columns after it take over as far as they can.

llama.cpp rounds every weight to the nearest value. With the inputs' second moments H = E[x x^T] at hand the error that
counts is that of the outputs, tr(E H E^T) for the rounding errors E, and inputs are correlated: a column may be rounded
so that it undoes what earlier columns did. This is the rule of GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et
al. 2023): with H = K K^T, K upper triangular, column j is rounded at w_j + sum over i < j of E_i K_ij / K_jj.

The scales of a block are ggml's own, chosen when the block is reached, for the weights as they are then. So a file is a
plain GGUF file that every llama.cpp reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from edgelora.quant import ggml
from edgelora.quant.ggml import Type
from edgelora.quant.grids import GRIDS

Factors = tuple[np.ndarray | None, np.ndarray | None]  # a matrix's importance and `feedback`

SHRINK = 0.2  # of the correlations between inputs, estimated from few rows; less lets feedback overshoot the blocks (bench/NOTES.md)
_VALUES_AT_ONCE, _ROWS_AT_ONCE = 1 << 20, 2048  # columns are done one after the other: many rows at once make their steps worth it
_FACTORED_AT_ONCE = 128  # columns
KEPT = 2  # matrices whose `feedback` is kept: threads that round one after the other meet at its end


def feedback(second_moments: np.ndarray, shrink: float) -> np.ndarray:
    """K_ij / K_jj above the diagonal, 0 elsewhere: how much of column i's error column j takes over. float32, shape (columns, columns).

    `second_moments`: H, symmetric, shape (columns, columns). Its correlations are estimates from few tokens, so they are
    shrunk towards none: by the share `shrink`, which also makes H invertible, in 32 bits too.
    """
    squares = np.diag(second_moments).astype(np.float64)
    deviation = np.sqrt(np.maximum(squares, 1e-12 * max(squares.max(), 1e-30)))
    h = np.divide(second_moments, deviation[:, None], dtype=np.float32)
    h *= ((1 - shrink) / deviation).astype(np.float32)
    np.fill_diagonal(h, 1.0)
    k = _upper_factor(h)
    taken_over = np.triu(k, 1)
    taken_over *= deviation[:, None].astype(np.float32)
    taken_over /= (np.diag(k) * deviation).astype(np.float32)
    return taken_over


def _upper_factor(h: np.ndarray) -> np.ndarray:
    """K, upper triangular, with `h` = K K^T, over `h` itself, whose lower triangle is left as it was.

    A group of columns after the other, from the last one on, so that nearly all is matrix products: numpy hands the whole
    to LAPACK, which takes five times as long for 8,192 columns on one thread.
    """
    for end in range(len(h), 0, -_FACTORED_AT_ONCE):
        own, after = slice(max(0, end - _FACTORED_AT_ONCE), end), slice(end, None)
        h[:end, own] -= h[:end, after] @ h[own, after].T
        k = np.linalg.cholesky(h[own, own][::-1, ::-1])[::-1, ::-1]  # of the matrix read backwards: an upper factor
        h[own, own] = k
        h[: own.start, own] = h[: own.start, own] @ np.linalg.inv(k).T
    return h


def values_at_once(columns: int) -> int:
    """About how many values of a matrix with so many columns are best rounded together."""
    return max(_VALUES_AT_ONCE, _ROWS_AT_ONCE * columns)


class Columns:
    """A matrix's columns in the order in which they are rounded, each as it is wanted once those before it have left their errors.

    `weights`: float32, shape (columns, rows). `errors`, of the same shape, takes what rounding leaves of each column, weight minus value.
    Without `taken_over` (from `feedback`) columns are wanted as they are.
    """

    def __init__(self, weights: np.ndarray, taken_over: np.ndarray | None) -> None:
        self.weights, self.errors = weights, np.zeros_like(weights)
        self._taken_over = taken_over

    def block(self, start: int, end: int) -> np.ndarray:
        """Columns `start` to `end`, after all before them: what scales are chosen for. float32, shape (end - start, rows)."""
        self._start, self._wanted = start, self.weights[start:end]
        if self._taken_over is not None:
            self._wanted = self._wanted + self._taken_over[:start, start:end].T @ self.errors[:start]
        return self._wanted

    def column(self, at: int) -> np.ndarray:
        """A column of the latest `block`, after those before it there too; float32, shape (rows,)."""
        wanted: np.ndarray = self._wanted[at - self._start]
        if self._taken_over is None:
            return wanted
        left: np.ndarray = self._taken_over[self._start : at, at] @ self.errors[self._start : at]
        left += wanted
        return left


def quantize(values: np.ndarray, type: Type, taken_over: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """`values` (float32, shape (rows, columns)) as ggml's bytes, uint8, shape (rows, row_bytes).

    `taken_over` comes from `feedback`; `importance` as in `ggml.quantize`, which chooses the scales. Rows do not depend on
    one another.
    """
    grid, size = GRIDS[type], ggml.block_size(type)
    columns = Columns(np.ascontiguousarray(values.T, dtype=np.float32), taken_over)
    packed = []
    for start in range(0, len(columns.weights), size):
        wanted = columns.block(start, start + size)
        blocks = ggml.quantize(wanted.T, type, None if importance is None else importance[start : start + size])
        scales, offsets = (np.ascontiguousarray(part.T) for part in grid.scales(blocks))
        steps = np.where(scales == 0, np.float32(np.inf), scales)  # whatever is divided by it takes the level of 0
        indices = np.empty(wanted.shape, dtype=np.uint8)
        for column in range(size):
            sub, at = column // grid.sub % len(scales), start + column
            indices[column] = grid.nearest(columns.column(at), steps[sub], offsets[sub])
            error = columns.errors[at]
            np.multiply(grid.levels.take(indices[column]), scales[sub], out=error)
            error += offsets[sub]
            np.subtract(columns.weights[at], error, out=error)
        packed.append(grid.store(blocks, indices.T))
    return np.concatenate(packed, axis=1)


class Rounding:
    """How each matrix of a model is rounded: `moments(name)` gives its inputs' second moments, None where they are unknown.

    With `compensated` errors are made up for, in every type whose codes can be chosen here; else ggml rounds, with the
    moments' diagonal as importance. `feedback` factors are computed once a matrix and kept for the latest ones. A large
    matrix is shared out by rows in `pool`: no thread of it may ask for one, or all of them could wait for one another.
    """

    def __init__(self, moments: Callable[[str], np.ndarray | None], compensated: bool, shrink: float, pool: Executor | None = None) -> None:
        self.compensated = compensated
        self._moments = moments
        self._shrink = shrink
        self.pool = pool
        self._lock = threading.Lock()
        self._latest: dict[str, _Once] = {}

    def quantize(self, name: str, values: np.ndarray, type: Type) -> np.ndarray:
        """Rows of matrix `name` (float32, shape (rows, columns)) as ggml's bytes, uint8, shape (rows, row_bytes)."""
        step = max(1, values_at_once(values.shape[1]) // values.shape[1])
        ranges = [values[i : i + step] for i in range(0, len(values), step)]
        each = self.pool.map if self.pool and len(ranges) > 1 else map
        return np.concatenate(list(each(lambda rows: self._quantize(name, rows, type), ranges)))

    def stop(self) -> None:
        """End what other threads have asked for, where that can be."""
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def of(self, name: str) -> Factors:
        """Importance of a matrix's columns and the factors of `feedback`, None for what is not known or not wanted."""
        with self._lock:
            once = self._latest.setdefault(name, _Once(lambda: self._factors(name)))
            if self.compensated and len(self._latest) > KEPT:
                del self._latest[next(iter(self._latest))]
        return once()

    def _quantize(self, name: str, values: np.ndarray, type: Type) -> np.ndarray:
        importance, taken_over = self.of(name)
        if taken_over is None or type not in GRIDS:
            return ggml.quantize(values, type, importance)
        return quantize(values, type, taken_over, importance)

    def _factors(self, name: str) -> Factors:
        moments = self._moments(name)
        if moments is None:
            return None, None
        importance = np.ascontiguousarray(np.diag(moments), dtype=np.float32)
        return importance, feedback(moments, self._shrink) if self.compensated else None


class _Once:
    """What several threads want is made by the first of them; those that want something else need not wait."""

    def __init__(self, make: Callable[[], Factors]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: Factors | None = None

    def __call__(self) -> Factors:
        with self._lock:
            if self._made is None:
                self._made = self._make()
        return self._made
