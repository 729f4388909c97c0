"""How an update is cut so that it fits a GPU's free memory: rows at once, weights written out or not, layers recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.errors import EdgeloraError
from edgelora.train.dealing import Division, deal, rounded_up

KINDS = ("llama", "mistral", "qwen2", "smollm3")  # model types whose layers are what `layer.Layer` computes
_SHARE = 0.85  # of the free memory that is planned with
_HEAD_BYTES = 1.2e9  # logits of one piece and what the loss makes of them
GATHERED = 4  # layers of a divided base that are whole at once: one that runs, the next, and the buffers through which each of them came


@dataclass(frozen=True)
class Shape:
    """What of a decoder counts here: sizes in elements, `linear` the weights of all its linear layers."""

    layers: int
    hidden: int
    inner: int
    attention: int  # heads x head size
    keys: int  # key heads x head size
    linear: int

    @property
    def token_bytes(self) -> int:
        """What one layer keeps of a token, in 16 bits: its input, the sum in the middle, q k v, the attention's output, gate and up."""
        return 2 * (2 * self.hidden + 2 * self.attention + 2 * self.keys + 2 * self.inner) + 4 * self.attention // 64 + 512

    @property
    def passing_bytes(self) -> int:
        """What the backward pass of one layer holds of a token beside that; attention adds up its gradients in fp32."""
        return 2 * (5 * self.inner + 6 * self.hidden) + 12 * self.attention


@dataclass(frozen=True)
class Cut:
    """How rows are divided; weights written out in 16 bits (`keep`); the first `recompute` layers keep only their input."""

    division: Division
    keep: bool
    recompute: int

    @property
    def rows(self) -> int:
        """At once, at most, in each process."""
        return self.division.rows

    @property
    def steps(self) -> int:
        """Of each process before an update."""
        return self.division.steps


def cut(
    shape: Shape, lengths: Sequence[int], together: int, processes: int, free: float, *, recompute: bool = False, kept_free: float = 0.0
) -> Cut:
    """The fastest way to train on `together` rows before each update: as many at once as fit, before anything is recomputed.

    `free` is the memory (bytes) left beside the base as loaded, on the GPU that has least. Of it a divided base, which is never written
    out, has `kept_free` for itself (0: it is not divided). EdgeloraError when not even one row at a time fits.
    """
    share = -(-together // processes)
    divisions = [
        Division(together, rows, processes) for rows in sorted({-(-share // steps) for steps in range(1, share + 1)}, reverse=True)
    ]
    written = 2.0 * shape.linear
    budget = free * _SHARE - _HEAD_BYTES - kept_free
    for keep in (False,) if kept_free else (True, False):
        for division in divisions:
            most = rounded_up(
                max(sum(lengths[i] for i in batch) for rows in deal(lengths, together) for batch in division.batches(lengths, rows))
            )
            room = budget - most * (shape.passing_bytes + 8 * shape.hidden) - (written if keep else written / shape.layers)
            layers = shape.layers if recompute else _recomputed(shape, most, room)
            if layers == 0 or (recompute and room >= most * shape.layers * 2 * shape.hidden):
                return Cut(division, keep, layers)
    longest = rounded_up(max(lengths))
    room = budget - longest * (shape.passing_bytes + 8 * shape.hidden) - written / shape.layers
    layers = _recomputed(shape, longest, room)
    if layers > shape.layers:
        raise EdgeloraError(
            f"one row of {longest} tokens does not fit the {free / 1e9:.1f} GB that the GPU has free beside the base",
            "shorten train.max_tokens, or take a smaller base",
        )
    return Cut(divisions[-1], False, layers)


def reserved(linear_bytes: float, layers: int, trained: int) -> float:
    """Bytes that a divided base will take while training: layers that are whole; of the adapter gradients, two moments, and two copies of
    the gradients while they are added up. On a card that cannot hold a base the adapter is no small thing either.
    """
    return GATHERED * linear_bytes / layers + 20.0 * trained


def least_free(shape: Shape, longest: int, kept_free: float = 0.0) -> float:
    """The memory (bytes) below which `cut` fits not even one row of `longest` tokens: weights in 4 bits, every layer recomputed."""
    row = rounded_up(longest) * (shape.passing_bytes + (8 + 2 * shape.layers) * shape.hidden)
    return (row + 2.0 * shape.linear / shape.layers + _HEAD_BYTES + kept_free) / _SHARE


def _recomputed(shape: Shape, tokens: int, room: float) -> int:
    """How many layers have to be recomputed for the rest to fit into `room`; more than there are when nothing helps."""
    lacking = tokens * shape.layers * shape.token_bytes - room
    saved = tokens * (shape.token_bytes - 2 * shape.hidden)
    return max(0, -int(-lacking // saved)) if lacking > 0 else 0
