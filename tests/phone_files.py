"""What every phone runtime's session must do as the model itself does in torch, and what every file must hold that training rows rounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelora.errors import Unsupported
from edgelora.export import on_grid
from edgelora.export.on_grid import OnGrid
from edgelora.export.there import grid
from edgelora.quant import curvature
from edgelora.quant.curvature import Moments
from edgelora.quant.nbits import Layout
from edgelora.runtime import Session, torch_reference
from edgelora.weights import Checkpoint
from tests.test_onnx_export import IDS, kl, quiet
from tests.test_onnx_rounding import ROWS, UNSEEN


def assert_answers_alike(torch: Session, session: Session) -> None:
    """The same greedy answer, ended by a stop token in the middle of it; a text longer than the file's context is refused."""
    greedy = [*torch.generate(IDS[:40], 24, ())]
    assert [*session.generate(IDS[:40], 24, ())] == greedy
    assert [*session.generate(IDS[:40], 24, greedy[5:6])] == greedy[: greedy.index(greedy[5])]
    with pytest.raises(Unsupported, match="257 tokens do not fit into the 256"):
        session.score([3] * 257)


def measured(model: Path, folder: Path) -> Moments:
    """Second moments of a tiny model's inputs."""
    curvature.save(curvature.collect(curvature.open_model(model, Checkpoint(model)), ROWS, quiet), folder / "moments")
    return on_grid.calibration(folder / "moments")


def matrices(source: OnGrid, layout: Layout) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Name, whole numbers (rows, columns), scales and smallest values (rows, blocks) of every matrix."""
    for name, shape in source.shapes.items():
        if len(shape) == 2 and name in source._names:
            values = source.rows(name)
            block = int(np.gcd(layout.block, shape[1]))
            steps = grid.steps(values, block, signed=not layout.zeros)
            low = np.minimum(values.reshape(len(values), -1, block).min(2), 0)
            yield name, np.rint(values / np.repeat(steps, block, 1)).astype(np.int8), steps, low


def assert_computes(session: Session, source: OnGrid, folder: Path) -> None:
    """What the weights that were handed over compute in torch, but for what rounding activations costs."""
    with torch_reference.open(on_grid.write(source, folder / "handed", quiet), 1) as reference:
        assert kl(reference.score(UNSEEN), session.score(UNSEEN)) < 0.02
