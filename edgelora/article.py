"""What introductions to fine-tuning promise of LoRA, its jobs and its sizes, held against this package's own estimates.

The claims are those of the Japanese introduction that this project began with. It names neither epochs nor tokens a row for its jobs (its
listing runs 3 epochs), so a job is reckoned for one and three epochs, and for rows of 128, 256 and 512 tokens. A claim holds when it holds for three
epochs of 256-token rows, does not hold when it fails even for one epoch of 128, and is undefined between: it depends on what was left unsaid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgelora import outline
from edgelora import recipe as recipes
from edgelora.gpus import Gpu, Table
from edgelora.train import adapter
from edgelora.train import estimate as training

HOLDS, FAILS, UNDEFINED = "holds", "does not hold", "undefined"
EPOCHS, ROW_TOKENS = (1, 3), (128, 256, 512)
_DECISIVE = ((3, 256), (1, 128))  # epochs and tokens a row: where a claim has to hold, and where it must not fail
_HALF_A_DAY_H, _TEN_DOLLARS = 12.0, 10.0
_SEVEN, _THIRTEEN, _SEVENTY = (f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b"))


@dataclass(frozen=True)
class Job:
    """A row of the introduction's table of jobs. `gpu` is what was taken for the card it names; `hours` None where it names none."""

    what: str
    base: str
    rows: int
    gpu: str
    hours: float | None
    dollars: float
    undefined: str = ""  # what it names and does not exist


JOBS = (
    Job("7B, 10,000 FAQ rows", _SEVEN, 10_000, "a100-80gb", 1.0, 2.0, "on an A100 8GB: there is none; an A100 80GB is taken for it"),
    Job(
        "13B, 50,000 chat rows",
        _THIRTEEN,
        50_000,
        "a100-80gb",
        None,
        7.0,
        "of Mistral-13B: there is none; Llama-2-13B is taken for it",
    ),
    Job("70B, 200,000 rows, one H100", _SEVENTY, 200_000, "h100-80gb", 8.0, 40.0),
)
SIZES = (("7B", _SEVEN, 14e9), ("13B", _THIRTEEN, 26e9), ("70B", _SEVENTY, 140e9))  # in FP16


def tables(table: Table) -> dict[str, Any]:
    """The introduction's three tables with our figures and a verdict a claim; estimates."""
    jobs = [_job(job, table) for job in JOBS]
    return {"estimate": True, "lora": _lora(), "jobs": jobs, "sizes": _sizes(), "half_a_day_and_ten_dollars": _half_a_day(jobs)}


def _train(**settings: Any) -> recipes.Train:
    """The settings that the jobs are reckoned with: QLoRA as edgelora trains by default."""
    return recipes.Train(**{"batch": 16, "accumulate": 1, "max_tokens": 2048, "dtype": "bf16", **settings})


def _lora() -> list[dict[str, Any]]:
    """LoRA against full fine-tuning, of a 7B."""
    base = outline.published(_SEVEN)
    asked = _train(r=8, targets=("q_proj", "v_proj"))
    share = adapter.parameters(base.shapes, asked) / base.parameters
    whole = adapter.parameters(base.shapes, _train(r=16)) / base.parameters
    ranks = [round(16 * wanted / whole) for wanted in (0.01, 0.02)]
    full = training.full_finetune_bytes(base.parameters)
    held = training.training(base, _train(batch=4), [512] * 64, _roomy()).peak_bytes
    return [
        {
            "claim": "LoRA trains 1 to 2 % of the weights",
            "found": f"{share:.2%} of a 7B with its own settings (r = 8 on queries and values), {whole:.1%} with r = 16 on all linear layers; "
            f"1 to 2 % take r of {ranks[0]} to {ranks[1]}",
            "verdict": FAILS,
        },
        {
            "claim": "LoRA needs a fraction of full fine-tuning's memory",
            "found": f"QLoRA of a 7B, 4 rows of 512 tokens: {held / 1e9:.0f} GB; full fine-tuning: {full / 1e9:.0f} GB before any activation",
            "verdict": HOLDS if held < full / 4 else FAILS,
        },
    ]


def _job(job: Job, table: Table) -> dict[str, Any]:
    base, gpu = outline.published(job.base), table.chosen([job.gpu])[0]
    cells = {(epochs, tokens): _cell(base, job, gpu, epochs, tokens) for epochs in EPOCHS for tokens in ROW_TOKENS}
    limits = {"hours": job.hours, "dollars": job.dollars}
    claims = [
        {"claim": f"{limit:g} h" if name == "hours" else f"${limit:g}", "verdict": _verdict([cells[at][name] <= limit for at in _DECISIVE])}
        for name, limit in limits.items()
        if limit is not None
    ]
    most = {str(n): min(int(256 * limit / cells[n, 256][name]) for name, limit in limits.items() if limit is not None) for n in EPOCHS}
    return {
        "job": job.what,
        "gpu": gpu.name,
        "dollars_an_hour": gpu.dollars,
        "claims": claims + ([{"claim": job.undefined, "verdict": UNDEFINED}] if job.undefined else []),
        "cells": [{"epochs": epochs, "row_tokens": tokens, **cell} for (epochs, tokens), cell in cells.items()],
        "most_tokens_a_row": most,  # by epochs: up to where all its claims are kept
    }


def _cell(base: outline.Outline, job: Job, gpu: Gpu, epochs: int, tokens: int) -> dict[str, float]:
    found = training.training(base, _train(epochs=float(epochs)), [tokens] * job.rows, gpu.device)
    hours = found.seconds / 3600
    return {"hours": hours, "dollars": hours * gpu.dollars, "peak_gpu_bytes": found.peak_bytes}


def _verdict(holds: Sequence[bool]) -> str:
    """`holds`: for three epochs of 256 tokens, and for one of 128."""
    return HOLDS if holds[0] else UNDEFINED if holds[1] else FAILS


def _sizes() -> list[dict[str, Any]]:
    found = []
    for name, base, claimed in SIZES:
        size = 2 * outline.published(base).parameters
        found.append(
            {
                "claim": f"{name} in FP16: {claimed / 1e9:.0f} GB",
                "bytes": size,
                "verdict": HOLDS if abs(size / claimed - 1) < 0.05 else FAILS,
            }
        )
    return found


def _half_a_day(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """半日+10ドル: half a day and ten dollars, a job at a time."""
    found = []
    for job in jobs:
        cells = {(cell["epochs"], cell["row_tokens"]): cell for cell in job["cells"]}
        fits = [cell["hours"] <= _HALF_A_DAY_H and cell["dollars"] <= _TEN_DOLLARS for cell in map(cells.__getitem__, _DECISIVE)]
        found.append({"claim": f"{job['job']}: half a day and $10", "verdict": _verdict(fits)})
    return found


def _roomy() -> training.Device:
    """A device that nothing is cut for."""
    return training.Device("", "cuda", 1e15, 1.0, 1.0)
