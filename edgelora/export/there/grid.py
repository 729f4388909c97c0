"""The grid of weights that lie on one already; `edgelora.export.on_grid` put them there. For every exporter's environment: numpy alone."""

from typing import Any

import numpy as np

CODES = 15  # from the smallest to the largest of 4 bits
SMALLEST, LARGEST = -8, 7  # of a code with a sign


def steps(values: Any, block: int, signed: bool) -> Any:
    """The scale of every block of a row, float32, shape (rows, blocks); `values` are float32, (rows, columns).

    All values of a block are whole multiples of its scale, which float16 and bfloat16 both hold; `signed` multiples go
    from -8 to 7, others over 15 steps that include 0. ValueError for values that lie on no such grid. Every step here is exact.
    """
    blocks = np.asarray(values, np.float32).reshape(-1, block)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    found = np.ones(len(blocks), np.float32)
    left = np.flatnonzero(high > low)  # blocks of zeros lie on any grid
    for count in range(CODES, 0, -1):
        step = (high[left] - low[left]) / np.float32(count)
        codes = np.rint(blocks[left] / step[:, None])
        fits = (codes * step[:, None] == blocks[left]).all(1) & _short(step)
        if signed:
            fits &= (codes.min(1) >= SMALLEST) & (codes.max(1) <= LARGEST)
        found[left[fits]] = step[fits]
        left = left[~fits]
    if len(left):
        raise ValueError(f"{len(left)} of {len(blocks)} blocks are not what was rounded: the exporter changed the weights")
    return found.reshape(len(values), -1)


def _short(step: Any) -> Any:
    """Whether float16 and bfloat16 hold it."""
    return (step.astype(np.float16).astype(np.float32) == step) & (step.view(np.uint32) & 0xFFFF == 0)
