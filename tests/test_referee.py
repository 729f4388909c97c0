"""Which plans are tried and which file is kept, with files whose divergence is known beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgelora.errors import Unsupported
from edgelora.export.referee import Referee, Tried
from edgelora.progress import Progress
from edgelora.quant.size_plan import Menu, Option, Plan

ITEMS = {f"blk.{i}": tuple(Option(f"t{bits}", 100 * bits, (i + 1) * 4.0**-bits) for bits in range(2, 9)) for i in range(12)}
HEAD = {"head": tuple(Option(f"t{bits}", 400 * bits, 2 * 4.0**-bits) for bits in (4, 8))}
TRUTHS: dict[str, Callable[[float], float]] = {
    "as predicted": lambda k: k, "three times": lambda k: 3 * k, "forty times": lambda k: 40 * k, "a fifth": lambda k: 0.2 * k,
    "its square": lambda k: 100 * k * k, "its root": lambda k: k**0.5,
}  # fmt: skip
MENU = Menu({**ITEMS, **HEAD}, 1000, frozenset({"head"}))


@dataclasses.dataclass(frozen=True)
class Scripted(Referee):
    """Writes files for real, and measures them by a rule."""

    folder: Path = Path()
    truth: Callable[[Plan], float] = lambda plan: plan.kl
    seen: list[Plan] = dataclasses.field(default_factory=list)

    def __call__(self, rounding: str, plan: Plan, progress: Progress) -> Tried:
        progress(0.0, "begun")
        self.seen.append(plan)
        file = self.folder / f"{len(self.seen)}.gguf"
        file.write_bytes(b"x")
        progress(1.0, "done")
        return Tried(rounding, plan, file, plan.size_bytes, {"kl": self.truth(plan)})


def referee(folder: Path, truth: Callable[[Plan], float]) -> Scripted:
    unused: Any = None
    return Scripted(unused, unused, [], [], "none", 1, folder, truth)


def cost(plan: Plan) -> float:
    """What the menu itself predicts of a plan, whoever made it."""
    return sum(next(o.cost for o in MENU.options[name] if o.type == kind) for name, kind in plan.types.items())


class Rising:
    def __init__(self) -> None:
        self.share = 0.0

    def __call__(self, share: float, text: str) -> None:
        assert self.share <= share <= 1.0
        self.share = share


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
@pytest.mark.parametrize("wanted", [0.02, 0.1, 0.4])
def test_the_smallest_file_within_a_divergence(tmp_path: Path, truth: Callable[[float], float], wanted: float) -> None:
    asked = referee(tmp_path, lambda plan: float(truth(cost(plan))))
    possible = [plan for plan in MENU.frontier(200) if truth(cost(plan)) <= wanted]
    if not possible:
        with pytest.raises(Unsupported, match=r"cannot be reached: the best of \d files"):
            asked.within("compensated", MENU, wanted, Rising())
        assert any(plan.types == MENU.plan_within(0.0).types for plan in asked.seen)
        assert not list(tmp_path.iterdir())
        return
    kept, tried = asked.within("compensated", MENU, wanted, Rising())
    assert kept.measured["kl"] <= wanted
    assert [one.plan for one in tried] == asked.seen
    assert len(tried) <= 5
    assert list(tmp_path.iterdir()) == [kept.file]
    assert kept.plan.size_bytes == min(one.plan.size_bytes for one in tried if one.measured["kl"] <= wanted)
    assert kept.plan.size_bytes <= 1.35 * min(plan.size_bytes for plan in possible)


@pytest.mark.parametrize("better", [True, False])
def test_of_a_file_and_its_challenger_the_nearer_one_is_kept(tmp_path: Path, better: bool) -> None:
    asked = referee(tmp_path, lambda plan: 1.0)
    first = asked("compensated", MENU.plan(6000), Rising())
    other = dataclasses.replace(asked, truth=lambda plan: 0.5 if better else 2.0)
    kept, more = other.challenged(first, MENU.plan(5000), Rising())
    assert (kept is first) != better
    assert [one.plan for one in more] == [MENU.plan(5000)]
    assert list(tmp_path.iterdir()) == [kept.file]


def test_a_challenger_of_the_same_types_is_not_written_again(tmp_path: Path) -> None:
    asked = referee(tmp_path, lambda plan: 1.0)
    first = asked("compensated", MENU.plan(6000), Rising())
    assert asked.challenged(first, MENU.plan(6000), Rising()) == (first, [])
    assert len(asked.seen) == 1
