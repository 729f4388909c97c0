"""Conversations as token ids, and which of them the model is trained on.

Only the assistant's words and the token that ends its turn are trained. They are found in the rendered text: what the
template adds after a prompt that waits for an answer is the answer. So templates need no generation marks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgelora.data import template
from edgelora.data.row import Row
from edgelora.errors import DataError, ModelError


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids and, of the same length, whether each is trained (and scored)."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the first trained one."""
        return self.ids[: self.trained.index(True)]

    @property
    def n_trained(self) -> int:
        return sum(self.trained)


def render(tokenizer: Any, messages: Sequence[tuple[str, str]], *, open_turn: bool = False) -> str:
    """The template's text; with `open_turn` up to where the assistant begins. ModelError when the template refuses."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return template.render(tokenizer.get_chat_template(), messages, special, open_turn=open_turn)


def prompt_ids(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Ids of a prompt that waits for the assistant's answer."""
    return list(tokenizer(render(tokenizer, messages, open_turn=True), add_special_tokens=False)["input_ids"])


def encode(tokenizer: Any, row: Row) -> Encoded:
    """Token ids and mask of a row: of plain text everything is trained, of a conversation what the assistant says.

    An earlier answer that the template writes otherwise than when it was the last one (Qwen 3 takes its thinking out) is not
    trained here: the model never says it like that. DataError when the template refuses the row or nothing would be trained.
    """
    if row.is_text:
        ids = list(tokenizer(row.answer)["input_ids"])
        ids += [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
        return Encoded(tuple(ids), tuple(token != tokenizer.bos_token_id for token in ids))
    try:
        text = render(tokenizer, row.messages)
        spans = [span for turn, (role, _) in enumerate(row.messages) if role == "assistant" and (span := _span(tokenizer, row, turn, text))]
    except ModelError as error:
        raise DataError(f"line {row.line}: {error.message}", error.hint) from error
    if not spans or spans[-1][1] != len(text.rstrip()):
        raise ModelError(
            "the base's chat template rewrites what comes before an answer, so answers cannot be told apart",
            "choose a base with a plain template",
        )
    pieces = tokenizer(text[: spans[-1][1]], add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(pieces["input_ids"]), pieces["offset_mapping"]
    trained = [any(begin <= left and right <= end and right > left for begin, end in spans) for left, right in offsets]
    if not trained[-1]:
        raise DataError(f"line {row.line}: nothing of the answer would be trained", "the base's tokenizer cuts across its own template")
    if ids[-1] != tokenizer.eos_token_id:  # the template ends a turn with plain text or nothing: the stop is learnt all the same
        ids.append(tokenizer.eos_token_id)
        trained.append(True)
    return Encoded(tuple(ids), tuple(trained))


def parts(tokenizer: Any, row: Row) -> list[Row]:
    """The row, preceded by a row up to each earlier answer that the whole row does not train (see `encode`)."""
    answers = [turn for turn, (role, _) in enumerate(row.messages[:-1]) if role == "assistant"]
    if row.is_text or not answers:
        return [row]
    text = render(tokenizer, row.messages)
    return [replace(row, messages=row.messages[: turn + 1]) for turn in answers if _span(tokenizer, row, turn, text) is None] + [row]


def encode_all(tokenizer: Any, rows: Sequence[Row], max_tokens: int) -> list[tuple[Row, Encoded]]:
    """The rows of at most `max_tokens` tokens with their ids. Longer ones are left out, never cut: half an answer teaches to stop half-way."""
    encoded = [(part, encode(tokenizer, part)) for row in rows for part in parts(tokenizer, row)]
    return [(row, ids) for row, ids in encoded if len(ids.ids) <= max_tokens]


def with_system(written: str, system: str | None) -> str:
    """The template, with `system` in front of conversations that bring no system message of their own.

    A shipped file then behaves as it was trained in every runtime, whoever calls it.
    """
    if not system:
        return written
    quoted = json.dumps(system, ensure_ascii=False)
    return (
        "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': "
        + quoted
        + "}] + messages %}{% endif %}"
        + written
    )


def taking_system(tokenizer: Any) -> str:
    """The tokenizer's template; of one that refuses system messages (Gemma) one that puts them in front of the first turn."""
    written = str(tokenizer.get_chat_template())
    try:
        render(tokenizer, (("system", "s"), ("user", "u")), open_turn=True)
    except ModelError:
        return (
            "{% if messages and messages[0]['role'] == 'system' %}{% set messages = [{'role': messages[1]['role'], 'content': "
            "messages[0]['content'] + '\n\n' + messages[1]['content']}] + messages[2:] %}{% endif %}" + written
        )
    return written


def _span(tokenizer: Any, row: Row, turn: int, text: str) -> tuple[int, int] | None:
    """Characters (begin, end) of one assistant turn with its end-of-turn mark, without the white space after it.

    None when the turn stands in `text` otherwise than it was said.
    """
    before = render(tokenizer, row.messages[:turn], open_turn=True)
    after = render(tokenizer, row.messages[: turn + 1])
    return (len(before), len(after.rstrip())) if text.startswith(after) and after.startswith(before) else None
