"""The quick start, measured from outside: time, peak memory of every process, sizes, losses, repeatability, kills.

    python bench/quickstart.py                       one run into an empty folder
    python bench/quickstart.py --twice               a second run into another empty folder: same bytes?
    python bench/quickstart.py --kill 10             then ten times kill -9 at random moments of every stage, and one that finishes

Writes results/<machine class>/<date>-<commit>-quickstart.json. Run it on an idle machine; the load before is recorded.
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
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgelora import artifact, machine

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "quickstart.yaml"


def command(out: Path, overrides: list[str]) -> list[str]:
    settings = [word for item in overrides for word in ("--set", item)]
    return [sys.executable, "-m", "edgelora.cli", "run", str(RECIPE), "--out", str(out), "--json", *settings]


def watched(arguments: list[str]) -> tuple[dict[str, Any], str]:
    """Run to the end; wall seconds, CPU seconds, peak resident bytes of each process by its role, exit code; stdout."""
    peaks: dict[str, int] = {}
    started, before = time.monotonic(), os.times()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.2):
            for pid in group(process.pid):
                role = "edgelora run" if pid == process.pid else role_of(pid)
                peaks[role] = max(peaks.get(role, 0), peak_bytes(pid))

    threading.Thread(target=sample, daemon=True).start()
    output, errors = process.communicate()
    ended.set()
    after = os.times()
    if process.returncode not in (0, 1):
        sys.exit(f"exit code {process.returncode}: {errors[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": time.monotonic() - started, "cpu_s": cpu, "exit_code": process.returncode, "peak_rss_bytes": peaks}, output


def group(leader: int) -> list[int]:
    """The leader and every descendant of it (children may lead sessions of their own)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found = [leader]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def role_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return "other"
    return (
        "onnx builder"
        if any("genai" in word for word in words)
        else "bench child"
        if any("edgelora.bench" in word for word in words)
        else "other"
    )


def peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def finished(out: Path) -> dict[str, int]:
    """Inode of every finished folder."""
    return {p.name: p.stat().st_ino for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")} if out.exists() else {}


def shipped(out: Path) -> dict[str, str]:
    """SHA-256 of every file of every export."""
    found = {}
    for folder in sorted(out.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            made = artifact.load(folder)
            if made.kind == "export":
                found |= {f"{folder.name}/{name}": digest for name, digest in made.files.items()}
    return found


def whole(out: Path) -> bool:
    """Whether everything under a final name is complete: a manifest, and every file with the hash it names."""
    folders = [p for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return all(artifact.sha256(folder / name) == digest for folder in folders for name, digest in artifact.load(folder).files.items())


def stages(out: Path) -> list[tuple[str, float]]:
    """Every finished folder in the order they were made, without its key, and the seconds it took."""
    folders = sorted((p for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")), key=ended)
    begins = [ended(folders[0]), *map(ended, folders)]  # the first stage's begin is not recorded: it is killed as it starts
    return [(folder.name.rpartition("-")[0], ended(folder) - begin) for folder, begin in zip(folders, begins, strict=False)]


def ended(folder: Path) -> float:
    return (folder / artifact.MANIFEST).stat().st_mtime


def kills(out: Path, overrides: list[str], count: int, first: Path) -> dict[str, Any]:
    """Kill `count` runs, each at a random moment of the next stage of `first`, checking after each; then let one finish.

    Stages that follow on a killed one are reached because the next round finishes it. More rounds than stages begin anew
    with the longest.
    """
    chance = random.Random(0)
    known = stages(first)
    longest = sorted(range(len(known)), key=lambda i: -known[i][1])
    plan = sorted([*range(len(known)), *longest * count][:count])
    rounds = []
    before: dict[str, int] = {}
    for index in plan:
        stage, seconds = known[index]
        process = subprocess.Popen(command(out, overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not (list(out.glob(f".{stage}-*.partial")) or list(out.glob(f"{stage}-*"))):
            time.sleep(0.01)
        after_s = chance.uniform(0, seconds)
        time.sleep(after_s)
        if process.poll() is not None:
            sys.exit(f"the run ended before it was killed in {stage}")
        for pid in reversed(group(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        now = finished(out)
        rounds.append(
            {
                "stage": stage,
                "killed_after_s": round(after_s, 1),
                "finished": sorted(now),
                "kept": all(now.get(name) == inode for name, inode in before.items()),
                "whole": whole(out),
            }
        )
        before = now
    last, _ = watched(command(out, overrides))
    now = finished(out)
    return {"rounds": rounds, "last": last, "kept": all(now.get(n) == i for n, i in before.items()), "whole": whole(out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--kill", type=int, default=0, metavar="N")
    parser.add_argument("--into", type=Path, help="Empty folder for the first run, kept; default a temporary one.")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {
        "command": "python bench/quickstart.py"
        + (" --twice" if options.twice else "")
        + (f" --kill {options.kill}" if options.kill else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "overrides": options.set,
        "machine": machine.describe(),
    }
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch:
        first = options.into or Path(scratch) / "first"
        result["run"], output = watched(command(first, options.set))
        result["report"] = json.loads(output)
        again, _ = watched(command(first, options.set))
        result["again"] = {"wall_s": again["wall_s"], "exit_code": again["exit_code"]}
        if options.twice:
            second = Path(scratch) / "second"
            result["second_run"], _ = watched(command(second, options.set))
            result["same_bytes"] = shipped(first) == shipped(second)
        if options.kill:
            result["kills"] = kills(Path(scratch) / "killed", options.set, options.kill, first)
            result["same_bytes_after_kills"] = shipped(first) == shipped(Path(scratch) / "killed")
    folder = options.results / result["machine"]["class"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{result['date']}-{commit}-quickstart.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
