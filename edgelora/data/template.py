"""Render a chat template in Jinja's sandbox, with what templates of the hub expect and nothing else.

Training, checking and talking to an exported file all render here, so none needs transformers for it. There is no clock:
templates that ask for the date (Llama 3.2) fall back to the one written in them, or no two days would train the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from edgelora.errors import ModelError

_MAX_TEMPLATE = 1 << 17  # characters
_MAX_TEXT = 1 << 22  # characters a template may produce


def render(template: str | None, messages: Sequence[tuple[str, str]], special_tokens: Mapping[str, str], *, open_turn: bool = True) -> str:
    """The text of a conversation; with `open_turn` up to where the assistant begins.

    ModelError when there is no template or it fails.
    """
    from jinja2.exceptions import TemplateError

    if not template:
        raise ModelError("the file carries no chat template", "export it again from a model with one")
    if len(template) > _MAX_TEMPLATE:
        raise ModelError(
            f"the file's chat template is {len(template)} characters long", "a real one is a few thousand; do not trust this file"
        )
    values: dict[str, Any] = {
        "messages": [{"role": role, "content": content} for role, content in messages],
        "add_generation_prompt": open_turn,
        "tools": None,
        "documents": None,
        **special_tokens,
    }
    pieces, length = [], 0
    try:
        for piece in _compiled(template).generate(values):
            length += len(piece)
            if length > _MAX_TEXT:
                raise ModelError("the file's chat template writes without end", "do not trust this file")
            pieces.append(piece)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ModelError(
            f"the chat template fails: {error}", "use a model whose template takes these turns (system, user and assistant)"
        ) from error
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says for one library's masks; here it is text like any other."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)
