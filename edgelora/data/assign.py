"""Which set every row belongs to, and which rows have to go because they would join a trained set with a held-out one.

`sealed` takes the hashes of groups from the bottom and `valid` from the top: adding, shuffling or cleaning rows, or changing
the other's share, moves no row into or out of either. So the shares hold only roughly, for every label too: a threshold that
looked at how many rows a label has would move rows when one is added.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgelora.data.keys import Keys, point

LEAST_ROWS = 4  # below this there is nothing to select on


@dataclass
class Index:
    """The keys of every row read, in order, and the set of the file that each came from (a place in `names`)."""

    names: tuple[str, ...]  # train, valid, sealed, then further held-out sets
    origin: array[int] = field(default_factory=lambda: array("B"))
    line: array[int] = field(default_factory=lambda: array("Q"))
    group: array[int] = field(default_factory=lambda: array("Q"))
    question: array[int] = field(default_factory=lambda: array("Q"))
    answer: array[int] = field(default_factory=lambda: array("Q"))
    pair: array[int] = field(default_factory=lambda: array("Q"))
    raw: array[int] = field(default_factory=lambda: array("Q"))
    elsewhere: array[int] = field(default_factory=lambda: array("Q"))

    def append(self, origin: int, line: int, keys: Keys) -> None:
        self.origin.append(origin)
        self.line.append(line)
        for name, value in keys._asdict().items():
            getattr(self, name).append(value)

    def __len__(self) -> int:
        return len(self.line)


@dataclass(frozen=True)
class Left:
    """Why a row is left out, and the row (an index) that is the reason, where there is one."""

    reason: str
    like: int | None = None


@dataclass
class Assigned:
    """The set of every row as a place in the index's names, -1 for those left out; why they were."""

    home: array[int]
    left: dict[int, Left]

    def leave(self, row: int, left: Left) -> None:
        self.home[row] = -1
        self.left[row] = left


def drawn(group: int, shares: Mapping[str, float]) -> str:
    """The set that a group's hash draws; shares of 0 draw nothing."""
    place = point(group)
    if place < shares["sealed"]:
        return "sealed"
    return "valid" if shares["valid"] and place >= 1 - shares["valid"] else "train"


def assign(index: Index, shares: Mapping[str, float], *, drop_duplicates: bool) -> Assigned:
    """Every row's set. Held-out rows stay where they are; of `valid` and `train` go the rows that share a question or group with them."""
    names = index.names
    train, valid = names.index("train"), names.index("valid")
    place = {name: number for number, name in enumerate(names)}
    home = array("b", index.origin)
    for row, origin in enumerate(index.origin):
        if origin == train:
            home[row] = place[drawn(index.group[row], shares)]
    if shares["valid"] and valid not in home:
        _lend(index, home, train, valid)
    assigned = Assigned(home, {})
    taken: dict[int, int] = {}  # question or group -> the first row that holds it back
    for wanted in (lambda h: h not in (train, valid), lambda h: h == valid, lambda h: h == train):
        held: dict[int, int] = {}
        for row in range(len(index)):
            if home[row] < 0 or not wanted(home[row]):
                continue
            keys = (index.question[row], index.elsewhere[row])
            like = next((taken[key] for key in keys if key in taken), None)
            if like is not None and home[row] in (train, valid):
                assigned.leave(row, Left(f"question stands in {names[home[like]]}", like))
                continue
            for key in keys:
                held.setdefault(key, row)
        for key, row in held.items():
            taken.setdefault(key, row)
    if drop_duplicates:
        _duplicates(index, assigned, loose={train, valid})
    return assigned


def _lend(index: Index, home: array[int], train: int, valid: int) -> None:
    """Too few rows for the hash to draw any for `valid`, and something has to select: the group whose hash is nearest to being drawn."""
    groups = {index.group[row] for row in range(len(index)) if home[row] == train}
    if sum(h == train for h in home) < LEAST_ROWS or len(groups) < 2:
        return
    nearest = max(groups)
    for row in range(len(index)):
        if home[row] == train and index.group[row] == nearest:
            home[row] = valid


def _duplicates(index: Index, assigned: Assigned, loose: set[int]) -> None:
    """Repeated rows of a set. Of sets that report only the very same text goes, so that no spelling displaces another."""
    seen: dict[tuple[int, int], int] = {}
    for row in range(len(index)):
        home = assigned.home[row]
        if home < 0:
            continue
        key = index.pair[row] if home in loose else index.raw[row]
        like = seen.setdefault((home, key), row)
        if like != row:
            assigned.leave(row, Left("duplicate", like))


def contradictions(index: Index, assigned: Assigned, sets: Sequence[str] = ("train",)) -> list[list[int]]:
    """Rows of the same question with different answers, a list for every such question."""
    wanted = {index.names.index(name) for name in sets}
    by_question: dict[int, dict[int, int]] = {}
    for row in range(len(index)):
        if assigned.home[row] in wanted:
            by_question.setdefault(index.question[row], {}).setdefault(index.answer[row], row)
    return [sorted(rows.values()) for rows in by_question.values() if len(rows) > 1]
