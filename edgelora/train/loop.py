"""The loop: transformers' Trainer over rows laid end to end, with a loss that costs only what is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from edgelora import machine
from edgelora.data.chat import Encoded
from edgelora.errors import EdgeloraError
from edgelora.train.dealing import deal
from edgelora.train.layer import Layers
from edgelora.train.loss import SummedLoss
from edgelora.train.packing import Collator, Documents, Sampler

_SAVE_EVERY_S = 600
_LOG_EVERY_S = 1.0  # where not every step is logged: reading a loss waits for the GPU, which then waits for the next step
COMPLETE = "complete"  # names the files of a checkpoint folder; written when all of them are there


class AnswerTrainer(Trainer):
    """Cross-entropy over answer tokens only, so that the vocabulary-wide logits of prompts are never made.

    The sum is divided by the trained tokens of the whole accumulated batch: 4 x 1 rows and 1 x 4 rows give the same
    gradient, whatever their lengths. Rows are `Encoded`, batches those of `Collator`; `layers` are the replaced ones, if any.
    """

    loss_is_scaled_for_ga = True

    obstacle: str | None = None  # why the layers are transformers' own
    recomputed = 0  # layers

    def __init__(
        self,
        *,
        rows: Sequence[Encoded],
        valid: Sequence[Encoded],
        collator: Collator,
        layers: Layers | None,
        recorded: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(train_dataset=rows, eval_dataset=valid, data_collator=collator, **settings)
        self.collator, self.layers = collator, layers
        self.recorder: Any = None
        if recorded and self.args.world_size == 1:
            from edgelora.train.graph import Recorder

            self.recorder = Recorder(self._forward_backward, [p for p in self.model.parameters() if p.requires_grad])

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return Sampler([len(row.ids) for row in self.train_dataset], self.args.train_batch_size, self.args.data_seed)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self.layers is not None:
            self.layers.adapt()
        total = answer_loss(self.accelerator.unwrap_model(model), inputs, self.collator.longest)
        counted = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum()
        loss = total / counted
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.recorder is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        loss: torch.Tensor = self.recorder.run(self._prepare_inputs(inputs), num_items_in_batch)
        return loss

    def _forward_backward(self, inputs: Mapping[str, Any], count: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=count)
        loss.backward()
        return loss.detach()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: walking over all parameters takes longer than launching a recorded step."""
        return 0

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The mean loss of the valid rows' trained tokens, each counted once."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        if self.layers is not None:
            self.layers.adapt()
        rows: Sequence[Encoded] = self.eval_dataset
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in deal([len(row.ids) for row in rows], self.args.eval_batch_size):
                inputs = self._prepare_inputs(self.collator([rows[i] for i in batch]))
                loss = answer_loss(model, inputs, self.collator.longest)
                sums += torch.tensor([loss.item(), (inputs["labels"] != -100).sum().item()], dtype=torch.float64)
        loss = float(sums[0] / sums[1])
        return EvalLoopOutput(predictions=None, label_ids=None, metrics={f"{metric_key_prefix}_loss": loss}, num_samples=len(rows))


def answer_loss(model: Any, inputs: Mapping[str, Any], longest: int) -> torch.Tensor:
    """Sum of the cross-entropies of a batch's trained tokens under a peft model; documents of at most `longest` tokens."""
    hidden = (
        model.get_base_model()
        .get_decoder()(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            documents=Documents(inputs["starts"], longest),
            use_cache=False,
        )
        .last_hidden_state[0]
        .index_select(0, inputs["predict"])
    )
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if getattr(head, "bias", None) is not None or head.weight.requires_grad or hasattr(head, "base_layer"):
        logits = head(hidden).float()
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="sum")
    total: torch.Tensor = SummedLoss.apply(hidden, inputs["labels"], head.weight, cap)
    return total


class NoNumber(EdgeloraError):
    """A loss is NaN or infinite."""


class Watch(TrainerCallback):
    """Marks finished checkpoints, reports progress, and stops a run whose loss is no number.

    `tokens` are those of an epoch. A checkpoint is also written when the last one is ten minutes old.
    """

    def __init__(self, progress: Callable[[float, str], None], tokens: int) -> None:
        self.progress, self.tokens = progress, tokens
        self.begun = self.saved = self.logged = time.monotonic()
        self.first = 0  # the step this process began at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.saved = self.logged = time.monotonic()
        self.first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self.saved > _SAVE_EVERY_S:
            control.should_save = True
        if now - self.logged > _LOG_EVERY_S or state.global_step >= state.max_steps:
            self.logged = now
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        for name, what in (("loss", "training"), ("eval_loss", "valid")):
            if name in logs and not math.isfinite(logs[name]):
                raise NoNumber(
                    f"the {what} loss is {logs[name]} at step {state.global_step}",
                    "lower train.lr (try a tenth), or use train.dtype bf16 or fp32",
                )
        if "loss" in logs:
            self.progress(state.global_step / max(1, state.max_steps), self._line(state, float(logs["loss"])))

    def _line(self, state: Any, loss: float) -> str:
        """Step, loss, speed since the start, memory and time left."""
        seconds, steps = time.monotonic() - self.begun, state.global_step - self.first
        rate = self.tokens * state.num_train_epochs / max(1, state.max_steps) * steps / max(seconds, 1e-9)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_rss_bytes()
        left = seconds / max(1, steps) * (state.max_steps - state.global_step)
        ahead = f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
        return f"step {state.global_step}/{state.max_steps}  loss {loss:.3f}  {rate:,.0f} tok/s  {memory / 1e9:.1f} GB  {ahead}"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint is whole, in one step."""
    partial = checkpoint / f".{COMPLETE}"
    partial.write_text("\n".join(p.name for p in checkpoint.iterdir() if p != partial), encoding="utf-8")
    partial.rename(checkpoint / COMPLETE)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and lost nothing since: a run may also be killed while it deletes an old one."""
    mark = checkpoint / COMPLETE
    return mark.is_file() and all((checkpoint / name).exists() for name in mark.read_text(encoding="utf-8").split("\n"))
