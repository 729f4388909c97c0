"""`--dry-run`: what a recipe will do and need, before anything is trained. Every figure here is an estimate, and nothing is fetched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgelora import machine, models, outline
from edgelora import recipe as recipes
from edgelora.data import lengths, split
from edgelora.export import remarks, sizes
from edgelora.train import adapter, estimate, room


def plan(recipe: recipes.Recipe, gpus: int = 1) -> dict[str, Any]:
    """Rows, parameters, predicted memory (bytes; of each GPU), time (seconds) and sizes (bytes). A GGUF base is converted on the way."""
    dataset = split.load(recipe)
    base = outline.of(recipe.base, recipe.folder)
    if base.gguf is not None:
        base = replace(base, folder=models.open_base(recipe.base, recipe.folder, recipe.out_dir).folder)
    found = lengths.of(recipe, base, dataset)
    trained = adapter.parameters(base.shapes, recipe.train)
    device = replace(estimate.here(recipe.train.dtype, recipe.threads), processes=gpus)
    device = room.chosen(base, recipe.train, found.train, device)
    predicted = estimate.training(base, recipe.train, found.train, device, found.valid)
    return {
        "name": recipe.name,
        "base": base.name,
        "base_known_from": base.known_from,
        "out": str(recipe.out_dir),
        "rows": {"train": len(found.train), "valid": len(dataset.valid), **{name: len(held) for name, held in dataset.held_out.items()}},
        "left_out": len(dataset.dropped) + found.left_out,
        "tokens": found.tokens,
        "tokens_counted": found.counted,
        "trained_parameters": trained,
        "total_parameters": base.parameters,
        "trained_share": trained / base.parameters,
        "training": predicted.figures(),
        "fits": predicted.fits,
        "divided": device.processes if device.shard else 1,
        "full_finetune_bytes": estimate.full_finetune_bytes(base.parameters),
        "available_memory_bytes": machine.available_memory_bytes(),
        "files": [sizes.predict(base, section, recipe.name, trained) for section in recipe.exports],
    }


def file_lines(row: dict[str, Any]) -> list[str]:
    """A file that is planned: its size, and where its type does not fit the model."""
    mixture = row.get("weights")
    size = f"{row['size_bytes'] / 1e6:.1f} MB (predicted)" if row["size_bytes"] is not None else "size known once it is planned"
    return [
        f"file: {row['format']} {row['type']}, {size}"
        + (f", {mixture['bits_a_weight']:.2f} bits a weight" if mixture else "")
        + (
            f"; to write it, about {row['seconds']:.0f} s on one core and {row['peak_bytes'] / 1e9:.1f} GB of memory"
            if "seconds" in row
            else ""
        ),
        *(f"  {remark}" for remark in remarks.fallbacks(mixture or {"fallbacks": []})),
    ]


def lines(found: dict[str, Any]) -> list[str]:
    training = found["training"]
    counts = ", ".join(f"{n} {name}" for name, n in found["rows"].items())
    return [
        f"rows: {counts}; {found['tokens']:,} tokens an epoch" + (f"; {found['left_out']} left out" if found["left_out"] else ""),
        f"base: {found['base']}, {found['total_parameters']:,} parameters; {found['trained_parameters']:,} trained ({found['trained_share']:.2%})",
        f"training: about {training['seconds']:.0f} s and {estimate.peak_bytes(training) / 1e9:.1f} GB of memory (predicted), "
        f"{found['available_memory_bytes'] / 1e9:.1f} GB free{'' if found['fits'] else ': it does not fit'}; "
        + (f"the base divided among {found['divided']} GPUs; " if found["divided"] > 1 else "")
        + f"full fine-tuning would hold {found['full_finetune_bytes'] / 1e9:.1f} GB",
        *(line for row in found["files"] for line in file_lines(row)),
        f"results: {found['out']}",
    ]
