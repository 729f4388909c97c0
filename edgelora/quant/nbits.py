"""Blocks of few bits as ONNX Runtime multiplies with them (MatMulNBits) and looks them up (GatherBlockQuantized).

    w ~ scale * (code - zero), one float32 scale and one zero point for every `block` columns of a row

A block's scale and zero point are searched for, so that the squared error is least where each column counts by its importance;
with feedback from `edgelora.quant.compensate` codes also make up for the errors of the columns before them.
Layout: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edgelora import machine
from edgelora.quant.compensate import Columns

_ROWS_AT_ONCE = 512  # a block of so many rows stays in a processor's cache while its scales are searched for
# Scales that are tried, in multiples of the one that just holds a block's largest value.
_STEPS = {False: np.linspace(0.72, 1.16, 12, dtype=np.float32), True: np.linspace(0.72, 1.04, 9, dtype=np.float32)}
_FINE = np.array([1.0], np.float32)  # in 8 bits nothing is gained by cutting the largest values off


@dataclass(frozen=True)
class Layout:
    """How a matrix is stored. Without `zeros` every block's zero point is the middle code, 2^(bits - 1).

    `short`: scales are not negative, and values that float16 and bfloat16 both hold, as runtimes for phones want them.
    """

    bits: int
    block: int
    zeros: bool
    short: bool = False

    @property
    def name(self) -> str:
        """int4-32, or int4-32-zeros with zero points."""
        return f"int{self.bits}-{self.block}{'-zeros' if self.zeros else ''}"

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Coded:
    """`codes`: uint8, shape (rows, columns). `scales`: float32, `zeros`: uint8, both of shape (rows, blocks a row)."""

    layout: Layout
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def values(self) -> np.ndarray:
        """What a runtime computes with, float32, shape (rows, columns)."""
        spread = np.arange(self.codes.shape[1]) // self.layout.block
        return np.asarray((self.codes - self.zeros[:, spread].astype(np.float32)) * self.scales[:, spread])

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes and zero points as the operators store them, uint8, flat; the columns that fill up a row's last block are 0.

        The first of several codes lies in the lowest bits. A row's zero points begin with a byte of their own.
        """
        columns = self.codes.shape[1]
        filled = np.repeat(self.zeros, self.layout.block, axis=1)
        filled[:, :columns] = self.codes
        return _packed(filled, self.layout.bits), _packed(self.zeros, self.layout.bits)


def coded(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, columns: int, layout: Layout) -> Coded:
    """What a file stores, read back: `codes` and `zeros` as `Coded.packed` gives them, `scales` float32 (rows x blocks)."""
    blocks = -(-columns // layout.block)
    scales = scales.reshape(-1, blocks)
    rows = len(scales)
    unpacked = _unpacked(codes.reshape(rows, -1), layout.bits)[:, :columns]
    if zeros is None:
        return Coded(layout, unpacked, scales, np.full(scales.shape, layout.middle, np.uint8))
    return Coded(layout, unpacked, scales, _unpacked(zeros.reshape(rows, -1), layout.bits)[:, :blocks])


def quantize(
    weights: np.ndarray,
    layout: Layout,
    importance: np.ndarray | None = None,
    taken_over: np.ndarray | None = None,
    pool: Executor | None = None,
) -> Coded:
    """Round `weights` (float32, shape (rows, columns)); rows do not depend on one another.

    `importance`: float32, shape (columns,), how much a column's squared error counts. `taken_over`: from
    `compensate.feedback`, shape (columns, columns); without it every weight goes to the nearest value. Row ranges
    are shared out in `pool`, to which the caller's thread must not belong, else in one of as many threads as there are cores.
    """
    counts = np.ones(weights.shape[1], np.float32) if importance is None else importance.astype(np.float32)
    ranges = [weights[start : start + _ROWS_AT_ONCE] for start in range(0, len(weights), _ROWS_AT_ONCE)]
    with contextlib.nullcontext(pool) if pool else ThreadPoolExecutor(machine.cores()) as threads:
        parts = list(threads.map(lambda rows: _quantize(rows, layout, counts, taken_over), ranges))
    return Coded(layout, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _quantize(
    weights: np.ndarray, layout: Layout, importance: np.ndarray, taken_over: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = Columns(np.ascontiguousarray(weights.T, np.float32), taken_over)
    codes = np.empty(columns.weights.shape, np.uint8)
    scales, zeros = [], []
    for start in range(0, len(codes), layout.block):
        end = min(start + layout.block, len(codes))
        scale, zero = _search(columns.block(start, end), importance[start:end], layout)
        with np.errstate(divide="ignore"):
            inverse = np.where(scale == 0, 0, 1 / scale)
        for at in range(start, end):
            code = np.clip(np.rint(columns.column(at) * inverse) + zero, 0, layout.most)
            codes[at] = code
            columns.errors[at] = columns.weights[at] - scale * (code - zero)
        scales.append(scale)
        zeros.append(zero.astype(np.uint8))
    return np.ascontiguousarray(codes.T), np.stack(scales, 1), np.stack(zeros, 1)


def _search(block: np.ndarray, importance: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point (both float32, shape (rows,)) with the least weighted error of `block`, shape (columns, rows)."""
    best = np.full(block.shape[1], np.inf, np.float32)
    best_scale, best_zero = np.zeros_like(best), np.full_like(best, layout.middle)
    counts = importance / max(float(importance.mean()), 1e-30) + 1e-3  # no column is worth nothing: it may matter to other texts
    for scale, zero in _candidates(block, layout):
        with np.errstate(divide="ignore"):
            inverse = np.where(scale == 0, 0, 1 / scale)
        steps = np.clip(np.rint(block * inverse), -zero, layout.most - zero)
        weighted = steps * counts[:, None]
        crossed, squared = np.einsum("ij,ij->j", weighted, block), np.einsum("ij,ij->j", weighted, steps)
        # With the scale that least squares then gives, the error is sum c w^2 - crossed^2 / squared.
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(squared > 0, -crossed * crossed / squared, 0)
            fitted = np.where(squared > 0, crossed / squared, 0)
        better = gain < best
        best = np.where(better, gain, best)
        best_scale, best_zero = np.where(better, fitted, best_scale), np.where(better, zero, best_zero)
    return _short(best_scale) if layout.short else best_scale, best_zero


def _short(scale: np.ndarray) -> np.ndarray:
    """The nearest value that float16 holds, and of those near it one that bfloat16 holds too."""
    bits = scale.astype(np.float16).astype(np.float32).view(np.uint32)
    return np.asarray((bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32))


def _candidates(block: np.ndarray, layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    steps = _STEPS[layout.zeros] if layout.bits == 4 else _FINE
    if not layout.zeros:
        # One side has one code more: a negative scale puts it above zero.
        largest = np.maximum(high, -low)
        for step in steps:
            for sign in (1,) if layout.short else (1, -1):
                yield largest * (sign * step / layout.middle), np.full_like(low, layout.middle)
        return
    for step in steps:
        scale = (high - low) * (step / layout.most)
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(scale > 0, np.rint(-low * step / scale), 0)
        for shift in (-1, 0, 1):
            yield scale, np.clip(zero + shift, 0, layout.most)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, uint8, shape (rows, n), as bytes; an odd last one of a row stands alone in its byte."""
    if bits == 8:
        return np.ascontiguousarray(codes).reshape(-1)
    rows, count = codes.shape
    even = np.zeros((rows, count + count % 2), np.uint8)
    even[:, :count] = codes
    return np.asarray(even[:, 0::2] | even[:, 1::2] << 4).reshape(-1)


def _unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """Shape (rows, bytes) -> (rows, codes)."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1)
