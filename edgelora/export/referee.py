"""What plans are really worth: each is written as a file and run in the runtime of its users, on rows that choose.

Predictions only say which plans to try. The task's score is a share of 1: with labels, of rows whose label is chosen;
else, of answer tokens that are the model's first choice given all before them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import evaluate, labels
from edgelora.data.chat import Encoded
from edgelora.errors import Unsupported
from edgelora.export import stage
from edgelora.export.reference import Reference
from edgelora.progress import Progress, part
from edgelora.quant.size_plan import Menu, Plan
from edgelora.runtime import runtime

Write = Callable[[str, Plan, Progress], Path]  # the way of rounding, what to write, and whom to tell

_NEIGHBOURS = (0.85, 1.15, 1.4)  # times the size of the file that is kept: what less and more would give
_STEPS = 16  # of the frontier that a score is looked for on
_TRIES, _AIM = 5, 0.97  # files until one keeps a divergence, and the share of it that all but the first aim at


@dataclass(frozen=True)
class Tried:
    """A plan, how it was rounded, its file with its real size, and what was measured of it."""

    rounding: str
    plan: Plan
    file: Path
    size_bytes: int
    measured: Mapping[str, Any]

    def as_row(self) -> dict[str, Any]:
        return {"rounding": self.rounding, "size_bytes": self.size_bytes, "predicted_kl": self.plan.kl, **self.measured}


@dataclass(frozen=True)
class Referee:
    """`answers`: ids of every label of a classification, none for other tasks. `runtime`: the one of the files' users."""

    write: Write
    reference: Reference
    rows: Sequence[Encoded]
    answers: Sequence[Sequence[int]]
    runtime: str
    threads: int

    def __call__(self, rounding: str, plan: Plan, progress: Progress) -> Tried:
        """Write and measure a plan; the file stays where it was written."""
        file = self.write(rounding, plan, progress)
        with runtime(self.runtime).open(file, self.threads) as session:
            found = evaluate.divergence(self.reference, session, self.rows)
            if self.answers:
                right = labels.hits(session, self.rows, self.answers)
                score = right, np.ones(len(right))
            else:
                score = found.right, found.tokens
        low, high = evaluate.interval(*score)
        share = float(score[0].sum() / score[1].sum())
        size = stage.size_bytes(file)
        return Tried(
            rounding, plan, file, size, {**evaluate.divergence_summary(found), "score": share, "score_low": low, "score_high": high}
        )

    def best(self, plans: Mapping[str, Plan], progress: Progress) -> tuple[Tried, list[Tried]]:
        """The candidate that is nearest to the model as trained, and all of them. Files of the others are removed."""
        tried = [self(rounding, plan, part(progress, i, len(plans))) for i, (rounding, plan) in enumerate(plans.items())]
        kept = min(tried, key=lambda one: one.measured["kl"])
        for one in tried:
            if one is not kept:
                _remove(one.file)
        return kept, tried

    def challenged(self, kept: Tried, plan: Plan, progress: Progress) -> tuple[Tried, list[Tried]]:
        """(the better one of `kept` and the file of `plan`, by the same way of rounding; what was measured: nothing for the same plan)."""
        if plan.types == kept.plan.types:
            return kept, []
        other = self(kept.rounding, plan, progress)
        better, worse = sorted((kept, other), key=lambda one: one.measured["kl"])
        _remove(worse.file)
        return better, [other]

    def neighbours(self, kept: Tried, menu: Menu, progress: Progress) -> list[Tried]:
        """Smaller and larger files by the same way of rounding, measured and removed."""
        sizes = [int(max(menu.smallest().size_bytes, factor * kept.plan.size_bytes)) for factor in _NEIGHBOURS]
        plans = {plan.size_bytes: plan for plan in map(menu.plan, sizes) if plan.size_bytes != kept.plan.size_bytes}
        found = []
        for i, plan in enumerate(plans.values()):
            found.append(self(kept.rounding, plan, part(progress, i, len(plans))))
            _remove(found[-1].file)
        return found

    def within(self, rounding: str, menu: Menu, kl: float, progress: Progress) -> tuple[Tried, list[Tried]]:
        """The smallest file measured to be at most `kl` away, each one correcting what the next is planned by, and all that were measured.

        Between one that is too far away and one that is near enough the next lies between the two. Unsupported when not even the best plan is near enough.
        """
        best, tried = menu.plan_within(0.0), list[Tried]()
        plan, too_small, kept = menu.plan_within(kl), 0, None
        while True:
            one = self(rounding, plan, part(progress, len(tried), _TRIES))
            tried.append(one)
            if one.measured["kl"] > kl:
                too_small = max(too_small, plan.size_bytes)
                _remove(one.file)
            else:
                if kept:
                    _remove(kept.file)
                kept = one
            if len(tried) == _TRIES:
                break
            enough = kept.plan.size_bytes if kept else best.size_bytes + 1
            plan = menu.corrected(plan, one.measured["kl"]).plan_within(_AIM * kl)
            if not kept and (len(tried) == _TRIES - 1 or plan.size_bytes <= too_small):
                plan = best
            if kept and too_small and not too_small < plan.size_bytes < enough:
                plan = menu.plan((too_small + enough) // 2)
            if not too_small < plan.size_bytes < enough:
                break
        if kept is None:
            nearest = min(tried, key=lambda one: one.measured["kl"])
            raise Unsupported(
                f"a KL of {kl:g} cannot be reached: the best of {len(tried)} files, {nearest.size_bytes / 1e6:.1f} MB, has "
                f"{nearest.measured['kl']:.2g} on {len(self.rows)} rows",
                "allow more, or choose --type f16",
            )
        return kept, tried

    def smallest(self, rounding: str, menu: Menu, score: float, progress: Progress) -> tuple[Tried, list[Tried]]:
        """The smallest file whose measured score is at least `score`, by bisection over the frontier, and all that were measured.

        Unsupported when even the largest scores less. That a larger file scores no less is taken for granted between two that
        were measured, so another one in between may hold too.
        """
        plans = menu.frontier(_STEPS)
        worst, best = -1, len(plans) - 1
        steps = 1 + best.bit_length()
        kept = self(rounding, plans[best], part(progress, 0, steps))
        tried = [kept]
        if kept.measured["score"] < score:
            raise Unsupported(
                f"a score of {score:g} cannot be reached: the largest plan, {kept.plan.size_bytes / 1e6:.1f} MB, scores "
                f"{kept.measured['score']:.3f} on {len(self.rows)} rows",
                "ask for less, train longer, or take a larger base",
            )
        while best - worst > 1:
            middle = (worst + best) // 2
            tried.append(self(rounding, plans[middle], part(progress, len(tried), steps)))
            if tried[-1].measured["score"] >= score:
                _remove(kept.file)
                kept, best = tried[-1], middle
            else:
                _remove(tried[-1].file)
                worst = middle
        return kept, tried


def _remove(file: Path) -> None:
    """A file, or the folder that some formats' files are."""
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink()
