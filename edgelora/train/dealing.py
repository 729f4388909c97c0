"""Which rows go into one batch, and how large a batch is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WINDOW = 64  # batches dealt at once: enough for even sums, few enough that every epoch mixes the rows anew


def rounded_up(count: int) -> int:
    """The next multiple of a sixteenth of the power of two below `count` (at least 64): at most 6 % more."""
    step = max(64, 1 << max(0, count.bit_length() - 1 - 4))
    return -(-count // step) * step


def deal(lengths: Sequence[int], batch: int, generator: Any = None) -> list[list[int]]:
    """Every index once, in batches of `batch` rows (the last may be smaller) whose token sums are nearly equal.

    Rows are drawn at random into windows of batches; within one, each round gives the longest rows left to the batches with
    the fewest tokens. Without a `generator` (torch's) the order is the given one.
    """
    order = list(range(len(lengths)))
    if generator is not None:
        import torch

        order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for begin in range(0, len(order), _WINDOW * batch):
        window = order[begin : begin + _WINDOW * batch]
        full = len(window) // batch
        batches += _dealt(lengths, window[: full * batch], full)
        if rest := window[full * batch :]:
            batches.append(rest)
    return batches


def _dealt(lengths: Sequence[int], rows: Sequence[int], count: int) -> list[list[int]]:
    """`rows` in `count` batches of as many rows each; where they do not divide, some have one less."""
    if not count:
        return []
    by_length = sorted(rows, key=lambda row: -lengths[row])  # stable: rows of one length keep their random order
    batches: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for begin in range(0, len(by_length), count):
        poorest = sorted(range(count), key=sums.__getitem__)
        for place, row in zip(poorest, by_length[begin : begin + count], strict=False):
            batches[place].append(row)
            sums[place] += lengths[row]
    return batches


@dataclass(frozen=True)
class Division:
    """How the rows before one update of the weights are divided: over `processes`, each of which takes at most `rows` at once.

    Which rows come before which update depends on neither, so a run that stopped goes on with another division.
    """

    together: int  # rows before an update
    rows: int
    processes: int = 1

    @classmethod
    def of(cls, batch: int, accumulate: int, processes: int = 1) -> Division:
        """As a recipe has it: `batch` rows at once, or fewer where a process has not as many."""
        together = batch * accumulate
        return cls(together, min(batch, -(-together // processes)), processes)

    @property
    def steps(self) -> int:
        """Batches of a process before an update."""
        return self._steps(self.together)

    def _steps(self, rows: int) -> int:
        return -(-rows // (self.rows * self.processes))

    def epoch(self, rows: int) -> int:
        """Batches of a process in an epoch of that many rows; the last update may take fewer steps."""
        updates, rest = divmod(rows, self.together)
        return updates * self.steps + self._steps(rest)

    def batches(self, lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
        """The rows of an update in batches of nearly equal token sums, for process 0, 1, ..., 0, 1, ...; some may be empty."""
        return _dealt(lengths, rows, self._steps(len(rows)) * self.processes)
