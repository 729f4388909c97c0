"""When two benches of a speed really differ: one rule, for budgets (`check`) and for comparisons (`report A B`).

A difference counts when it is larger than what is allowed *and* the repeats' samples differ by a rank-sum test *and*
nothing from outside (other programs, heat, a quota) disturbed either bench. How far the rule can be trusted is measured
by ``bench/alarms.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

ALPHA = 0.05  # how often two equal sets of samples may be called different; the change has to be larger than allowed besides
WORK = ("runtime", "device_class", "threads", "prompt_tokens", "decode_tokens", "workload")  # two rows with other values did other work
_FAST = 0.1  # share of the samples whose slowest stands for them all
_ENUMERATED = 200_000  # ways to deal the samples; above it the normal approximation is exact enough


@dataclass(frozen=True)
class Slowdown:
    """How much longer a step takes now than before, as a share (0.1: 10 % longer; below zero: it became faster).

    `real` is None where it cannot be told, and `why` says why not; `p` is the chance that equal benches look so different.
    """

    share: float
    real: bool | None
    why: str = ""
    p: float | None = None


def slowdown(
    before: Mapping[str, Any], now: Mapping[str, Any], name: str, allowed: float, called: tuple[str, str] = ("the baseline", "this run")
) -> Slowdown | None:
    """Two bench rows of the same work by their raw samples `name` (ttft or decode); None where one has none.

    `allowed` is the share of the time that two equal benches may be apart. A step that is not slower by more is no slowdown,
    whatever the test says. `called` is what the reader knows the two rows as.
    """
    theirs, ours = (_samples(row, name) for row in (before, now))
    if not theirs or not ours:
        return None
    share = _fast(ours) / _fast(theirs) - 1
    if share <= allowed:
        return Slowdown(share, False)
    if disturbed := [which for which, row in zip(called[::-1], (now, before), strict=True) if row.get("crowded", row.get("noisy"))]:
        return Slowdown(share, None, f"other programs disturbed {' and '.join(disturbed)}; measure on an idle machine")
    each, other = repeats(now, name), repeats(before, name)
    if 1 / math.comb(len(each) + len(other), len(each)) > ALPHA:
        return Slowdown(share, None, f"{len(other)} and {len(each)} repeats are too few to tell; bench with 5 or more")
    chance = p_larger(each, other)
    if chance > ALPHA:
        return Slowdown(share, None, f"the repeats do not differ enough (p = {chance:.2g}); measure again with more", chance)
    return Slowdown(share, True, "", chance)


def other_work(row: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What kept two bench rows from doing the same work; empty when nothing did."""
    differ = [k for k in WORK if row.get(k) != before.get(k)]
    return f"it did other work ({differ[0]} {before.get(differ[0])}, now {row.get(differ[0])})" if differ else ""


def machine_class(row: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """The class of machines that a bench row was measured on: its device's, else the document's."""
    return str(row.get("device_class") or (document.get("machine") or {}).get("class"))


def repeats(row: Mapping[str, Any], name: str) -> list[float]:
    """One figure a repeat, in ms: its tokens' lower quartile. Tokens of one repeat share its luck, so they are no samples of their own."""
    values, count = _samples(row, name), len(_samples(row, "ttft"))
    if not count or len(values) < count:
        return []
    each = len(values) // count
    return [sorted(values[i * each : (i + 1) * each])[each // 4] for i in range(count)]


def p_larger(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How likely samples as large as `ours` are when both come from one source: the one-sided rank-sum test.

    Exact for small samples, whatever the ties; ranks, because latencies have long tails (Mann and Whitney 1947).
    """
    n, m = len(ours), len(theirs)
    if not n or not m:
        return 1.0
    pooled = sorted([*ours, *theirs])
    rank = {value: (2 * pooled.index(value) + pooled.count(value) + 1) / 2 for value in set(pooled)}
    ranks = [rank[value] for value in pooled]
    ours_sum = sum(rank[value] for value in ours)
    if math.comb(n + m, n) <= _ENUMERATED:
        sums = [sum(chosen) for chosen in combinations(ranks, n)]
        return sum(s >= ours_sum - 1e-9 for s in sums) / len(sums)
    mean = n * (n + m + 1) / 2
    ties = sum(pooled.count(v) ** 3 - pooled.count(v) for v in set(pooled))
    variance = n * m / 12 * ((n + m + 1) - ties / ((n + m) * (n + m - 1)))
    return 1.0 if variance <= 0 else 0.5 * math.erfc((ours_sum - mean - 0.5) / math.sqrt(2 * variance))


def figure(value: Any) -> float | None:
    """A measured number, None for anything else: missing, text, NaN, infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _samples(row: Mapping[str, Any], name: str) -> list[float]:
    values = [figure(v) for v in (row.get("samples_ms") or {}).get(name) or []]
    return [v for v in values if v is not None and v > 0]


def _fast(samples: Sequence[float]) -> float:
    """What the machine can do, in ms: other programs and clocks only ever add time, so the fast end moves least from run to run.

    Measured on one idle machine, 40 benches of one file: medians vary by 2.7 %, the fastest tenth by 1.8 %.
    """
    return sorted(samples)[int(_FAST * len(samples))]
