"""MNN's `llm_bench` in its mode of real chats (`-kv true`), one start a repeat: it prints a Markdown table of speeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgelora.device import Garbled, Measured, Work

PROGRAM, RUNTIME = "llm_bench", "mnn"
_ROW = re.compile(r"prompt=(\d+)<br>decode=(\d+)\s*\|\s*([\d.]+) ± [\d.]+<br>([\d.]+) ± [\d.]+\s*\|(?:\s*([\d.]+) ± [\d.]+\s*\|)?")


def opens(path: Path) -> bool:
    return (path / "llm.mnn").is_file() and (path / "config.json").is_file()


def files(path: Path) -> list[Path]:
    return [path / "config.json", *sorted(p for p in path.iterdir() if p.is_file() and p.name != "config.json")]


def commands(names: Sequence[str], threads: int, work: Work) -> list[list[str]]:
    prompts = ",".join(map(str, work.prompt_tokens))
    once = ["-m", names[0], "-a", "cpu", "-t", str(threads), "-p", prompts, "-n", str(work.decode_tokens)]
    return [[*once, "-rep", "1", "-kv", "true", "-load", "true"] for _ in range(work.repeats)]


def read(outputs: Sequence[str], threads: int, work: Work) -> list[Measured]:
    tables = [{(int(m[1]), int(m[2])): m for m in _ROW.finditer(text)} for text in outputs]
    found = []
    for n in work.prompt_tokens:
        rows = [table.get((n, work.decode_tokens)) for table in tables]
        if not rows or None in rows:
            raise Garbled(f"no row of a {n}-token prompt and {work.decode_tokens} tokens after it: {outputs[-1].strip()[-80:]!r}")
        matches = [row for row in rows if row]
        prefill, decode = ([_speed(match[group]) for match in matches] for group in (3, 4))
        found.append(
            Measured(
                "MNN, llm_bench",
                n,
                work.decode_tokens,
                tuple(1000 * float(match[5]) for match in matches if match[5]),
                tuple(1000 * n / speed for speed in prefill),
                tuple(1000 / speed for speed in decode),
            )
        )
    return found


def _speed(text: str) -> float:
    """Tokens a second, of which the table shows two decimals."""
    speed = float(text)
    if speed <= 0:
        raise Garbled(f"a speed of {text} tokens a second")
    return speed
