"""The loop: transformers' Trainer over rows laid end to end, with a loss that costs only what is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from edgelora import machine, processes
from edgelora.data.chat import Encoded
from edgelora.errors import EdgeloraError
from edgelora.train.dealing import Division, deal
from edgelora.train.layer import Layers
from edgelora.train.loss import SummedLoss
from edgelora.train.packing import Collator, Documents, Sampler
from edgelora.train.shards import Shards

_SAVE_EVERY_S = 600
_LOG_EVERY_S = 1.0  # where not every step is logged: reading a loss waits for the GPU, which then waits for the next step
COMPLETE = "complete"  # names the files of a checkpoint folder; written when all of them are there


class AnswerTrainer(Trainer):
    """Cross-entropy over answer tokens only, so that the vocabulary-wide logits of prompts are never made.

    The sum is divided by the trained tokens of the whole accumulated batch: 4 x 1 rows and 1 x 4 rows give the same
    gradient, whatever their lengths. Rows are `Encoded`, batches those of `Collator`; `layers` are the replaced ones, if any.

    So it is with several processes: they divide the rows of an update, and what they find is added up before the weights move. Only
    the adapter's gradients travel, once an update. DistributedDataParallel would want to call the model itself, which
    neither the loss nor a recorded step does.
    """

    loss_is_scaled_for_ga = True

    obstacle: str | None = None  # why the layers are transformers' own
    recomputed = 0  # layers
    shards: Shards | None = None  # the base's, where processes hold it together

    def __init__(
        self,
        *,
        rows: Sequence[Encoded],
        valid: Sequence[Encoded],
        collator: Collator,
        division: Division,
        layers: Layers | None,
        recorded: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(train_dataset=rows, eval_dataset=valid, data_collator=collator, **settings)
        self.collator, self.division, self.layers = collator, division, layers
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.args.world_size > 1:
            self.model._is_accelerate_prepared = True  # so accelerate does not wrap it
            for parameter in self.trained:
                parameter.data.copy_(broadcast(parameter.data))
        self.recorder: Any = None
        if recorded:
            from edgelora.train.graph import Recorder

            self.recorder = Recorder(self._forward_backward, self.trained)

    def get_train_dataloader(self) -> Any:
        """The batches of this process: `Sampler` divides them, because accelerate would fill up the last ones with rows seen before."""
        sampler = Sampler([len(row.ids) for row in self.train_dataset], self.division, self.args.data_seed, self.args.process_index)
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.collator, pin_memory=self.args.dataloader_pin_memory
        )
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self.layers is not None:
            self.layers.adapt()
        total = answer_loss(self.accelerator.unwrap_model(model), inputs, self.collator.longest)
        counted = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum()
        loss = total / counted
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.recorder is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            loss = self.recorder.run(self._prepare_inputs(inputs), num_items_in_batch)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            self._add_up()
        return loss * self.args.world_size  # of which the Trainer reports the mean over processes

    def _add_up(self) -> None:
        """Let every process have the sum of all gradients; the losses are parts of one loss already."""
        grads = [p.grad for p in self.trained if p.grad is not None]
        flat = self.recorder.flat if self.recorder is not None else torch.cat([grad.flatten() for grad in grads])
        total = self.accelerator.reduce(flat, "sum")
        if self.recorder is not None:
            flat.copy_(total)
            return
        for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

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
            batches = deal([len(row.ids) for row in rows], self.args.eval_batch_size)
            batches += [[]] * (-len(batches) % self.args.world_size)  # all processes take as many: they may hold the base together
            for batch in batches[self.args.process_index :: self.args.world_size]:
                inputs = self._prepare_inputs(self.collator([rows[i] for i in batch]))
                loss = answer_loss(model, inputs, self.collator.longest)
                sums += torch.tensor([loss.item(), (inputs["labels"] != -100).sum().item()], dtype=torch.float64)
        sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
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

    `tokens` are those of an epoch. A checkpoint is also written when the last one is ten minutes old. Logging and saving are done
    by all processes together, so the first one's clock says when.
    """

    def __init__(self, progress: Callable[[float, str], None], tokens: int) -> None:
        self.progress, self.tokens = progress, tokens
        self.begun = self.saved = self.looked = time.monotonic()
        self.first = self.last = self.next = 0  # the steps this process began at, last looked at the clock, and will

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.saved = self.looked = time.monotonic()
        self.first = self.last = self.next = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < min(self.next, state.max_steps):
            return
        now = time.monotonic()
        a_step = (now - self.looked) / max(1, state.global_step - self.last)
        self.looked, self.last = now, state.global_step
        wait, save = processes.told((max(1, int(_LOG_EVERY_S / max(a_step, 1e-6))), now - self.saved > _SAVE_EVERY_S))
        self.next = state.global_step + wait
        control.should_log = True
        if save:
            control.should_save = True

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
        rate = self.tokens * state.epoch / max(1, state.global_step) * steps / max(seconds, 1e-9)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_rss_bytes()
        left = seconds / max(1, steps) * (state.max_steps - state.global_step)
        ahead = f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
        return f"step {state.global_step}/{state.max_steps}  loss {loss:.3f}  {rate:,.0f} tok/s  {memory / 1e9:.1f} GB  {ahead}"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.wait()
        self.saved = time.monotonic()
        if processes.index():
            return
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
