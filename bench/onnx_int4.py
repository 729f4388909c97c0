"""ONNX int4 as edgelora writes it against the builder's stock presets: divergence at equal size, cost, speed.

    python bench/onnx_int4.py RECIPE MODEL --work DIR
    python bench/onnx_int4.py RECIPE MODEL --work DIR --speed      (after the first)

MODEL is the merged folder of a run of RECIPE (`runs/NAME/model-...`). Both exports of every type come from
onnxruntime-genai's builder; one has its weights rounded by second moments of `importance.plan_rows` training rows.

quality   KL to the model in float32, in nats a token, on the first held-out set of RECIPE, in ONNX Runtime; the ratio of
          rounded to stock with a paired 95 % bootstrap interval over rows
cost      CPU seconds and peak memory of the builder's process, CPU seconds of measuring and of rounding (one thread)
speed     prefill and decode in turns, with CPU time and load: both files in ONNX Runtime and onnxruntime-genai, beside them
          in onnxruntime-genai what the builder writes by itself (`-p int4 -e cpu`)
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import results

from edgelora import bench as benches
from edgelora import evaluate, models, pipeline, tuned
from edgelora import recipe as recipes
from edgelora.data import chat, split
from edgelora.export import onnx as export
from edgelora.export.reference import Reference
from edgelora.quant import moments
from edgelora.runtime import onnx_runtime
from edgelora.weights import Checkpoint

TYPES = ("int4", "int4-mixed")
ROWS = 60
COMMAND = "python bench/onnx_int4.py quickstart MODEL --work DIR"
PACKAGES = ("onnxruntime", "onnxruntime-genai", "onnx", "torch", "transformers")


def quiet(share: float, text: str) -> None:
    pass


def folders(model: Path, type: str, measured: Path, work: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Both exports, and what the builder and the rounding cost."""
    made, cost = {}, {}
    for name, given in (("stock", None), ("rounded", export.calibration(measured))):
        own, child = (time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN))
        made[name] = export.write(model, type, work, name, quiet, given)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cost[name] = {
            "builder_cpu_s": after.ru_utime + after.ru_stime - child.ru_utime - child.ru_stime,
            "own_cpu_s": time.process_time() - own,
            "largest_child_rss_bytes": 1024 * after.ru_maxrss,
        }
    return made, cost


def quality(made: dict[str, Path], reference: Any, rows: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, folder in made.items():
        with onnx_runtime.open(folder, 1) as session:
            divergence = evaluate.divergence(reference, session, rows)
        size = sum(path.stat().st_size for path in folder.iterdir())
        found[name] = evaluate.divergence_summary(divergence) | {"size_bytes": size, "nats_of_rows": divergence.nats.tolist()}
        found[name, "nats"] = divergence.nats
    stock, rounded = found.pop(("stock", "nats")), found.pop(("rounded", "nats"))
    low, high = evaluate.interval(rounded, stock)
    return found | {"ratio": {"kl": float(rounded.sum() / stock.sum()), "low": low, "high": high}}


def speed(model: Path, work: Path, threads: int) -> list[dict[str, Any]]:
    """Rows of `edgelora bench`, the exports of an earlier run and the builder's own in turns."""
    own = work / "builder-int4"
    if not own.is_dir():
        options = ["-i", str(model), "-o", str(own), "-c", str(work / "cache"), "--extra_options", "hf_token=false"]
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu", *options], check=True)
    ours = [work / f"{name}-{type}-onnx" for type in TYPES for name in ("stock", "rounded")]
    files = [(folder, "onnxruntime") for folder in ours] + [(folder, "onnxruntime-genai") for folder in (own, *ours)]
    return benches.bench_all(files, recipes.Bench(prompt_tokens=(128,), decode_tokens=32, repeats=7), threads, quiet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.speed:
        measured = speed(arguments.model, arguments.work, arguments.threads)
        figures = [
            (
                f"{row['file']} in {row['runtime']}",
                f"{1000 * row['cpu_s_per_token']:.2f} ms CPU a decoded token, {1000 * row['prefill_cpu_s']:.0f} ms for {row['prompt_tokens']} "
                f"prompt tokens, decode {row['decode_tok_per_s']:.0f} tok/s" + (" (beside other programs)" if row["crowded"] else ""),
            )
            for row in measured
        ]
        results.save("onnx-int4-speed", f"{COMMAND} --speed --threads {arguments.threads}", PACKAGES, figures, {"speed": measured})
        return
    recipe = recipes.load(recipes.locate(arguments.recipe))
    dataset, tokenizer = split.load(recipe), models.open_tokenizer(arguments.model)
    arguments.work.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    known = moments.measure(
        tuned.plain(arguments.model, arguments.model.name),
        pipeline.planning_rows(recipe, arguments.model, dataset),
        arguments.work,
        quiet,
    )
    measuring = time.process_time() - begun
    made, cost = {}, {}
    for type in TYPES:
        made[type], cost[type] = folders(arguments.model, type, known.path / moments.FILE, arguments.work)
    name, held = next(iter(dataset.held_out.items()))
    rows = [ids for _, ids in chat.encode_all(tokenizer, held, recipe.train.max_tokens)][:ROWS]
    reference = list(Reference(arguments.model, Checkpoint(arguments.model), None, rows, arguments.threads))
    found = {type: quality(made[type], reference, rows) for type in TYPES}
    headline = [
        (type, f"{one['rounded']['size_bytes'] / 1e6:.1f} MB, KL {one['rounded']['kl']:.3f} against the stock preset's {one['stock']['kl']:.3f}, "
         f"{one['ratio']['kl']:.2f} x [{one['ratio']['low']:.2f}, {one['ratio']['high']:.2f}]")
        for type, one in found.items()
    ]  # fmt: skip
    results.save(
        "onnx-int4",
        COMMAND,
        PACKAGES,
        headline,
        {
            "set": name,
            "rows": len(rows),
            "calibration": dict(known.facts),
            "measuring_cpu_s": measuring,
            "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "quality": found,
            "cost": cost,
        },
    )


if __name__ == "__main__":
    main()
