"""An Ollama Modelfile beside a GGUF file.

Ollama renders prompts with a template in Go's language, not with the Jinja template inside the file: left to itself it
looks for a known template of similar text, and without one sends the bare prompt (ollama #6371, #10222). So the template
is translated, by what it does: conversations are rendered with the Jinja template, the text around each turn is read off,
and the translation counts only if it renders a battery of conversations to the very same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from edgelora.data import template
from edgelora.errors import ModelError
from edgelora.gguf_header import Header, read_header

Messages = Sequence[tuple[str, str]]

_LONGEST_CONTEXT = 8192  # tokens: a key-value cache for more takes memory that small devices lack
# Words that no template holds, for contents.
_S, _U, _A, _U2, _A2 = "qzsystem", "qzuser", "qzanswer", "qzagain", "qzclosing"
_BATTERY: tuple[Messages, ...] = (
    (("user", _U),),
    (("user", _U), ("assistant", _A), ("user", _U2)),
    (("user", _U), ("assistant", _A), ("user", _U2), ("assistant", _A2), ("user", _U)),
    (("system", _S), ("user", _U)),
    (("system", _S), ("user", _U), ("assistant", _A), ("user", _U2)),
    (("system", _S), ("user", _U), ("assistant", _A), ("user", _U2), ("assistant", _A2), ("user", _U)),
)
_UNUSUAL: tuple[Messages, ...] = ((("user", _U), ("user", _U2)), (("user", _U), ("assistant", _A), ("assistant", _A2), ("user", _U2)))


def write(file: Path, adapter: Path | None = None, licence: str | None = None, system: str | None = None) -> Path:
    """Write ``Modelfile`` beside the GGUF `file`; with `adapter`, Ollama puts that GGUF adapter on it.

    `system`: a system message for conversations that bring none, where the file's template does not hold it.
    """
    header = read_header(file)
    turns = translate(header)
    target = file.with_name("Modelfile")
    target.write_text("".join(line + "\n" for line in _lines(file, adapter, header, turns, licence, system)), encoding="utf-8")
    return target


def _lines(file: Path, adapter: Path | None, header: Header, turns: Turns | None, licence: str | None, system: str | None) -> Iterator[str]:
    yield f"# ollama create {(adapter or file).stem.lower()} -f Modelfile"
    yield f"FROM ./{file.name}"
    if adapter is not None:
        yield f"ADAPTER ./{adapter.name}"
    if turns is not None:
        yield f'TEMPLATE """{turns.go()}"""'
    else:
        yield "# The chat template of this model cannot be said in Go's template language: Ollama will guess one, so its answers may differ."
    if system:
        yield f'SYSTEM """{system}"""'
    context = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    if isinstance(context, int):
        yield f"PARAMETER num_ctx {min(context, _LONGEST_CONTEXT)}"
    yield "PARAMETER temperature 0"  # as the answers of the report were made
    for mark in _stops(header):
        yield f"PARAMETER stop {json.dumps(mark, ensure_ascii=False)}"
    if licence:
        yield f'LICENSE """{licence}"""'


def _stops(header: Header) -> list[str]:
    """Texts at which an answer ends: those of the end-of-sequence and end-of-turn tokens."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    ids = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    texts = list(tokens)
    return list(dict.fromkeys(texts[i] for i in ids if isinstance(i, int) and 0 <= i < len(texts)))


@dataclass(frozen=True)
class Turns:
    """The texts around each role's turns. `first` stands before a conversation without a system message, `last` after all.

    With `folded` the system message stands inside the first user turn, else it is a turn of its own.
    """

    first: str
    last: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str]
    folded: bool

    def render(self, messages: Messages) -> str:
        """What Ollama makes of a conversation with `go()`."""
        system = next((content for role, content in messages if role == "system"), "")
        text = "" if system else self.first
        for i, (role, content) in enumerate(messages):
            if role == "system" and self.folded:
                continue
            before, after = {"user": self.user, "assistant": self.assistant, "system": self.system}[role]
            if role == "user" and self.folded and system and i == 1:
                before += self.system[0] + system + self.system[1]
            text += before + content + after
        return text + self.last

    def go(self) -> str:
        """The template in Go's language. Texts stand in quotes, so that no white space is lost."""
        system = "" if self.folded else self._turn("system", self.system) + "{{ else "
        inner = self.user
        user = _said(inner[0])
        if self.folded:
            user += f"{{{{ if and $.System (eq $i 1) }}}}{_said(self.system[0])}{{{{ $.System }}}}{_said(self.system[1])}{{{{ end }}}}"
        user += f"{{{{ .Content }}}}{_said(inner[1])}"
        first = f"{{{{ if not .System }}}}{_said(self.first)}{{{{ end }}}}" if self.first else ""
        return (
            f"{first}{{{{ range $i, $_ := .Messages }}}}"
            + (system or "{{ ")
            + f'if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}'
            + f"{_said(self.assistant[0])}{{{{ .Content }}}}{_said(self.assistant[1])}{{{{ end }}}}{{{{ end }}}}{_said(self.last)}"
        )

    def _turn(self, role: str, around: tuple[str, str]) -> str:
        return f'{{{{ if eq .Role "{role}" }}}}{_said(around[0])}{{{{ .Content }}}}{_said(around[1])}'


def _said(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def translate(header: Header) -> Turns | None:
    """What the file's chat template does, None when it is not of the plain form that `Turns` can say.

    The begin-of-sequence text is left out where Ollama's tokenizer puts the token there itself.
    """
    values = header.metadata
    texts = list(values.get("tokenizer.ggml.tokens", ()))
    specials: dict[str, str] = {}
    for name in ("bos", "eos"):
        i = values.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(i, int) and 0 <= i < len(texts):
            specials[f"{name}_token"] = texts[i]
    added = specials.get("bos_token", "") if values.get("tokenizer.ggml.add_bos_token") else ""

    def render(messages: Messages) -> str | None:
        try:
            return template.render(header.chat_template, messages, specials).removeprefix(added)
        except ModelError:
            return None

    return read_off(render)


def read_off(render: Callable[[Messages], str | None]) -> Turns | None:
    """The `Turns` that render every conversation of the battery as `render` does; None when there are none.

    `render` gives None for a conversation that the template refuses.
    """
    expected = {messages: render(messages) for messages in (*_BATTERY, *_UNUSUAL)}
    wanted = {messages: text for messages, text in expected.items() if text is not None}
    if any(messages not in wanted for messages in _BATTERY):
        return None
    for turns in _candidates(wanted):
        if all(turns.render(messages) == text for messages, text in wanted.items()):
            return turns
    return None


def _candidates(wanted: Mapping[Messages, str]) -> Iterator[Turns]:
    """Every way to share out the texts between contents among the turns that they end and begin."""
    alone, talk, told = wanted[_BATTERY[0]], wanted[_BATTERY[1]], wanted[_BATTERY[3]]
    try:
        (start, end), (_, to_answer, to_user, _) = _around(alone, _U), _around(talk, _U, _A, _U2)
        before, between, _ = _around(told, _S, _U)
    except ValueError:
        return
    for user_end, answer_end in product(range(len(to_answer) + 1), range(len(to_user) + 1)):
        user = (to_user[answer_end:], to_answer[:user_end])
        assistant = (to_answer[user_end:], to_user[:answer_end])
        if not (start.endswith(user[0]) and end.startswith(user[1])):
            continue
        first, last = start.removesuffix(user[0]), end[len(user[1]) :]
        if between.endswith(user[0]):
            yield Turns(first, last, user, assistant, (before, between.removesuffix(user[0])), folded=False)
        if before.startswith(user[0]):
            yield Turns(first, last, user, assistant, (before.removeprefix(user[0]), between), folded=True)


def _around(text: str, *contents: str) -> list[str]:
    """The texts before, between and after `contents`; ValueError when they do not stand there once each, in this order."""
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            raise ValueError(content)
        pieces.append(before)
    return [*pieces, text]
