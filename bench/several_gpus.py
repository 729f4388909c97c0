"""Training on several GPUs of one machine: speed and memory by number of processes, and whether the losses stay the same.

    python bench/several_gpus.py [--processes 1 2 4] [--cases smol 8b ...] [--seconds 500]

Models, rows and clock are those of `train_speed.py`; every GPU gets as many rows as the only one does, so efficiency is the tokens
a second of N processes over N times those of one, all in the same call. Losses: 40 updates of 8 rows of unequal length, by one
process at once, by one process in two steps, and by two processes; the first two differ by rounding alone, which says how
near the third has to be.
Results: `results/<machine class>/<date>-<commit>-several-gpus.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from results import save
from train_speed import SHAPES, build, ours

from edgelora import processes
from edgelora import recipe as recipes
from edgelora.data.chat import Encoded
from edgelora.train import adapter, attention, dealing, finetune

# name: (shape, rows a GPU, tokens a row, steps, numbers of processes)
CASES = {
    "smol": ("smollm2-135m", 4, 2048, 60, (1, 2, 4, 8)),
    "smol-large": ("smollm2-135m", 64, 2048, 9, (1, 2, 4, 8)),
    "8b": ("llama-3.1-8b", 4, 2048, 18, (1, 2, 4, 8)),
    "70b": ("llama-2-70b", 4, 2048, 6, (1, 2, 4, 8)),
}


def losses(folder: Path, *, halves: bool) -> list[float]:
    """The loss of every update; `halves`: in two steps each, where one process has them all."""
    train = recipes.Train(batch=8, accumulate=1, max_tokens=600, epochs=1.0, patience=0, dtype="bf16", lr=1e-3)
    recipe = recipes.Recipe(name="bench", base="random", data=recipes.Data(train="random"), train=train)
    torch.manual_seed(0)
    model = adapter.attach(build("smollm2-135m"), train)
    chance = random.Random(0)
    lengths = [chance.randrange(40, 600) for _ in range(8 * 40)]
    rows = [Encoded(tuple(chance.randrange(40) for _ in range(n)), tuple(i > n // 3 for i in range(n))) for n in lengths]
    made = finetune.make_trainer(recipe, model, rows, rows[:1], folder, torch.bfloat16)
    if halves:
        made.division = dealing.Division(8, 4)
        made.args.gradient_accumulation_steps = 2
    made.args.logging_strategy, made.args.eval_strategy, made.args.save_strategy = "steps", "no", "no"
    made.args.load_best_model_at_end = False
    made.train()
    return [h["loss"] for h in made.state.log_history if "loss" in h]


def worker(names: list[str], target: Path) -> None:
    """Measure the cases in this and the other processes; the first one writes what was found to `target`, a line each."""
    attention.register()
    folder = target.parent / "work"
    with processes.joined():
        for name in names:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            begun = time.monotonic()
            row: dict[str, Any] = {"case": name, "processes": processes.count()}
            try:
                if name in ("losses", "losses-halves"):
                    row["losses"] = losses(folder, halves=name == "losses-halves")
                else:
                    shape, batch, tokens, steps, _ = CASES[name]
                    row |= ours(shape, batch * processes.count(), tokens, steps, 5, folder)
            except Exception as error:
                traceback.print_exc()
                row["error"] = repr(error)[:300]
                if processes.count() > 1:
                    raise
            row["peak_gpu_bytes"] = processes.all_of(torch.cuda.max_memory_allocated())
            if not processes.index():
                with target.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                shown = {k: v for k, v in row.items() if k not in ("losses", "tok_per_s_thirds")}
                print(json.dumps(shown), f"{time.monotonic() - begun:.0f} s", flush=True)


def start(count: int, names: list[str], target: Path, limit_s: float) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
    launcher += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    line = [sys.executable, *(launcher if count > 1 else []), __file__, "--worker", str(target), "--cases", *names]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": "0"} if count == 1 else {})
    try:
        subprocess.run(line, env=env, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"{count} processes: out of time", flush=True)


def headline(rows: list[dict[str, Any]]) -> list[list[str]]:
    found = []
    speed = {(row["case"], row["processes"]): row["tok_per_s"] for row in rows if "tok_per_s" in row}
    for (case, count), rate in speed.items():
        share = f", {rate / count / speed[case, 1]:.2f} of {count} times one" if count > 1 and (case, 1) in speed else ""
        peak = max(next(r["peak_gpu_bytes"] for r in rows if (r["case"], r["processes"]) == (case, count)))
        found.append([f"{case}, {count} GPU{'s' * (count > 1)}", f"{rate:,.0f} tok/s{share}, {peak / 1e9:.1f} GB a GPU"])
    curves = {(row["case"], row["processes"]): row["losses"] for row in rows if row["case"].startswith("losses") and "losses" in row}
    if {("losses", 1), ("losses", 2), ("losses-halves", 1)} <= curves.keys():
        two, halves, whole = curves["losses", 2], curves["losses-halves", 1], curves["losses", 1]
        found.append(["largest difference of a loss, 2 processes and 1 in two steps", f"{apart(two, halves):.5f} of {halves[-1]:.2f}"])
        found.append(["1 process at once and in two steps", f"{apart(whole, halves):.5f}"])
    return found


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--cases", nargs="*", default=["losses", "smol", "smol-large", "8b"])
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this time")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.cases, options.worker)
        return
    begun = time.monotonic()
    target = Path(tempfile.mkdtemp()) / "rows.jsonl"
    target.touch()
    for count in options.processes:
        names = [name for name in options.cases if (name == "losses" and count <= 2) or (name in CASES and count in CASES[name][-1])]
        if count == 1 and "losses" in names:
            names.insert(0, "losses-halves")
        if (left := options.seconds - (time.monotonic() - begun)) > 0:
            start(count, names, target, left)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"gpu": gpu, "gpus": torch.cuda.device_count(), "torch": torch.__version__, "shapes": SHAPES, "rows": rows}
    save("several-gpus", " ".join(["python", *sys.argv]), ("torch", "transformers", "accelerate", "bitsandbytes"), headline(rows), found)


if __name__ == "__main__":
    main()
