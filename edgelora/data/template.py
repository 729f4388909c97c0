"""Render a chat template in Jinja's sandbox, with what templates of the hub expect and nothing else.

An exported file carries its template; talking to it needs neither transformers nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edgelora.errors import ModelError

_MAX_TEMPLATE = 1 << 17  # characters
_MAX_TEXT = 1 << 22  # characters a template may produce


def render(template: str | None, messages: Sequence[tuple[str, str]], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation up to where the assistant begins. ModelError when there is no template or it fails."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not template:
        raise ModelError("the file carries no chat template", "export it again from a model with one")
    if len(template) > _MAX_TEMPLATE:
        raise ModelError(
            f"the file's chat template is {len(template)} characters long", "a real one is a few thousand; do not trust this file"
        )

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    values: dict[str, Any] = {"messages": [{"role": r, "content": c} for r, c in messages], "add_generation_prompt": True, **special_tokens}
    pieces, length = [], 0
    try:
        for piece in environment.from_string(template).generate(values):
            length += len(piece)
            if length > _MAX_TEXT:
                raise ModelError("the file's chat template writes without end", "do not trust this file")
            pieces.append(piece)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ModelError(
            f"the file's chat template fails: {error}", "export it again from a model whose template takes user and assistant turns"
        ) from error
    return "".join(pieces)
