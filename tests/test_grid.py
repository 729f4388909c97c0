"""Bases that were quantized once: recognized, and what of a change each type keeps."""

from __future__ import annotations

import numpy as np
import pytest

from edgelora.quant import ggml, grid
from edgelora.quant.ggml import Type


class Weights:
    """Matrices in memory."""

    def __init__(self, matrices: dict[str, np.ndarray]) -> None:
        self.matrices = matrices

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: matrix.shape for name, matrix in self.matrices.items()}

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        return self.matrices[name][first:last]


NAMES = {f"blk.{i}.ffn_down.weight": f"layer {i}" for i in range(4)}


def random_weights(seed: int = 0, scale: float = 0.05) -> Weights:
    random = np.random.default_rng(seed)
    return Weights({name: (scale * random.standard_normal((64, 512))).astype(np.float32) for name in NAMES.values()})


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)


def born(type: Type) -> Weights:
    """Weights that were stored in `type` and written out in bfloat16, as edgelora opens a GGUF base."""
    return Weights({n: bfloat16(ggml.dequantize(ggml.quantize(m, type), type)) for n, m in random_weights().matrices.items()})


def changed(base: Weights, size: float) -> Weights:
    """A change of rank 4 and relative size `size`."""
    random = np.random.default_rng(1)
    found = {}
    for name, matrix in base.matrices.items():
        change = (random.standard_normal((64, 4)) @ random.standard_normal((4, 512))).astype(np.float32)
        found[name] = matrix + change * np.float32(size * np.linalg.norm(matrix) / np.linalg.norm(change))
    return Weights(found)


@pytest.mark.parametrize("type", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.IQ4_NL, Type.Q4_K, Type.Q6_K, Type.Q8_0])
def test_a_base_that_was_quantized_is_recognized(type: Type) -> None:
    found = grid.recognize(born(type), NAMES)
    assert found is not None
    assert found.type == type
    assert found.share == 1
    assert found.error < 0.007  # what bfloat16 makes of it


def test_a_base_that_was_not_is_on_no_grid() -> None:
    assert grid.recognize(random_weights(), NAMES) is None
    assert grid.recognize(changed(born(Type.Q4_1), 0.5), NAMES) is None


def test_a_small_change_is_lost_on_the_grid_and_kept_off_it() -> None:
    on, off = born(Type.Q4_1), random_weights()
    types = dict.fromkeys(NAMES, Type.Q4_1)
    assert grid.kept(on, changed(on, 0.01), NAMES, types) == pytest.approx(0, abs=0.2)
    assert grid.kept(off, changed(off, 0.01), NAMES, types) == pytest.approx(1, abs=0.2)
    assert grid.kept(on, changed(on, 0.01), NAMES, dict.fromkeys(NAMES, Type.Q8_0)) == pytest.approx(1, abs=0.1)


def test_no_change_has_no_share() -> None:
    assert grid.kept(random_weights(), random_weights(), NAMES, dict.fromkeys(NAMES, Type.Q4_0)) is None
