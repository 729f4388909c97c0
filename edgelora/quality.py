"""Judge exported files on held-out rows, each beside the untuned base exported to the same type.

Only sets that report are read here: paraphrases, sealed rows, whatever the recipe holds out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgelora import artifact, evaluate, machine, models
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data import chat
from edgelora.data.row import Row
from edgelora.data.split import Dataset
from edgelora.export.stage import exported_path
from edgelora.runtime import Session, runtime

Progress = Callable[[float, str], None]
T = TypeVar("T")


def judge(
    recipe: recipes.Recipe, base: models.Base, dataset: Dataset, pairs: Sequence[tuple[Artifact, Artifact]], out: Path, progress: Progress
) -> Artifact:
    """Loss of every held-out set before and after (and accuracy, for labels), and answers side by side.

    `pairs` are (untuned base, tuned model) exported to the same format and type.
    """
    names = list(dataset.held_out)
    return artifact.build(
        out,
        "evaluation",
        "evaluation",
        lambda folder: _judge(recipe, base, dataset, pairs, progress),
        made_from={**{str(a.facts["file"]): a.key for pair in pairs for a in pair}, "rows": dataset.fingerprint(*names)},
        recipe={
            **recipes.as_dict(recipe.evaluate),
            "task": recipe.data.task,
            "labels": list(dataset.labels) if recipe.data.task == "classify" else [],
        },
        versions=artifact.versions_of("llama-cpp-python", "onnxruntime"),
        rows=dict.fromkeys(names, "report"),
    )


def _judge(
    recipe: recipes.Recipe, base: models.Base, dataset: Dataset, pairs: Sequence[tuple[Artifact, Artifact]], progress: Progress
) -> dict[str, Any]:
    tokenizer = models.open_tokenizer(base.folder)
    fitting = {name: chat.encode_all(tokenizer, dataset.reporting(name), recipe.train.max_tokens) for name in dataset.held_out}
    chosen = {name: _spread(pairs, recipe.evaluate.rows) for name, pairs in fitting.items() if pairs}
    sets = {name: [row for row, _ in pairs] for name, pairs in chosen.items()}
    encoded = {name: [ids for _, ids in pairs] for name, pairs in chosen.items()}
    shown = _spread(next(iter(sorted(sets.items(), key=lambda item: item[0] == "sealed")))[1], recipe.evaluate.answers) if sets else ()
    found: dict[str, Any] = {"losses": [], "accuracy": [], "answers": [{"question": row.question, "after": {}} for row in shown]}
    for number, (before, after) in enumerate(pairs):
        measured = []
        for half, export in enumerate((before, after)):
            path = exported_path(export)
            progress((2 * number + half) / (2 * len(pairs)), f"scoring {path.name}")
            with runtime(str(export.facts["runtime"])).open(path, recipe.threads or machine.cores()) as session:
                scores = {name: evaluate.losses(session, rows) for name, rows in encoded.items()}
                hits = {name: _hits(session, tokenizer, dataset, sets[name]) for name in sets} if recipe.data.task == "classify" else {}
                for row, entry in zip(shown, found["answers"], strict=True):
                    if half == 0 and number == 0:
                        entry["before"] = answer(session, tokenizer, row, recipe.evaluate.max_new_tokens)
                    elif half == 1:
                        entry["after"][path.name] = answer(session, tokenizer, row, recipe.evaluate.max_new_tokens)
                measured.append((scores, hits))
        (before_scores, before_hits), (after_scores, after_hits) = measured
        for name in sets:
            where = {"set": name, "file": exported_path(after).name, "rows": len(sets[name])}
            old, new = before_scores[name], after_scores[name]
            found["losses"].append(
                {
                    **where,
                    "tokens": int(new.tokens.sum()),
                    "before": evaluate.summary(old),
                    "after": evaluate.summary(new),
                    **evaluate.change(old, new),
                }
            )
            if after_hits:
                low, high = evaluate.interval(after_hits[name], np.ones(len(after_hits[name])))
                found["accuracy"].append(
                    {**where, "before": float(before_hits[name].mean()), "after": float(after_hits[name].mean()), "low": low, "high": high}
                )
    return {key: value for key, value in found.items() if value}


def answer(session: Session, tokenizer: Any, row: Row, max_new_tokens: int) -> str:
    """The greedy answer to a row's question."""
    ids = list(session.generate(chat.prompt_ids(tokenizer, row.messages[:-1]), max_new_tokens, session.stop_ids))
    return session.detokenize(ids).strip()


def _hits(session: Session, tokenizer: Any, dataset: Dataset, rows: Sequence[Row]) -> np.ndarray:
    """1.0 where the most likely label is the row's own, shape (rows,)."""
    labels = dataset.labels
    hits = []
    for row in rows:
        prompt, answers = label_ids(tokenizer, row.messages[:-1], labels)
        hits.append(float(labels[int(evaluate.label_log_probs(session, prompt, answers).argmax())] == row.answer))
    return np.array(hits)


def label_ids(tokenizer: Any, prompt: Sequence[tuple[str, str]], labels: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt and of every label as its answer, the stop token included."""
    answers = []
    for label in labels:
        whole = chat.encode(tokenizer, Row((*prompt, ("assistant", label)), 0))
        answers.append(list(whole.ids[len(whole.prompt) :]))
    return list(whole.prompt), answers


def _spread(rows: Sequence[T], most: int) -> tuple[T, ...]:
    """At most `most` rows, evenly over the file, so that every topic is asked."""
    if len(rows) <= most:
        return tuple(rows)
    return tuple(rows[i * len(rows) // most] for i in range(most))
