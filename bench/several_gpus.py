"""Training on several GPUs of one machine: speed and memory by number of processes, with the base whole in each and divided among
them, whether the losses stay the same, and what happens when one process is killed.

    python bench/several_gpus.py --out FOLDER [--gpus 4] [--parts all 8b ...] [--seconds 480]

Models, rows and clock are those of `train_speed.py`; every GPU gets as many rows as the only one does, so efficiency is the tokens
a second of N processes over N times those of one, all in the same call. Losses: 40 updates of 8 rows of unequal length, by one
process at once, by one process in two steps, by all with the base whole in each, and by all with the base divided; the first two differ
by rounding alone, which says how near the others have to be. The killed one is `kill_one.py`'s.
Each part has a time of its own; what is found is in FOLDER (rows.jsonl, several-gpus.json) as soon as a part is done, and in
`results/<machine class>/<date>-<commit>-several-gpus.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from kill_one import kill_one
from results import save
from train_speed import SHAPES, build, ours

from edgelora import processes
from edgelora import recipe as recipes
from edgelora.data.chat import Encoded
from edgelora.train import adapter, attention, dealing, finetune, load

# name: (shape, rows a GPU, tokens a row, steps after the warm-up, those of the warm-up, base divided)
CASES = {
    "smol": ("smollm2-135m", 4, 2048, 60, 5, False),
    "smol-large": ("smollm2-135m", 64, 2048, 9, 5, False),
    "8b": ("llama-3.1-8b", 4, 2048, 18, 5, False),
    "8b-divided": ("llama-3.1-8b", 4, 2048, 12, 3, True),
    "70b": ("llama-2-70b", 4, 2048, 6, 2, False),
    "70b-divided": ("llama-2-70b", 4, 2048, 6, 2, True),
}


def parts(gpus: int) -> dict[str, tuple[int, tuple[str, ...], float]]:
    """Name: processes, cases, the most seconds; the most wanted first."""
    made = {
        "all": (gpus, ("losses", "losses-divided", "smol", "8b"), 120.0),
        "one": (1, ("losses-halves", "losses", "smol", "8b"), 110.0),
        "70b": (gpus, ("70b-divided",), 150.0),
        "killed": (gpus, (), 240.0),
        "two": (2, ("losses", "smol", "8b"), 100.0),
        "one-70b": (1, ("70b",), 150.0),
        "all-divided": (gpus, ("8b-divided",), 90.0),
    }
    return {name: part for name, part in made.items() if name != "two" or gpus > 2}


def losses(folder: Path, *, halves: bool, divide: bool) -> list[float]:
    """The loss of every update; `halves`: in two steps each, where one process has them all."""
    train = recipes.Train(batch=8, accumulate=1, max_tokens=600, epochs=1.0, patience=0, dtype="bf16", lr=1e-3)
    recipe = recipes.Recipe(name="bench", base="random", data=recipes.Data(train="random"), train=train)
    torch.manual_seed(0)
    base = build("smollm2-135m", "cpu")  # as one is loaded that no GPU holds whole
    model = adapter.attach(base if divide else base.to(load.own_device()), train)
    chance = random.Random(0)
    lengths = [chance.randrange(40, 600) for _ in range(8 * 40)]
    rows = [Encoded(tuple(chance.randrange(40) for _ in range(n)), tuple(i > n // 3 for i in range(n))) for n in lengths]
    made = finetune.make_trainer(recipe, model, rows, rows[:1], folder, torch.bfloat16, divide=divide)
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
                if name.startswith("losses"):
                    row["losses"] = losses(folder, halves=name == "losses-halves", divide=name == "losses-divided")
                else:
                    shape, batch, tokens, steps, warmup, divide = CASES[name]
                    row |= ours(shape, batch * processes.count(), tokens, steps, warmup, folder, divide=divide)
            except Exception as error:
                traceback.print_exc()
                row["error"] = repr(error)[:300]
                if processes.count() > 1:
                    raise
            row["peak_gpu_bytes"] = processes.all_of(torch.cuda.max_memory_allocated())
            row["case_s"] = round(time.monotonic() - begun, 1)
            if not processes.index():
                with target.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(json.dumps({k: v for k, v in row.items() if k not in ("losses", "tok_per_s_thirds")}), flush=True)


def start(count: int, names: tuple[str, ...], target: Path, limit_s: float) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
    launcher += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    line = [sys.executable, *(launcher if count > 1 else []), __file__, "--worker", str(target), "--cases", *names]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": "0"} if count == 1 else {})
    going = subprocess.Popen(line, env=env, start_new_session=True)
    try:
        going.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(going.pid, signal.SIGKILL)
        going.wait()
        print(f"{', '.join(names)} on {count}: out of time after {limit_s:.0f} s", flush=True)


def headline(rows: list[dict[str, Any]]) -> list[list[str]]:
    found = []
    speed = {(row["case"], row["processes"]): row["tok_per_s"] for row in rows if "tok_per_s" in row}
    for (case, count), rate in speed.items():
        alone = speed.get((case.removesuffix("-divided"), 1))
        share = f", {rate / count / alone:.2f} of {count} times one" if count > 1 and alone else ""
        peak = max(next(r["peak_gpu_bytes"] for r in rows if (r["case"], r["processes"]) == (case, count)))
        found.append([f"{case}, {count} GPU{'s' * (count > 1)}", f"{rate:,.0f} tok/s{share}, {peak / 1e9:.1f} GB a GPU"])
    curves = {(row["case"], row["processes"]): row["losses"] for row in rows if row["case"].startswith("losses") and "losses" in row}
    if whole := curves.get(("losses", 1)):
        for (case, count), curve in curves.items():
            if (case, count) != ("losses", 1):
                found.append(
                    [f"largest difference of a loss, {case}, {count} and one process", f"{apart(curve, whole):.5f} of {whole[-1]:.2f}"]
                )
    for row in rows:
        if row["case"] == "killed":
            for base in ("whole", "divided"):
                if killed := row.get(base):
                    ended = f"all ended after {killed['ended_s']:.1f} s"
                    if "difference" in killed:
                        ended += f"; {row['resumed_processes']} went on, losses at most {killed['difference']:.3f} from those of {row['processes']} undisturbed"
                    found.append([f"1 of {row['processes']} killed, the base {base}", ended])
            for what, key in (("whole", "order"), ("divided", "dividing")):
                if key in row:
                    found.append([f"losses apart, one process and all with the base {what}", f"{row[key]:.3f}"])
            if "error" in row:
                found.append(["not to its end", row["error"].partition("(")[0]])
    return found


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def write(out: Path) -> None:
    """What was found so far, as a result."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"gpu": gpu, "gpus": torch.cuda.device_count(), "torch": torch.__version__, "shapes": SHAPES, "rows": rows}
    command = " ".join(["python", *sys.argv])
    made = save("several-gpus", command, ("torch", "transformers", "accelerate", "bitsandbytes"), headline(rows), found)
    shutil.copy(made, out / "several-gpus.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--parts", nargs="*", help=f"of {', '.join(parts(4))}; default all of them")
    parser.add_argument("--seconds", type=float, default=480, help="all parts together")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.cases, options.worker)
        return
    if options.out is None:
        parser.error("--out names a folder")
    begun = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    target = (options.out / "rows.jsonl").absolute()
    target.touch()
    for name, (count, cases, limit_s) in parts(options.gpus).items():
        left = options.seconds - (time.monotonic() - begun)
        if (options.parts and name not in options.parts) or left < 20:
            continue
        if cases:
            start(count, cases, target, min(limit_s, left))
        else:
            with target.open("a") as out:
                out.write(json.dumps(kill_one(count, min(limit_s, left))) + "\n")
        write(options.out)
        print(f"--- {name}: {time.monotonic() - begun:.0f} s since the start", flush=True)


if __name__ == "__main__":
    main()
