"""`edgelora export --format onnx --max-size`: its folders against the builder's stock presets, and ours, of their size.

    python bench/onnx_size.py quickstart MODEL --work DIR --budget 80MB --budget 90MB --budget 100MB

MODEL is the merged 16-bit folder of a run of the recipe. Planned on `train` rows, judged on the first held-out set, which neither
training nor planning saw, in ONNX Runtime. A rival counts at a budget up to 3 % above it; sizes are those of whole folders, tokenizer
included. Intervals are paired bootstraps over rows. What was judged is kept in DIR: the same command goes on where it was ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import results

from edgelora import evaluate, machine, models, pipeline, tuned
from edgelora import recipe as recipes
from edgelora.data import chat, split
from edgelora.export import budget, configuration, onnx_builder, onnx_graph, onnx_plan, onnx_presets, stage
from edgelora.export import onnx as export
from edgelora.export.reference import Reference
from edgelora.quant.compensate import SHRINK, Rounding
from edgelora.quant.curvature import Moments
from edgelora.runtime import onnx_runtime
from edgelora.weights import Checkpoint

ROOM = 1.03
STOCK = {  # name -> what the builder is told; everything else as it is by default
    "int4": ("algo_config=default", "block_size=32"),
    "int4, blocks of 64": ("algo_config=default", "block_size=64"),
    "int4, blocks of 16": ("algo_config=default", "block_size=16"),
    "k_quant": ("algo_config=k_quant", "block_size=32"),
    "k_quant_last": ("algo_config=k_quant_last", "block_size=32"),
    "k_quant_mixed": ("algo_config=k_quant_mixed", "block_size=32"),
}
OURS = ("int4", "int4-mixed")
PACKAGES = ("onnxruntime", "onnxruntime-genai", "onnx", "torch", "transformers")


def quiet(share: float, text: str) -> None:
    pass


def stock(model: Path, options: tuple[str, ...], work: Path) -> Path:
    """What the builder writes by itself, made loadable: the graph tidied as in every export, no weight rounded anew."""
    config, shapes = export._config(model), export._shapes(model)
    built = work / "model"
    for place in (built, work / "home", work / "tmp"):
        place.mkdir(parents=True)
    common = onnx_presets.options_of("int4", config, shapes, None, None)
    chosen = [option for option in common if not option.startswith(("algo_config=", "block_size="))]
    onnx_builder.run(onnx_builder.readable(model.resolve(), work), [*chosen, *options], work.resolve(), export._layers(config), quiet)
    onnx_graph.tidy(built, "int4", export._is_tied(config, shapes), export._attention(configuration.opened(model)))
    export._tidy_files(model, built)
    return built


class Judge:
    """KL of a folder to the model on rows, measured once: `kept` holds what was."""

    def __init__(self, model: Path, rows: list[Any], threads: int, kept: Path) -> None:
        self.reference = Reference(model, Checkpoint(model), None, rows, threads)
        self.rows, self.threads, self.kept = rows, threads, kept

    def __call__(self, name: str, write: Callable[[Path], Path]) -> dict[str, Any]:
        place = self.kept / f"{name}.json"
        if place.is_file():
            return dict(json.loads(place.read_text(encoding="utf-8")))
        work = self.kept / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        begun = time.process_time()
        folder = write(work)
        cost = time.process_time() - begun
        with onnx_runtime.open(folder, self.threads) as session:
            found = evaluate.divergence(self.reference, session, self.rows)
        row = {"name": name, "size_bytes": stage.size_bytes(folder), "write_cpu_s": cost, **evaluate.divergence_summary(found)}
        row |= {"nats_of_rows": found.nats.tolist(), "loss_of_rows": found.losses.nats.tolist(), "tokens_of_rows": found.tokens.tolist()}
        place.write_text(json.dumps(row), encoding="utf-8")
        shutil.rmtree(work)
        print(f"{name}: {row['size_bytes'] / 1e6:.1f} MB, KL {row['kl']:.4f}", flush=True)
        return row


def against(plan: dict[str, Any], rival: dict[str, Any]) -> dict[str, Any]:
    ours, theirs, tokens = (np.array(one) for one in (plan["nats_of_rows"], rival["nats_of_rows"], plan["tokens_of_rows"]))
    low, high = evaluate.interval(ours, theirs)
    losses = np.array(plan["loss_of_rows"]) - np.array(rival["loss_of_rows"])
    loss_low, loss_high = evaluate.interval(losses, tokens)
    return {
        "name": rival["name"], "size_bytes": rival["size_bytes"], "kl": rival["kl"],
        "kl_ratio": float(ours.sum() / theirs.sum()), "kl_ratio_low": low, "kl_ratio_high": high,
        "loss_difference": float(losses.sum() / tokens.sum()), "loss_difference_low": loss_low, "loss_difference_high": loss_high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--threads", type=int, default=machine.cores())
    given = parser.parse_args()
    recipe = recipes.load(recipes.locate(given.recipe))
    dataset, tokenizer = split.load(recipe), models.open_tokenizer(given.model)
    given.work.mkdir(parents=True, exist_ok=True)
    plain = tuned.plain(given.model, given.model.name)
    training = pipeline.planning_rows(recipe, given.model, dataset)
    begun = time.process_time()
    known = budget.measure(plain, "16bit", training, "planned", given.threads, given.work, "", quiet, "onnx")
    took = given.work / "planning.json"
    if not took.is_file():
        took.write_text(json.dumps(time.process_time() - begun), encoding="utf-8")
    planning = float(json.loads(took.read_text(encoding="utf-8")))
    print(f"measured in {planning:.0f} CPU seconds", flush=True)
    moments = Moments(known.path / "moments.safetensors")
    name, held = next(iter(dataset.held_out.items()))
    judge = Judge(
        given.model, [ids for _, ids in chat.encode_all(tokenizer, held, recipe.train.max_tokens)][: given.rows], given.threads, given.work
    )
    shutil.rmtree(given.work / "frame", ignore_errors=True)
    (given.work / "frame").mkdir()
    writer = onnx_plan.open(given.model, "planned", Checkpoint(given.model), given.work / "frame", given.threads, quiet)
    menu = replace(budget.menus(known)["compensated"], fixed_bytes=writer.fixed_bytes)
    plans, predicted = {}, {}
    for wanted in given.budget:
        plan = menu.plan(recipes.size_bytes(wanted))
        predicted[wanted] = {"predicted_kl": plan.kl, "predicted_bytes": plan.size_bytes, "types": dict(plan.types)}
        plans[wanted] = judge(
            f"plan {wanted}", lambda work, plan=plan: writer.write(plan, moments, Rounding(moments, True, SHRINK), work, quiet)
        )
    rivals = {kind: judge(kind, lambda work, told=told: stock(given.model, told, work)) for kind, told in STOCK.items()}
    ours = {
        f"{kind}, rounded by rows": judge(
            f"{kind}, rounded by rows", lambda work, kind=kind: export.write(given.model, kind, work, "x", quiet, moments)
        )
        for kind in OURS
    }
    found = []
    for wanted, plan in plans.items():
        entry: dict[str, Any] = {**plan, **predicted[wanted]}
        for key, others in (("best_stock", rivals), ("best_rounded", ours)):
            near = [row for row in others.values() if row["size_bytes"] <= ROOM * recipes.size_bytes(wanted)]
            if near:
                entry[key] = against(plan, min(near, key=lambda row: row["kl"]))
        found.append(entry)
    headline = []
    for wanted, entry in zip(given.budget, found, strict=True):
        rows = [entry[key] for key in ("best_stock", "best_rounded") if key in entry]
        beside = "; ".join(f"{r['kl_ratio']:.2f} x [{r['kl_ratio_low']:.2f}, {r['kl_ratio_high']:.2f}] of {r['name']}" for r in rows)
        headline.append((wanted, f"KL {entry['kl']:.3f}" + (f", {beside}" if beside else ", no rival so small")))
    command = "python bench/onnx_size.py quickstart MODEL --work DIR " + " ".join(f"--budget {wanted}" for wanted in given.budget)
    document = {
        "set": name, "rows": len(judge.rows), "threads": given.threads, "planning_cpu_s": planning, "training_rows": len(training),
        "budgets": found, "stock": list(rivals.values()), "rounded": list(ours.values()),
    }  # fmt: skip
    results.save("onnx-size", command, PACKAGES, headline, document)


if __name__ == "__main__":
    main()
