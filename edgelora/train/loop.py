"""The loop: transformers' Trainer with a loss that costs only what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from edgelora.data.chat import Encoded
from edgelora.errors import EdgeloraError

COMPLETE = "complete"  # names the files of a checkpoint folder; written when all of them are there


class Collator:
    """Pad rows of `Encoded` on the right: input_ids, attention_mask and labels (-100 where not trained), int64 (rows, longest)."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

        return {
            "input_ids": padded("input_ids", self.pad_id),
            "attention_mask": padded("attention_mask", 0),
            "labels": padded("labels", -100),
        }


def examples(rows: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": list(row.ids),
            "attention_mask": [1] * len(row.ids),
            "labels": [i if trained else -100 for i, trained in zip(row.ids, row.trained, strict=True)],
        }
        for row in rows
    ]


class AnswerTrainer(Trainer):
    """Cross-entropy over answer tokens only, so that the vocabulary-wide logits of prompts and padding are never made.

    The sum is divided by the trained tokens of the whole accumulated batch: 4 x 1 rows and 1 x 4 rows give the same
    gradient, whatever their lengths.
    """

    loss_is_scaled_for_ga = True

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs["labels"][:, 1:]
        hidden = model.get_base_model().get_decoder()(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        chosen = labels != -100
        logits = model.get_output_embeddings()(hidden.last_hidden_state[:, :-1][chosen]).float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        total = torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="sum")
        loss = total / (num_items_in_batch if num_items_in_batch is not None else chosen.sum())
        return (loss, {"logits": logits[:0]}) if return_outputs else loss


class NoNumber(EdgeloraError):
    """A loss is NaN or infinite."""


class Watch(TrainerCallback):
    """Marks finished checkpoints, reports progress, and stops a run whose loss is no number."""

    def __init__(self, progress: Callable[[float, str], None]) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        for name, what in (("loss", "training"), ("eval_loss", "valid")):
            if name in logs and not math.isfinite(logs[name]):
                raise NoNumber(
                    f"the {what} loss is {logs[name]} at step {state.global_step}",
                    "lower train.lr (try a tenth), or use train.dtype bf16 or fp32",
                )
        if "loss" in logs:
            loss = float(logs["loss"])
            self.progress(state.global_step / max(1, state.max_steps), f"step {state.global_step}/{state.max_steps}  loss {loss:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
