"""Fine-tune: a base and rows in, an adapter out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelora import artifact, labels, machine, models
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data import chat
from edgelora.data.split import Dataset
from edgelora.errors import DataError, ModelError
from edgelora.train import adapter, estimate, load

Progress = Callable[[float, str], None]
_CHECKPOINTS = "checkpoints"


def finetune(recipe: recipes.Recipe, base: models.Base, dataset: Dataset, out: Path, progress: Progress) -> Artifact:
    """Train an adapter on `train`, choosing the best epoch on `valid`. A killed run continues from its last checkpoint.

    The folder holds PEFT's adapter_model.safetensors and adapter_config.json; the facts hold the loss curves, the
    share of trained parameters, and predicted beside measured memory (bytes) and time (seconds).
    """
    section = {
        "train": recipes.as_dict(recipe.train),
        "seed": recipe.seed,
        "system": recipe.data.system,
        "base": models.shown(recipe.base),
        "threads": recipe.threads,
    }
    return artifact.build(
        out,
        "adapter",
        "adapter",
        lambda folder: _train(recipe, base, dataset, folder, progress),
        made_from={"base": base.key, "train": dataset.fingerprint("train"), "valid": dataset.fingerprint("valid")},
        recipe=section,
        versions=artifact.versions_of("torch", "transformers", "peft", "bitsandbytes", "accelerate"),
        rows={"train": "train", "valid": "select"},
        resumable=True,
    )


def _train(recipe: recipes.Recipe, base: models.Base, dataset: Dataset, folder: Path, progress: Progress) -> dict[str, Any]:
    import torch
    from transformers import EarlyStoppingCallback, set_seed

    from edgelora.train import loop

    train = recipe.train
    torch.set_num_threads(recipe.threads or machine.cores())
    dtype, note = load.arithmetic(train.dtype)
    tokenizer = models.open_tokenizer(base.folder)
    rows = [ids for _, ids in chat.encode_all(tokenizer, dataset.train, train.max_tokens)]
    valid = [ids for _, ids in chat.encode_all(tokenizer, dataset.selecting, train.max_tokens)]
    if len(rows) < 2 or not valid:
        raise DataError(f"nearly every row is longer than train.max_tokens = {train.max_tokens}", "raise train.max_tokens")
    if recipe.data.task == "classify":
        labels.check(dataset, tokenizer)
    notes = [note] if note else []
    if left_out := len(dataset.train) - len(rows):
        notes.append(f"{left_out} training rows longer than train.max_tokens = {train.max_tokens} left out")
    tokens = sum(len(row.ids) for row in rows)
    predicted = estimate.training(base.folder, train, tokens, [len(r.ids) for r in rows])

    started = time.monotonic()
    set_seed(recipe.seed)
    loaded = load.load_base(base.folder, train.method, dtype, load.attention(max(len(row.ids) for row in rows)))
    model = adapter.attach(loaded, train, base.start)
    arguments = _arguments(recipe, folder / _CHECKPOINTS, dtype)
    watch = loop.Watch(progress)
    trainer = loop.AnswerTrainer(
        model=model,
        args=arguments,
        optimizers=(adapter.optimizer(model, train, arguments), None),
        train_dataset=loop.examples(rows),
        eval_dataset=loop.examples(valid),
        data_collator=loop.Collator(tokenizer.pad_token_id),
        callbacks=[watch, *([EarlyStoppingCallback(train.patience)] if train.patience else [])],
    )
    _quiet(trainer)
    resumed = _last_checkpoint(folder / _CHECKPOINTS)
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except loop.NoNumber as error:
        if name := models.no_number(base.folder):
            raise ModelError(f"{base.name}: {name} holds values that are no numbers", "copy or download the base again") from error
        raise
    history = trainer.state.log_history
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card names this machine's paths
    models.tidy(folder, models.shown(recipe.base))
    shutil.rmtree(folder / _CHECKPOINTS)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = models.parameter_count(base.folder)
    seconds = time.monotonic() - started
    return {
        "method": train.method,
        "variant": train.variant,
        "base": base.name,
        "data": {"data_licence": recipe.data.licence, "data_attribution": recipe.data.attribution},
        "dtype": str(dtype).removeprefix("torch."),
        "device": load.device(),
        "trained_parameters": trained,
        "total_parameters": total,
        "trained_share": trained / total,
        "rows": len(rows),
        "tokens": tokens,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "resumed": resumed is not None,
        "best_valid_loss": trainer.state.best_metric,
        "curve": [{"step": h["step"], "loss": h["loss"]} for h in history if "loss" in h],
        "valid_curve": [{"step": h["step"], "loss": h["eval_loss"]} for h in history if "eval_loss" in h],
        "predicted": predicted,
        "measured": {
            "peak_rss_bytes": machine.peak_rss_bytes(),
            **({"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if load.device() == "cuda" else {}),
            **({} if resumed else {"seconds": seconds, "tokens_per_s": tokens * trainer.state.epoch / seconds}),
        },
        "full_finetune_bytes": estimate.full_finetune_bytes(total),
        "notes": notes,
    }


def _arguments(recipe: recipes.Recipe, folder: Path, dtype: Any) -> Any:
    import torch
    from transformers import TrainingArguments

    train = recipe.train
    on_cpu = load.device() == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch,
        per_device_eval_batch_size=train.batch,
        gradient_accumulation_steps=train.accumulate,
        num_train_epochs=train.epochs,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=on_cpu,
        optim="adamw_torch" if on_cpu else "adamw_torch_fused",
        seed=recipe.seed,
        data_seed=recipe.seed,
        train_sampling_strategy="group_by_length",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )


def _quiet(trainer: Any) -> None:
    """The Trainer prints its log to stdout, which belongs to the command's own result."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; others are removed."""
    from edgelora.train.loop import is_complete

    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for unfinished in [p for p in found if not is_complete(p)]:
        shutil.rmtree(unfinished)
    complete = [p for p in found if p.exists()]
    return complete[-1] if complete else None
