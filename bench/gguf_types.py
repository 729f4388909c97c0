"""What a type and an importance matrix do to a fine-tuned model.

    python bench/gguf_types.py RECIPE ADAPTER --rows 20

RECIPE names base and rows, ADAPTER is the folder that `edgelora finetune RECIPE` wrote. One thread.

survival    for both merges: the grid that the base lies on, and the share of the adapter's change that each type keeps
importance  KL to the same model in F16, in llama.cpp, on `valid` rows, without an importance matrix and with one measured
            on `train` rows, an answer's tokens counting once, four and sixteen times; 95 % bootstrap intervals over rows,
            of the difference too (paired). `seconds` and `peak_rss_bytes` are those of measuring the matrix.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import results

from edgelora import artifact, evaluate, machine, models, pipeline, tuned
from edgelora import recipe as recipes
from edgelora.data import split
from edgelora.export import gguf, survival
from edgelora.quant import importance
from edgelora.runtime import llama_cpp

TYPES = ("q4_0", "iq4_nl", "iq4_xs", "q4_k_m", "q3_k_m", "q2_k")
WEIGHTS = (1, 4, 16)


def quiet(share: float, text: str) -> None:
    pass


def measured(divergence: evaluate.Divergence) -> dict[str, Any]:
    found = evaluate.divergence_summary(divergence)
    return {key: found[key] for key in ("kl", "kl_low", "kl_high", "top1")} | {"nats_of_rows": divergence.nats.tolist()}


def weighed(recipe: recipes.Recipe, model: tuned.Tuned, described: Path, rows: list[Any], dataset: Any, work: Path) -> dict[str, Any]:
    source = model.merged("nf4" if model.held == "nf4" else "16bit")
    with llama_cpp.open(gguf.write(described, "f16", work, "wide", quiet, weights=source), 1) as session:
        reference = evaluate.answer_scores(session, rows)
    matrices: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    for weight in WEIGHTS:
        begun = time.perf_counter()
        section = recipes.Importance(rows=recipe.importance.rows, answer_weight=weight)
        made = importance.measure(
            model.base, model.key, section, dataset, recipe.train.max_tokens, work, quiet, adapter=model.adapter, prefix=f"w{weight}-"
        )
        matrices[f"weight {weight}"] = importance.read(made.path / importance.FILE)
        costs[f"weight {weight}"] = {"seconds": time.perf_counter() - begun, **made.facts}
    found: dict[str, Any] = {}
    for kind in TYPES:
        without = None
        for name, means in ({"none": None} | matrices).items():
            file = gguf.write(described, kind, work, "narrow", quiet, means, weights=source)
            with llama_cpp.open(file, 1) as session:
                divergence = evaluate.divergence(reference, session, rows)
            row = measured(divergence) | {"bytes": file.stat().st_size}
            if without is None:
                without = divergence
            else:
                low, high = evaluate.interval(divergence.nats, without.nats)
                row |= {"of_without": float(divergence.nats.sum() / without.nats.sum()), "of_without_low": low, "of_without_high": high}
            found.setdefault(kind, {})[name] = row
            print(kind, name, {k: v for k, v in row.items() if k != "nats_of_rows"}, flush=True)
    return {
        "rows": len(rows),
        "answer_tokens": sum(row.n_trained for row in rows),
        "kl": found,
        "matrices": costs,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def shown(ways: dict[str, dict[str, float]]) -> str:
    row = ways[f"weight {recipes.Importance.answer_weight}"]
    return f"{row['of_without']:.2f} [{row['of_without_low']:.2f}, {row['of_without_high']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rows", type=int, default=20)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    recipe = recipes.load(options.recipe)
    dataset = split.load(recipe)
    adapter = artifact.load(options.adapter)
    begun = machine.describe()["load_average"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = models.open_base(recipe.base, recipe.folder, options.adapter.parent)
        model = tuned.tuned(base, recipe.base, adapter)
        described = model.describe(work)
        survived = {into: survival.survey(described, model.unmerged(into), model.merged(into), "q8_0") for into in model.into("auto")}
        print(json.dumps(survived), flush=True)
        rows = pipeline.selecting_rows(recipe, base.folder, dataset)
        step = max(1, len(rows) // options.rows)
        importances = weighed(recipe, model, described, rows[::step][: options.rows], dataset, work)
    kept = survived.get("nf4") or next(iter(survived.values()))
    headline = [
        ["kept of the adapter's change", ", ".join(f"{name} {share:.0%}" for name, share in kept["kept"].items())],
        ["KL with an importance matrix, of that without", ", ".join(f"{kind} {shown(ways)}" for kind, ways in importances["kl"].items())],
    ]
    found = {
        "load_average_before": begun,
        "training": {key: adapter.facts.get(key) for key in ("method", "epochs", "rows", "tokens")},
        "survival": survived,
        "importance": importances,
    }
    command = f"python bench/gguf_types.py {options.recipe.name} ADAPTER --rows {options.rows}"
    results.save("gguf-types", command, ("torch", "transformers", "gguf", "llama-cpp-python"), headline, found)


if __name__ == "__main__":
    main()
