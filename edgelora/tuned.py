"""A tuned model before it is merged: a base, an adapter, and what ships around them.

Formats that merge on the way read it through `merged`, one range of rows at a time; the others from a folder that
`edgelora.merge` wrote. Whatever is made of it is compared with `as_trained`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import artifact, models
from edgelora.artifact import Artifact
from edgelora.data import chat
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError, UsageError
from edgelora.weights import Base, Checkpoint, Merged

if TYPE_CHECKING:
    from edgelora.export.reference import Reference


@dataclass(frozen=True)
class Tuned:
    """`base` is a Hugging Face folder, `adapter` PEFT's folder or None: then this is that model as it is.

    `held` says how training held the base ("nf4" or "16bit") and `arithmetic` what it computed in (torch's name), `name` what
    the base is called in files that ship, `key` stands for the content of everything here. `folder` is set once a merge was
    written to this disk.
    """

    base: Path
    key: str
    name: str = ""
    adapter: Path | None = None
    held: str = "16bit"
    arithmetic: str = "float32"
    system: str | None = None
    labels: tuple[str, ...] = ()
    folder: Path | None = None

    def into(self, wish: str) -> tuple[str, ...]:
        """The bases to merge into for merge.base = `wish`; the first is the one that training saw."""
        if self.held == "16bit":
            if wish == "nf4":
                raise ModelError("merge.base nf4: this adapter was trained on the 16-bit base", "write merge.base: auto or 16bit")
            return ("16bit",)
        return ("nf4", "16bit") if wish == "auto" else (wish,)

    def merged(self, into: str) -> Checkpoint:
        """The weights, each added up when it is read."""
        return Merged(self.base, self.adapter, into, self.arithmetic) if self.adapter else Checkpoint(self.base)

    def weights(self, into: str | None) -> Checkpoint:
        """What was written to this disk, or what `merged` gives."""
        return Checkpoint(self.folder) if self.folder else self.merged(into or self.held)

    def unmerged(self, held: str) -> Base:
        """The base alone, "16bit" or "nf4"."""
        return Base(self.base, held, self.arithmetic)

    def as_trained(self, rows: Sequence[Encoded], threads: int) -> Reference:
        """The model as training left it: the adapter beside the base that training saw."""
        from edgelora.export.reference import Reference

        return Reference(self.base, self.unmerged(self.held), self.adapter, rows, threads)

    def described(self, scratch: Path, apart: bool) -> Path:
        """The folder that says all but the weights. `apart`: for a format that takes the weights from elsewhere, so it can be written anew.

        transformers runs some tokenizers of the hub otherwise than their files say; what it ran is what it writes.
        """
        return self.describe(scratch) if apart or not self.folder else self.folder

    def describe(self, folder: Path) -> Path:
        """Write into `folder` what a merged model has beside its weights: configuration, tokenizer, template."""
        import torch
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.base, local_files_only=True)
        config.dtype = torch.bfloat16
        if self.adapter and self.merged(self.held).unties:
            config.tie_word_embeddings = False
        config.save_pretrained(folder)
        if (self.base / "generation_config.json").is_file():
            shutil.copyfile(self.base / "generation_config.json", folder / "generation_config.json")
        tokenizer = models.open_tokenizer(self.base)
        tokenizer.chat_template = chat.with_system(tokenizer.chat_template, self.system)
        tokenizer.save_pretrained(folder)
        models.tidy(folder, self.name)
        return folder


def plain(folder: Path, key: str) -> Tuned:
    """A model that needs no adapter: an untuned base, or one that was merged before."""
    known = artifact.load(folder).facts if (folder / artifact.MANIFEST).is_file() else {}
    return Tuned(folder, key, str(known.get("base", "")), labels=tuple(known.get("labels", ())), folder=folder)


def tuned(base: models.Base, reference: str, adapter: Artifact) -> Tuned:
    """An adapter that edgelora trained, beside the base that training began on, which the user calls `reference`.

    UsageError when it was trained on another base, ModelError when a file of it is not the one that training wrote.
    """
    if adapter.made_from.get("base") != base.key:
        raise UsageError(f"{adapter.path.name} was trained on another base than {reference}", "name the base it was trained on")
    _whole(adapter)
    held = "nf4" if adapter.facts["method"] == "qlora" else "16bit"
    system, labels = adapter.recipe.get("system"), tuple(adapter.facts.get("labels", ()))
    words: dict[str, Any] = {"system": system, "labels": list(labels), "base_model": models.shown(reference)}
    key = artifact.stage_key("tuned", {"base": base.key, "adapter": adapter.key}, words, {})
    arithmetic = adapter.facts.get("dtype", "float32")
    return Tuned(base.folder, key, models.shown(reference), adapter.path, held, arithmetic, system, labels)


def _whole(adapter: Artifact) -> None:
    """ModelError when a file of the adapter is missing or not the one that training wrote."""
    for name, digest in adapter.files.items():
        file = adapter.path / name
        if not file.is_file():
            raise ModelError(f"{adapter.path.name} lacks {name}", "remove the folder and train again")
        if artifact.sha256(file) != digest:
            raise ModelError(
                f"{adapter.path.name}/{name} is damaged: it is not the file that was written", "remove the folder and train again"
            )
