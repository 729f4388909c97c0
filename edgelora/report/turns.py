"""Files that took turns in one bench, each against the first of them: which is faster, and whether that is more than chance.

Repeats are compared pair by pair, so the verdict holds on a machine whose speed drifts; two reports of other minutes cannot be told apart as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgelora import speeds
from edgelora.report import differences
from edgelora.report import figures as f
from edgelora.report.tables import Column, Row, Table, of, rows, section, tabulate, text

_WORK = ("threads", "prompt_tokens", "decode_tokens", "workload")


def compared(bench: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of a report's `in_turns`: every row of a bench but the first that did its work in the same turns, against that one."""
    return list(_compared(bench))


def _compared(bench: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in bench:
        first = next(other for other in bench if other is row or _beside(row, other))
        if first is row:
            continue
        yield {
            **{key: row.get(key) for key in ("file", "runtime", "threads", "prompt_tokens")},
            "against": first.get("file"),
            "against_runtime": first.get("runtime"),
            "repeats": len((row.get("samples_ms") or {}).get("ttft") or ()),
            **{name: _verdict(first, row, name) for name in ("decode", "ttft")},
        }


def _beside(row: Row, other: Row) -> bool:
    return speeds.in_turns(row, other) and all(row.get(key) == other.get(key) for key in _WORK)


def _verdict(first: Row, row: Row, name: str) -> dict[str, Any]:
    """The change of a speed or of a time, and what it is: real, noise or cannot tell."""
    found = speeds.slowdown(first, row, name, differences.ALLOWED)
    share = found.share if found else None
    change = share if share is None or name == "ttft" else 1 / (1 + share) - 1
    return {"change": change, **differences.speed(first, row, name)}


def table(doc: Row) -> Table:
    return tabulate(
        rows(doc, "in_turns"),
        [
            Column("File", text("file"), numeric=False),
            Column("In", text("runtime"), numeric=False),
            Column("Against", against, numeric=False),
            Column("Threads", of("threads", f.count), by="threads"),
            Column("Prompt tokens", of("prompt_tokens", f.count), by="prompt_tokens"),
            Column("Repeats", of("repeats", f.count), by="repeats"),
            Column("Decode speed", lambda row: said(row, "decode"), False, lambda row: section(row, "decode").get("change")),
            Column("Time to the first token", lambda row: said(row, "ttft"), False, lambda row: section(row, "ttft").get("change")),
        ],
    )


def against(row: Row) -> str:
    other = row.get("against_runtime")
    return f.aside(row.get("against") or "", f"in {other}" if other and other != row.get("runtime") else "")


def said(row: Row, name: str) -> str:
    """'−9.1 % (slower, p = 0.0002)', '+0.4 % (noise: within 5 %)'."""
    found = section(row, name)
    word, why = found.get("word"), (found.get("why") or "").removesuffix(" that this is chance")
    return f.aside(f.change(found.get("change")), why if word == differences.REAL else f"{word}: {why}" if word else "")


def sentence(row: Row) -> str:
    """The row for a terminal."""
    threads = f"{row.get('threads')} thread{'' if row.get('threads') == 1 else 's'}"
    return (
        f"{row.get('file')} against {against(row)}, {row.get('runtime')}, {threads}, prompt {row.get('prompt_tokens')}, "
        f"{row.get('repeats')} repeats in turns: decode speed {said(row, 'decode')}; time to the first token {said(row, 'ttft')}"
    )
