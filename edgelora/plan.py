"""`--dry-run`: what a recipe will do and need, before anything is trained. Every figure here is an estimate."""

from __future__ import annotations

from typing import Any

from edgelora import machine, models
from edgelora import recipe as recipes
from edgelora.data import chat, split
from edgelora.export import remarks
from edgelora.export import stage as exports
from edgelora.train import adapter, estimate


def plan(recipe: recipes.Recipe) -> dict[str, Any]:
    """Rows, parameters, predicted memory (bytes), time (seconds) and sizes (bytes). A GGUF base is converted on the way."""
    dataset = split.load(recipe)
    base = models.open_base(recipe.base, recipe.folder, recipe.out_dir)
    tokenizer = models.open_tokenizer(base.folder)
    rows = [ids for _, ids in chat.encode_all(tokenizer, dataset.train, recipe.train.max_tokens)]
    lengths = [len(row.ids) for row in rows]
    total = models.parameter_count(base.folder)
    trained = adapter.parameters(models.shapes(base.folder), recipe.train)
    files = []
    for section in (exports.resolve(section) for section in recipe.exports):
        size, mixture = exports.predict(base.folder, section, recipe.name)
        if exports.format_module(section.format).APART:
            size += 2 * trained  # the adapter, in 16 bits, beside its base
        files.append(
            {
                "format": section.format,
                "type": section.type or budget_words(section),
                "size_bytes": size,
                **({"weights": mixture} if mixture else {}),
                **exports.estimate(base.folder, section),
            }
        )
    return {
        "name": recipe.name,
        "base": base.name,
        "out": str(recipe.out_dir),
        "rows": {"train": len(rows), "valid": len(dataset.valid), **{name: len(held) for name, held in dataset.held_out.items()}},
        "left_out": len(dataset.dropped) + len(dataset.train) - len(rows),
        "tokens": sum(lengths),
        "trained_parameters": trained,
        "total_parameters": total,
        "trained_share": trained / total,
        "training": estimate.training(base.folder, recipe.train, sum(lengths), lengths),
        "full_finetune_bytes": estimate.full_finetune_bytes(total),
        "available_memory_bytes": machine.available_memory_bytes(),
        "files": files,
    }


def budget_words(section: recipes.Export) -> str:
    """What stands for the type of a file whose types a plan will choose; its size here is that of a plan without data."""
    if section.max_size is not None:
        return f"within {section.max_size} (types chosen on training rows; here as if every weight mattered alike)"
    return f"with a KL of at most {section.max_kl} (size known once it is measured; here the largest)"


def file_lines(row: dict[str, Any]) -> list[str]:
    """A file that is planned: its size, and where its type does not fit the model."""
    mixture = row.get("weights")
    return [
        f"file: {row['format']} {row['type']}, {row['size_bytes'] / 1e6:.1f} MB (predicted)"
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
        f"{found['available_memory_bytes'] / 1e9:.1f} GB free; full fine-tuning would hold {found['full_finetune_bytes'] / 1e9:.1f} GB",
        *(line for row in found["files"] for line in file_lines(row)),
        f"results: {found['out']}",
    ]
