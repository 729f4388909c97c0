"""ExecuTorch's `llama_main` (examples/models/llama), one start a repeat: it prints `PyTorchObserver` and a JSON object of time stamps.

The tokenizer lies beside the .pte file. The prompt is a text, so its length in tokens is near the wanted one and reported as
it was; loading and reading the prompt include tokenizing it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora.bench.rounds import TEXT
from edgelora.device import Garbled, Measured, Work
from edgelora.errors import ModelError

PROGRAM, RUNTIME = "llama_main", "executorch"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
_WORDS_A_TOKEN = 0.8  # of English; the runner says how many tokens it really were
_LINE = re.compile(r"PyTorchObserver (\{.*\})")


def opens(path: Path) -> bool:
    return (path.is_file() and path.suffix.lower() == ".pte") or (path.is_dir() and len(list(path.glob("*.pte"))) == 1)


def files(path: Path) -> list[Path]:
    model = path if path.is_file() else next(path.glob("*.pte"))
    tokenizer = next((model.with_name(name) for name in _TOKENIZERS if model.with_name(name).is_file()), None)
    if tokenizer is None:
        raise ModelError(f"no tokenizer lies beside {model.name}", f"llama_main needs one of {', '.join(_TOKENIZERS)} there")
    return [model, tokenizer]


def commands(names: Sequence[str], threads: int, work: Work) -> list[list[str]]:
    return [
        [
            *(f"--model_path={names[0]}", f"--tokenizer_path={names[1]}", f"--cpu_threads={threads}", "--warmup=true", "--temperature=0"),
            *(f"--prompt={_prompt(n)}", f"--seq_len={n + work.decode_tokens}"),
        ]
        for n in work.prompt_tokens
        for _ in range(work.repeats)
    ]


def read(outputs: Sequence[str], threads: int, work: Work) -> list[Measured]:
    groups = [outputs[i * work.repeats : (i + 1) * work.repeats] for i in range(len(work.prompt_tokens))]
    return [_measured([_stamps(text) for text in group]) for group in groups]


def _measured(stamps: Sequence[Mapping[str, int]]) -> Measured:
    return Measured(
        "ExecuTorch, llama_main",
        stamps[0]["prompt_tokens"],
        stamps[0]["generated_tokens"],
        tuple(_span(s, "model_load_start_ms", "model_load_end_ms") for s in stamps),
        tuple(_span(s, "inference_start_ms", "first_token_ms") for s in stamps),
        tuple(_span(s, "prompt_eval_end_ms", "inference_end_ms") / s["generated_tokens"] for s in stamps),
    )


def _stamps(text: str) -> Mapping[str, int]:
    """The object of the last such line: a warm-up may print one of its own."""
    lines = _LINE.findall(text)
    if not lines:
        raise Garbled(f"no line with PyTorchObserver: {text.strip()[-80:]!r}")
    try:
        found = json.loads(lines[-1])
    except ValueError as error:
        raise Garbled(f"PyTorchObserver without JSON: {lines[-1][:80]!r}") from error
    for key in ("prompt_tokens", "generated_tokens"):
        if not isinstance(found.get(key), int) or found[key] < 1:
            raise Garbled(f"{key} is {found.get(key)!r}")
    return dict(found)


def _span(stamps: Mapping[str, Any], start: str, end: str) -> float:
    """Milliseconds between two of the clock's whole milliseconds; a span below one is no measurement."""
    try:
        span = float(stamps[end] - stamps[start])
    except (KeyError, TypeError) as error:
        raise Garbled(f"{start} or {end} is missing") from error
    if span <= 0:
        raise Garbled(f"{end} is not after {start}")
    return span


def _prompt(tokens: int) -> str:
    words = TEXT.split()
    wanted = max(1, round(tokens * _WORDS_A_TOKEN))
    return " ".join((words * (wanted // len(words) + 1))[:wanted])
