"""Why a file is slower in Chromium than in its native runtime: types, threads, warm-up, and where the time goes.

    python bench/browser_speed.py FILE... --part a.json              # every file natively and in Chromium, one and two threads
    python bench/browser_speed.py FILE... --profile --part b.json    # V8's sampling profiler over one thread: the hottest functions
    python bench/browser_speed.py --save a.json b.json

FILE is a .gguf file or an exported ONNX folder. Needs Chromium, Node and `edgelora doctor --install web`. The first pass after loading
is kept apart: V8 compiles what runs often a second time, and better. Parts keep each run short enough for a machine held still.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results

from edgelora import machine
from edgelora.bench.rounds import prompt
from edgelora.runtime import browser, browser_of, runtime, runtime_of
from edgelora.runtime.browser import BrowserSession
from edgelora.runtime.page_server import PageServer

PROMPT, DECODE, PASSES = 64, 16, 3
LIBRARIES = {"wllama": ("wllama", "@wllama/wllama/esm"), "onnxruntime-web": ("ort", "onnxruntime-web/dist")}


def natively(path: Path, threads: int) -> dict[str, Any]:
    with runtime(runtime_of(path)).open(path, threads) as session:
        ids, passes, beside = prompt(session, PROMPT), [], []
        for _ in range(PASSES):
            beside.append(machine.others_running())
            marks = [time.perf_counter()]
            marks += [time.perf_counter() for _ in session.generate(ids, DECODE + 1, ())]
            gaps = [1000 * (b - a) for a, b in itertools.pairwise(marks)]
            passes.append((gaps[0], gaps[1:]))
    return {**row(path, runtime_of(path), threads, passes), "others_running": beside}


def in_chromium(path: Path, threads: int) -> dict[str, Any]:
    with opened(path, threads) as session:
        ids = prompt(session, PROMPT)
        beside, timed = [], []
        for _ in range(PASSES):
            beside.append(machine.others_running())
            timed.append(session.time(ids, DECODE))
        found = row(path, browser_of(path), threads, [(t.ttft_ms, list(t.decode_ms)) for t in timed])
        cpu = statistics.median(t.decode_cpu_s / DECODE for t in timed[1:])
        return {
            **found,
            "version": session.version,
            "browser": session.page.browser,
            "load_ms": session.load_ms,
            "cpu_s_per_token": cpu,
            "others_running": beside,
        }


def opened(path: Path, threads: int) -> BrowserSession:
    session = runtime(browser_of(path)).open(path, threads)
    assert isinstance(session, BrowserSession)
    return session


def row(path: Path, name: str, threads: int, passes: Sequence[tuple[float, list[float]]]) -> dict[str, Any]:
    """The first pass apart; speeds are of the medians of the others."""
    ttft = statistics.median(first for first, _ in passes[1:])
    decode = statistics.median(ms for _, gaps in passes[1:] for ms in gaps)
    found = {
        "file": path.name,
        "runtime": name,
        "threads": threads,
        "prefill_tok_per_s": 1000 * PROMPT / ttft,
        "decode_tok_per_s": 1000 / decode,
    }
    cold = {"first_prefill_tok_per_s": 1000 * PROMPT / passes[0][0], "first_decode_tok_per_s": 1000 / statistics.median(passes[0][1])}
    print(f"{path.name}  {name}, {threads} threads: prefill {found['prefill_tok_per_s']:.1f}, decode {found['decode_tok_per_s']:.1f} tok/s")
    return {**found, **cold, "samples_ms": [{"ttft": first, "decode": gaps} for first, gaps in passes]}


def profile(path: Path) -> dict[str, Any]:
    """Share of the worker's time by function, one thread, the hottest first. Wasm functions are named by their index."""
    name, place = browser_of(path), browser.modules()
    at, folder = LIBRARIES[name]
    pages = Path(browser.__file__).parent / "web"
    with PageServer({"page": pages, at: place / folder, "model": path}) as server, runtime(runtime_of(path)).open(path, 1) as native:
        ids = prompt(native, PROMPT)
        about = {
            "playwright": (place / "playwright-core" / "index.mjs").as_uri(),
            "executable": browser.chromium(),
            "url": f"{server.origin}/page/{name.removesuffix('-web')}.html",
            "load": {"threads": 1, "context": browser.CONTEXT, "files": sorted(f.name for f in path.glob("model.onnx*"))},
            "time": {"prompt": {"ids": ids, "text": native.detokenize(ids)}, "n": DECODE},
        }
        script = Path(__file__).with_name("browser_profile.mjs")
        done = subprocess.run(["node", str(script), json.dumps(about)], capture_output=True, text=True, timeout=300, check=True)
    found = {"file": path.name, "runtime": name, **json.loads(done.stdout)}
    print(f"{path.name}  {name}: " + ", ".join(f"{share:.0%} {function}" for function, share in found["prefill and decode"][:4]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--part", type=Path, help="write what was measured here")
    parser.add_argument("--save", nargs="+", type=Path, help="put parts together into a result")
    asked = parser.parse_args()
    if asked.save:
        save(asked.save)
        return
    found: list[dict[str, Any]] = []
    for path in asked.files:
        found += [profile(path)] if asked.profile else [one(path, threads) for one in (natively, in_chromium) for threads in (1, 2)]
    asked.part.write_text(json.dumps({"profiles" if asked.profile else "rows": found}), encoding="utf-8")


def save(parts: Sequence[Path]) -> None:
    read = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
    rows, profiles = ([made for part in read for made in part.get(name, [])] for name in ("rows", "profiles"))
    native = {(r["file"], r["threads"]): r for r in rows if r["runtime"] not in LIBRARIES}
    headline = []
    for found in rows:
        if found["runtime"] in LIBRARIES and found["threads"] == 1:
            other = native[found["file"], 1]
            words = ", ".join(
                f"{kind} {found[key]:.1f} against {other[key]:.0f}"
                for kind, key in (("prefill", "prefill_tok_per_s"), ("decode", "decode_tok_per_s"))
            )
            headline.append([f"{found['file']} in {found['runtime']}, one thread, tok/s", words])
    command = "python bench/browser_speed.py FILE... (see its head)"
    results.save("browser-speed", command, ("llama-cpp-python", "onnxruntime"), headline, {"rows": rows, "profiles": profiles})


if __name__ == "__main__":
    main()
