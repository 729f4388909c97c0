"""Read a data file into rows. Knows CSV, TSV, JSON and JSONL with question/answer columns or chat messages."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgelora.data import encoding as encodings
from edgelora.errors import DataError

# Usual column names, best first; compared without case. Found columns are shown, and a recipe can name others.
QUESTIONS = ("question", "質問", "質問文", "instruction", "prompt", "query", "text", "input", "utterance", "問い", "q")
ANSWERS = ("answer", "回答", "回答文", "output", "completion", "response", "label", "category", "intent", "答え", "a")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ROLES = ("system", "user", "assistant")
_MAX_CELL = 1 << 20  # characters


@dataclass(frozen=True)
class Row:
    """One conversation: (role, content) pairs, the last one the assistant's. `line` is where it starts in its file."""

    messages: tuple[tuple[str, str], ...]
    line: int

    @property
    def question(self) -> str:
        """Everything before the last answer, which is what a held-out row must not share with a trained one."""
        return "\n".join(content for role, content in self.messages[:-1] if role != "system")

    @property
    def answer(self) -> str:
        return self.messages[-1][1]


@dataclass(frozen=True)
class Table:
    """The rows of one file, the columns they came from, and every line that was left out with the reason."""

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    dropped: tuple[tuple[int, str], ...]
    encoding: str = "utf-8"  # it was read in


def read(
    path: Path,
    *,
    question: str | None = None,
    answer: str | None = None,
    system: str | None = None,
    encoding: str | None = None,
    answered: bool = True,
) -> Table:
    """Read `path` by its suffix; `question` and `answer` name columns where the usual names do not fit.

    Without `encoding` it is found out; a byte order mark is honoured in any case.

    With ``answered=False`` the rows are questions alone, each waiting for its answer.

    Raises DataError with the line number for a file that is missing, of another encoding, malformed or without rows.
    """
    if path.suffix.lower() not in (*_DELIMITERS, ".json", ".jsonl"):
        raise DataError(f"{path.name}: {path.suffix or 'no suffix'} is not a known data format", "use .csv, .tsv, .json or .jsonl")
    text, used = _text(path, encoding)
    if path.suffix.lower() in _DELIMITERS:
        records = _delimited(path, text, _DELIMITERS[path.suffix.lower()])
    elif path.suffix.lower() == ".jsonl":
        records = _json_lines(path, text)
    else:
        records = _json_array(path, text)
    return dataclasses.replace(_table(path, list(records), question, answer, system, answered), encoding=used)


def _text(path: Path, encoding: str | None) -> tuple[str, str]:
    """The file's text and the encoding it was read in."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"data file not found: {path}", "check `data:` in the recipe; paths are relative to the recipe") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    encoding = encodings.marked(raw) or encoding or encodings.detect(raw, path.name)
    try:
        text = raw.decode(encoding)
    except LookupError:
        raise DataError(f"{encoding!r} is not an encoding", "set data.encoding, for instance utf-8, cp932 or cp1252") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path.name} line {line}: byte 0x{raw[error.start]:02x} is not {encoding}",
            "set data.encoding, for instance cp932 (Excel in Japan)",
        ) from error
    if "\0" in text:
        raise DataError(
            f"{path.name} line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a NUL byte; this is not a text file",
            "export the data as CSV or JSONL",
        )
    return text, encoding


def _delimited(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Tab-separated files carry quotation marks as text; comma-separated ones as quotes.
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    old_limit = csv.field_size_limit(_MAX_CELL)
    last = 0
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        names = list(reader.fieldnames or [])
        if names and not any(name.strip() for name in names):
            raise DataError(f"{path.name} has no header line", "the first line should name the columns, for instance question,answer")
        last = reader.line_num
        for record in reader:
            yield last + 1, record
            last = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path.name} line {last + 1}: {error}", "look for an unclosed quotation mark in that row") from error
    finally:
        csv.field_size_limit(old_limit)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _record(path, number, _json(path, line, number))


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    values = _json(path, text, 1) if text.strip() else []
    if not isinstance(values, list):
        raise DataError(
            f"{path.name}: expected a JSON list of rows, found {type(values).__name__}", "put the rows into one list, or use .jsonl"
        )
    for number, value in enumerate(values, 1):
        yield number, _record(path, number, value)


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name} line {line + error.lineno - 1}: not JSON ({error.msg})", "each row should be one JSON object"
        ) from error
    except RecursionError:
        raise DataError(f"{path.name} line {line}: nested too deeply", "each row should be one flat JSON object") from None


def _record(path: Path, line: int, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path.name} line {line}: expected an object, found {type(value).__name__}",
            'a row looks like {"question": "...", "answer": "..."}',
        )
    return value


def _table(
    path: Path,
    records: Sequence[tuple[int, Mapping[str, Any]]],
    question: str | None,
    answer: str | None,
    system: str | None,
    answered: bool,
) -> Table:
    if not records:
        raise DataError(f"{path.name} holds no rows", "put one question and answer on each line below the header")
    names = tuple(str(name) for name in records[0][1] if name is not None)
    if "messages" in names and question is None and answer is None:
        columns: tuple[str, ...] = ("messages",)
    else:
        columns = _columns(path, names, question, answer, answered)
    rows, dropped = [], []
    for line, record in records:
        messages = _messages(path, line, record) if columns == ("messages",) else _pair(record, columns)
        if not answered and messages and messages[-1][0] == "assistant":
            messages = messages[:-1]
        if system and messages and messages[0][0] != "system":
            messages = (("system", system), *messages)
        if not messages or any(not content.strip() for _, content in messages):
            dropped.append((line, "empty"))
        elif answered and (messages[-1][0] != "assistant" or len(messages) < 2):
            dropped.append((line, "does not end with an answer"))
        else:
            rows.append(Row(messages, line))
    if not rows:
        what = "both a question and an answer" if answered else "a question"
        raise DataError(f"{path.name}: none of its {len(records)} rows has {what}", f"columns used: {', '.join(columns)}; name others")
    return Table(tuple(rows), columns, tuple(dropped))


def _columns(path: Path, names: Sequence[str], question: str | None, answer: str | None, answered: bool) -> tuple[str, ...]:
    def pick(wanted: str | None, usual: Sequence[str], what: str, taken: str | None = None) -> str:
        if wanted is not None:
            if wanted not in names:
                raise DataError(f"{path.name} has no column {wanted!r}", f"its columns: {', '.join(names)}; set data.{what}")
            return wanted
        lower = {name.strip().lower(): name for name in reversed(names) if name != taken}
        for name in usual:
            if name in lower:
                return lower[name]
        raise DataError(f"{path.name}: no column looks like the {what}", f"its columns: {', '.join(names)}; set data.{what}")

    first = pick(question, QUESTIONS, "question")
    return (first, pick(answer, ANSWERS, "answer", taken=first)) if answered else (first,)


def _pair(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    question, *answer = (_cell(record.get(column)) for column in columns)
    extra = _cell(record.get("input")) if columns[0] == "instruction" else ""  # Alpaca: instruction, input, output
    return ("user", f"{question}\n\n{extra}" if extra else question), *(("assistant", text) for text in answer)


def _messages(path: Path, line: int, record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise DataError(
            f"{path.name} line {line}: `messages` is not a list", 'a row looks like {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    found = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(message.get("content"), str):
            raise DataError(
                f"{path.name} line {line}: {str(message)[:80]!r} is not a message", f"role is one of {', '.join(_ROLES)}, content is text"
            )
        found.append((role, message["content"].strip()))
    return tuple(found)


def _cell(value: Any) -> str:
    return "" if value is None else value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
