"""QnA Maker's export: Question, Answer, Metadata and more. Questions with one answer's number are a group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import cell
from edgelora.data.row import Dropped, Row
from edgelora.recipe import Reading

_ITS_OWN = {"Metadata", "SuggestedQuestions", "IsContextOnly", "QnaId"}


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    if not ({"Question", "Answer"} <= set(columns) and _ITS_OWN & set(columns)):
        return None
    if (reading.question or "Question", reading.answer or "Answer") != ("Question", "Answer"):
        return None
    group = reading.group or ("QnaId" if "QnaId" in columns else None)
    return {"question": "Question", "answer": "Answer", **({"group": group} if group else {})}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        group = f"conversation:{cell(record.get(mapping['group']))}" if "group" in mapping else None
        messages = (("user", _unescaped(record.get("Question"))), ("assistant", _unescaped(record.get("Answer"))))
        yield Row(messages, line, group)


def _unescaped(value: Any) -> str:
    """Its tab-separated files write line ends and tabs in a cell as \\n and \\t."""
    return cell(value).replace("\\n", "\n").replace("\\t", "\t")
