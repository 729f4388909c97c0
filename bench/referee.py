"""Which base an adapter should be merged into, measured on the file that ships: the table behind `merge.base: auto`.

    python bench/referee.py RECIPE:ADAPTER ...

ADAPTER is the folder that `edgelora finetune RECIPE` wrote. For each both merges, into the 16-bit base and into the
dequantized NF4 one, are written in F16, Q8_0, Q4_K_M and Q4_0 and run in llama.cpp on `valid` rows. Each row of the result
holds loss and KL to the model as trained with 95 % bootstrap intervals over rows; `change` is the 16-bit merge's loss relative
to the NF4 one's, rows paired.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import results

from edgelora import artifact, evaluate, models, pipeline
from edgelora import recipe as recipes
from edgelora.data import split
from edgelora.export import gguf
from edgelora.runtime import llama_cpp
from edgelora.tuned import tuned

TYPES = ("f16", "q8_0", "q4_k_m", "q4_0")


def measure(recipe: recipes.Recipe, adapter: Path, most: int) -> list[dict[str, Any]]:
    threads = pipeline.threads(recipe)
    base = models.open_base(recipe.base, recipe.folder, adapter.parent)
    model = tuned(base, recipe.base, artifact.load(adapter))
    rows = pipeline.selecting_rows(recipe, base.folder, split.load(recipe))[:most]
    reference = model.as_trained(rows, threads)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "described").mkdir()
        described = model.describe(Path(work) / "described")
        for kind in TYPES:
            measured = {}
            for into in ("nf4", "16bit"):
                file = gguf.write(described, kind, Path(work), into, lambda share, text: None, weights=model.merged(into))
                with llama_cpp.open(file, threads) as session:
                    measured[into] = evaluate.divergence(reference, session, rows)
                file.unlink()
            change = evaluate.change(measured["nf4"].losses, measured["16bit"].losses)
            for into, divergence in measured.items():
                loss = evaluate.summary(divergence.losses)
                interval = {"loss_low": loss["low"], "loss_high": loss["high"]}
                own = {"tuned": recipe.name, "type": kind, "into": into, **interval, **evaluate.divergence_summary(divergence)}
                row = {**own, **(change if into == "16bit" else {})}
                found.append(row)
                print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", nargs="+", metavar="RECIPE:ADAPTER")
    parser.add_argument("--rows", type=int, default=48, help="rows at most, of each fine-tune")
    options = parser.parse_args()
    found = []
    for item in options.tuned:
        recipe, _, adapter = item.rpartition(":")
        found += measure(recipes.load(Path(recipe)), Path(adapter), options.rows)
    headline = [
        (f"{name}, the 16-bit merge's loss against the NF4 one's", changes(found, name))
        for name in dict.fromkeys(r["tuned"] for r in found)
    ]
    command = f"python bench/referee.py {' '.join('RECIPE:ADAPTER' for _ in options.tuned)} --rows {options.rows}"
    results.save("referee", command, ("torch", "bitsandbytes", "peft", "llama-cpp-python"), headline, {"rows": found})


def changes(rows: list[dict[str, Any]], name: str) -> str:
    return ", ".join(
        f"{row['type']} {row['change']:+.1%} [{row['change_low']:+.1%}, {row['change_high']:+.1%}]"
        for row in rows
        if row["tuned"] == name and row["into"] == "16bit"
    )


if __name__ == "__main__":
    main()
