"""Fixed sets: `train` trains, `valid` selects, `sealed` and other held-out sets only report.

Which set a row belongs to is a hash of its normalized question, so adding or shuffling rows moves no other row.
A trained row whose question also stands in a held-out set is dropped from `train`, never the other way round.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelora import recipe as recipes
from edgelora.data.read import Table, read
from edgelora.data.row import Row
from edgelora.errors import DataError

_LEAST_ROWS = 4  # below this there is nothing to select on


@dataclass(frozen=True)
class Dataset:
    """Every set's rows. `selecting` and `reporting` are the only ways to held-out rows, so a stage cannot mix them up."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    held_out: Mapping[str, tuple[Row, ...]]
    dropped: tuple[tuple[str, int, str], ...]  # (file name, line, reason)
    columns: tuple[str, ...]

    @property
    def selecting(self) -> tuple[Row, ...]:
        return self.valid

    def reporting(self, name: str) -> tuple[Row, ...]:
        return self.held_out[name]

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers of a classification data set, sorted."""
        return tuple(sorted({row.answer for row in self.train}))

    def fingerprint(self, *names: str) -> str:
        """SHA-256 of the named sets' rows, in order."""
        sets = {"train": self.train, "valid": self.valid, **self.held_out}
        text = json.dumps([[row.messages for row in sets[name]] for name in names], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load(recipe: recipes.Recipe) -> Dataset:
    """Read every file a recipe names and split it. DataError for files that cannot serve."""
    data = recipe.data
    table = _read(recipe, data.train)
    sets: dict[str, tuple[Row, ...]] = {}
    for name, file in {"valid": data.valid, **data.held_out, "sealed": data.sealed}.items():
        if file is not None:
            sets[name] = _read(recipe, file).rows
    dropped = [(Path(data.train).name, line, reason) for line, reason in table.dropped]
    train: list[Row] = []
    seen: set[tuple[str, str]] = set()
    reserved = {group_key(row): name for name, rows in sets.items() for row in rows}
    shares = {"sealed": 0.0 if "sealed" in sets else data.sealed_share, "valid": 0.0 if "valid" in sets else data.valid_share}
    drawn: dict[str, list[Row]] = {name: [] for name, share in shares.items() if share}
    for row in table.rows:
        key = group_key(row)
        if (key, row.answer) in seen:
            dropped.append((Path(data.train).name, row.line, "duplicate"))
            continue
        seen.add((key, row.answer))
        if key in reserved:
            dropped.append((Path(data.train).name, row.line, f"question stands in {reserved[key]}"))
        elif home := _drawn_set(key, shares):
            drawn[home].append(row)
        else:
            train.append(row)
    for name in drawn:
        if not drawn[name] and len(train) >= _LEAST_ROWS:  # too few rows for the hash to choose any: the lowest one
            lowest = min(train, key=group_key)
            drawn[name] = [row for row in train if group_key(row) == group_key(lowest)]
            train = [row for row in train if group_key(row) != group_key(lowest)]
        sets[name] = tuple(drawn[name])
    if len(train) < 2 or not sets["valid"]:
        raise DataError(
            f"{Path(data.train).name} has {len(table.rows)} usable {'row' if len(table.rows) == 1 else 'rows'}; fine-tuning needs at least {_LEAST_ROWS}",
            "some rows must be kept to select and to report on; a useful bot wants a few hundred",
        )
    return Dataset(tuple(train), sets.pop("valid"), {k: v for k, v in sets.items() if v}, tuple(dropped), table.columns)


def group_key(row: Row) -> str:
    """Hash (hex) that keeps equal questions together. Version 1: NFKC, lower case, letters and digits only."""
    text = unicodedata.normalize("NFKC", row.question).lower()
    return hashlib.sha256(("1:" + "".join(c for c in text if c.isalnum())).encode("utf-8", "surrogatepass")).hexdigest()


def _drawn_set(key: str, shares: Mapping[str, float]) -> str | None:
    """`sealed` takes hashes from the bottom and `valid` from the top: changing one share moves no row of the other."""
    point = int(key[:13], 16) / 16**13
    if point < shares["sealed"]:
        return "sealed"
    return "valid" if point >= 1 - shares["valid"] and shares["valid"] else None


def _read(recipe: recipes.Recipe, file: str) -> Table:
    table = read(recipe.file(file), recipe.data)
    if table.rows[0].is_text:
        raise DataError(f"{file} is plain text without questions and answers", "fine-tuning needs rows with both, or conversations")
    return table
