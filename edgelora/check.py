"""Budgets: limits on what was measured, and on how far it may move from a baseline.

A limit without a measurement fails: nobody looked. A change that cannot be judged (no baseline, another machine, other
work, too noisy) is a warning: never a pass, and never a red that nobody trusts. Sizes are exact. A change of speed
counts only when it is larger than allowed *and* the samples differ by a test.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora import recipe as recipes
from edgelora import size as sizes
from edgelora import speeds
from edgelora.errors import ModelError, UsageError


@dataclass(frozen=True)
class Metric:
    """Where a budget's figure stands in the report and what it takes to compare two of them."""

    section: str
    key: str
    upper: bool  # more is worse
    kind: str  # bytes, quality, memory or speed
    mend: str  # what to do when it is broken
    samples: str = ""  # speed: the name of its raw samples

    @property
    def is_bytes(self) -> bool:
        return self.kind in ("bytes", "memory")


_SMALLER = "take a smaller type (`edgelora export --type`), or raise the budget on purpose"
_BETTER = "take a type of more bits or train longer, or loosen the budget on purpose"
_FASTER = "take a smaller type, or loosen the budget on purpose"
METRICS: dict[str, Metric] = {
    "size": Metric("files", "size_bytes", True, "bytes", _SMALLER),
    "kl": Metric("files", "kl", True, "quality", _BETTER),
    "top1": Metric("files", "top1", False, "quality", _BETTER),
    "loss": Metric("losses", "after", True, "quality", _BETTER),
    "change": Metric("losses", "change_high", True, "quality", _BETTER),
    "accuracy": Metric("accuracy", "after", False, "quality", _BETTER),
    "peak_rss": Metric("bench", "peak_rss_bytes", True, "memory", _SMALLER),
    "ttft_ms": Metric("bench", "ttft_ms", True, "speed", _FASTER, "ttft"),
    "decode_tok_per_s": Metric("bench", "decode_tok_per_s", False, "speed", _FASTER, "decode"),
}
ALIASES = {"decode": "decode_tok_per_s", "ttft": "ttft_ms"}
_LIMIT = re.compile(r"^\s*(<=|>=)?\s*(.+?)\s*$")
_CHANGE = re.compile(r"^\s*([+-])\s*(\d+(?:\.\d+)?)\s*(%|kB|KB|MB|GB|KiB|MiB|GiB|B)\s*$")


@dataclass(frozen=True)
class Budget:
    """One demand: a `limit` on the figure, or how far it may get worse than the baseline: by a `share` of it or by `n_bytes`."""

    name: str
    text: str
    limit: float | None = None
    share: float | None = None
    n_bytes: float | None = None

    @property
    def metric(self) -> Metric:
        return METRICS[self.name]


@dataclass(frozen=True)
class Verdict:
    """One budget held against one row. `ok` is None when it could not be judged; `why` says more about what is not ok."""

    what: str
    limit: str
    value: str
    ok: bool | None
    why: str = ""

    def as_row(self) -> dict[str, Any]:
        return {"what": self.what, "limit": self.limit, "value": self.value, "ok": self.ok, **({"why": self.why} if self.why else {})}


def parse(budgets: Mapping[str, Any]) -> list[Budget]:
    """Budgets as written in a recipe: a figure, text or a list of them for each name. UsageError lists all that cannot be read."""
    found, problems = [], []
    for written, value in budgets.items():
        name = ALIASES.get(written, written)
        if name not in METRICS:
            problems.append(f"{written}: not a budget; known: {', '.join((*METRICS, *ALIASES))}")
            continue
        for text in value if isinstance(value, (list, tuple)) else [value]:
            try:
                found.append(_budget(name, text))
            except ValueError as error:
                problems.append(f"{written}: {error}")
    if problems:
        raise UsageError(
            "budgets:\n" + "\n".join(f"  {p}" for p in problems),
            "for instance size: [130MB, +1%], kl: 0.3, decode_tok_per_s: 15, decode: -5%",
        )
    return found


def _budget(name: str, value: Any) -> Budget:
    metric, text = METRICS[name], str(value)
    if change := _CHANGE.match(text):
        sign, number, unit = change.groups()
        if name == "change":
            raise ValueError(f"{text!r}: it is a change already; give a limit, for instance -0.2")
        if (sign == "+") != metric.upper:
            raise ValueError(f"{text!r} allows what a budget should stop; write {'+' if metric.upper else '-'}{number}{unit}")
        if unit == "%":
            return Budget(name, text.strip(), share=float(number) / 100)
        if not metric.is_bytes:
            raise ValueError(f"{text!r}: it is no size; give a change in percent")
        return Budget(name, text.strip(), n_bytes=float(recipes.size_bytes(f"{number}{unit}")))
    match = _LIMIT.match(text)
    sign, number = (match[1], match[2]) if match else (None, "")
    if isinstance(value, bool):
        raise ValueError(f"{text!r} is not a number")
    limit = float(recipes.size_bytes(int(number) if number.isdigit() else number)) if metric.is_bytes else float(number)
    if not math.isfinite(limit):
        raise ValueError(f"{text!r} is not a number")
    if sign and (sign == "<=") != metric.upper:
        raise ValueError(f"{sign} would allow what a budget should stop; write {'<=' if metric.upper else '>='}")
    return Budget(name, f"{'<=' if metric.upper else '>='} {number}", limit=limit)


def check(
    document: Mapping[str, Any],
    budgets: Mapping[str, Any],
    baseline: Mapping[str, Any] | None = None,
    find: Callable[[str], Path | None] = lambda name: None,
) -> list[Verdict]:
    """Hold every budget against every row of a report that it speaks of.

    `baseline` is one that `edgelora.baseline` made; `find` gives the path of an exported file by its name, where it is at
    hand, so that a file that grew can be asked what grew.
    """
    verdicts = []
    for budget in parse(budgets):
        rows = list(document.get(budget.metric.section) or [])
        if not rows:
            verdicts.append(Verdict(f"{budget.name}: no {budget.metric.section} in the report", budget.text, "not measured", False))
        for row in rows:
            if budget.limit is not None:
                verdicts.append(_limited(budget, row))
            else:
                verdicts.append(_compared(budget, row, document, baseline, find))
    return verdicts


def broken(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.ok is False]


def unjudged(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.ok is None]


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table for a pull request, what is broken first."""
    failed, warned = len(broken(verdicts)), len(unjudged(verdicts))
    words = f"{failed} of {len(verdicts)} broken" if failed else f"{len(verdicts) - warned} of {len(verdicts)} held"
    lines = [f"### edgelora: budgets, {words}" + (f", {warned} not judged" if warned else ""), ""]
    lines += ["| | budget | limit | measured | |", "| --- | --- | --- | --- | --- |"]
    order = {False: 0, None: 1, True: 2}
    marks = {False: "✗", None: "!", True: "✓"}
    for v in sorted(verdicts, key=lambda v: order[v.ok]):
        cells = (marks[v.ok], v.what, v.limit, v.value, v.why)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def workflow_commands(verdicts: Iterable[Verdict]) -> list[str]:
    """GitHub's workflow commands: an error for what is broken, a warning for what could not be judged."""
    escapes = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
    return [
        f"::{'warning' if v.ok is None else 'error'} title=edgelora::{f'{v.what}: {v.value} (limit {v.limit}); {v.why}'.translate(escapes)}\n"
        for v in verdicts
        if not v.ok
    ]


# ---- limits ----


def _limited(budget: Budget, row: Mapping[str, Any]) -> Verdict:
    value, metric = figure(row.get(budget.metric.key)), budget.metric
    limit = float(budget.limit or 0)
    held = value is not None and (value <= limit if metric.upper else value >= limit)
    why = "" if held or value is None else metric.mend
    return Verdict(f"{budget.name} of {_where(row)}", budget.text, _shown(value, metric), held, why)


# ---- changes ----


def _compared(
    budget: Budget,
    row: Mapping[str, Any],
    document: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
    find: Callable[[str], Path | None],
) -> Verdict:
    metric = budget.metric
    what = f"{budget.name} of {_where(row)} against the baseline"
    now = figure(row.get(metric.key))
    if now is None:
        return Verdict(what, budget.text, "not measured", False, "measure it again")

    def warn(why: str) -> Verdict:
        return Verdict(what, budget.text, _shown(now, metric), None, why)

    if baseline is None:
        return warn("there is no baseline; make one with `edgelora baseline update`")
    before_row = _counterpart(row, baseline.get(metric.section) or [])
    if before_row is None:
        return warn("the baseline has no such row; `edgelora baseline update` takes it in")
    before = figure(before_row.get(metric.key))
    if before is None or before <= 0 or now <= 0:
        return warn("one of the two figures is not above zero")
    if why := _other_work(metric, row, before_row, document, baseline):
        return warn(why)
    since = f"since {baseline['commit']}" if baseline.get("commit") else "since the baseline"
    if metric.kind == "speed":
        return _compared_speed(budget, what, since, row, before_row)
    worse_by = (now - before) if metric.upper else (before - now)
    value = f"{now / before - 1:+.2%} {since} ({_shown(before, metric)} -> {_shown(now, metric)})"
    allowed = budget.n_bytes if budget.n_bytes is not None else float(budget.share or 0) * before
    if worse_by <= allowed:
        return Verdict(what, budget.text, value, True)
    grew = _grown(str(row.get("file", "")), before_row, find) if metric.kind == "bytes" else ""
    return Verdict(what, budget.text, value, False, f"{grew}; {metric.mend}" if grew else metric.mend)


def _compared_speed(budget: Budget, what: str, since: str, row: Mapping[str, Any], before_row: Mapping[str, Any]) -> Verdict:
    """Red when a step takes longer by more than allowed and `speeds` says that this is no noise."""
    metric, allowed = budget.metric, float(budget.share or 0)
    # a rate that may fall by s allows a time that grows by s / (1 - s)
    found = speeds.slowdown(
        before_row, row, metric.samples, allowed if metric.upper else allowed / (1 - allowed) if allowed < 1 else math.inf
    )
    if found is None:
        return Verdict(what, budget.text, "no raw samples", None, "measure both again with `edgelora bench`")
    share = found.share if metric.upper else 1 / (1 + found.share) - 1
    value = f"{share:+.2%} {since} ({_shown(figure(before_row.get(metric.key)), metric)} -> {_shown(figure(row.get(metric.key)), metric)})"
    why = f"{found.evidence}; {metric.mend}" if found.real else found.why
    return Verdict(what, budget.text, value, None if found.real is None else not found.real, why)


def _counterpart(row: Mapping[str, Any], rows: Sequence[Any]) -> Mapping[str, Any] | None:
    """The baseline's row of the same file, set and work; of the same file and set where the work differs."""
    same = [r for r in rows if isinstance(r, Mapping) and all(r.get(k) == row.get(k) for k in ("file", "set"))]
    return next((r for r in same if all(r.get(k) == row.get(k) for k in speeds.WORK)), same[0] if same else None)


def _other_work(
    metric: Metric, row: Mapping[str, Any], before: Mapping[str, Any], document: Mapping[str, Any], baseline: Mapping[str, Any]
) -> str:
    """Why two figures must not be compared; empty when they may."""
    if metric.kind == "bytes":
        return ""
    if metric.kind == "quality":
        other = [k for k in ("rows", "tokens") if row.get(k) != before.get(k)]
        return f"it was measured on other rows ({before.get(other[0])} {other[0]}, now {row.get(other[0])})" if other else ""
    here, there = speeds.machine_class(row, document), speeds.machine_class(before, baseline)
    if here != there:
        return f"the baseline is of another machine ({there}, this is {here})"
    return speeds.other_work(row, before)


def _grown(name: str, before: Mapping[str, Any], find: Callable[[str], Path | None]) -> str:
    """The three parts of a file that grew most, with their types; empty when one of the two is not at hand."""
    path, known = find(name), before.get("parts")
    if path is None or not isinstance(known, Mapping):
        return ""
    try:
        parts = sizes.read(path).parts
    except ModelError:
        return ""
    old = {str(n): pair for n, pair in known.items() if isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[1], int)}
    new = {p.name: (p.type, p.n_bytes) for p in parts}
    moved = sizes.changes({n: int(pair[1]) for n, pair in old.items()}, {n: pair[1] for n, pair in new.items()})
    lines = []
    for part, (a, b) in [item for item in moved.items() if item[1][1] > item[1][0]][:3]:
        types = f", {old[part][0]} -> {new[part][0]}" if part in old and old[part][0] != new[part][0] else "" if part in old else ", new"
        lines.append(f"{part} {b - a:+,} bytes{types}")
    return f"grew: {'; '.join(lines)}" if lines else ""


def figure(value: Any) -> float | None:
    """A measured number, None for anything else: missing, text, NaN, infinite."""
    return speeds.figure(value.get("loss") if isinstance(value, Mapping) else value)


def _where(row: Mapping[str, Any]) -> str:
    return " on ".join(str(row[k]) for k in ("file", "set") if k in row)


def _shown(value: float | None, metric: Metric) -> str:
    if value is None:
        return "not measured"
    return f"{value / 1e6:.1f} MB" if metric.is_bytes else f"{value:.4g}"
