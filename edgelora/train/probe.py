"""Twenty real steps on this machine, so that an estimate of it rests on a measurement."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelora import machine
from edgelora import recipe as recipes
from edgelora.data.chat import Encoded
from edgelora.train import finetune
from edgelora.train.estimate import Estimate

STEPS = 20
_WARM_UP = 5  # steps that compile kernels, record graphs and grow the allocator's pool
_VALID_BATCHES = 4


@dataclass(frozen=True)
class Probe:
    """What a few steps took: seconds a step once warm, more for the first ones, a batch of `valid`, loading; the peak memory (bytes)."""

    steps: int
    step_s: float
    warm_up_s: float
    valid_batch_s: float
    start_s: float
    peak_bytes: int

    def correct(self, predicted: Estimate, valid_batches: int, epochs: int) -> Estimate:
        """The estimate of this machine with what was measured in the place of what was predicted."""
        return replace(
            predicted,
            parts={"measured": float(self.peak_bytes)},
            step_s=self.step_s,
            start_s=self.start_s + self.warm_up_s,
            valid_s=self.valid_batch_s * valid_batches * epochs,
        )


def probe(
    recipe: recipes.Recipe, model: Any, rows: Sequence[Encoded], valid: Sequence[Encoded], dtype: Any, begun: float, steps: int = STEPS
) -> Probe:
    """Train a peft model for `steps` steps on the first of `rows`; it is spoilt afterwards. `begun` is when loading began (time.monotonic())."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Reads the clock after every step, lets nothing be saved or evaluated, and stops."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.times.append(_now())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.times.append(_now())
            control.should_evaluate = control.should_save = control.should_log = False
            control.should_training_stop = state.global_step >= steps

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = control.should_save = False

    together = recipe.train.batch * recipe.train.accumulate
    few = [*rows] * (1 + steps * together // max(1, len(rows)))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = finetune.make_trainer(recipe, model, few[: steps * together], valid, Path(folder), dtype, callbacks=[clock])
        trainer.args.load_best_model_at_end = False
        trainer.train()
        some = valid[: _VALID_BATCHES * trainer.args.eval_batch_size]
        trainer.eval_dataset = some
        trainer.evaluate()  # the first one compiles
        started = _now()
        trainer.evaluate()
        batches = -(-len(some) // trainer.args.eval_batch_size)
        valid_batch_s = (_now() - started) / batches
    spent = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    warm = spent[_WARM_UP:] or spent
    step_s = statistics.median(warm)
    cuda = torch.cuda.is_available()
    return Probe(
        steps=len(spent),
        step_s=step_s,
        warm_up_s=max(0.0, sum(spent) - step_s * len(spent)),
        valid_batch_s=valid_batch_s,
        start_s=clock.times[0] - begun,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else machine.peak_rss_bytes(),
    )


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()
