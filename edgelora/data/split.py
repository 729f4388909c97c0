"""Fixed sets: `train` trains, `valid` selects, `sealed` and other held-out sets only report.

Which set a row belongs to is a hash of its group's raw text, so neither adding, shuffling nor cleaning rows moves another.
A trained row whose question also stands in a held-out set is dropped from `train`, never the other way round.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgelora import recipe as recipes
from edgelora.data import assign, folder
from edgelora.data.assign import LEAST_ROWS
from edgelora.data.keys import group_key as group_key
from edgelora.data.prepare import Prepared, prepare
from edgelora.data.row import Row
from edgelora.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Every set's rows. `selecting` and `reporting` are the only ways to held-out rows, so a stage cannot mix them up."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    held_out: Mapping[str, tuple[Row, ...]]
    dropped: tuple[tuple[str, int, str], ...]  # (file name, line, reason)
    columns: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())  # what cleaning changed and what it found, in sentences

    @property
    def selecting(self) -> tuple[Row, ...]:
        return self.valid

    def reporting(self, name: str) -> tuple[Row, ...]:
        if name not in self.held_out:
            why = "selects and does not report" if name == "valid" else "trains" if name == "train" else "holds no rows"
            raise DataError(f"`{name}` {why}", f"sets that report: {', '.join(self.held_out) or 'none'}")
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
    """Read, clean and split every file a recipe names. DataError for files that cannot serve."""
    data = recipe.data
    data, notes = folder.opened(data, recipe.folder)
    prepared = prepare(data, recipe.folder)
    if prepared.entry(0)[0].is_text:
        raise DataError(f"{data.train} is plain text without questions and answers", "fine-tuning needs rows with both, or conversations")
    sets: dict[str, list[Row]] = {name: [] for name in prepared.index.names}
    changed: Counter[str] = Counter()
    for finished in prepared.finished():
        sets[finished.set].append(finished.row.stripped())
        changed.update(change.step for change in finished.changes)
    if len(sets["train"]) < 2 or not sets["valid"]:
        usable = len(prepared.index)
        raise DataError(
            f"{Path(data.train).name} has {usable} usable {'row' if usable == 1 else 'rows'}; fine-tuning needs at least {LEAST_ROWS}",
            "some rows must be kept to select and to report on; a useful bot wants a few hundred",
        )
    train, valid, sealed = sets.pop("train"), sets.pop("valid"), sets.pop("sealed")
    return Dataset(
        tuple(train),
        tuple(valid),
        {name: tuple(rows) for name, rows in (*sets.items(), ("sealed", sealed)) if rows},
        tuple(dropped(prepared)),
        tuple(dict.fromkeys(prepared.sources["train"].mapping.values())),
        (*notes, *_notes(prepared, changed)),
    )


def dropped(prepared: Prepared) -> list[tuple[str, int, str]]:
    """(file name, line, reason) of every record that was left out."""
    index = prepared.index
    unread = [(prepared.sources[name].path.name, record.line, record.reason) for name, record in prepared.unread if name == "train"]
    left = [
        (prepared.sources[index.names[index.origin[row]]].path.name, index.line[row], why.reason)
        for row, why in sorted(prepared.assigned.left.items())
    ]
    return unread + left


def _notes(prepared: Prepared, changed: Counter[str]) -> list[str]:
    """What cleaning did and found, in sentences for the report; without a word of the rows themselves."""
    notes = []
    if changed:
        steps = ", ".join(f"{n} by {step}" for step, n in changed.most_common())
        notes.append(f"Cleaning changed the rows in {sum(changed.values())} places ({steps}); `edgelora data prepare` lists every one.")
    if disagreeing := assign.contradictions(prepared.index, prepared.assigned):
        notes.append(f"{len(disagreeing)} trained questions have more than one answer.")
    home = prepared.assigned.home
    if across := sum(home[row] >= 0 and home[like] >= 0 and home[row] != home[like] for row, like, _ in prepared.near):
        notes.append(f"{across} rows are nearly the same as a row of another set; data.clean.near: drop leaves them out of training.")
    if prepared.data.sealed_share and not prepared.counts["sealed"]:
        notes.append(
            "No row fell into `sealed`, so nothing is reported on unseen rows of this file: it holds too few, or name data.sealed."
        )
    return notes
