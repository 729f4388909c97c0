"""Second moments of every matrix's inputs on the user's training rows: what rounding that makes up for its errors must know.

A stage of its own for formats whose files are not planned; a size plan measures the same and more (`export.budget`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import artifact, merge
from edgelora.artifact import Artifact
from edgelora.data.chat import Encoded
from edgelora.progress import Progress
from edgelora.quant import curvature
from edgelora.tuned import Tuned
from edgelora.weights import Checkpoint

FILE = "moments.safetensors"


def estimate(writing: Mapping[str, float], values: int, vocabulary: int) -> dict[str, float]:
    """`writing` (`peak_bytes` of memory and `seconds` of CPU time that a file takes) with measuring and rounding by it, an estimate.

    `values`: weights of the model. A pass forwards and backwards over the rows, with the gradients of 256 tokens' predictions.
    """
    peak, seconds = 1.5e9 + 8.0 * values + 6 * 4 * 256 * vocabulary, 4.7e-7 * values
    return {"peak_bytes": max(writing["peak_bytes"], peak), "seconds": writing["seconds"] + seconds}


def measure(model: Tuned, rows: Sequence[Encoded], out: Path, progress: Progress, *, prefix: str = "") -> Artifact:
    """The moments of a merged `model` on training `rows`; computed once."""

    def make(folder: Path) -> dict[str, Any]:
        assert model.folder is not None, "merge the adapter first"
        found = curvature.collect(curvature.open_model(model.folder, Checkpoint(model.folder)), rows, progress)
        curvature.save(found, folder / FILE)
        return {"file": FILE, "rows": len(rows), "tokens": sum(len(row.ids) for row in rows), "answer_tokens": found.answers}

    return artifact.build(
        out,
        f"{prefix}moments",
        "moments",
        make,
        made_from={"model": model.key, "rows": merge.rows_key(rows)},
        recipe={},
        versions=artifact.versions_of("torch", "transformers"),
        rows={"train": "train"},
    )
