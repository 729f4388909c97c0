"""SQuAD: articles with paragraphs with questions; also one question a record with its context. An article is a group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import cell
from edgelora.data.row import Broken, Dropped, Row
from edgelora.recipe import Reading


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    if "paragraphs" in columns:
        return {
            "context": "paragraphs.context",
            "question": "paragraphs.qas.question",
            "answer": "paragraphs.qas.answers",
            "group": "title",
        }
    if {"context", "question", "answers"} <= set(columns) and isinstance(first.get("answers"), dict):
        return {"context": "context", "question": "question", "answer": "answers", "group": "title" if "title" in columns else "context"}
    return None


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    nested = mapping["context"].startswith("paragraphs")
    for line, record in records:
        if not nested:
            yield _row(line, cell(record.get("context")), record, cell(record.get(mapping["group"])))
            continue
        paragraphs = record.get("paragraphs")
        for paragraph in paragraphs if isinstance(paragraphs, list) else [None]:
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
                yield Broken(
                    line,
                    "not an article of paragraphs with questions",
                    record,
                    'a row looks like {"paragraphs": [{"context": ..., "qas": [...]}]}',
                )
                continue
            for question in paragraph["qas"]:
                yield _row(line, cell(paragraph.get("context")), question, cell(record.get("title")) or cell(paragraph.get("context")))


def _row(line: int, context: str, asked: Any, document: str) -> Row | Dropped:
    if not isinstance(asked, dict):
        return Broken(
            line, f"{str(asked)[:80]!r} is not a question", str(asked), 'a question looks like {"question": "...", "answers": [...]}'
        )
    answers = asked.get("answers")
    if isinstance(answers, dict):  # columns instead of records: {"text": [...], "answer_start": [...]}
        texts = answers.get("text")
        answers = [{"text": text} for text in texts] if isinstance(texts, list) else []
    answer = answers[0].get("text") if isinstance(answers, list) and answers and isinstance(answers[0], dict) else ""
    if asked.get("is_impossible") or not answer:
        return Dropped(line, "the question has no answer", asked)
    return Row((("user", f"{context}\n\n{cell(asked.get('question'))}"), ("assistant", cell(answer))), line, f"document:{document}")
