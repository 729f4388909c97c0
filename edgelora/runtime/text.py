"""The text side of an exported folder: tokenizer, chat template and stop tokens, read without transformers or torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError

_MAX_BYTES = 64 << 20  # of a JSON file; tokenizers of 256k tokens have about 35 MB
_AGAIN = "export the model again, or fetch the folder again"


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

    @cached_property
    def chat_template(self) -> str | None:
        own = self._folder / "chat_template.jinja"
        if own.is_file():
            return own.read_text(encoding="utf-8", errors="replace")
        template = self._settings("tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        found = {}
        for name in ("bos_token", "eos_token"):
            token = self._settings("tokenizer_config.json").get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[name] = token
        return found

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-sequence token first, then what the generation settings add."""
        eos = self.special_tokens.get("eos_token")
        first = self._tokenizer.token_to_id(eos) if eos is not None else None
        more = self._settings("generation_config.json").get("eos_token_id")
        ids = [first, *(more if isinstance(more, list) else [more])]
        return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool)))

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = self._folder / "tokenizer.json"
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ModelError(f"{path} cannot be read: {error}", _AGAIN) from error

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
