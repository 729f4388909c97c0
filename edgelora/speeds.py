"""When two speeds really differ: one rule, for budgets (`check`), files of one bench (`bench A B`) and several reports (`report A B`).

Two files that took turns in one bench are compared pair by pair: repeat by repeat both met the same moment of the machine. Then a
difference counts when it is larger than what is allowed *and* a signed-rank test says that it is no chance. Benches of other minutes met
another machine: one that is idle but shared was 21 % slower within an hour, steadily, and no test of their samples can tell that
from a slower file. They prove one only beyond `DRIFT`, on the same kind of processor. How far the rule can be trusted is measured by ``bench/alarms.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALPHA = 0.05  # how often two equal sets of samples may be called different; the change has to be larger than allowed besides
REPEATS = 15  # in turns: what it takes to see that a file is a tenth slower, 18 times of 20
DRIFT = 0.5  # share of the time by which benches of one file may be apart that were not in turns
AGAIN = "measure both in turns: edgelora check NEW --against OLD --budget decode=-5%"
WORK = ("runtime", "device_class", "threads", "prompt_tokens", "decode_tokens", "workload")  # two rows with other values did other work
_FAST = 0.1  # share of the samples whose slowest stands for them all


@dataclass(frozen=True)
class Slowdown:
    """How much longer a step takes now than before, as a share (0.1: 10 % longer; below zero: it became faster).

    `real` is None where it cannot be told, and `why` says why not; `p` is the chance that equal benches in turns look so different.
    """

    share: float
    real: bool | None
    why: str = ""
    p: float | None = None

    @property
    def evidence(self) -> str:
        """What a real one rests on."""
        return f"by more than {DRIFT:.0%}" if self.p is None else f"p = {self.p:.2g} that this is chance"


def slowdown(before: Mapping[str, Any], now: Mapping[str, Any], name: str, allowed: float) -> Slowdown | None:
    """Two bench rows of the same work by their raw samples `name` (ttft or decode); None where one has none.

    `allowed` is the share of the time that two equal benches may be apart. A step that is not slower by more is no slowdown,
    whatever the test says.
    """
    if not _samples(before, name) or not _samples(now, name):
        return None
    if in_turns(before, now):
        return _in_turns(before, now, name, allowed)
    share = _fast(_samples(now, name)) / _fast(_samples(before, name)) - 1
    if share <= allowed:
        return Slowdown(share, False)
    why = _doubt(before, now, share)
    return Slowdown(share, None if why else True, why)


def _doubt(before: Mapping[str, Any], now: Mapping[str, Any], share: float) -> str:
    """Why two benches of other minutes do not tell a slower file; empty when they do."""
    again = "measure both again" if now.get("device") else AGAIN
    if before.get("processor") != now.get("processor"):
        return f"they ran on other processors ({before.get('processor')}, now {now.get('processor')}); {again}"
    if share <= DRIFT:
        return f"benches that were not in turns may be {DRIFT:.0%} apart; {again}"
    return f"other programs disturbed one of them; {again}" if before.get("crowded") or now.get("crowded") else ""


def in_turns(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two bench rows were measured by one bench, whose files take turns."""
    return bool(now.get("turns")) and now.get("turns") == before.get("turns")


def _in_turns(before: Mapping[str, Any], now: Mapping[str, Any], name: str, allowed: float) -> Slowdown:
    """What disturbs one repeat disturbs its neighbour, so that crowded rows are judged too; the middle pair of repeats says by how much."""
    logs = [math.log(ours / theirs) for theirs, ours in zip(repeats(before, name), repeats(now, name), strict=False)]
    share = math.exp(statistics.median(logs)) - 1 if logs else 0.0
    if share <= allowed and logs:
        return Slowdown(share, False)
    if 2.0 ** -len(logs) > ALPHA:
        return Slowdown(share, None, f"{len(logs)} repeats are too few to tell; bench with {REPEATS}")
    chance = p_positive(logs)
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


def p_positive(differences: Sequence[float]) -> float:
    """How likely differences as far above zero as these are when their signs are chance: the one-sided signed-rank test.

    Exact up to 100 of them, whatever the ties (Wilcoxon 1945); zeros say nothing and are left out.
    """
    sizes = sorted(abs(d) for d in differences if d)
    twice = {size: 2 * sizes.index(size) + sizes.count(size) + 1 for size in set(sizes)}  # the rank; doubled, so that ties are whole
    ranks, ours = [twice[size] for size in sizes], sum(twice[d] for d in differences if d > 0)
    if len(ranks) > 100:
        return 0.5 * math.erfc((ours - sum(ranks) / 2 - 1) / math.sqrt(sum(rank * rank for rank in ranks) / 2))
    ways = {0: 1}  # rank sums, and how many choices of signs give each
    for rank in ranks:
        for total, count in list(ways.items()):
            ways[total + rank] = ways.get(total + rank, 0) + count
    return sum(count for total, count in ways.items() if total >= ours) / 2 ** len(ranks)


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
