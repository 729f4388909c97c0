"""Tables of hardware in YAML, the package's own or a user's in its place: every problem told at once, rows chosen by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from edgelora.errors import DataError, UsageError

Row = TypeVar("Row")


def refuse(path: Path, own: Path, problems: Sequence[str]) -> None:
    """DataError that lists the problems, if there are any; `own` is the package's table, an example to follow."""
    if problems:
        raise DataError(f"{path}:\n" + "\n".join(f"  {p}" for p in problems), f"see edgelora/{own.name} for a table that works")


def chosen(rows: Mapping[str, Row], names: Sequence[str], kind: str, option: str) -> list[Row]:
    """The rows of those names, each once; UsageError for the first name that is not there. `kind` is what a row is, `option` what names another table."""
    for name in names:
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1)
            raise UsageError(
                f"no {kind} {name!r} in the table" + (f"; did you mean {near[0]!r}?" if near else ""),
                f"known: {', '.join(rows)}; or add it to a copy of the table and name that with {option}",
            )
    return [rows[name] for name in dict.fromkeys(names)]
