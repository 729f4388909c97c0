"""The grids of ggml's block formats: which values a block can hold once its scales are chosen, and where the codes lie.

A column of a block is stored as a code, an index into `levels`; its value is `scale * levels[code] + offset`, with one
scale and offset for every `sub` columns. The layouts are those of ggml-common.h and of the `dequantize_row_*` functions
in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgelora.quant.ggml import Type

# Blocks as uint8, shape (rows, bytes) -> scales and offsets, float32, each (rows, subs).
Scales = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Grid:
    """`levels`: float32, ascending. `places`: whole numbers, shape (columns, bits of a code): bit b of byte n is 8 n + b."""

    sub: int
    levels: np.ndarray
    places: np.ndarray
    scales: Scales
    first_code: int = 0  # the code of levels[0]; codes count up from it and wrap at 256

    def nearest(self, values: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Indices of the levels nearest to `values`, uint8; all of shape (rows,). No scale is 0: infinite stands for it."""
        wanted = values - offset
        wanted /= scale
        if not self._even:
            return np.searchsorted(self._between, wanted).astype(np.uint8)
        wanted -= self.levels[0]
        np.rint(wanted, out=wanted)
        np.maximum(wanted, 0, out=wanted)
        np.minimum(wanted, len(self.levels) - 1, out=wanted)
        return wanted.astype(np.uint8)

    def store(self, blocks: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """`blocks` (uint8, shape (rows, bytes)) with the codes of `indices` (uint8, shape (rows, columns)) in place of theirs."""
        bits = np.unpackbits(blocks, axis=1, bitorder="little")
        codes = indices + np.uint8(self.first_code)
        for bit in range(self.places.shape[1]):
            bits[:, self.places[:, bit]] = (codes >> bit) & 1
        return np.packbits(bits, axis=1, bitorder="little")

    @cached_property
    def _even(self) -> bool:
        return bool(self.levels[-1] - self.levels[0] == len(self.levels) - 1)

    @cached_property
    def _between(self) -> np.ndarray:
        return np.asarray((self.levels[1:] + self.levels[:-1]) / 2)


def _half(blocks: np.ndarray, byte: int) -> np.ndarray:
    """The float16 at `byte` of every block, float32, shape (rows, 1)."""
    return np.ascontiguousarray(blocks[:, byte : byte + 2]).view(np.float16).astype(np.float32)


def _scale(byte: int = 0) -> Scales:
    return lambda blocks: (_half(blocks, byte), np.zeros((len(blocks), 1), np.float32))


def _scale_and_offset(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _half(blocks, 0), _half(blocks, 2)


def _nibbles(start: int, columns: int = 32) -> np.ndarray:
    """Four bits a column from byte `start`: of every 2n columns the first n in the low halves of n bytes, the others in the high ones."""
    column = np.arange(columns)
    byte = start + (column // 32) * 16 + column % 16
    return (8 * byte + 4 * (column % 32 // 16))[:, None] + np.arange(4)


def _wide_nibbles(start: int) -> np.ndarray:
    """As above with 64 columns in 32 bytes."""
    column = np.arange(256)
    return (8 * (start + column // 64 * 32 + column % 32) + 4 * (column % 64 // 32))[:, None] + np.arange(4)


def _pairs(start: int) -> np.ndarray:
    """Two bits a column: 128 columns in 32 bytes, each byte holding columns c, c + 32, c + 64 and c + 96."""
    column = np.arange(256)
    return (8 * (start + column // 128 * 32 + column % 32) + 2 * (column % 128 // 32))[:, None] + np.arange(2)


def _one(start: int, columns: int) -> np.ndarray:
    """A bit a column in 32 bits, or (256 columns) in 32 bytes, each with columns c, c + 32, c + 64, ..."""
    column = np.arange(columns)
    return (8 * start + column if columns == 32 else 8 * (start + column % 32) + column // 32)[:, None]


def _six_bits(blocks: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and eight offsets of Q4_K and Q5_K, six bits each in twelve bytes (get_scale_min_k4)."""
    a, b, c = (blocks[:, start + 4 * i : start + 4 * i + 4] for i in range(3))
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    offset = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scale.astype(np.float32), offset.astype(np.float32)


def _q45_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale, offset = _six_bits(blocks, 4)
    return _half(blocks, 0) * scale, -_half(blocks, 2) * offset


def _q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _half(blocks, 208)
    return scale, np.zeros_like(scale)


def _q3_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = np.concatenate([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], axis=1)
    high = np.concatenate([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = ((low | high << 4).astype(np.float32) - 32) * _half(blocks, 108)
    return scale, np.zeros_like(scale)


def _q2_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    packed = blocks[:, :16]
    return _half(blocks, 80) * (packed & 15).astype(np.float32), -_half(blocks, 82) * (packed >> 4).astype(np.float32)


def _iq4_xs(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scale = ((low | high << 4).astype(np.float32) - 32) * _half(blocks, 0)
    return scale, np.zeros_like(scale)


def _levels(first: int, last: int) -> np.ndarray:
    return np.arange(first, last + 1, dtype=np.float32)


# kvalues_iq4nl in ggml-common.h
_UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)

_Q6_LOW = np.arange(256) // 128 * 64 + np.arange(256) % 64  # of Q6_K: byte of a column's low four bits
GRIDS = {
    Type.Q4_0: Grid(32, _levels(-8, 7), _nibbles(2), _scale()),
    Type.Q4_1: Grid(32, _levels(0, 15), _nibbles(4), _scale_and_offset),
    Type.Q5_0: Grid(32, _levels(-16, 15), np.hstack([_nibbles(6), _one(2, 32)]), _scale()),
    Type.Q5_1: Grid(32, _levels(0, 31), np.hstack([_nibbles(8), _one(4, 32)]), _scale_and_offset),
    Type.Q8_0: Grid(32, _levels(-127, 127), 8 * np.arange(2, 34)[:, None] + np.arange(8), _scale(), first_code=129),
    Type.IQ4_NL: Grid(32, _UNEVEN, _nibbles(2), _scale()),
    Type.IQ4_XS: Grid(32, _UNEVEN, _nibbles(8, 256), _iq4_xs),
    Type.Q2_K: Grid(16, _levels(0, 3), _pairs(16), _q2_k),
    Type.Q3_K: Grid(16, _levels(-4, 3), np.hstack([_pairs(32), _one(0, 256)]), _q3_k),
    Type.Q4_K: Grid(32, _levels(0, 15), _wide_nibbles(16), _q45_k),
    Type.Q5_K: Grid(32, _levels(0, 31), np.hstack([_wide_nibbles(48), _one(16, 256)]), _q45_k),
    Type.Q6_K: Grid(
        16,
        _levels(-32, 31),
        np.hstack([(8 * _Q6_LOW + 4 * (np.arange(256) % 128 // 64))[:, None] + np.arange(4), _pairs(128)]),
        _q6_k,
    ),
}
