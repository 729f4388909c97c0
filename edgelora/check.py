"""Budgets: limits on what was measured. A limit without a measurement fails too: nobody looked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelora import recipe as recipes
from edgelora.errors import UsageError

# name -> (report section, key in its rows, is it a size in bytes, does more than the limit break it)
LIMITS: dict[str, tuple[str, str, bool, bool]] = {
    "size": ("files", "size_bytes", True, True),
    "kl": ("files", "kl", False, True),
    "top1": ("files", "top1", False, False),
    "loss": ("losses", "after", False, True),
    "change": ("losses", "change_high", False, True),
    "accuracy": ("accuracy", "after", False, False),
    "peak_rss": ("bench", "peak_rss_bytes", True, True),
    "ttft_ms": ("bench", "ttft_ms", False, True),
    "decode_tok_per_s": ("bench", "decode_tok_per_s", False, False),
}
_LIMIT = re.compile(r"^\s*(<=|>=)?\s*(.+?)\s*$")


@dataclass(frozen=True)
class Verdict:
    """One limit held against one row. `value` is None when nothing was measured, which is never a pass."""

    what: str
    limit: str
    value: float | None
    ok: bool

    def as_row(self) -> dict[str, Any]:
        shown = "not measured" if self.value is None else _shown(self.value, self.limit)
        return {"what": self.what, "limit": self.limit, "value": shown, "ok": self.ok}


def parse(budgets: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """name -> (limit, is it an upper one). UsageError lists every budget that cannot be read."""
    limits, problems = {}, []
    for name, text in budgets.items():
        if name not in LIMITS:
            problems.append(f"{name}: not a budget; known: {', '.join(LIMITS)}")
            continue
        _, _, is_size, upper = LIMITS[name]
        match = _LIMIT.match(str(text))
        sign, number = (match[1], match[2]) if match else (None, "")
        try:
            limit = float(recipes.size_bytes(int(number) if number.isdigit() else number)) if is_size else float(number)
            if limit != limit:
                raise ValueError(f"{text!r} is not a number")
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if sign and (sign == "<=") != upper:
            problems.append(f"{name}: {sign} would allow what a budget should stop; write {'<=' if upper else '>='}")
        limits[name] = (limit, upper)
    if problems:
        raise UsageError("budgets:\n" + "\n".join(f"  {p}" for p in problems), "for instance size: 130MB, kl: 0.3, decode_tok_per_s: 15")
    return limits


def check(document: Mapping[str, Any], budgets: Mapping[str, Any]) -> list[Verdict]:
    """Hold every budget against every row of a report that it speaks of."""
    verdicts = []
    for name, (limit, upper) in parse(budgets).items():
        section, key, _, _ = LIMITS[name]
        text = f"{'<=' if upper else '>='} {budgets[name] if not str(budgets[name]).strip().startswith(('<', '>')) else str(budgets[name]).strip()[2:].strip()}"
        rows = list(document.get(section) or [])
        if not rows:
            verdicts.append(Verdict(f"{name}: no {section} in the report", text, None, False))
        for row in rows:
            value = _number(row.get(key))
            where = " on ".join(str(row[k]) for k in ("file", "set") if k in row)
            held = value is not None and (value <= limit if upper else value >= limit)
            verdicts.append(Verdict(f"{name} of {where}", text, value, held))
    return verdicts


def broken(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if not verdict.ok]


def _number(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = value.get("loss")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    return float(value)


def _shown(value: float, limit: str) -> str:
    return f"{value / 1e6:.1f} MB" if limit.rstrip().endswith("B") else f"{value:.4g}"
