"""Judge exported files on held-out rows, each beside the untuned base exported to the same type.

Only sets that report are read here: paraphrases, sealed rows, whatever the recipe holds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgelora import artifact, evaluate, labels, machine, models
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data import chat
from edgelora.data.row import Row
from edgelora.data.split import Dataset
from edgelora.export.stage import exported_path
from edgelora.progress import Progress
from edgelora.runtime import Session, runtime

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
    found: dict[str, Any] = {
        "losses": [],
        "accuracy": [],
        "confusion": [],
        "answers": [{"question": row.question, "after": {}} for row in shown],
    }
    for number, (before, after) in enumerate(pairs):
        measured = []
        for half, export in enumerate((before, after)):
            path = exported_path(export)
            progress((2 * number + half) / (2 * len(pairs)), f"scoring {path.name}")
            with runtime(str(export.facts["runtime"])).open(path, recipe.threads or machine.cores()) as session:
                scores = {name: evaluate.losses(session, rows) for name, rows in encoded.items()}
                chose = {name: _chosen(session, tokenizer, dataset, sets[name]) for name in sets} if recipe.data.task == "classify" else {}
                for row, entry in zip(shown, found["answers"], strict=True):
                    if half == 0 and number == 0:
                        entry["before"] = answer(session, tokenizer, row, recipe.evaluate.max_new_tokens)
                    elif half == 1:
                        entry["after"][path.name] = answer(session, tokenizer, row, recipe.evaluate.max_new_tokens)
                measured.append((scores, chose))
        (before_scores, before_chose), (after_scores, after_chose) = measured
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
            if after_chose:
                found["accuracy"].append({**where, **_accuracy(dataset, sets[name], before_chose[name], after_chose[name])})
                counts = labels.confusion(_true(dataset, sets[name]), after_chose[name], len(dataset.labels))
                found["confusion"].append({"set": name, "file": where["file"], "labels": list(dataset.labels), "counts": counts.tolist()})
    return {key: value for key, value in found.items() if value}


def answer(session: Session, tokenizer: Any, row: Row, max_new_tokens: int) -> str:
    """The greedy answer to a row's question."""
    ids = list(session.generate(chat.prompt_ids(tokenizer, row.messages[:-1]), max_new_tokens, session.stop_ids))
    return session.detokenize(ids).strip()


def _chosen(session: Session, tokenizer: Any, dataset: Dataset, rows: Sequence[Row]) -> list[int]:
    """The place of the label that is chosen for each row, among the data set's labels."""
    found = []
    for row in rows:
        prompt, answers = labels.ids(tokenizer, row.messages[:-1], dataset.labels)
        found.append(int(labels.log_shares(session.score_answers(prompt, answers)).argmax()))
    return found


def _true(dataset: Dataset, rows: Sequence[Row]) -> list[int]:
    return [dataset.labels.index(row.answer) for row in rows]


def _accuracy(dataset: Dataset, rows: Sequence[Row], before: Sequence[int], after: Sequence[int]) -> dict[str, float]:
    """Accuracy and macro-F1 before and after; low and high are the interval of the accuracy after."""
    truth = np.array(_true(dataset, rows))
    hits = (truth == np.array(after)).astype(float)
    low, high = evaluate.interval(hits, np.ones(len(hits)))
    f1 = [labels.macro_f1(labels.confusion(truth, chosen, len(dataset.labels))) for chosen in (before, after)]
    return {
        "before": float((truth == np.array(before)).mean()),
        "after": float(hits.mean()),
        "low": low,
        "high": high,
        "macro_f1_before": f1[0],
        "macro_f1_after": f1[1],
    }


def _spread(rows: Sequence[T], most: int) -> tuple[T, ...]:
    """At most `most` rows, evenly over the file, so that every topic is asked."""
    if len(rows) <= most:
        return tuple(rows)
    return tuple(rows[i * len(rows) // most] for i in range(most))
