"""Merge: a base and an adapter in, one dense model out, W' = W + (alpha / r) B A.

A QLoRA adapter was trained on the rounded NF4 base, so there are two dense models it can become: added to the
16-bit base that the NF4 one was rounded from, or to the NF4 base written out in 16 bits, which is what training saw.
Tools disagree on which is right (llama.cpp #13485, unsloth #1089, peft #2105), so both are measured on `valid` beside
the model as it was trained, and `choose` keeps one. Never merged: into the 4-bit weights themselves, which rounds the
change away (peft #2321).

Here the merge is written in 16 bits, for formats that start from a folder. GGUF merges while it is written, and is
judged as the file that ships: see `edgelora.export.stage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora import artifact, evaluate, machine, weights
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data.chat import Encoded
from edgelora.evaluate import Divergence
from edgelora.export import card
from edgelora.progress import Progress
from edgelora.tuned import Tuned


@dataclass(frozen=True)
class Candidate:
    """One merge and how far it is from the model as trained, on the rows that choose."""

    base: str
    measured: Divergence

    def as_row(self) -> dict[str, Any]:
        return {"base": self.base, **evaluate.divergence_summary(self.measured)}


def choose(candidates: Sequence[Candidate], max_kl: float) -> tuple[Candidate, str]:
    """The candidate of lowest loss, and why. One further than `max_kl` from the trained model is kept only if all are."""
    near = [c for c in candidates if c.as_row()["kl"] <= max_kl] or candidates
    kept = min(near, key=lambda c: c.measured.losses.mean)
    own = kept.as_row()
    if len(candidates) == 1:
        return kept, f"the only one asked for; valid loss {own['loss']:.4f}, KL to the trained model {own['kl']:.2g}"
    other = next(c for c in candidates if c is not kept)
    theirs, change = other.as_row(), evaluate.change(other.measured.losses, kept.measured.losses)
    words = (
        f"loss on valid {own['loss']:.4f} against {theirs['loss']:.4f} of the {other.base} merge "
        f"({change['change']:+.1%}, 95 % interval {change['change_low']:+.1%} to {change['change_high']:+.1%}; "
        f"KL to the trained model {own['kl']:.2g} against {theirs['kl']:.2g})"
    )
    if other not in near:
        return kept, f"the other is further than max_kl = {max_kl} from the trained model; {words}"
    return kept, ("lower " if change["change_high"] < 0 else "not told apart by these rows, the lower kept: ") + words


def merge(
    model: Tuned, wish: str, rows: Sequence[Encoded], limits: recipes.Evaluate, threads: int, out: Path, progress: Progress
) -> Artifact:
    """Write the merged model as a Hugging Face folder in bf16, with the tokenizer and template it was trained with.

    `wish` is merge.base; `rows` of `valid` choose where both bases are possible.
    """
    return artifact.build(
        out,
        "model",
        "model",
        lambda folder: _merge(model, wish, rows, limits.max_kl, threads, folder, progress),
        made_from={"model": model.key, "rows": rows_key(rows)},
        recipe={"base": wish, "max_kl": limits.max_kl},
        versions=artifact.versions_of("torch", "transformers", "peft", "bitsandbytes"),
        rows={"valid": "select"},
    )


def rows_key(rows: Sequence[Encoded]) -> str:
    return artifact.stage_key("rows", {}, {"ids": [row.ids for row in rows]}, {})


def _merge(
    model: Tuned, wish: str, rows: Sequence[Encoded], max_kl: float, threads: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    from edgelora.export.reference import Reference

    wanted = model.into(wish)
    progress(0.0, "running the model as trained")
    trained = model.as_trained(rows, threads or machine.cores())
    candidates = []
    for number, into in enumerate(wanted):
        progress((number + 1) / (len(wanted) + 2), f"merging into the {into} base")
        merged = Reference(model.base, model.merged(into), None, rows, threads)
        candidates.append(Candidate(into, evaluate.divergence(trained, merged, rows)))
    kept, why = choose(candidates, max_kl)
    progress(1 - 1 / (len(wanted) + 2), f"writing the {kept.base} merge")
    model.describe(folder)
    weights.write(model.merged(kept.base), folder, lambda share, name: None)
    labels = {"labels": list(model.labels)} if model.labels else {}
    licence = card.licence_of(model.base)
    return {"kept": kept.base, "why": why, "candidates": [c.as_row() for c in candidates], "base": model.name, "licence": licence, **labels}
