"""Rounding that makes up for its own error, against ggml's own reading of the bytes and closed formulas."""

from __future__ import annotations

import numpy as np
import pytest

from edgelora.quant import compensate, ggml
from edgelora.quant.ggml import Type
from edgelora.quant.grids import GRIDS

TYPES = pytest.mark.parametrize("kind", list(GRIDS), ids=lambda kind: kind.name)


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of very different size, one of them empty."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns)) * random.lognormal(0, 2, (rows, 1))
    values[rows // 2] = 0
    return values.astype(np.float32)


def moments(columns: int, tokens: int = 2000, seed: int = 1) -> np.ndarray:
    """Second moments of correlated inputs of which some columns are large and one is always 0."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((tokens, 32)) @ random.standard_normal((32, columns)) + random.standard_normal((tokens, columns))
    inputs *= np.exp(random.standard_normal(columns) / 2)
    inputs[:, 3] = 0
    return np.asarray(inputs.T @ inputs / tokens)


def output_error(values: np.ndarray, packed: np.ndarray, kind: Type, h: np.ndarray) -> float:
    errors = ggml.dequantize(packed, kind) - values
    return float(np.einsum("ij,jk,ik->", errors, h, errors))


@TYPES
def test_a_code_is_read_by_ggml_as_the_value_that_was_meant(kind: Type) -> None:
    grid, size = GRIDS[kind], ggml.block_size(kind)
    blocks = ggml.quantize(weights(9, size), kind)
    scales, offsets = grid.scales(blocks)
    indices = np.random.default_rng(2).integers(0, len(grid.levels), (9, size)).astype(np.uint8)
    indices[0], indices[1] = 0, len(grid.levels) - 1
    assert scales.shape[1] in (1, size // grid.sub)
    meant = np.repeat(scales, size // scales.shape[1], axis=1) * grid.levels[indices]
    meant += np.repeat(offsets, size // offsets.shape[1], axis=1)
    read = ggml.dequantize(grid.store(blocks, indices), kind)
    assert np.abs(read - meant).max() <= 1e-6 * np.abs(meant).max()


@TYPES
def test_the_nearest_level_is_the_nearest(kind: Type) -> None:
    grid = GRIDS[kind]
    values = np.random.default_rng(3).uniform(-200, 200, 500).astype(np.float32)
    scale, offset = np.full(500, -0.7, np.float32), np.full(500, 3.0, np.float32)
    distance = np.abs(values[:, None] - (scale[:, None] * grid.levels + offset[:, None]))
    chosen = distance[np.arange(500), grid.nearest(values, scale, offset)]
    assert np.allclose(chosen, distance.min(1), atol=1e-4)


def test_a_block_of_scale_zero_stays_zero() -> None:
    for kind in GRIDS:
        columns = ggml.block_size(kind)
        packed = compensate.quantize(np.zeros((4, columns), np.float32), kind, np.zeros((columns, columns), np.float32))
        assert not ggml.dequantize(packed, kind).any()


@TYPES
def test_the_outputs_error_falls(kind: Type) -> None:
    columns = 512
    values, h = weights(40, columns), moments(columns)
    importance = np.diag(h).astype(np.float32)
    plain = output_error(values, ggml.quantize(values, kind, importance), kind, h)
    packed = compensate.quantize(values, kind, compensate.feedback(h, 0.01), importance)
    assert packed.shape == (40, ggml.row_bytes(kind, columns))
    assert output_error(values, packed, kind, h) < 0.5 * plain


@TYPES
def test_inputs_without_correlation_take_the_nearest_values(kind: Type) -> None:
    columns = 256
    values = weights(16, columns)
    taken_over = compensate.feedback(np.diag(np.arange(1.0, columns + 1)), 0.01)
    assert not taken_over.any()
    packed = compensate.quantize(values, kind, taken_over)
    close = ggml.dequantize(packed, kind) - values
    ggmls = ggml.dequantize(ggml.quantize(values, kind), kind) - values
    assert (close**2).sum() <= (ggmls**2).sum() * 1.0001


def test_feedback_is_the_factor_of_the_shrunk_moments() -> None:
    h = moments(300) + np.eye(300)  # more columns than are factored at once
    deviation = np.sqrt(np.diag(h))
    shrunk = 0.8 * h + 0.2 * np.diag(np.diag(h))
    unit = compensate.feedback(h, 0.2).astype(np.float64) + np.eye(300)
    # H = U D U^T with U of unit diagonal: D is what remains of each column once the later ones are known
    remains = np.linalg.solve(unit, np.linalg.solve(unit, shrunk).T)
    assert np.allclose(remains, np.diag(np.diag(remains)), atol=1e-4 * deviation.max() ** 2)
    assert not np.tril(compensate.feedback(h, 0.2)).any()
    assert compensate.feedback(h, 0.2).dtype == np.float32


def test_rows_do_not_depend_on_one_another() -> None:
    values, taken_over = weights(30, 64), compensate.feedback(moments(64), 0.05)
    whole = compensate.quantize(values, Type.Q4_0, taken_over)
    parts = [compensate.quantize(values[a:b], Type.Q4_0, taken_over) for a, b in ((0, 7), (7, 30))]
    assert np.array_equal(whole, np.concatenate(parts))
