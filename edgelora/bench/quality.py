"""How good the very files are that are benched: loss, accuracy and answers on rows, and divergence from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import evaluate, talk
from edgelora.data.row import Row
from edgelora.errors import UsageError
from edgelora.labels import confusion, macro_f1
from edgelora.progress import Progress
from edgelora.recipe import Evaluate
from edgelora.runtime import Session, runtime, runtime_of


def measured(
    files: Sequence[Path], rows: Sequence[Row], name: str, labels: Sequence[str], reference: Path | None, threads: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Sections of a report by name: losses, answers or (with `labels`) accuracy and confusion, and divergence (with a `reference` model).

    Each file runs in its own first runtime. Intervals are 95 % bootstraps over rows. UsageError when a file and the
    reference do not split the rows into the same tokens, or a row has none of the `labels`.
    """
    if strange := [row for row in rows if labels and row.answer not in labels]:
        raise UsageError(
            f"line {strange[0].line}: the label {strange[0].answer!r} is none that {files[0].name} was trained on",
            f"its labels: {', '.join(labels)}",
        )
    shown = [rows[i * len(rows) // Evaluate.answers] for i in range(Evaluate.answers)] if len(rows) > Evaluate.answers else list(rows)
    found: dict[str, list[dict[str, Any]]] = {
        "losses": [],
        "accuracy": [],
        "confusion": [],
        "divergence": [],
        "answers": [] if labels else [{"question": row.question, "after": {}} for row in shown],
    }
    compared = runtime(runtime_of(reference)).open(reference, threads) if reference else None
    try:
        for number, path in enumerate(files):
            progress(number / len(files), f"scoring {path.name}")
            with runtime(runtime_of(path)).open(path, threads) as session:
                encoded = [talk.encode(session, row) for row in rows]
                where = {"set": name, "file": path.name, "rows": len(rows)}
                if compared is None:
                    losses = evaluate.losses(session, encoded)
                else:
                    if encoded != [talk.encode(compared, row) for row in rows]:
                        raise UsageError(
                            f"{path.name} and {reference} read the rows as different tokens", "name the model that the files were made from"
                        )
                    divergence = evaluate.divergence(compared, session, encoded)
                    losses = divergence.losses
                    found["divergence"].append({"file": path.name, **evaluate.divergence_summary(divergence)})
                found["losses"].append({**where, "tokens": int(losses.tokens.sum()), "after": evaluate.summary(losses)})
                if labels:
                    counts = _confusion(session, rows, labels)
                    found["accuracy"].append({**where, **_accuracy(counts)})
                    found["confusion"].append({"set": name, "file": path.name, "labels": list(labels), "counts": counts.tolist()})
                for row, entry in zip(shown, found["answers"], strict=False):
                    entry["after"][path.name] = "".join(talk.stream(session, row.messages[:-1], Evaluate.max_new_tokens)).strip()
    finally:
        if compared is not None:
            compared.close()
    progress(1.0, "scored")
    return {section: entries for section, entries in found.items() if entries}


def _confusion(session: Session, rows: Sequence[Row], labels: Sequence[str]) -> np.ndarray:
    asked = [Row(row.messages[:-1], row.line) for row in rows]
    chosen = [labels.index(made["label"]) for made in talk.predict(session, asked, labels, 1, lambda share: None)]
    return confusion([labels.index(row.answer) for row in rows], chosen, len(labels))


def _accuracy(counts: np.ndarray) -> dict[str, float]:
    hits = np.repeat([1.0, 0.0], [counts.trace(), counts.sum() - counts.trace()])
    low, high = evaluate.interval(hits, np.ones(len(hits)))
    return {"after": float(hits.mean()), "low": low, "high": high, "macro_f1_after": macro_f1(counts)}
