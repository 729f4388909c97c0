"""Rows laid end to end: a batch is one long row of documents, without padding between them.

The recipe's rows a step stay exactly that; they are dealt so that all batches hold nearly the same number of tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgelora.data.chat import Encoded
from edgelora.train.dealing import Division, deal, rounded_up


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch begin: `starts` int32 (documents + 1,), the last entry the number of tokens; no document is longer than `longest`."""

    starts: torch.Tensor
    longest: int

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """Tokens of each document, int32 (documents,), on the device of `starts`."""
        return self.starts.diff()

    def begin(self, width: int) -> torch.Tensor:
        """Where each document begins among rows of `width` numbers, int64 (documents + 1,); made once a batch."""
        if width not in self._begin:
            self._begin[width] = self.starts.long() * width
        return self._begin[width]

    @functools.cached_property
    def _begin(self) -> dict[int, torch.Tensor]:
        return {}

    @functools.cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """(begin, end) of every document that is not empty. On a GPU this waits for the device."""
        ends = self.starts.tolist()
        return [(begin, end) for begin, end in itertools.pairwise(ends) if end > begin]


class Collator:
    """Lay rows of `Encoded` end to end.

    `input_ids` and `position_ids` int64 (1, tokens), positions counted anew in every document; `starts` int32 (documents + 1,);
    `predict` int64 (answers,): the positions whose next token is trained, and `labels` int64 (answers,): those tokens. Both begin with
    an entry that does not count (-100), because the Trainer leaves out a first label when it counts.

    With `even` the sizes are rounded up to a few fixed ones, so that a recorded CUDA graph serves many batches: documents of padding
    at the end, labels of -100, none of which changes a loss or a gradient.
    """

    def __init__(self, longest: int, *, pad_id: int = 0, even: bool = False) -> None:
        self.longest, self.pad_id, self.even = longest, pad_id, even

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        rows = rows or [Encoded((self.pad_id,), (False,))]  # a process that has no row left still takes part
        lengths = [len(row.ids) for row in rows]
        ends = list(itertools.accumulate(lengths))
        given = _flat((row.ids for row in rows), ends[-1], np.int64)
        trained = _flat((row.trained for row in rows), ends[-1], np.bool_)
        trained[[0, *ends[:-1]]] = False  # no token comes before a document's first
        at = trained.nonzero()[:, 0]
        tokens, answers, documents = ends[-1], len(at) + 1, len(rows)
        if self.even:
            tokens, answers = rounded_up(tokens), rounded_up(answers)
            while ends[-1] < tokens:
                lengths.append(min(self.longest, tokens - ends[-1]))
                ends.append(ends[-1] + lengths[-1])
            documents = len(rows) + 1 + -(-max(64, tokens // 16) // self.longest)  # those of padding included, however many there are
        ids = torch.full((tokens,), self.pad_id)
        ids[: len(given)] = given
        starts = torch.full((documents + 1,), tokens, dtype=torch.int32)
        starts[: len(ends)] = torch.tensor([0, *ends[:-1]])
        predict, labels = torch.zeros(answers, dtype=torch.int64), torch.full((answers,), -100)
        predict[1 : len(at) + 1], labels[1 : len(at) + 1] = at - 1, ids[at]
        positions = torch.cat([torch.arange(length) for length in lengths])
        return {
            "input_ids": ids.unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "starts": starts,
            "predict": predict,
            "labels": labels,
        }


def _flat(parts: Iterable[Iterable[Any]], count: int, dtype: Any) -> torch.Tensor:
    """`count` values end to end. 131,072 tokens as Python lists took 120 ms, a quarter of a small model's step on a GPU; this takes 10."""
    return torch.from_numpy(np.fromiter(itertools.chain.from_iterable(parts), dtype, count))


class Sampler(torch.utils.data.Sampler[list[int]]):
    """The batches of one process, as lists of row numbers: every row once an epoch, in one of the processes.

    The rows of an update depend on seed and epoch alone, so a run that is resumed in the middle of an epoch sees the rows that are left.
    """

    def __init__(self, lengths: Sequence[int], division: Division, seed: int, process: int = 0) -> None:
        self.lengths, self.division, self.seed, self.process, self.epoch = lengths, division, seed, process, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.division.epoch(len(self.lengths))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        updates = deal(self.lengths, self.division.together, generator)
        rest = [updates.pop()] if len(updates[-1]) < self.division.together else []
        for rows in [updates[i] for i in torch.randperm(len(updates), generator=generator).tolist()] + rest:
            yield from self.division.batches(self.lengths, rows)[self.process :: self.division.processes]
