"""What is in a data file: how it was read, what its rows are like, what repeats, what looks odd, and what a model would see."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgelora.data import chat, languages, oddities
from edgelora.data.chat import Encoded
from edgelora.data.keys import normal
from edgelora.data.oddities import Odd
from edgelora.data.row import Broken, Dropped, Row
from edgelora.data.source import Source, open_source
from edgelora.errors import EdgeloraError
from edgelora.progress import Progress
from edgelora.recipe import Reading

_SAMPLE = 2000  # rows, spread over the file, of which tokens and languages are counted
_EXAMPLES = 3
_SHOWN = 5  # lines and pairs listed of each kind
_MOST_LABELS = 200
_MOST_REASONS = 100
_LONGEST_LABEL = 60  # characters
_LIMITS = (256, 512, 1024, 2048)  # tokens
_HELD = 400_000_000  # characters of rows held to find near-duplicates
_LEAST_NEAR = 20  # characters; in a shorter text one letter changes a quarter of all pieces
_PUNCTUATION = re.compile(r"[^\w\s]")
NEAR = 0.8  # Jaccard similarity of pieces of five characters


@dataclass
class _Rows:
    """What is kept of the rows of one file: hashes, lengths, and as many texts as there is room for."""

    lines: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # what a row asks, to compare with others
    characters: int = 0
    sample: list[Row] = field(default_factory=list)
    step: int = 1  # every `step`-th row is in the sample
    question_lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # while they may be labels
    groups: set[str] = field(default_factory=set)
    turns: Counter[int] = field(default_factory=Counter)
    left: _Left = field(default_factory=lambda: _Left())
    odd: dict[str, Odd] = field(default_factory=dict)
    same: _Repeats = field(default_factory=lambda: _Repeats())
    alike: _Repeats = field(default_factory=lambda: _Repeats())
    asked: _Repeats = field(default_factory=lambda: _Repeats())
    replied: _Repeats = field(default_factory=lambda: _Repeats())
    answer_to: dict[int, int] = field(default_factory=dict)  # question -> its first answer
    contradicted: set[int] = field(default_factory=set)  # questions with another answer


class _Left:
    """Why records make no row: how many for each reason, and the first lines."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, list[int]]] = {}

    def add(self, reason: str, line: int) -> None:
        if reason not in self.found and len(self.found) >= _MOST_REASONS:
            reason = "other reasons"
        count, lines = self.found.get(reason, (0, []))
        self.found[reason] = (count + 1, lines if len(lines) == 4 * _SHOWN else [*lines, line])

    def document(self) -> dict[str, Any]:
        return {reason: {"rows": count, "lines": lines} for reason, (count, lines) in self.found.items()}


@dataclass
class _Repeats:
    """Which rows repeat an earlier one."""

    first: dict[int, int] = field(default_factory=dict)  # hash -> line
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (line, line of the earlier one), the first few
    count: int = 0

    def add(self, key: int, line: int) -> None:
        if key not in self.first:
            self.first[key] = line
            return
        self.count += 1
        if len(self.pairs) < _SHOWN:
            self.pairs.append((line, self.first[key]))

    def document(self) -> dict[str, Any]:
        return {"rows": self.count, "lines": self.pairs}


def inspect(
    path: Path,
    reading: Reading,
    *,
    against: Path | None = None,
    tokenizer: Any = None,
    base: str | None = None,
    near: bool = True,
    progress: Progress = lambda share, text: None,
) -> dict[str, Any]:
    """Everything about `path` as one JSON document.

    `against` is a file whose rows must not stand in this one. `tokenizer`, that of the model `base`, counts tokens and
    renders examples. DataError for files that cannot be read at all; malformed records are listed.
    """
    source = open_source(path, reading, lenient=True)
    document = _form(source)
    if source.layout is None:
        return document | _cells(source, progress)
    rows = _read(source, progress)
    document |= {"rows": len(rows.lines), "left_out": rows.left.document()}
    if not rows.lines:
        return document | {"odd": _odd(rows.odd)}
    found = languages.shares(_words(row) for row in rows.sample)
    document |= {
        "turns": dict(sorted(rows.turns.items())),
        "groups": len(rows.groups),
        "characters": {"question": _lengths(rows.question_lengths), "answer": _lengths(rows.answer_lengths)},
        "languages": None if found is None else {"shares": found[0], "texts": found[1]},
        "labels": _labels(rows),
        "odd": _odd(rows.odd),
        "repeats": {
            "same": rows.same.document(),
            "alike": rows.alike.document(),
            "question": rows.asked.document(),
            "answer": rows.replied.document(),
            "contradicted_questions": len(rows.contradicted),
        },
    }
    other = _read(open_source(against, _for_other(reading, against, path), lenient=True), progress) if against is not None else None
    if other is not None and against is not None:
        document["against"] = {"file": against.name, "rows": len(other.lines), **_leaks(rows, other)}
    if near:
        document |= _near(rows, other, progress)
    if tokenizer is not None:
        document |= _tokens(rows, tokenizer, base)
    return document


def _form(source: Source) -> dict[str, Any]:
    opened = source.opened
    return {
        "file": source.path.name,
        "size_bytes": source.path.stat().st_size,
        "format": source.format,
        "encoding": opened.encoding,
        "delimiter": opened.delimiter,
        "sheet": opened.sheet,
        "header": opened.header,
        "skipped": list(opened.skipped),
        "columns": list(opened.columns),
        "layout": source.layout,
        "mapping": dict(source.mapping),
        "counts": opened.counts,
    }


def _cells(source: Source, progress: Progress) -> dict[str, Any]:
    """Of a table without questions and answers: its records, what is odd in any cell, and which records repeat."""
    found: dict[str, Odd] = {}
    left = _Left()
    same = _Repeats()
    records = 0
    for line, record in source.opened.records():
        if isinstance(record, Broken):
            left.add(record.reason, line)
            continue
        records += 1
        cells = [value for value in record.values() if isinstance(value, str)]
        if not any(cell.strip() for cell in cells) and len(cells) == len(record):
            left.add("empty", line)
            continue
        same.add(_hash(repr(record)), line)
        oddities.look(cells, line, found)
        if records % 1000 == 0:
            progress(0.5, f"{records:,} records")
    return {
        "records": records,
        "left_out": left.document(),
        "odd": _odd(found),
        "repeats": {"same": same.document()},
        "why": source.unmapped().message,
    }


def _read(source: Source, progress: Progress) -> _Rows:
    rows = _Rows()
    for found in source:
        if isinstance(found, Dropped):
            rows.left.add(found.reason, found.line)
            continue
        _add(rows, found)
        if len(rows.lines) % 1000 == 0:
            progress(0.3, f"{len(rows.lines):,} rows")
    return rows


def _add(rows: _Rows, row: Row) -> None:
    number, told, answer = len(rows.lines), _told(row), row.answer.strip()
    rows.lines.append(row.line)
    if rows.characters < _HELD:
        rows.told.append(told)
        rows.characters += len(told)
    if number % rows.step == 0:
        rows.sample.append(row)
        if len(rows.sample) > 2 * _SAMPLE:
            rows.sample, rows.step = rows.sample[::2], 2 * rows.step
    rows.question_lengths.append(len(row.question))
    rows.answer_lengths.append(len(row.answer))
    if len(rows.answers) <= _MOST_LABELS or answer in rows.answers:
        rows.answers[answer[: _LONGEST_LABEL + 1]] += 1
    if row.group is not None:
        rows.groups.add(row.group)
    rows.turns[len([role for role, _ in row.messages if role != "system"])] += 1
    oddities.look((content for _, content in row.messages), row.line, rows.odd)
    # A place in the file may hold several rows, so repeats are told by their number there.
    question = _hash(normal(told))
    rows.same.add(_hash(f"{told}\0{row.answer}"), row.line)
    rows.alike.add(_hash(f"{_folded(told)}\0{_folded(answer)}"), row.line)
    rows.asked.add(_hash(_folded(told)), row.line)
    rows.replied.add(_hash(_folded(answer)), row.line)
    reply = _hash(_folded(answer))
    if rows.answer_to.setdefault(question, reply) != reply:
        rows.contradicted.add(question)


def _leaks(rows: _Rows, other: _Rows) -> dict[str, Any]:
    """Rows of the other file whose question also stands in this one, told in three ways, each looser than the one before."""
    found: dict[str, Any] = {}
    for name, form in (("same", _folded), ("unpunctuated", _unpunctuated), ("letters", normal)):
        here: dict[int, int] = {}
        for line, told in zip(rows.lines, rows.told, strict=False):
            here.setdefault(_hash(form(told)), line)
        pairs = [(line, here[key]) for line, told in zip(other.lines, other.told, strict=False) if (key := _hash(form(told))) in here]
        found[name] = {"rows": len(pairs), "lines": pairs[:_SHOWN]}
    return found


def _near(rows: _Rows, other: _Rows | None, progress: Progress) -> dict[str, Any]:
    """Questions that are nearly the same, in this file and against the other one. Equal ones are no news here."""
    import numpy as np

    from edgelora.data import duplicates

    texts: list[str] = []
    places: list[tuple[bool, int]] = []  # whether of this file, line
    seen: set[int] = set()
    for mine, part in ((True, rows), (False, other)):
        for line, told in zip(part.lines, part.told, strict=False) if part is not None else ():
            key = _hash(normal(told))
            if key not in seen and len(told) >= _LEAST_NEAR:
                seen.add(key)
                texts.append(told)
                places.append((mine, line))
    if not texts:
        return {"near": {"rows": 0, "lines": []}}
    signatures = np.empty((len(texts), duplicates.PERMUTATIONS), dtype=np.uint32)
    for number, text in enumerate(texts):
        signatures[number] = duplicates.signature(text)
        if number % 500 == 0:
            progress(0.3 + 0.6 * number / len(texts), "near-duplicates")
    found = duplicates.near(signatures, np.arange(len(texts)), NEAR, lambda number: texts[number])
    inside = [(places[a][1], places[b][1], round(float(s), 2)) for a, b, s in found if places[a][0] and places[b][0]]
    across = [(places[a][1], places[b][1], round(float(s), 2)) for a, b, s in found if places[a][0] != places[b][0]]
    document: dict[str, Any] = {"near": {"similarity": NEAR, "rows": len(inside), "lines": inside[:_SHOWN]}}
    if other is not None:
        document["near_against"] = {"similarity": NEAR, "rows": len(across), "lines": across[:_SHOWN]}
    return document


def _tokens(rows: _Rows, tokenizer: Any, base: str | None) -> dict[str, Any]:
    """Lengths in the base's tokens, and examples as the model sees them. Rows that it cannot take are counted with the reason."""
    encoded: list[tuple[Row, Encoded]] = []
    problems = _Left()
    for row in rows.sample[: 2 * _SAMPLE]:
        try:
            encoded.append((row, chat.encode(tokenizer, row.stripped())))
        except EdgeloraError as error:
            problems.add(error.message.removeprefix(f"line {row.line}: "), row.line)
    lengths = [len(ids.ids) for _, ids in encoded]
    return {
        "tokens": {
            "base": base,
            "rows": len(rows.sample),
            "sampled": rows.step > 1,
            "row": _lengths(lengths) if lengths else None,
            "trained": sum(ids.n_trained for _, ids in encoded),
            "over": {limit: sum(length > limit for length in lengths) for limit in _LIMITS},
            "refused": problems.document(),
        },
        "examples": [{"line": row.line, "pieces": pieces(tokenizer, ids)} for row, ids in _spread(encoded)],
    }


def pieces(tokenizer: Any, encoded: Encoded) -> list[tuple[str, bool]]:
    """A row as the model sees it, special tokens written out: runs of text, and whether they are trained on."""
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), trained) for ids, trained in runs]


def _spread(encoded: Sequence[tuple[Row, Encoded]]) -> Iterator[tuple[Row, Encoded]]:
    """A short, a middling and a long row: by length at a tenth, a half and nine tenths."""
    ordered = sorted(encoded, key=lambda item: len(item[1].ids))
    places = dict.fromkeys(int(share * (len(ordered) - 1)) for share in (0.1, 0.5, 0.9)) if ordered else {}
    for place in list(places)[:_EXAMPLES]:
        yield ordered[place]


def _labels(rows: _Rows) -> dict[str, Any] | None:
    """The answers with their counts, where they are few enough and short enough to be labels."""
    count = len(rows.lines)
    if rows.sample[0].is_text or len(rows.answers) > min(_MOST_LABELS, count / 5) or max(map(len, rows.answers)) > _LONGEST_LABEL:
        return None
    return dict(rows.answers.most_common())


def _for_other(reading: Reading, against: Path, path: Path) -> Reading:
    """How the other file is read: as this one where it has the same suffix, else found out but for the columns."""
    if against.suffix == path.suffix:
        return reading
    return Reading(question=reading.question, answer=reading.answer)


def _told(row: Row) -> str:
    """What a row asks: where the file names the question apart from what is added to it (choices), that."""
    if row.group is not None and row.group.startswith("question:"):
        return row.group.removeprefix("question:")
    return row.question


def _words(row: Row) -> str:
    return "\n".join(content for _, content in row.messages)


def _folded(text: str) -> str:
    """Without case and the amount of white space."""
    return " ".join(text.casefold().split())


def _unpunctuated(text: str) -> str:
    """Without punctuation as well."""
    return _folded(_PUNCTUATION.sub("", text))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _lengths(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    at = {name: ordered[int(share * (len(ordered) - 1))] for name, share in (("median", 0.5), ("p95", 0.95))}
    return {"least": ordered[0], **at, "most": ordered[-1], "mean": round(sum(ordered) / len(ordered), 1)}


def _odd(found: Mapping[str, Odd]) -> dict[str, Any]:
    return {name: asdict(found[name]) for name in oddities.ODDITIES if name in found}
