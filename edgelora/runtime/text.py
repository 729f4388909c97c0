"""The text side of a model's folder: tokenizer, chat template and stop tokens, read without transformers or torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError

_MAX_BYTES = 64 << 20  # of a JSON file; tokenizers of 256k tokens have about 35 MB
_AGAIN = "export the model again, or fetch the folder again: it needs tokenizer.json and tokenizer_config.json"


class FolderText:
    """What tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a folder say.

    Files are read when first asked for, so that a bench that never needs a template does not pay for it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token(self, id: int) -> str:
        """The text of one id as it stands in the vocabulary."""
        return str(self._tokenizer.id_to_token(id))

    def surrounded(self, text: str) -> list[int]:
        """Ids of a text with those that the tokenizer puts before and after it."""
        return list(self._tokenizer.encode(text).ids)

    def backend(self) -> dict[str, Any]:
        """tokenizer.json with what it leaves out filled in."""
        return dict(json.loads(self._tokenizer.to_str()))

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Name -> template; "default" is for conversations."""
        own, others = self._folder / "chat_template.jinja", self._folder / "additional_chat_templates"
        files = {path.stem: path for path in sorted(others.glob("*.jinja"))} | ({"default": own} if own.is_file() else {})
        if files:
            return {name: path.read_text(encoding="utf-8", errors="replace") for name, path in files.items()}
        written = self._settings("tokenizer_config.json").get("chat_template")
        named = written if isinstance(written, list) else [{"name": "default", "template": written}]
        pairs = [(one.get("name"), one.get("template")) for one in named if isinstance(one, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        return {name: text for name in ("bos_token", "eos_token") if (text := self._special(name)) is not None}

    def special_id(self, name: str) -> int | None:
        """The id of the token that the folder calls bos_token, eos_token, unk_token or pad_token; None where it names none."""
        text = self._special(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-sequence token first, then what the generation settings add."""
        more = self._settings("generation_config.json").get("eos_token_id")
        ids = [self.special_id("eos_token"), *(more if isinstance(more, list) else [more])]
        return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool)))

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = self._folder / "tokenizer.json"
        try:
            made = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ModelError(f"{path} cannot be read: {error}", _AGAIN) from error
        made.no_padding()  # what it was last trained or run with is no part of it
        made.no_truncation()
        return made

    def _special(self, name: str) -> str | None:
        token = self._settings("tokenizer_config.json").get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def _settings(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; empty where the file is absent, which is allowed."""
        path = self._folder / name
        try:
            with path.open("rb") as stream:
                values = json.loads(stream.read(_MAX_BYTES))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError, OSError) as error:
            raise ModelError(f"{path} is damaged: {error}", _AGAIN) from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} is damaged: not an object", _AGAIN)
        return values
