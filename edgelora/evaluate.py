"""Measure a model on rows: loss, divergence from a reference, top-1 agreement, each with n and an interval.

Rows are resampled, not tokens, because tokens of one answer stand or fall together. Differences are paired: both
models are scored on the same rows and resampled together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.data.chat import Encoded
from edgelora.runtime import Session

_DRAWS = 4000
_SEED = 20240601  # of the bootstrap: the same figures give the same interval


@dataclass(frozen=True)
class Losses:
    """Per row: summed negative log-likelihood of the answer tokens (nats, float64) and their number; both shape (rows,)."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Divergence:
    """Per row: summed KL(reference || model) in nats; answer tokens where the most likely one is the reference's, and where
    it is the true one (`right`); answer tokens.
    """

    nats: np.ndarray
    agreed: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    losses: Losses
    reference: Losses


def losses(session: Session, rows: Sequence[Encoded], progress: Callable[[float], None] = lambda share: None) -> Losses:
    """Loss of every row's answer tokens, given everything before them."""
    nats = []
    for number, row in enumerate(rows, 1):
        scores = answer_scores(session, [row])[0].astype(np.float64)
        nats.append(-scores[np.arange(len(scores)), np.array(row.ids)[list(row.trained)]].sum())
        progress(number / len(rows))
    return Losses(np.array(nats), np.array([row.n_trained for row in rows]))


def answer_scores(session: Session, rows: Sequence[Encoded]) -> list[np.ndarray]:
    """Log-probabilities where `rows` are scored, float32, each (answer tokens, vocabulary): a reference that is compared with more than once."""
    return [_score(session, row)[_predicting(row)] for row in rows]


def divergence(reference: Session | Sequence[np.ndarray], model: Session | Sequence[np.ndarray], rows: Sequence[Encoded]) -> Divergence:
    """How far `model` is from `reference` on the answer tokens of `rows`; each is a session, or its `answer_scores`."""
    nats, agreed, right, own, theirs = [], [], [], [], []
    for number, row in enumerate(rows):
        p, q = (
            (scorer[number] if isinstance(scorer, Sequence) else answer_scores(scorer, [row])[0]).astype(np.float64)
            for scorer in (reference, model)
        )
        true = (np.arange(len(q)), np.array(row.ids)[list(row.trained)])
        nats.append(np.maximum(0.0, (np.exp(p) * (p - q)).sum()))  # rounding alone makes it negative
        agreed.append((p.argmax(-1) == q.argmax(-1)).sum())
        right.append((q.argmax(-1) == true[1]).sum())
        own.append(-q[true].sum())
        theirs.append(-p[true].sum())
    tokens = np.array([row.n_trained for row in rows])
    return Divergence(
        np.array(nats), np.array(agreed), np.array(right), tokens, Losses(np.array(own), tokens), Losses(np.array(theirs), tokens)
    )


def interval(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(numerator) / sum(denominator) over rows (Efron 1979)."""
    drawn = _draws(len(numerator))
    ratios = numerator[drawn].sum(1) / denominator[drawn].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def summary(measured: Losses) -> dict[str, float]:
    low, high = interval(measured.nats, measured.tokens)
    return {"loss": measured.mean, "low": low, "high": high}


def change(before: Losses, after: Losses) -> dict[str, float]:
    """Relative change of the loss, rows paired: -0.3 is 30 % lower."""
    low, high = interval(after.nats, before.nats)
    return {"change": float(after.nats.sum() / before.nats.sum() - 1), "change_low": low - 1, "change_high": high - 1}


def divergence_summary(measured: Divergence) -> dict[str, Any]:
    low, high = interval(measured.nats, measured.tokens)
    tokens = int(measured.tokens.sum())
    return {
        "kl": float(measured.nats.sum() / tokens),
        "kl_low": low,
        "kl_high": high,
        "top1": float(measured.agreed.sum() / tokens),
        "loss": measured.losses.mean,
        "reference_loss": measured.reference.mean,
        "rows": len(measured.tokens),
        "tokens": tokens,
    }


def _score(session: Session, row: Encoded) -> np.ndarray:
    """Log-probabilities from the token before the first answer token on, the last token's own prediction left out."""
    first = row.trained.index(True) - 1
    return session.score(row.ids[:-1], first=first)


def _predicting(row: Encoded) -> np.ndarray:
    """Which rows of `_score` predict an answer token."""
    return np.array(row.trained[row.trained.index(True) :])


def _draws(rows: int) -> np.ndarray:
    return np.random.default_rng(_SEED).integers(0, rows, size=(_DRAWS, rows))
