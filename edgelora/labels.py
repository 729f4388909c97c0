"""Classification with a language model: a label is an answer like any other, and the likeliest answer is chosen.

Labels are no tokens of their own, so nothing is added to the vocabulary and every runtime can score them. The log-likelihood of
a label's tokens and of the stop token after them is divided by their number: a label of eight tokens is not passed over for
one of two because more things can go wrong on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.data import chat
from edgelora.data.row import Row
from edgelora.errors import DataError

if TYPE_CHECKING:
    from edgelora.data.chat import Encoded
    from edgelora.data.split import Dataset
    from edgelora.runtime import Session

_MOST = 1000  # labels; all of them are scored for every row that is judged


def check(dataset: Dataset, tokenizer: Any) -> None:
    """DataError for a label that no training row has, that the base's tokenizer cannot write, or that is the only one or one of thousands."""
    known = set(dataset.labels)
    if len(known) > _MOST:
        raise DataError(
            f"the training rows have {len(known)} different labels, more than {_MOST}", "are they answers? write data.task: chat"
        )
    if len(known) < 2:
        raise DataError(f"every training row has the label {next(iter(known), '')!r}", "a choice needs at least two labels")
    for name, rows in {"valid": dataset.valid, **dataset.held_out}.items():
        if strange := Counter(row.answer for row in rows if row.answer not in known):
            label, count = strange.most_common(1)[0]
            more = f" and {len(strange) - 1} other labels" if len(strange) > 1 else ""
            raise DataError(
                f"{name}: the label {label!r} ({count} {'row' if count == 1 else 'rows'}){more} stands in no training row",
                "give the training file rows with it, or take it out of the set: what was never trained cannot be chosen",
            )
    if tokenizer.unk_token_id is not None:
        for label in dataset.labels:
            if tokenizer.unk_token_id in tokenizer(label, add_special_tokens=False)["input_ids"]:
                raise DataError(f"the label {label!r} is outside the base's vocabulary", "rename it with characters that the base knows")


def ids(tokenizer: Any, prompt: Sequence[tuple[str, str]], labels: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt and of every label as its answer, the stop token included."""
    answers = []
    for label in labels:
        whole = chat.encode(tokenizer, Row((*prompt, ("assistant", label)), 0))
        answers.append(list(whole.ids[len(whole.prompt) :]))
    return list(whole.prompt), answers


def hits(session: Session, rows: Sequence[Encoded], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Per row 1.0 where the right label is chosen, 0.0 where another is; `answers`: ids of every label, as `ids` gives them."""
    known = [tuple(answer) for answer in answers]
    found = []
    for row in rows:
        chosen = int(log_shares(session.score_answers(row.prompt, answers)).argmax())
        found.append(known[chosen] == row.ids[len(row.prompt) :])
    return np.array(found, dtype=float)


def log_shares(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probability of each label among all, shape (labels,), of `Session.score_answers` of them.

    Each counts by its mean a token, as if all were of the average length: that keeps the scale of a probability.
    """
    lengths = np.array([len(tokens) for tokens in scores])
    totals = np.array([tokens.sum(dtype=np.float64) for tokens in scores]) / lengths * lengths.mean()
    return np.asarray(totals - np.logaddexp.reduce(totals))


def confusion(truth: Sequence[int] | np.ndarray, chosen: Sequence[int] | np.ndarray, labels: int) -> np.ndarray:
    """Counts, int, shape (labels, labels): row the true label, column the chosen one."""
    counts = np.zeros((labels, labels), dtype=int)
    np.add.at(counts, (np.asarray(truth), np.asarray(chosen)), 1)
    return counts


def macro_f1(counts: np.ndarray) -> float:
    """Mean F1 over the labels that are true or chosen somewhere, each as heavy as the other."""
    right, truth, chosen = np.diag(counts), counts.sum(1), counts.sum(0)
    seen = truth + chosen > 0
    return float((2 * right[seen] / (truth + chosen)[seen]).mean())
