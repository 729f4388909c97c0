"""A model whose matrices lie on a grid of 4 bits already, for exporters that run elsewhere and only have to find it again.

Their own quantizers look at weights alone. Here weights are rounded by what training rows say matters
(`edgelora.quant.compensate`), to values that the format's blocks hold exactly, and written out in float32. Whatever an exporter
renames, takes apart or puts together, a block's scale can be read off its values: `there/grid.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import weights
from edgelora.export import architectures, configuration
from edgelora.progress import Progress
from edgelora.quant import compensate, nbits
from edgelora.quant.curvature import Moments
from edgelora.quant.nbits import Layout
from edgelora.weights import Checkpoint

Known = Callable[[str], np.ndarray | None]  # second moments of a matrix's inputs, by its name in a GGUF file

TYPE = "int4"  # of every format that is rounded like this; 8 bits are nearly exact


class OnGrid(Checkpoint):
    """The weights of `folder`, every matrix rounded to blocks of `layout` by the second moments of its inputs.

    `gguf_names`: checkpoint's name -> the one that `moments` knows, of matrices to round. A table that is only looked up has no inputs: there every
    weight goes to the nearest value.
    """

    def __init__(self, folder: Path, layout: Layout, moments: Known, gguf_names: Mapping[str, str]) -> None:
        super().__init__(folder)
        self._layout, self._names = layout, gguf_names
        self._rounding = compensate.Rounding(lambda name: moments(gguf_names[name]), True, compensate.SHRINK)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        values = super().rows(name, first, last)
        if len(self.shapes[name]) < 2 or name not in self._names:
            return values
        block = math.gcd(self._layout.block, values.shape[1])  # rows are whole blocks
        return nbits.quantize(values, replace(self._layout, block=block), *self._rounding.of(name)).values()


def calibration(path: Path) -> Moments:
    """What `write` takes as `importance`, from the file that was measured."""
    return Moments(path)


def gains_from_importance(model: Path, type: str) -> bool:
    return type == TYPE


def gains_of(config: Mapping[str, Any], type: str, exporter: str | None = None) -> bool:
    """The same from a model's configuration."""
    return type == TYPE


def opened(model: Path, layout: Layout, moments: Known, kept: Collection[str] = ()) -> OnGrid:
    """`kept`: tensors that the format holds in more bits."""
    config = configuration.of(model)
    names = {source.name: name for name, source in architectures.of(config.model_type).tensors(config).items() if source.name not in kept}
    return OnGrid(model, layout, moments, names)


def source(
    model: Path, type: str, layout: Layout, moments: Moments | None, scratch: Path, progress: Progress, kept: Collection[str] = ()
) -> tuple[Path, Progress]:
    """What an exporter reads, and what it tells its progress: `model` itself, or the same on the grid, in `scratch`."""
    if moments is None or type != TYPE:
        return model, progress
    share = 0.3  # of the time
    written = write(opened(model, layout, moments, kept), scratch / "rounded", lambda done, text: progress(share * done, text))
    return written, lambda done, text: progress(share + (1 - share) * done, text)


def write(source: OnGrid, folder: Path, progress: Progress) -> Path:
    """Make `folder` a Hugging Face folder of these weights, in float32, and return it."""
    model = source.folder
    folder.mkdir()
    for path in model.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").unlink()
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}), encoding="utf-8")  # 16 bits would round once more
    weights.write(source, folder, lambda share, name: progress(share, f"rounding {name}"), "F32")
    return folder
