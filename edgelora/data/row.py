"""What comes out of a data file: rows, and what was left out and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One conversation: (role, content) pairs, the last one the assistant's. Or plain text: one pair with the role "text".

    `line` is where it starts in its file: a line of a text file, a row of a sheet, an entry of a JSON list or a Parquet file.
    `group` is what the file itself says belongs together. What starts with "question:" or "document:" names content and means
    the same in every file; what starts with "conversation:" is an identifier of this file alone. None: the file says nothing.
    """

    messages: tuple[tuple[str, str], ...]
    line: int
    group: str | None = None

    @property
    def question(self) -> str:
        """What a held-out row must not share with a trained one: everything before the last answer; of plain text all of it."""
        told = self.messages[:-1] or self.messages
        return "\n".join(content for role, content in told if role != "system")

    @property
    def answer(self) -> str:
        return self.messages[-1][1]

    @property
    def is_text(self) -> bool:
        """Whether this is plain text, which has no turns and no template."""
        return self.messages[0][0] == "text"

    def stripped(self) -> Row:
        """The row without white space around its messages."""
        return dataclasses.replace(self, messages=tuple((role, content.strip()) for role, content in self.messages))


@dataclass(frozen=True)
class Dropped:
    """A record that makes no row, and why. `record` is what stands in the file: columns by name, or text."""

    line: int
    reason: str
    record: Mapping[str, Any] | str


@dataclass(frozen=True)
class Broken(Dropped):
    """A record that is not what its format demands: an error, unless who reads asked to have such records listed."""

    hint: str = ""


Record = Mapping[str, Any] | Broken  # of one line: columns by name, or why there are none
