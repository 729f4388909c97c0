"""Use an exported file: answer one conversation, or every row of a file. Needs only the file's own runtime."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgelora.data import template
from edgelora.data.chat import Encoded
from edgelora.data.row import Row
from edgelora.errors import DataError, ModelError, UsageError
from edgelora.runtime import Session

Message = tuple[str, str]


def prompt_ids(session: Session, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation that waits for the assistant, by the file's own template and tokenizer."""
    return session.tokenize(template.render(session.chat_template, messages, session.special_tokens))


def stream(session: Session, messages: Sequence[Message], max_new_tokens: int) -> Iterator[str]:
    """The greedy answer, piece by piece; a character split over several tokens comes when it is whole."""
    ids: list[int] = []
    shown = ""
    for token in session.generate(prompt_ids(session, messages), max_new_tokens, session.stop_ids):
        ids.append(token)
        text = session.detokenize(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = session.detokenize(ids)
    if len(text) > len(shown):
        yield text[len(shown) :]


def encode(session: Session, row: Row) -> Encoded:
    """A row as the file itself reads it: prompt, answer and stop token, the last two scored."""
    prompt = prompt_ids(session, row.messages[:-1])
    if not session.stop_ids:
        raise ModelError("the file names no end-of-sequence token", "export it again from a model with one")
    answer = [*session.tokenize(row.answer), session.stop_ids[0]]
    return Encoded((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def predict(
    session: Session, rows: Sequence[Row], labels: Sequence[str], max_new_tokens: int, progress: Callable[[float], None]
) -> Iterator[dict[str, Any]]:
    """For every row its line and question, and the answer; with `labels` the most likely one and its probability."""
    import numpy as np

    from edgelora.labels import log_shares

    for number, row in enumerate(rows, 1):
        messages = row.messages
        found: dict[str, Any] = {"line": row.line, "question": messages[-1][1]}
        if labels:
            answers = [[*session.tokenize(label), session.stop_ids[0]] for label in labels]
            scores = log_shares(session.score_answers(prompt_ids(session, messages), answers))
            best = int(scores.argmax())
            found |= {"label": labels[best], "probability": round(float(np.exp(scores[best])), 6)}
        else:
            found["answer"] = "".join(stream(session, messages, max_new_tokens)).strip()
        progress(number / len(rows))
        yield found


def check_suffix(file: Path) -> str:
    """The suffix of a file of predictions; UsageError when it names no format that they are written in."""
    suffix = file.suffix.lower()
    if suffix not in (".jsonl", ".csv", ".tsv"):
        raise UsageError(f"{file.name}: {suffix or 'no suffix'} is not a format predictions are written in", "use .jsonl, .csv or .tsv")
    return suffix


def write(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Write predictions as .jsonl, .csv or .tsv, replacing `file` in one step."""
    suffix = check_suffix(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream_:
            if suffix == ".jsonl":
                stream_.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            else:
                table = csv.DictWriter(stream_, list(found[0]), delimiter="," if suffix == ".csv" else "\t")
                table.writeheader()
                table.writerows(found)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"cannot write {file}: {error.strerror}", "choose another place with -o") from error
    os.replace(partial, file)
