"""The size planner's knapsack, against trying every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from edgelora.quant import knapsack
from edgelora.quant.knapsack import Frontier


def every_choice(sizes: list[list[int]], costs: list[list[float]]) -> list[tuple[int, float]]:
    choices = itertools.product(*(range(len(item)) for item in sizes))
    return [(sum(s[o] for s, o in zip(sizes, c, strict=True)), sum(k[o] for k, o in zip(costs, c, strict=True))) for c in choices]


def drawn(seed: int, unit: int) -> tuple[list[list[int]], list[list[float]]]:
    """Items with equal sizes, dominated options and costs that rise with size, as a careless menu has."""
    random.seed(seed)
    counts = [random.randint(1, 4) for _ in range(random.randint(1, 6))]
    return [[unit * random.randint(1, 30) + 7 for _ in range(n)] for n in counts], [[random.random() for _ in range(n)] for n in counts]


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better_at_any_capacity(seed: int) -> None:
    sizes, costs = drawn(seed, unit=32)
    frontier, choices = Frontier(sizes, costs), every_choice(sizes, costs)
    assert frontier.smallest == min(size for size, _ in choices)
    for capacity in {size + off for size, _ in choices for off in (-1, 0, 1)}:
        if capacity < frontier.smallest:
            with pytest.raises(ValueError, match=f"nothing fits {capacity} bytes: the smallest total is {frontier.smallest}"):
                frontier.choose(capacity)
            continue
        size, cost = frontier.total(frontier.choose(capacity))
        assert size <= capacity
        assert cost == pytest.approx(min(c for s, c in choices if s <= capacity))


@pytest.mark.parametrize("seed", range(40))
def test_no_smaller_choice_is_as_good(seed: int) -> None:
    sizes, costs = drawn(seed, unit=5)
    frontier, choices = Frontier(sizes, costs), every_choice(sizes, costs)
    for wanted in (-1.0, *(cost + 1e-12 for _, cost in choices)):
        fitting = [size for size, cost in choices if cost <= wanted]
        chosen = frontier.within(wanted)
        assert (chosen is None) == (not fitting)
        if chosen is not None:
            assert frontier.total(chosen)[0] == min(fitting)


def test_the_unit_is_the_greatest_common_divisor() -> None:
    assert Frontier([[100, 100 + 96], [7, 7 + 864]], [[1, 0], [1, 0]]).unit == 96
    assert Frontier([[5]], [[0.5]]).total((0,)) == (5, 0.5)


def test_a_coarser_unit_never_breaks_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_MOST_STATES", 50)
    for seed in range(20):
        sizes, costs = drawn(seed, unit=17)
        frontier, choices = Frontier(sizes, costs), every_choice(sizes, costs)
        for capacity in (size for size, _ in choices):
            size, cost = frontier.total(frontier.choose(capacity))
            assert size <= capacity
            spare = frontier.unit * len(sizes)
            assert cost <= min((c for s, c in choices if s <= capacity - spare), default=float("inf")) + 1e-9


def test_of_two_hundred_items_no_single_change_would_pay() -> None:
    random.seed(1)
    sizes = [[rows * bits for bits in (4, 5, 6, 8)] for rows in random.choices([72, 24 * 9, 192], k=200)]
    costs = [[4.0 ** -(bits + random.random()) for bits in (4, 5, 6, 8)] for _ in sizes]
    frontier = Frontier(sizes, costs)
    for capacity in range(frontier.smallest, frontier.largest, 1001):
        chosen = frontier.choose(capacity)
        size, _ = frontier.total(chosen)
        assert size <= capacity
        for i, option in enumerate(chosen):
            for other in range(4):
                assert size + sizes[i][other] - sizes[i][option] > capacity or costs[i][other] >= costs[i][option]


@pytest.mark.parametrize(("sizes", "costs"), [([[1, 2]], [[1.0]]), ([[]], [[]]), ([[1]], [[float("nan")]]), ([[1]], [[float("inf")]])])
def test_a_broken_menu_is_refused(sizes: list[list[int]], costs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"option|finite"):
        Frontier(sizes, costs)
