"""`edgelora export --max-size` on a processor: how long planning takes, and its files against stock recipes of their size.

    python bench/size_export.py RECIPE ADAPTER --budget 80MB --budget 90MB --budget 100MB

RECIPE names base and rows, ADAPTER is the folder that `edgelora finetune RECIPE` wrote. Planned on `train` rows, chosen on
`valid`, judged on `sealed` rows; every figure is llama.cpp's. The rivals are rounded with the same importance, the embedding's
included; one counts at a budget up to 3 % above it. Intervals are paired bootstraps over rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import results

from edgelora import artifact, evaluate, machine, models, pipeline, tuned
from edgelora import recipe as recipes
from edgelora.data import chat, split
from edgelora.export import budget, gguf
from edgelora.quant import curvature, importance
from edgelora.runtime import llama_cpp

ROOM = 1.03
# Those that were best at some size among all of llama.cpp's types and embeddings (results `size-plan`).
RIVALS = (
    ("iq4_nl", "iq4_nl"), ("iq4_xs", "iq4_nl"), ("iq4_xs", "q5_0"), ("iq4_xs", "q5_1"), ("iq4_nl", "q5_1"), ("iq4_xs", ""), ("iq4_nl", ""),
    ("q4_k_s", "q5_0"), ("q4_k_m", "q5_1"), ("q5_0", "q5_1"), ("q4_k_s", ""), ("q4_1", ""), ("q4_k_m", ""), ("q5_k_m", ""),
)  # fmt: skip


def quiet(share: float, text: str) -> None:
    pass


def timed(action: Any) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = action()
    return found, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def row(name: str, size: int, measured: evaluate.Divergence) -> dict[str, Any]:
    kept = {key: value for key, value in evaluate.divergence_summary(measured).items() if key != "reference_loss"}
    return {"name": name, "size_bytes": size, **kept}


def against(plan: evaluate.Divergence, rival: evaluate.Divergence) -> dict[str, float]:
    low, high = evaluate.interval(plan.nats, rival.nats)
    difference = plan.losses.nats - rival.losses.nats
    loss_low, loss_high = evaluate.interval(difference, plan.tokens)
    return {
        "kl_ratio": float(plan.nats.sum() / rival.nats.sum()), "kl_ratio_low": low, "kl_ratio_high": high,
        "loss_difference": float(difference.sum() / plan.tokens.sum()), "loss_difference_low": loss_low, "loss_difference_high": loss_high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--rows", type=int, default=48, help="of `sealed`, at most")
    parser.add_argument("--threads", type=int, default=machine.cores())
    given = parser.parse_args()
    recipe = recipes.load(given.recipe)
    dataset, adapter = split.load(recipe), artifact.load(given.adapter)
    load = machine.load_average()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.adapter.parent) as name:
        work = Path(name)
        base = models.open_base(recipe.base, recipe.folder, given.adapter.parent)
        model = tuned.tuned(base, recipe.base, adapter)
        tokenizer = models.open_tokenizer(base.folder)
        training = [ids for _, ids in importance.spread(chat.encode_all(tokenizer, dataset.train, 512), recipe.importance.plan_rows)]
        valid = pipeline.selecting_rows(recipe, base.folder, dataset)
        sealed = [ids for _, ids in chat.encode_all(tokenizer, dataset.reporting("sealed"), 512)][: given.rows]
        into = budget.merged_into(model, recipe.merge.base)
        known, planning = timed(lambda: budget.measure(model, into, training, "planned", given.threads, work, "", quiet))
        print(json.dumps(planning), flush=True)
        reference = model.as_trained(sealed, given.threads)

        def judged(file: Path) -> evaluate.Divergence:
            with llama_cpp.open(file, given.threads) as session:
                return evaluate.divergence(reference, session, sealed)

        plans: dict[str, tuple[dict[str, Any], evaluate.Divergence]] = {}
        for wanted in given.budget:
            made, seconds = timed(
                lambda wanted=wanted: budget.export(
                    model, recipes.Export("gguf", max_size=wanted), name="planned", known=known, rows=valid, rows_from={"valid": "select"},
                    merge_base=recipe.merge.base, limits=recipe.evaluate, threads=given.threads, out=work, progress=quiet,
                )
            )  # fmt: skip
            file = made.path / str(made.facts["file"])
            measured = judged(file)
            plans[wanted] = row(wanted, file.stat().st_size, measured) | seconds | {"plan": made.facts["plan"]}, measured
            print(json.dumps({k: v for k, v in plans[wanted][0].items() if k != "plan"}), flush=True)
        (work / "described").mkdir()
        described = model.describe(work / "described")
        means = curvature.Moments(known.path / "moments.safetensors").importance()
        rivals: dict[str, tuple[int, evaluate.Divergence]] = {}
        for kind, embedding in RIVALS:
            by_hand = [f"token_embd={embedding}"] if embedding else []
            size = gguf.predict_bytes(described, kind, "rival", means, by_hand, model.merged(into))
            if not any(0.9 < size / recipes.size_bytes(wanted) < ROOM for wanted in given.budget):
                continue
            file = gguf.write(described, kind, work, "rival", quiet, means, by_hand, weights=model.merged(into))
            label = kind + (f", embedding {embedding}" if embedding else "")
            rivals[label] = size, judged(file)
            file.unlink()
            print(json.dumps(row(label, *rivals[label])), flush=True)
        for wanted, (planned, measured) in plans.items():
            near = {label: d for label, (size, d) in rivals.items() if size <= ROOM * recipes.size_bytes(wanted)}
            best: Mapping[str, str] = {
                "least_kl": min(near, key=lambda label: near[label].nats.sum()),
                "least_loss": min(near, key=lambda label: near[label].losses.mean),
            }
            entry = planned | {key: row(label, *rivals[label]) | against(measured, near[label]) for key, label in best.items()}
            found.append(entry)
    headline = [["planning", f"{planning['seconds']:.0f} s"]] + [
        [entry["name"], f"KL {entry['kl']:.4f}, {entry['least_kl']['kl_ratio']:.2f} of {entry['least_kl']['name']}"] for entry in found
    ]
    command = f"python bench/size_export.py {given.recipe.name} ADAPTER " + " ".join(f"--budget {b}" for b in given.budget)
    document = {
        "load_average_before": load, "threads": given.threads, "into": into, "planning": planning,
        "training": {key: adapter.facts.get(key) for key in ("method", "epochs", "rows", "tokens")},
        "rows": {"train": len(training), "valid": len(valid), "sealed": len(sealed)}, "budgets": found,
        "rivals": [row(label, *values) for label, values in rivals.items()],
    }  # fmt: skip
    results.save("size-export", command, ("torch", "transformers", "gguf", "llama-cpp-python"), headline, document)


if __name__ == "__main__":
    main()
