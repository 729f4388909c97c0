"""Of two runs' figures of one measure: what really differs, and what is noise.

Sizes are exact. Quality differs when the 95 % intervals over the same rows do not overlap. A speed differs by the rule that
`edgelora check` uses (`edgelora.speeds`), on the same class of machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora import speeds
from edgelora.report import figures as f

ALLOWED = 0.05  # two benches of one file may be this far apart; what `bench/alarms.py` measured the rule with
_MEMORY = 0.02  # so may the memory of two processes that do the same
REAL, NOISE, UNKNOWN = "real", "noise", "cannot tell"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run's figure: its interval's ends and n where it has them, and of a speed the bench row and the name of its samples."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    row: Row | None = None
    samples: str = ""


def verdict(unit: str, first: Cell | None, cell: Cell | None, machines: tuple[Any, Any]) -> dict[str, str] | None:
    """{"word": real, noise or cannot tell, "why"} of a later run's figure against the first run's; None where there is nothing to say."""
    if first is None or cell is None:
        return None
    if cell.samples:
        return _speed(first, cell, machines)
    if cell.row is not None:
        return _memory(first, cell, machines)
    if cell.low is None or cell.high is None or first.low is None or first.high is None:
        return _exact(first, cell) if unit == "bytes" else None
    if cell.n != first.n:
        return {"word": UNKNOWN, "why": f"measured on other rows (n = {f.count(first.n)} and {f.count(cell.n)})"}
    apart = cell.low > first.high or cell.high < first.low
    return {"word": REAL, "why": "the 95 % intervals do not overlap"} if apart else {"word": NOISE, "why": "the 95 % intervals overlap"}


def findings(runs: Sequence[Row], rows: Sequence[Row], kind_of: Any, show: Any) -> Iterator[tuple[str, str]]:
    """(word, sentence) of every verdict, run by run: 'B against A: gguf q4_0, decode ... 152 -> 136 tok/s (-10.5 %); why'."""
    for i, run in enumerate(runs):
        for row in rows:
            verdicts, values = list(row.get("verdicts") or []), list(row.get("values") or [])
            said = verdicts[i] if i < len(verdicts) else None
            if not said or not said.get("word") or i >= len(values) or not f.known(values[i]) or not f.known(values[0]):
                continue
            change = f.change((values[i] - values[0]) / abs(values[0])) if abs(values[0]) > 1e-12 else ""
            unit = row.get("unit") or ""
            figures = f.aside(f"{show(unit, values[0])} → {show(unit, values[i])}", change)
            why = f"; {said['why']}" if said.get("why") else ""
            yield said["word"], f"{run.get('label') or i + 1}: {kind_of(row)}, {row.get('what') or ''}: {figures}{why}"


def _exact(first: Cell, cell: Cell) -> dict[str, str] | None:
    moved = f"{cell.value - first.value:+,.0f}".replace("-", "\u2212")
    return {"word": REAL, "why": f"{moved} byte{'' if abs(cell.value - first.value) == 1 else 's'}"} if cell.value != first.value else None


def _memory(first: Cell, cell: Cell, machines: tuple[Any, Any]) -> dict[str, str]:
    if machines[0] != machines[1]:
        return {"word": UNKNOWN, "why": "other machines"}
    near = abs(cell.value - first.value) <= _MEMORY * first.value
    return {"word": NOISE, "why": f"within {_MEMORY:.0%}"} if near else {"word": REAL, "why": f"more than {_MEMORY:.0%}"}


def _speed(first: Cell, cell: Cell, machines: tuple[Any, Any]) -> dict[str, str]:
    if machines[0] != machines[1]:
        return {"word": UNKNOWN, "why": "other machines"}
    return speed(first.row or {}, cell.row or {}, cell.samples)


def speed(before: Row, now: Row, samples: str) -> dict[str, str]:
    """{"word", "why"} of two bench rows that did the same work, by their samples of that name."""
    slower = speeds.slowdown(before, now, samples, ALLOWED)
    faster = speeds.slowdown(now, before, samples, ALLOWED)
    if slower is None or faster is None:
        return {"word": UNKNOWN, "why": "no raw samples"}
    for found, word in ((slower, "slower"), (faster, "faster")):
        if found.real:
            return {"word": REAL, "why": f"{word}, {found.evidence}"}
        if found.real is None:
            return {"word": UNKNOWN, "why": found.why}
    return {"word": NOISE, "why": f"within {ALLOWED:.0%}"}
