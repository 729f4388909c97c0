"""LiteRT-LM's `litert_lm_advanced_main --benchmark`, one start a repeat: it prints a block of text that begins with `BenchmarkInfo:`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgelora.device import Garbled, Measured, Work

PROGRAM, RUNTIME = "litert_lm_advanced_main", "litert-lm"
_INIT = re.compile(r"^\s+- [^:\n]+: ([\d.]+) ms$", re.M)
_TURN = r"{} Turn 1: Processed (\d+) tokens in (\S+) duration"
_UNITS_MS = {"h": 3.6e6, "m": 6e4, "s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}


def opens(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".litertlm", ".task")


def files(path: Path) -> list[Path]:
    return [path]


def commands(names: Sequence[str], threads: int, work: Work) -> list[list[str]]:
    return [
        [
            *(f"--model_path={names[0]}", "--backend=cpu", f"--num_cpu_threads={threads}", "--async=false", "--benchmark=true"),
            *(f"--benchmark_prefill_tokens={n}", f"--benchmark_decode_tokens={work.decode_tokens}", "--disable_cache=true"),
        ]
        for n in work.prompt_tokens
        for _ in range(work.repeats)
    ]


def read(outputs: Sequence[str], threads: int, work: Work) -> list[Measured]:
    found = []
    for i in range(len(work.prompt_tokens)):
        blocks = [_block(text) for text in outputs[i * work.repeats : (i + 1) * work.repeats]]
        prefill, decode = ([_turn(block, kind) for block in blocks] for kind in ("Prefill", "Decode"))
        found.append(
            Measured(
                "LiteRT-LM",
                prefill[0][0],
                decode[0][0],
                tuple(sum(map(float, _INIT.findall(block.partition("Time to first token")[0]))) for block in blocks),
                tuple(ms + later / tokens for (_, ms), (tokens, later) in zip(prefill, decode, strict=True)),
                tuple(ms / tokens for tokens, ms in decode),
            )
        )
    return found


def _block(text: str) -> str:
    _, found, block = text.rpartition("BenchmarkInfo:")
    if not found:
        raise Garbled(f"no BenchmarkInfo: {text.strip()[-80:]!r}")
    return block


def _turn(block: str, kind: str) -> tuple[int, float]:
    """(tokens, milliseconds) of the first prefill or decode turn."""
    match = re.search(_TURN.format(kind), block)
    if match is None:
        raise Garbled(f"no {kind.lower()} turn in it")
    tokens, ms = int(match[1]), duration_ms(match[2])
    if tokens < 1 or ms <= 0:
        raise Garbled(f"a {kind.lower()} turn of {match[1]} tokens in {match[2]}")
    return tokens, ms


def duration_ms(text: str) -> float:
    """Abseil's way to write a duration, '1m2.5s' or '850.2ms', in milliseconds."""
    parts = re.findall(r"([\d.]+)(h|ms|us|ns|m|s)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise Garbled(f"{text!r} is no duration")
    return sum(float(number) * _UNITS_MS[unit] for number, unit in parts)
