"""Render a chat template in Jinja's sandbox, with what templates of the hub expect and nothing else.

Training, checking and talking to an exported file all render here, so none needs transformers for it. There is no clock:
templates that ask for the date (Llama 3.2) fall back to the one written in them, or no two days would train the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from edgelora.errors import ModelError

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

_MAX_TEMPLATE = 1 << 17  # characters
_MAX_TEXT = 1 << 22  # characters a template may produce


def render(template: str | None, messages: Sequence[tuple[str, str]], special_tokens: Mapping[str, str], *, open_turn: bool = True) -> str:
    """The text of a conversation; with `open_turn` up to where the assistant begins.

    ModelError when there is no template or it fails.
    """
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
    except ModelError:
        raise
    except Exception as error:  # a template is a program from outside: whatever it raises is its own fault
        raise ModelError(
            f"the chat template fails: {error}", "use a model whose template takes these turns (system, user and assistant)"
        ) from error
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension

    class Generation(Extension):
        """{% generation %} marks what the assistant says for one library's masks; here it is text like any other."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = _sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


@cache
def _sandbox() -> type[SandboxedEnvironment]:
    """Jinja's sandbox, in which no operator makes a text or number of more than _MAX_TEXT characters, bytes or digits."""
    from jinja2.exceptions import SecurityError
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def size(value: Any) -> int:
        return len(value) if isinstance(value, (str, list, tuple)) else 0

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%", "+"))

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            large: float
            if operator == "+":
                large = size(left) + size(right)
            elif operator == "*":
                numbers = [value for value in (left, right) if isinstance(value, (int, float))]
                large = max(size(left), size(right)) * max([1, *(abs(n) for n in numbers)])
            elif operator == "**":
                large = abs(right) * 64 if isinstance(right, (int, float)) else 0
            else:  # a width such as %1000000000d
                digits = re.findall(r"\d+", left) if isinstance(left, str) else []
                large = max([0, *(int(n[:12]) for n in digits)])
            if large > _MAX_TEXT:
                raise SecurityError(f"{operator} makes something of {large:.3g} characters")
            return super().call_binop(context, operator, left, right)

    return Sandbox
