"""How far `edgelora estimate` is from what a training then needs: memory before anything is loaded, time after `--probe`'s twenty steps.

    python bench/estimate.py                    on this machine: each setting estimated, probed, then trained, a process each
    python bench/estimate.py --recorded         beside the step times and peaks recorded in results/h100-80gb/*-train-speed.json

Aims: memory within 10 %, time within 20 %. On a CPU the settings are the quick start's, shortened; on a GPU models with random weights in
the shapes of `train_speed.py`, built on the card. Recorded runs: memory and time before a probe come from the shape alone;
the probe is what the first twenty steps took, and what it foretells is the time of all steps. Results: `results/<machine
class>/<date>-<commit>-estimate.json`. Nothing else should run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
# name: what of the quick start's recipe is set otherwise
CPU = {
    "2 rows": ("train.epochs=0.1", "train.batch=2"),
    "4 rows, 16 bits, r = 8": ("train.epochs=0.15", "train.method=lora", "train.batch=4", "train.r=8"),
    "8 rows, recomputed": ("train.epochs=0.25", "train.checkpointing=true"),
    "2 rows, dropout (transformers' own layers)": ("train.epochs=0.1", "train.batch=2", "train.dropout=0.05"),
}
# name: shape of train_speed.py, rows a step, tokens a row at least and at most, steps, settings
GPU: dict[str, tuple[str, int, tuple[int, int], int, dict[str, Any]]] = {
    "135M, 4 x 2048": ("smollm2-135m", 4, (2048, 2048), 80, {}),
    "135M, 16 x 20 to 400": ("smollm2-135m", 16, (20, 400), 120, {}),
    "0.5B, 4 x 2048": ("qwen2.5-0.5b", 4, (2048, 2048), 80, {}),
    "1B, 4 x 2048": ("llama-3.2-1b", 4, (2048, 2048), 60, {}),
    "1B, 8 x 1024, recomputed": ("llama-3.2-1b", 8, (1024, 1024), 60, {"checkpointing": True}),
    "1B, 4 x 512, dropout (transformers' own layers)": ("llama-3.2-1b", 4, (512, 512), 60, {"dropout": 0.05}),
    "8B, 32 x 128": ("llama-3.1-8b", 32, (128, 128), 50, {}),
    "8B, 4 x 2048": ("llama-3.1-8b", 4, (2048, 2048), 40, {}),
}


def on_cpu(changes: tuple[str, ...], out: Path, threads: int) -> dict[str, Any]:
    """The commands as a user types them."""
    given = [part for change in (*changes, f"out={out}", f"threads={threads}") for part in ("--set", change)]

    def said(*command: str) -> Any:
        line = [sys.executable, "-m", "edgelora.cli", *command, *given, "--json", "--quiet"]
        return json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)

    (before,) = said("estimate", "quickstart", "--devices", "here")["devices"]
    (probed,) = said("estimate", "quickstart", "--devices", "here", "--probe")["devices"]
    facts = said("finetune", "quickstart")
    return row(
        before["peak_rss_bytes"], before["seconds"], probed["seconds"], facts["measured"]["peak_rss_bytes"], facts["measured"]["seconds"]
    ) | {
        "steps": facts["steps"],
        "kernels": facts["kernels"],
    }


def on_gpu(shape: str, batch: int, tokens: tuple[int, int], steps: int, settings: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    """One model three times: to compile kernels, for the probe, which spoils it, and for the whole training."""
    import torch
    import train_speed

    from edgelora import machine, outline
    from edgelora import recipe as recipes
    from edgelora.train import adapter, attention, estimate, finetune, load, loop, probe

    attention.register()
    train = recipes.Train(batch=batch, accumulate=1, max_tokens=tokens[1], epochs=1.0, patience=0, **settings)
    recipe = recipes.Recipe(name="bench", base="random", data=recipes.Data(train="random"), train=train)
    chance = random.Random(0)
    rows = [r for _ in range(steps * batch) for r in train_speed.rows_of(1, chance.randint(*tokens), 1000)]
    valid = rows[: 4 * batch]
    config, dtype = dict(train_speed.SHAPES[shape]), load.arithmetic("auto")
    base = outline.Outline(shape, config, outline.shapes(config), "train_speed.py")
    lengths = [len(r.ids) for r in rows]

    def free() -> None:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def fresh() -> tuple[Any, float]:
        free()
        begun = time.monotonic()
        return adapter.attach(train_speed.build(shape, device), train), begun

    free()
    before = estimate.training(base, train, lengths, estimate.here(), sum(len(r.ids) for r in valid))
    model, begun = fresh()
    probe.probe(recipe, model, rows, valid, dtype, begun, 6)  # compiles kernels, which a process does once
    del model
    model, begun = fresh()
    found = probe.probe(recipe, model, rows, valid, dtype, begun)
    after = found.correct(before, -(-len(valid) // before.cut.rows), 1)
    del model
    model, begun = fresh()
    with tempfile.TemporaryDirectory() as folder:
        watch = loop.Watch(lambda share, text: None, sum(lengths))
        trainer = finetune.make_trainer(recipe, model, rows, valid, Path(folder), dtype, callbacks=[watch])
        trainer.args.save_strategy = "no"
        trainer.args.load_best_model_at_end = False
        trainer.train()
    if device == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else machine.peak_rss_bytes()
    kernels = f"plain: {trainer.obstacle}" if trainer.obstacle else "fused"
    return row(before.peak_bytes, before.seconds, after.seconds, peak, time.monotonic() - begun) | {"steps": steps, "kernels": kernels}


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of a result of `train_speed.py` that kept their steps."""
    from train_speed import CASES, SHAPES

    from edgelora import gpus, outline
    from edgelora import recipe as recipes
    from edgelora.train import estimate

    document, found = json.loads(path.read_text(encoding="utf-8")), {}
    card = gpus.load().gpus["h100-80gb"].device
    device = dataclasses.replace(card, matmul_flop_per_s=document["matmul_flop_per_s"], attention="flash")
    for run in document["rows"]:
        if run["who"] != "edgelora" or "step_s" not in run:
            continue
        shape, batch, tokens, steps, _ = CASES[run["case"]]
        config = SHAPES[shape]
        base = outline.Outline(shape, config, outline.shapes(config), "train_speed.py")
        train = recipes.Train(batch=batch, accumulate=1, max_tokens=tokens, epochs=1.0, dtype="bf16")
        before = estimate.training(base, train, [tokens] * batch * steps, device)
        spent = run["step_s"]
        probe = statistics.median(spent[: min(15, len(spent) // 2)])  # twenty steps less five of warm-up; of a shorter run its first half
        found[f"{shape}, {batch} x {tokens}"] = row(
            before.peak_bytes, before.step_s * len(spent), probe * len(spent), run["peak_gpu_bytes"], sum(spent)
        ) | {"steps": len(spent), "kernels": run["kernels"]}
    return found


def row(memory: float, seconds: float, probed: float, measured_memory: float, measured_s: float) -> dict[str, Any]:
    return {
        "estimated_bytes": round(memory),
        "measured_bytes": round(measured_memory),
        "memory_error": round(memory / measured_memory - 1, 4),
        "estimated_s": round(seconds, 2),
        "probed_s": round(probed, 2),
        "measured_s": round(measured_s, 2),
        "time_error": round(seconds / measured_s - 1, 4),
        "probed_time_error": round(probed / measured_s - 1, 4),
    }


def main() -> None:
    from edgelora import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", action="store_true", help="compare with recorded runs; nothing is trained")
    parser.add_argument("--cases", nargs="*", help="some of the settings, by their names' beginnings")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of a CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after this time")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    if options.recorded:
        for path in sorted((ROOT / "bench" / "results" / "h100-80gb").glob("*-train-speed.json")):
            rows |= recorded(path)
    else:
        import torch

        cuda = torch.cuda.is_available()
        begun = time.monotonic()
        for name, case in (GPU if cuda else CPU).items():
            if options.cases and not name.startswith(tuple(options.cases)):
                continue
            if time.monotonic() - begun > options.seconds:
                print("out of time before", name)
                break
            with tempfile.TemporaryDirectory() as out:
                rows[name] = on_gpu(*case) if cuda else on_cpu(case, Path(out), options.threads)  # type: ignore[arg-type,misc]
            print(name, json.dumps(rows[name]), flush=True)
    memory, timed = (max(abs(r[key]) for r in rows.values()) for key in ("memory_error", "probed_time_error"))
    for name, r in rows.items():
        print(f"{name:45} memory {r['memory_error']:+.1%}, time {r['time_error']:+.1%}, after a probe {r['probed_time_error']:+.1%}")
    where = f"{len(rows)} settings" + (", runs recorded on one H100 80GB" if options.recorded else "")
    headline = [[where, f"memory at most {memory:.1%} off, time at most {timed:.1%} after a probe"]]
    command = "python bench/estimate.py" + (" --recorded" if options.recorded else "")
    what = "estimate-recorded" if options.recorded else "estimate"
    results.save(what, command, PACKAGES, headline, {"load_average": machine.load_average(), "settings": rows})


if __name__ == "__main__":
    main()
