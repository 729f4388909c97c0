"""A chat template as LiteRT-LM's engine runs it.

Its engine (minijinja) gives templates every content as a list of parts, where training gave text: `'...' + message['content']`
then fails, and the engine answers with an error or with nothing. It knows no names of special tokens, and keeps a line end
that closes the template. A template that needs it is therefore preceded by lines that put text back where it was and name
the tokens. In Jinja itself the result renders as the original does; which form a file gets is tried in the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

_TEXT_AGAIN = """\
{%- set known = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- set known.messages = known.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = known.messages %}
"""  # the last line end is trimmed by both engines, so the template begins at the beginning of a line as before


def candidates(template: str, special_tokens: Mapping[str, str]) -> tuple[str, str]:
    """The template as it is, and mended; the first that the engine renders as training did is the one to ship."""
    tokens = [(name, json.dumps(text, ensure_ascii=False)) for name, text in special_tokens.items() if name in template]
    named = "".join(f"{{%- set {name} = {text} -%}}\n" for name, text in tokens)
    return template, named + _TEXT_AGAIN + template.removesuffix("\n")  # Jinja drops one line end at the very end
