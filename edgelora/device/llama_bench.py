"""llama.cpp's `llama-bench`: two starts a thread count, one for reading prompts, one for writing after them.

It is run on the processor (`-ngl 0`) with its own warm-up. Prompts are random tokens; what was written after a prompt of n
tokens is its test at depth n, so the figures mean what they mean elsewhere in a report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora.device import Garbled, Measured, Work

PROGRAM = RUNTIME = "llama-bench"


def opens(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".gguf"


def files(path: Path) -> list[Path]:
    return [path]


def commands(names: Sequence[str], threads: int, work: Work) -> list[list[str]]:
    prompts = ",".join(map(str, work.prompt_tokens))
    same = ["-m", names[0], "-t", str(threads), "-r", str(work.repeats), "-ngl", "0", "-o", "json"]
    return [[*same, "-p", prompts, "-n", "0"], [*same, "-p", "0", "-n", str(work.decode_tokens), "-d", prompts]]


def read(outputs: Sequence[str], threads: int, work: Work) -> list[Measured]:
    tests: dict[tuple[int, int, int], Mapping[str, Any]] = {}
    for text in outputs:
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise Garbled(f"no JSON: {text.strip()[:80]!r}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Garbled(f"no list of tests: {text.strip()[:80]!r}")
        tests |= {(row.get("n_prompt", -1), row.get("n_gen", -1), row.get("n_depth", 0)): row for row in rows}
    return [_measured(tests, n, threads, work) for n in work.prompt_tokens]


def _measured(tests: Mapping[tuple[int, int, int], Mapping[str, Any]], n: int, threads: int, work: Work) -> Measured:
    prompt, decode = tests.get((n, 0, 0)), tests.get((0, work.decode_tokens, n))
    if prompt is None or decode is None:
        raise Garbled(f"no test of a {n}-token prompt and of {work.decode_tokens} tokens after it")
    for row in (prompt, decode):
        if row.get("n_threads") != threads:
            raise Garbled(f"it ran {row.get('n_threads')} threads instead of {threads}")
    ttft, whole = (_samples(row, work.repeats) for row in (prompt, decode))
    version = f"llama.cpp {prompt.get('build_commit', '')} ({prompt.get('build_number', '')}), {prompt.get('backends', '')}"
    return Measured(version, n, work.decode_tokens, (), tuple(ttft), tuple(ms / work.decode_tokens for ms in whole))


def _samples(row: Mapping[str, Any], repeats: int) -> list[float]:
    """Milliseconds of each repeat."""
    found = row.get("samples_ns")
    if not isinstance(found, list) or len(found) != repeats:
        raise Garbled(f"samples_ns of {repeats} repeats are {str(found)[:80]}")
    if not all(isinstance(ns, int) and not isinstance(ns, bool) and ns > 0 for ns in found):
        raise Garbled(f"samples_ns hold something else than times: {str(found)[:80]}")
    return [ns / 1e6 for ns in found]
