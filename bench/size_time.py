"""How long naming a size takes: what `edgelora run` does for `max_size`, for a random Llama of 1.07B with a LoRA. Wants a GPU.

    python bench/size_time.py TOKENIZER [--budget 650MB]

TOKENIZER is a folder with SmolLM2's, whose vocabulary the shape has. Rows are the quick start's, as many as `edgelora run` takes: of `train`
for the curvature (on the GPU where there is one) and the costs of every type of every matrix (on the processor), of `valid` to choose between
the files, which llama.cpp runs. What is timed includes writing, measuring and verifying them. Weights are random, so losses mean nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import results
import torch
from stream_export import adapter, checkpoint

from edgelora import machine, models, tuned
from edgelora import recipe as recipes
from edgelora.data import chat
from edgelora.data.read import read
from edgelora.export import budget
from edgelora.quant import importance

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
LIMITS = recipes.Evaluate(max_kl=100.0)  # a random model's answers are all guesses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--shape", default="1.07b")
    parser.add_argument("--budget", default="650MB")
    parser.add_argument("--threads", type=int, default=machine.cores())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = work / "base"
        base.mkdir()
        shapes = checkpoint(given.shape, base)
        for file in given.tokenizer.iterdir():
            (base / file.name).write_bytes(file.read_bytes())
        opened = models.open_base(str(base), Path(), work)
        model = tuned.tuned(opened, str(base), adapter(shapes, base, work / "adapters"))
        tokenizer = models.open_tokenizer(base)
        train, valid = (
            chat.encode_all(tokenizer, read(DATA / file).rows, 512) for file in ("edgelora-faq.jsonl", "edgelora-faq-valid.jsonl")
        )
        rows = [ids for _, ids in importance.spread(train, recipes.Importance.plan_rows)]
        choosing = [ids for _, ids in valid[: LIMITS.rows]]
        said = Said()
        began = time.perf_counter()
        known = budget.measure(model, "16bit", rows, "planned", given.threads, work, "", said)
        planned = time.perf_counter()
        made = budget.export(
            model, recipes.Export("gguf", max_size=given.budget), name="planned", known=known, rows=choosing, rows_from={"valid": "select"},
            merge_base="16bit", limits=LIMITS, threads=given.threads, out=work, progress=said,
        )  # fmt: skip
        ended = time.perf_counter()
    seconds = {"costs": planned - began, "files": ended - planned, "together": ended - began}
    facts = {key: made.facts[key] for key in ("size_bytes", "predicted_bytes", "kl", "rows", "tokens", "plan", "weights")}
    document: dict[str, Any] = {
        "weights": sum(torch.Size(dims).numel() for dims in shapes.values()), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": given.threads, "rows": {"train": len(rows), "valid": len(choosing)}, "answer_tokens": known.facts["answer_tokens"],
        "seconds": seconds, "steps": said.steps, "file": facts,
    }  # fmt: skip
    print(json.dumps({key: value for key, value in document.items() if key not in ("steps", "file")}))
    headline = [[f"{document['weights'] / 1e9:.2f}B within {given.budget}, {what}", f"{taken:.0f} s"] for what, taken in seconds.items()]
    command = f"python bench/size_time.py TOKENIZER --shape {given.shape} --budget {given.budget}"
    results.save("size-time", command, ("torch", "transformers", "gguf", "llama-cpp-python"), headline, document)


class Said:
    """Progress, with the second of every text that is new but for its numbers."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps: list[tuple[float, float, str]] = []

    def __call__(self, share: float, text: str) -> None:
        if not self.steps or text.split()[0] != self.steps[-1][2].split()[0]:
            self.steps.append((round(time.perf_counter() - self.began, 1), round(share, 3), text))
            print(*self.steps[-1], flush=True)


if __name__ == "__main__":
    main()
