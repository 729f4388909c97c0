"""Read, clean and split a data set in two passes. Rows wait between them in a spool, so memory holds only hashes and counts.

The first pass mends every text by itself, hashes the raw text and counts spellings. Then, knowing the whole, the sets are
assigned and the data set's own spellings chosen. The second pass writes these spellings and yields the finished rows.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from edgelora import doctor
from edgelora import recipe as recipes
from edgelora.data import assign, clean, gaps
from edgelora.data.assign import Assigned, Index, Left
from edgelora.data.clean import Change, Decided, Messages, Seen
from edgelora.data.keys import Keys, keys
from edgelora.data.row import Dropped, Row
from edgelora.data.source import Source, open_source
from edgelora.errors import DataError
from edgelora.progress import Progress

T = TypeVar("T")
R = TypeVar("R")
_CHUNK = 256  # rows that travel to a process together
_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder at every call


class Finding(NamedTuple):
    """Something to look at in a row, which was not changed."""

    what: str  # "personal data: phone", "gap: ends in the middle of a sentence", ...
    turn: int
    text: str


class Finished(NamedTuple):
    """A row of one set as it will be used, as it was read, and what was done to it."""

    set: str
    row: Row
    raw: Messages
    changes: tuple[Change, ...]
    findings: tuple[Finding, ...]


class _Met(NamedTuple):
    """What the first pass keeps of a row: its hashes, its MinHash (bytes), the length of its answer, its label, and the rest as JSON."""

    line: int
    keys: Keys
    emptied: bool  # whether cleaning left nothing of a message; the entry then holds the row as it was
    signature: bytes
    length: int
    label: str | None
    entry: str


@dataclass
class Spool:
    """Entries in order, each a line of JSON: in a file, or in memory without one."""

    stream: IO[bytes] | None = None
    places: array[int] = field(default_factory=lambda: array("Q"))
    held: list[str] = field(default_factory=list)
    bytes: int = 0

    def append(self, entry: str) -> None:
        if self.stream is None:
            self.held.append(entry)
        else:
            raw = entry.encode("utf-8", "surrogatepass") + b"\n"
            self.places.append(self.bytes)
            self.stream.write(raw)
            self.bytes += len(raw)

    def __getitem__(self, number: int) -> str:
        if self.stream is None:
            return self.held[number]
        self.stream.seek(self.places[number])
        return self.stream.readline().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        if self.stream is None:
            return iter(self.held)
        self.stream.seek(0)
        return (line.decode("utf-8", "surrogatepass") for line in self.stream)


@dataclass
class Prepared:
    """A data set that was read and judged, ready to be gone through once more."""

    data: recipes.Data
    sources: Mapping[str, Source]  # of every set that has a file
    index: Index
    spool: Spool
    assigned: Assigned
    decided: Decided
    unread: list[tuple[str, Dropped]]  # (set, record) that made no row
    lengths: Counter[int]  # of answers, in characters
    labels: list[str | None]  # of every row, where labels are what is learnt
    near: list[tuple[int, int, float]]  # (row, the row it is like, similarity)

    @property
    def counts(self) -> dict[str, int]:
        """Rows in every set."""
        homes = Counter(self.assigned.home)
        return {name: homes[number] for number, name in enumerate(self.index.names) if homes[number] or number < 3}

    def finished(self, processes: int = 1) -> Iterator[Finished]:
        """The second pass: every row that stays, in the order of the files."""
        names, home = self.index.names, self.assigned.home
        entries = ((names[home[n]], entry) for n, entry in enumerate(self.spool) if home[n] >= 0)
        second = partial(_second, clean_as=self.data.clean, decided=self.decided, labels=self.data.task == "classify")
        for rows in _mapped(second, _chunks(entries), processes):
            yield from rows

    def entry(self, number: int) -> tuple[Row, Messages]:
        """A row as the first pass left it, and as it was read."""
        line, group, raw, mended, _, _ = json.loads(self.spool[number])
        return Row(_messages(mended or raw), line, group), _messages(raw)


def prepare(
    data: recipes.Data,
    folder: Path,
    *,
    spool: Spool | None = None,
    processes: int = 1,
    lenient: bool = False,
    progress: Progress = lambda share, text: None,
) -> Prepared:
    """The first pass over all files that `data` names (relative to `folder`), and the decisions that follow from it.

    With `lenient`, malformed records are left out and listed; otherwise they end the reading. DataError for files that
    cannot be read or hold no rows.
    """
    doctor.require(_needs(data.clean))
    files = {"train": data.train, "valid": data.valid, "sealed": data.sealed, **data.held_out}
    index = Index(tuple(files))
    sources = {name: open_source(folder / file, data, lenient=lenient) for name, file in files.items() if file is not None}
    shares = {"sealed": 0.0 if data.sealed else data.sealed_share, "valid": 0.0 if data.valid else data.valid_share}
    spool = spool or Spool()
    unread: list[tuple[str, Dropped]] = []
    seen, lengths, labels, signatures = Seen(), Counter[int](), list[str | None](), bytearray()
    size = sum(source.path.stat().st_size for source in sources.values()) or 1
    read, emptied = 0, list[int]()
    for number, name in enumerate(files):
        if name not in sources:
            continue
        rows = _rows(sources[name], name, unread)
        first = partial(_first, data=data, shares=shares if name == "train" else None, trains=name == "train")
        before = len(index)
        for chunk, learnt in _mapped(first, _chunks(rows), processes):
            seen.add(learnt)
            for met in chunk:
                if met.emptied:
                    emptied.append(len(index))
                index.append(number, met.line, met.keys)
                lengths[met.length] += 1
                labels.append(met.label)
                signatures += met.signature
                spool.append(met.entry)
                read += len(met.entry)
            progress(min(0.99, read / size), f"{len(index):,} rows read")
        if len(index) == before:
            raise _no_rows(sources[name], [dropped for set_name, dropped in unread if set_name == name])
    progress(1.0, f"{len(index):,} rows: sets and spellings")
    assigned = assign.assign(index, shares, drop_duplicates=data.clean.duplicates == "drop")
    for row in emptied:
        if assigned.home[row] in (0, 1):  # a row that reports stays, as it was: what reports does not depend on cleaning
            assigned.leave(row, Left("nothing is left of it after cleaning"))
    prepared = Prepared(data, sources, index, spool, assigned, clean.decide(seen, data.clean), unread, lengths, labels, [])
    if signatures:
        prepared.near = _near(prepared, signatures)
    return prepared


def _near(prepared: Prepared, signatures: bytearray) -> list[tuple[int, int, float]]:
    """Rows that are nearly the same as another; under `near: drop` those that train or select leave the data set."""
    import numpy as np

    from edgelora.data import duplicates

    home = np.frombuffer(prepared.assigned.home, dtype=np.int8)
    rank = np.select(
        [home > 1, home == 1, home == 0], [0, 1, 2], 3
    )  # held-out rows stay before those that select, and these before trained ones
    order = np.argsort(rank, kind="stable")
    order = order[home[order] >= 0]
    matrix = np.frombuffer(signatures, dtype=np.uint32).reshape(-1, duplicates.PERMUTATIONS)
    found = duplicates.near(matrix, order, prepared.data.clean.similarity, lambda row: _compared(prepared.entry(row)[1]))
    if prepared.data.clean.near == "drop":
        for row, like, _ in found:
            if prepared.assigned.home[row] in (0, 1):
                prepared.assigned.leave(
                    row, Left(f"nearly the same as a row of {prepared.index.names[prepared.assigned.home[like]]}", like)
                )
    return [(row, like, round(similarity, 3)) for row, like, similarity in found]


def _needs(settings: recipes.Clean) -> list[str]:
    """The packages that these settings need."""
    wanted = (("ftfy", settings.mojibake), ("symspellpy", settings.typos), ("rensa", settings.near), ("numpy", settings.near))
    return [module for module, switch in wanted if switch != "none"]


def _rows(source: Source, name: str, unread: list[tuple[str, Dropped]]) -> Iterator[Row]:
    for found in source:
        if isinstance(found, Row):
            yield found
        else:
            unread.append((name, found))


def _no_rows(source: Source, unread: Sequence[Dropped]) -> DataError:
    used = ", ".join(dict.fromkeys(source.mapping.values()))
    return DataError(
        f"{source.path.name}: none of its {len(unread)} rows has both a question and an answer", f"columns used: {used}; name others"
    )


def _first(rows: Sequence[Row], *, data: recipes.Data, shares: Mapping[str, float] | None, trains: bool) -> tuple[list[_Met], Seen]:
    """The first pass over some rows. Only rows that will train are counted: what is held out decides nothing."""
    seen = Seen()
    met = []
    classify = data.task == "classify"
    for row in rows:
        made = keys(row)
        mended, changes = _mend(row.messages, data.clean, classify)
        emptied = any(not content.strip() for _, content in mended)
        if emptied:
            mended, changes = row.messages, []
        if trains and (shares is None or assign.drawn(made.group, shares) == "train"):
            clean.observe(mended[:-1] if classify else mended, data.clean, seen)
        findings = [Finding(f"personal data: {found.kind}", turn, found.text) for turn, found in clean.report_personal(mended, data.clean)]
        answer = mended[-1][1]
        if not classify and not row.is_text:
            findings += [Finding(f"gap: {what}", len(mended) - 1, answer[-60:]) for what in gaps.look(answer)]
        entry = [row.line, row.group, row.messages, mended if changes else None, changes, findings]
        met.append(
            _Met(
                row.line,
                made,
                emptied,
                b"" if data.clean.near == "none" else _signature(row.messages),
                len(answer),
                answer if classify else None,
                _encode(entry),
            )
        )
    return met, seen


def _signature(messages: Messages) -> bytes:
    from edgelora.data import duplicates

    return duplicates.signature(_compared(messages)).tobytes()


def _compared(messages: Messages) -> str:
    return "\n".join(content for role, content in messages if role != "system")


def _second(rows: Sequence[tuple[str, str]], *, clean_as: recipes.Clean, decided: Decided, labels: bool) -> list[Finished]:
    """The second pass over some rows, each (set, entry)."""
    finished = []
    steps = clean.second(clean_as, decided)
    for name, entry in rows:
        line, group, raw, mended, changes, findings = json.loads(entry)
        messages = _messages(mended or raw)
        if labels:
            head, more = clean.apply(messages[:-1], steps)
            messages = (*head, messages[-1])
        else:
            messages, more = clean.apply(messages, steps)
        made = (*(Change(*change) for change in changes), *more)
        finished.append(Finished(name, Row(messages, line, group), _messages(raw), made, tuple(Finding(*found) for found in findings)))
    return finished


def _mend(messages: Messages, settings: recipes.Clean, classify: bool) -> tuple[Messages, list[Change]]:
    """The first cleaning of a row. A label is a name: of it only white space around it goes."""
    if not classify:
        return clean.mend(messages, settings)
    head, changes = clean.mend(messages[:-1], settings)
    role, label = messages[-1]
    if label.strip() != label:
        changes.append(Change("whitespace", len(head), label, label.strip()))
    return (*head, (role, label.strip())), changes


def _messages(values: Any) -> Messages:
    return tuple((role, content) for role, content in values)


def _chunks(values: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _mapped(function: Callable[[T], R], tasks: Iterable[T], processes: int) -> Iterator[R]:
    """`map` in order over several processes, with only a few tasks on their way at a time."""
    if processes == 1:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: deque[Any] = deque()
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) >= 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def without_mending(settings: recipes.Clean) -> recipes.Clean:
    """The same settings with every step that changes text switched off."""
    steps = dict.fromkeys((*clean.STEPS, "variants", "spelling"), "none")
    return dataclasses.replace(settings, **steps, typos="none", personal="report")  # type: ignore[arg-type]
