"""`edgelora finetune --gpus N` on a tiny base that N processes hold together: one of them is killed, and half as many go on.

Beside it one process trains the same undisturbed, with the base whole, and another one with the rows of an update in two steps: these
two differ by rounding alone, which says how near the run that went on has to be. Used by `several_gpus.py`.
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
    """What was said, when all had ended, and the largest difference of a `valid` loss from the undisturbed run's: of the run that went on
    (`difference`), and of the one in two steps (`rounding`).
    """
    begun = time.monotonic()
    row: dict[str, Any] = {"case": "killed", "processes": count}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        alone = finetune(folder, "alone", 1, "never")
        steps = finetune(folder, "steps", 1, "never", "--set=train.batch=4", "--set=train.accumulate=2")
        going = finetune(folder, "killed", count, "always")
        try:
            mark = "killed/.adapter-*.partial/checkpoints/checkpoint-*/complete"
            while len(list(folder.glob(mark))) < 1 or epochs(folder) < _KILL_AFTER:
                if going.poll() is not None or time.monotonic() - begun > limit_s / 2:
                    raise RuntimeError(f"it ended or wrote no checkpoint: {said(going)}")
                time.sleep(0.02)
            working = [child for child in psutil.Process(going.pid).children(recursive=True) if "edgelora.cli" in child.cmdline()]
            os.kill(working[1].pid, signal.SIGKILL)
            killed = time.monotonic()
            going.wait(60)
            row["ended_s"] = time.monotonic() - killed
            row["left"] = len(psutil.wait_procs(working, 5)[1])
            row |= {"code": going.returncode, "said": said(going)}
            row["resumed_processes"] = max(1, count // 2)
            resumed = finetune(folder, "killed", row["resumed_processes"], "never")
            curves = []
            for process in (alone, resumed, steps):
                out, err = process.communicate(timeout=max(1.0, limit_s - (time.monotonic() - begun)))
                if process.returncode:
                    raise RuntimeError(err.decode()[-1000:])
                document = json.loads(out)
                curves.append({point["step"]: point["loss"] for point in document["valid_curve"]})
                row["resumed"] = row.get("resumed", False) or document["resumed"]
            row["difference"], row["rounding"] = (max(abs(loss - curve[step]) for step, loss in curves[0].items()) for curve in curves[1:])
            row["steps"], row["loss"] = max(curves[0]), curves[0][max(curves[0])]
        except (RuntimeError, subprocess.TimeoutExpired, IndexError) as error:
            row["error"] = repr(error)[:1000]
        finally:
            for process in (alone, steps, going):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    row["case_s"] = round(time.monotonic() - begun, 1)
    print(json.dumps(row), flush=True)
    return row


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


def finetune(folder: Path, out: str, gpus: int, shard: str, *more: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "edgelora.cli", "finetune", "tiny.yaml", "--out", out, "--json"]
    line += ["--gpus", str(gpus), f"--set=train.shard={shard}", *more]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if gpus == 1:
        env["CUDA_VISIBLE_DEVICES"] = "0"
    return subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def epochs(folder: Path) -> int:
    """How many times the run that will be killed has saved: it keeps two checkpoints, and the newest knows its epoch."""
    states = sorted(folder.glob("killed/.adapter-*.partial/checkpoints/checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    try:
        return round(json.loads(states[-1].read_text())["epoch"]) if states else 0
    except (json.JSONDecodeError, FileNotFoundError):  # it is being written or removed
        return 0


def said(process: subprocess.Popen[bytes]) -> list[str]:
    """The last lines on stderr of a process that has ended."""
    if process.poll() is None or process.stderr is None:
        return []
    return process.stderr.read().decode(errors="replace").splitlines()[-6:]
