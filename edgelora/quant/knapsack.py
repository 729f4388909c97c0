"""The multiple-choice knapsack: of every item one option, at the least total cost, within a number of bytes.

Dynamic programming over bytes (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, section 11.5). Sizes are
counted in the greatest common divisor of their differences, so the answer is exact, and one pass gives it for every
capacity at once: the frontier of size against cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MOST_STATES = 1 << 18  # above it sizes are rounded up to a coarser unit; one byte of memory an item and state


class Frontier:
    """The least cost at every capacity from the smallest total to the largest that pays.

    `sizes` and `costs`: of every item its options' bytes (whole numbers) and costs (finite), in the same order.
    `unit` is what a step counts, in bytes. Where it is not a common divisor of all differences, which happens with more
    than 2^18 steps only, options count as a little larger than they are: a choice still keeps within its capacity, and
    another one may be better by less than `unit` bytes an item.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> None:
        if not all(len(s) == len(c) and len(s) for s, c in zip(sizes, costs, strict=True)):
            raise ValueError("every item needs one size and one cost for each of its options, and at least one option")
        if not all(math.isfinite(cost) for item in costs for cost in item):
            raise ValueError("costs must be finite")
        self._sizes = [list(map(int, item)) for item in sizes]
        self._costs = [list(map(float, item)) for item in costs]
        self._worth = [_undominated(s, c) for s, c in zip(self._sizes, self._costs, strict=True)]
        least = [self._sizes[i][worth[0]] for i, worth in enumerate(self._worth)]
        extra = [[self._sizes[i][o] - least[i] for o in worth] for i, worth in enumerate(self._worth)]
        self.smallest = sum(least)
        self.largest = self.smallest + sum(max(item) for item in extra)
        divisor = math.gcd(*(size for item in extra for size in item)) or 1
        self.unit = divisor * -(-(self.largest - self.smallest) // (divisor * _MOST_STATES)) or divisor
        self._steps = [[-(-size // self.unit) for size in item] for item in extra]
        self._least, self._taken = self._solve()

    def choose(self, capacity: int) -> tuple[int, ...]:
        """The option of every item, as its index, that cost least within `capacity` bytes; ValueError when nothing fits."""
        if capacity < self.smallest:
            raise ValueError(f"nothing fits {capacity} bytes: the smallest total is {self.smallest}")
        state = min((capacity - self.smallest) // self.unit, len(self._least) - 1)
        state = int(np.argmin(self._least[: state + 1]))
        chosen = []
        for i in reversed(range(len(self._worth))):
            taken = int(self._taken[i][state])
            chosen.append(self._worth[i][taken])
            state -= self._steps[i][taken]
        return tuple(reversed(chosen))

    def within(self, cost: float) -> tuple[int, ...] | None:
        """The options of least total bytes whose cost is at most `cost`; None when no choice is that good."""
        good = np.flatnonzero(self._least <= cost)
        return self.choose(self.smallest + int(good[0]) * self.unit) if len(good) else None

    def total(self, chosen: Sequence[int]) -> tuple[int, float]:
        """Bytes and cost of a choice."""
        size = sum(self._sizes[i][option] for i, option in enumerate(chosen))
        return size, math.fsum(self._costs[i][option] for i, option in enumerate(chosen))

    def _solve(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Least cost at exactly every number of steps, float64, and for every item the place of the option taken there, uint8."""
        states = sum(max(item) for item in self._steps) + 1
        best = np.full(states, np.inf)
        best[0] = 0.0
        reached, taken = 0, []
        for i, worth in enumerate(self._worth):
            now, choice = np.full(states, np.inf), np.zeros(states, dtype=np.uint8)
            for place, (option, step) in enumerate(zip(worth, self._steps[i], strict=True)):
                total = best[: reached + 1] + self._costs[i][option]
                reachable = now[step : step + reached + 1]
                better = total < reachable
                reachable[better] = total[better]
                choice[step : step + reached + 1][better] = place
            reached += max(self._steps[i])
            best = now
            taken.append(choice)
        return best, taken


def _undominated(sizes: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Options, smallest first, each cheaper than every smaller one."""
    kept: list[int] = []
    for option in sorted(range(len(sizes)), key=lambda o: (sizes[o], costs[o])):
        if not kept or costs[option] < costs[kept[-1]]:
            kept.append(option)
    if len(kept) > 256:
        raise ValueError(f"an item has {len(kept)} options that pay, more than 256")
    return kept
