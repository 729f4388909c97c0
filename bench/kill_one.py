"""`edgelora finetune --gpus N` on a tiny base that N processes hold, each the whole or all together: one of them is killed, and half as many go on.

Undisturbed, one process trains the same, and N with the base whole, which differ by the order of sums alone, and N with the base
divided. Used by `several_gpus.py`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
_KILL_AFTER = 3  # epochs
_RECIPE = """\
name: tiny
base: base
data: {train: rows.jsonl, clean: {mojibake: none, typos: none, near: none}}
train: {r: 8, alpha: 16, lr: 2e-3, epochs: 10, batch: 8, accumulate: 1, max_tokens: 256, patience: 0}
exports: [{format: gguf, type: q8_0}]
"""


def kill_one(count: int, limit_s: float) -> dict[str, Any]:
    """For the base `whole` and `divided`: what was said, when all had ended, and the largest difference of a `valid` loss from the
    undisturbed run's. Between the undisturbed runs: one process and all, with the base whole (`order`) and divided (`dividing`).
    """
    begun = time.monotonic()
    row: dict[str, Any] = {"case": "killed", "processes": count, "resumed_processes": max(1, count // 2)}
    left = lambda: max(1.0, limit_s - (time.monotonic() - begun))  # noqa: E731
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        undisturbed = {
            "one": finetune(folder, "one", 1, "never"),
            "whole": finetune(folder, "all-whole", count, "never"),
            "divided": finetune(folder, "all-divided", count, "always"),
        }
        try:
            known = {name: curve(process, left()) for name, process in undisturbed.items()}
            row |= {"order": apart(known["whole"], known["one"]), "dividing": apart(known["divided"], known["one"]), "valid": known}
            for name, shard in (("whole", "never"), ("divided", "always")):
                row[name] = killed(folder, name, count, shard, left)
                resumed = curve(finetune(folder, name, row["resumed_processes"], "never"), left(), resumed=True)
                row[name]["difference"] = apart(resumed, known[name])
                known[f"{name}, resumed"] = resumed
        except (RuntimeError, subprocess.TimeoutExpired, IndexError) as error:
            row["error"] = repr(error)[:1000]
        finally:
            for process in undisturbed.values():
                stop(process)
    row["case_s"] = round(time.monotonic() - begun, 1)
    print(json.dumps(row), flush=True)
    return row


def killed(folder: Path, out: str, count: int, shard: str, left: Callable[[], float]) -> dict[str, Any]:
    """What became of `count` processes when the second one was killed."""
    going = finetune(folder, out, count, shard)
    try:
        mark = f"{out}/.adapter-*.partial/checkpoints/checkpoint-*"
        while len(list(folder.glob(f"{mark}/complete"))) < 1 or epochs(folder, mark) < _KILL_AFTER:
            if going.poll() is not None or left() <= 1:
                raise RuntimeError(f"it ended or wrote no checkpoint: {said(going)}")
            time.sleep(0.02)
        working = [child for child in psutil.Process(going.pid).children(recursive=True) if "edgelora.cli" in child.cmdline()]
        os.kill(working[1].pid, signal.SIGKILL)
        began = time.monotonic()
        going.wait(60)
        found = {"ended_s": time.monotonic() - began, "left": len(psutil.wait_procs(working, 5)[1])}
        return found | {"code": going.returncode, "said": said(going), "epoch": epochs(folder, mark)}
    finally:
        stop(going)


def curve(process: subprocess.Popen[bytes], limit_s: float, resumed: bool = False) -> dict[int, float]:
    """The `valid` loss by step of a run that ends well."""
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        stop(process)
    if process.returncode:
        raise RuntimeError(err.decode()[-1000:])
    document = json.loads(out)
    if document["resumed"] != resumed:
        raise RuntimeError("it did not go on from a checkpoint" if resumed else "it found a checkpoint")
    return {point["step"]: point["loss"] for point in document["valid_curve"]}


def apart(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    return max(abs(loss - b[step]) for step, loss in a.items())


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prepare(folder: Path) -> None:
    """A base of four layers, 96 rows of unequal length, a recipe of about a hundred updates."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny_models import tiny_model

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    tiny_model("llama", folder / "base", **sizes)
    chance = random.Random(0)
    rows = [
        {"question": f"What is part {n} for?", "answer": f"Part {n} is no. {n * n}." + " Ask again." * chance.randrange(8)}
        for n in range(96)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(_RECIPE)


def finetune(folder: Path, out: str, gpus: int, shard: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "edgelora.cli", "finetune", "tiny.yaml", "--out", out, "--json"]
    line += ["--gpus", str(gpus), f"--set=train.shard={shard}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if gpus == 1:
        env["CUDA_VISIBLE_DEVICES"] = "0"
    return subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def epochs(folder: Path, mark: str) -> int:
    """How many times the run that will be killed has saved: it keeps two checkpoints, and the newest knows its epoch."""
    states = sorted(folder.glob(f"{mark}/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    try:
        return round(json.loads(states[-1].read_text())["epoch"]) if states else 0
    except (json.JSONDecodeError, FileNotFoundError):  # it is being written or removed
        return 0


def said(process: subprocess.Popen[bytes]) -> list[str]:
    """The last lines on stderr of a process that has ended."""
    if process.poll() is None or process.stderr is None:
        return []
    return process.stderr.read().decode(errors="replace").splitlines()[-6:]
