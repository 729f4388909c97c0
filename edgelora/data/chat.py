"""Conversations as token ids, and which of them the model is trained on.

Only the assistant's words and the token that ends its turn are trained. They are found in the rendered text: what the
template adds after a prompt that waits for an answer is the answer. So templates need no generation marks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """The template's text; with `open_turn` up to where the assistant begins. transformers renders in Jinja's sandbox."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=open_turn
        )
    except Exception as error:  # a template is a program from outside: whatever it raises is its own fault
        raise ModelError(
            f"the base's chat template fails: {error}", "choose a base whose template takes system, user and assistant turns"
        ) from error
    return str(text)


def prompt_ids(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Ids of a prompt that waits for the assistant's answer."""
    return list(tokenizer(render(tokenizer, messages, open_turn=True), add_special_tokens=False)["input_ids"])


def encode(tokenizer: Any, row: Row) -> Encoded:
    """Token ids and mask of a row. DataError when nothing of it would be trained."""
    text = render(tokenizer, row.messages)
    spans = [_span(tokenizer, row, turn, text) for turn, (role, _) in enumerate(row.messages) if role == "assistant"]
    pieces = tokenizer(text[: spans[-1][1]], add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(pieces["input_ids"]), pieces["offset_mapping"]
    trained = [any(begin <= left and right <= end and right > left for begin, end in spans) for left, right in offsets]
    if not trained[-1]:
        raise DataError(f"line {row.line}: nothing of the answer would be trained", "the base's tokenizer cuts across its own template")
    if ids[-1] != tokenizer.eos_token_id:  # the template ends a turn with plain text or nothing: the stop is learnt all the same
        ids.append(tokenizer.eos_token_id)
        trained.append(True)
    return Encoded(tuple(ids), tuple(trained))


def encode_all(tokenizer: Any, rows: Sequence[Row], max_tokens: int) -> list[tuple[Row, Encoded]]:
    """The rows of at most `max_tokens` tokens with their ids. Longer ones are left out, never cut: half an answer teaches to stop half-way."""
    encoded = [(row, encode(tokenizer, row)) for row in rows]
    return [(row, ids) for row, ids in encoded if len(ids.ids) <= max_tokens]


def with_system(template: str, system: str | None) -> str:
    """The template, with `system` in front of conversations that bring no system message of their own.

    A shipped file then behaves as it was trained in every runtime, whoever calls it.
    """
    if not system:
        return template
    quoted = json.dumps(system, ensure_ascii=False)
    return (
        "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': "
        + quoted
        + "}] + messages %}{% endif %}"
        + template
    )


def _span(tokenizer: Any, row: Row, turn: int, text: str) -> tuple[int, int]:
    """Characters (begin, end) of one assistant turn with its end-of-turn mark, without the white space after it."""
    before = render(tokenizer, row.messages[:turn], open_turn=True)
    after = render(tokenizer, row.messages[: turn + 1])
    if not (text.startswith(after) and after.startswith(before)):
        raise ModelError(
            "the base's chat template rewrites earlier turns, so its answers cannot be told apart", "choose a base with a plain template"
        )
    return len(before), len(after.rstrip())
