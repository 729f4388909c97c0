"""Measure exported files on this machine: load, time to the first token, prefill, decode, peak memory.

Decoding one token reads every weight once, so a file of B bytes decodes no faster than bandwidth / B; every row says
what share of that ceiling was reached. Each file runs in a process of its own, which holds the runtime and nothing
else. Several files take turns, so that whatever drifts (heat, clocks, other programs, other guests of the host) hits all of them alike:
in every repeat all are opened, on the same cores, and decode in turns of a twentieth of a second. Where memory has no room for all
of them, or the model runs in yet another process, a turn is a whole repeat.

    rounds        one repeat, inside the measuring process
    cores         which cores it runs on
    child         that process and how it is spoken to
    disturbance   why a figure is doubtful
    quality       how good the files are; agreement: whether they answer in a browser as they do natively
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgelora import machine
from edgelora.bench import cores, disturbance
from edgelora.bench.child import measuring
from edgelora.bench.rounds import WORKLOAD, Round
from edgelora.progress import Progress
from edgelora.recipe import Bench

_WARM_UP_ROUNDS = 5  # at most
_ROOM = 4  # times the bytes of all files, to hold them open at once: llama.cpp has repacked weights twice, and repacks where half of memory is left
_SOON_S = 0.005  # a process that just answered is asleep again by then, and does not count as another program
_STABLE = 0.05  # two successive decode medians this near each other end the warm-up


def bench(path: Path, runtime_name: str, settings: Bench, threads: int, progress: Progress) -> list[dict[str, Any]]:
    """`bench_all` of one file."""
    return bench_all([(path, runtime_name)], settings, threads, progress)


def bench_all(files: Sequence[tuple[Path, str]], settings: Bench, threads: int, progress: Progress) -> list[dict[str, Any]]:
    """Measure files, each with the runtime named beside it; one row per file and prompt length.

    A row holds raw samples and their medians (of a short prompt that is read several times in a repeat the median reading is the sample);
    rows of one call have the same `turns`, so that their repeats are pairs (`edgelora.speeds`).
    `peak_rss_bytes` is of the whole child process, interpreter included, or of the browser's processes together; `load_average` is taken
    before the first round. A row is `crowded` when something from outside disturbed it and `noisy`
    when it or its samples are doubtful; `noisy_why` says why.
    Raises what the runtime raised, or EdgeloraError with a child's last words when it crashed or hung.
    """
    load_average = machine.load_average()
    others: list[int] = []
    hot: list[bool] = []
    rounds: list[list[Round]] = [[] for _ in files]
    with contextlib.ExitStack() as stack:
        ceilings = [_bandwidth(threads)]
        children = [stack.enter_context(measuring(path.name)) for path, _ in files]
        requests = [
            {
                "file": str(path.resolve()),
                "runtime": name,
                "threads": threads,
                "prompt_tokens": settings.prompt_tokens,
                "decode_tokens": settings.decode_tokens,
            }
            for path, name in files
        ]
        settled = []
        for (path, _), process, request in zip(files, children, requests, strict=True):
            progress(0.0, f"warming up {path.name}")
            settled.append(_warm_up(partial(process.round, request)))
        at_once = len(files) > 1 and _ROOM * sum(size_bytes(path) for path, _ in files) < machine.available_memory_bytes()
        places = cores.places(threads) if len(files) > 1 else []
        before, started = disturbance.snapshot(), time.monotonic()
        for repeat in range(settings.repeats):
            time.sleep(_SOON_S)
            others += [n] if (n := machine.others_running()) is not None else []
            hot.append(machine.clock_held_down())
            here = {"turns": at_once, "cores": places[repeat % len(places)] if places else ()}
            waiting = deque((repeat + turn) % len(files) for turn in range(len(files)))  # every repeat begins with another file
            taken = 0
            while waiting:
                number = waiting.popleft()
                if taken < len(files):
                    share = (repeat * len(files) + taken) / (settings.repeats * len(files))
                    progress(share, f"{files[number][0].name}, repeat {repeat + 1} of {settings.repeats}")
                taken += 1
                if (done := children[number].turn({**requests[number], **here})) is None:
                    waiting.append(number)
                else:
                    rounds[number].append(done)
        after, wall_s = disturbance.snapshot(), time.monotonic() - started
        ceilings.append(_bandwidth(threads))
    progress(1.0, "measured")
    crowded = disturbance.from_outside(before, after, wall_s, others, hot, threads, machine.cores())
    rows, turns = [], secrets.token_hex(4)
    for number, (path, name) in enumerate(files):
        about = {"file": path.name, "runtime": name, "runtime_version": rounds[number][0].version, "threads": threads, "turns": turns}
        for index in range(len(settings.prompt_tokens)):
            row = _row(rounds[number], index, size_bytes(path), max(ceilings), crowded, settled[number])
            rows.append({**about, **row, "load_average": load_average})
    return rows


def _bandwidth(threads: int) -> float:
    """GB/s that the memory gives now. A ceiling: of two looks, before and after, the better one counts."""
    with measuring("the memory bandwidth") as memory:
        return float(memory.ask({"threads": threads})["bandwidth_gb_per_s"])


def _warm_up(one_round: Callable[[], Round]) -> bool:
    """Run rounds until two in a row decode alike, at most _WARM_UP_ROUNDS; whether they came to that."""
    before = _decode_median(one_round())
    for _ in range(2, _WARM_UP_ROUNDS + 1):
        now = _decode_median(one_round())
        if abs(now - before) <= _STABLE * before:
            return True
        before = now
    return False


def _decode_median(measured: Round) -> float:
    return statistics.median(ms for timing in measured.timings for ms in timing.decode_ms)


def _row(rounds: Sequence[Round], index: int, size: int, bandwidth: float, crowded: Sequence[str], settled: bool) -> dict[str, Any]:
    timings = [r.timings[index] for r in rounds]
    read = rounds[0].bytes_per_token
    load, ttft = [r.load_ms for r in rounds], [t.ttft_ms for t in timings]
    decode = [ms for t in timings for ms in t.decode_ms]
    ttft_ms, decode_ms = statistics.median(ttft), statistics.median(decode)
    why = [*crowded, *disturbance.in_samples([statistics.median(t.decode_ms) for t in timings], settled)]
    return {
        "prompt_tokens": timings[0].prompt_tokens,
        "decode_tokens": len(timings[0].decode_ms),
        "workload": WORKLOAD,
        "processor": machine.processor(),
        "load_ms": statistics.median(load),
        "ttft_ms": ttft_ms,
        "prefill_tok_per_s": 1000 * timings[0].prompt_tokens / ttft_ms,
        "decode_tok_per_s": 1000 / decode_ms,
        "peak_rss_bytes": max(r.peak_rss_bytes for r in rounds),
        "prefill_cpu_s": statistics.median(t.prefill_cpu_s for t in timings),
        "cpu_s_per_token": statistics.median(t.decode_cpu_s / len(t.decode_ms) for t in timings),
        "size_bytes": size,
        "bytes_per_token": read,
        "bandwidth_gb_per_s": bandwidth,
        "bandwidth_share": read / decode_ms / 1e6 / bandwidth if read else None,
        "samples_ms": {"load": load, "ttft": ttft, "decode": decode},
        "crowded": bool(crowded),
        "noisy": bool(why),
        "noisy_why": "; ".join(why),
    }


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
