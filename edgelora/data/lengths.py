"""How many tokens the rows have: counted by the base's tokenizer where it is on this disk, else estimated from their characters."""

from __future__ import annotations

from dataclasses import dataclass

from edgelora import models
from edgelora import recipe as recipes
from edgelora.data import chat
from edgelora.data.row import Row
from edgelora.data.split import Dataset
from edgelora.errors import ModelError
from edgelora.outline import Outline

# Characters a token in Latin script, tokens a character in others, tokens that a template puts around a message: rough means of the
# tokenizers of Llama 2 and 3, Qwen and SmolLM2.
_CHARACTERS, _TOKENS, _MESSAGE = 4.0, 0.9, 6


@dataclass(frozen=True)
class Lengths:
    """Tokens of every training row that is not left out as too long; `counted` says how that is known."""

    train: tuple[int, ...]
    valid: int  # tokens of the rows that choose
    left_out: int
    counted: str

    @property
    def tokens(self) -> int:
        """Of one epoch."""
        return sum(self.train)


def of(recipe: recipes.Recipe, outline: Outline, dataset: Dataset) -> Lengths:
    """The lengths of a recipe's own rows. Nothing is fetched."""
    most = recipe.train.max_tokens
    tokenizer = None
    if outline.tokenizer is not None:
        try:
            tokenizer = models.tokenizer_of(str(outline.tokenizer), recipe.folder)
        except ModelError:
            if outline.here:
                raise
    if tokenizer is not None:
        found = [[len(ids.ids) for _, ids in chat.encode_all(tokenizer, rows, most)] for rows in (dataset.train, dataset.selecting)]
        counted = "counted with the base's tokenizer"
    else:
        found = [[n for n in map(_estimated, rows) if n <= most] for rows in (dataset.train, dataset.selecting)]
        counted = "estimated from the characters: the base's tokenizer is not on this machine"
    return Lengths(tuple(found[0]), sum(found[1]), max(0, len(dataset.train) - len(found[0])), counted)


def assumed(rows: int, tokens: int, valid_share: float) -> Lengths:
    """So many rows of so many tokens each, of which `valid_share` choose."""
    valid = round(rows * valid_share)
    return Lengths((tokens,) * (rows - valid), valid * tokens, 0, f"assumed: {rows:,} rows of {tokens} tokens")


def _estimated(row: Row) -> int:
    return sum(_MESSAGE + _tokens(text) for _, text in row.messages)


def _tokens(text: str) -> int:
    latin = sum(ord(character) < 0x250 for character in text)
    return round(latin / _CHARACTERS + (len(text) - latin) * _TOKENS)
