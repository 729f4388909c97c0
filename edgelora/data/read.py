"""All rows of a data file at once, for what fits into memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelora.data.row import Row as Row
from edgelora.data.source import Source, open_source
from edgelora.errors import DataError
from edgelora.recipe import Reading


@dataclass(frozen=True)
class Table:
    """The rows of one file, how it was read, and every line that was left out with the reason."""

    rows: tuple[Row, ...]
    source: Source

    @property
    def dropped(self) -> tuple[tuple[int, str], ...]:
        return tuple(self.source.dropped)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that questions and answers came from."""
        return tuple(dict.fromkeys(self.source.mapping.values()))


def read(path: Path, reading: Reading | None = None, *, answered: bool = True) -> Table:
    """The rows of `path`, their messages without white space around them.

    With ``answered=False`` the rows are questions alone, each waiting for its answer. Raises DataError with the line for a
    file that is missing, of another encoding, malformed or without rows.
    """
    source = open_source(path, reading or Reading(), answered=answered)
    rows = tuple(row.stripped() for row in source.rows())
    if not rows:
        what = "both a question and an answer" if answered else "a question"
        used = ", ".join(dict.fromkeys(source.mapping.values()))
        raise DataError(f"{path.name}: none of its {len(source.dropped)} rows has {what}", f"columns used: {used}; name others")
    return Table(rows, source)
