"""Fine-tune: a base and rows in, an adapter out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import artifact, labels, machine, models, outline, processes
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data import chat
from edgelora.data.chat import Encoded
from edgelora.data.split import Dataset
from edgelora.errors import DataError, ModelError, UsageError
from edgelora.progress import Progress
from edgelora.train import adapter, estimate, fit, load, room

if TYPE_CHECKING:
    from edgelora.train import loop

_CHECKPOINTS = "checkpoints"


def finetune(recipe: recipes.Recipe, base: models.Base, dataset: Dataset, out: Path, progress: Progress) -> Artifact:
    """Train an adapter on `train`, choosing the best epoch on `valid`. A killed run continues from its last checkpoint.

    The folder holds PEFT's adapter_model.safetensors and adapter_config.json; the facts hold the loss curves, the
    share of trained parameters, and predicted beside measured memory (bytes) and time (seconds). Of several processes each calls this;
    the first one writes.
    """
    section = {
        "train": {key: value for key, value in recipes.as_dict(recipe.train).items() if key != "shard"},  # which changes no adapter
        "seed": recipe.seed,
        "system": recipe.data.system,
        "base": models.shown(recipe.base),
        "threads": recipe.threads,
    }
    made_from = {"base": base.key, "train": dataset.fingerprint("train"), "valid": dataset.fingerprint("valid")}
    versions = artifact.versions_of("torch", "transformers", "peft", "bitsandbytes", "accelerate")

    def make(folder: Path) -> dict[str, Any]:
        return _train(recipe, base, dataset, folder, progress)

    if processes.index():
        final = artifact.place(out, "adapter", "adapter", made_from, section, versions)
        if not final.exists():
            make(artifact.unfinished(final))
        processes.wait()
        return artifact.load(final)
    made = artifact.build(
        out,
        "adapter",
        "adapter",
        make,
        made_from=made_from,
        recipe=section,
        versions=versions,
        rows={"train": "train", "valid": "select"},
        resumable=True,
    )
    processes.wait()
    return made


def _train(recipe: recipes.Recipe, base: models.Base, dataset: Dataset, folder: Path, progress: Progress) -> dict[str, Any]:
    import torch
    from transformers import EarlyStoppingCallback, set_seed

    from edgelora.train import attention, loop

    train = recipe.train
    torch.set_num_threads(max(1, (recipe.threads or machine.cores()) // processes.here()))
    dtype = load.arithmetic(train.dtype)
    tokenizer = models.open_tokenizer(base.folder)
    rows = [ids for _, ids in chat.encode_all(tokenizer, dataset.train, train.max_tokens)]
    valid = [ids for _, ids in chat.encode_all(tokenizer, dataset.selecting, train.max_tokens)]
    if len(rows) < 2 or not valid:
        raise DataError(f"nearly every row is longer than train.max_tokens = {train.max_tokens}", "raise train.max_tokens")
    if recipe.data.task == "classify":
        labels.check(dataset, tokenizer)
    notes = _other_attempts(folder)
    if left_out := len(dataset.train) - len(rows):
        notes.append(f"{left_out} training rows longer than train.max_tokens = {train.max_tokens} left out")
    tokens = sum(len(row.ids) for row in rows)
    valid_tokens = sum(len(row.ids) for row in valid)
    shape, device = outline.of(str(base.folder), Path()), estimate.here(train.dtype, torch.get_num_threads())
    lengths = [len(row.ids) for row in rows]
    device = replace(device, shard=processes.told(room.chosen(shape, train, lengths, device).shard))
    predicted = room.require(shape, train, lengths, device, valid_tokens)
    if device.shard:
        why = "one alone cannot hold it all" if train.shard == "auto" else f"train.shard: {train.shard}"
        notes.append(f"the base is divided among {device.processes} processes (FSDP): {why}")
        progress(0.0, notes[-1])

    started = time.monotonic()
    set_seed(recipe.seed)
    attention.register()
    place = room.place(predicted) if device.shard else load.own_device()
    model = adapter.attach(load.load_base(base.folder, train.method, dtype, attention.NAME, place), train, base.start)
    watch = loop.Watch(progress, tokens)
    trainer = make_trainer(
        recipe, model, rows, valid, folder / _CHECKPOINTS, dtype, divide=device.shard,
        callbacks=[watch, *([EarlyStoppingCallback(train.patience)] if train.patience else [])],
    )  # fmt: skip
    if processes.index():
        set_seed(recipe.seed + processes.index())  # so that dropout leaves out something else in each
    resumed = processes.told(None if processes.index() else _last_checkpoint(folder / _CHECKPOINTS))
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except loop.NoNumber as error:
        if name := models.no_number(base.folder):
            raise ModelError(f"{base.name}: {name} holds values that are no numbers", "copy or download the base again") from error
        raise
    history = trainer.state.log_history
    measured = {
        "peak_rss_bytes": max(processes.all_of(machine.peak_rss_bytes())),
        **({"peak_gpu_bytes": max(processes.all_of(torch.cuda.max_memory_allocated()))} if load.device() == "cuda" else {}),
    }
    if processes.index():
        return {}
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
        **({"labels": list(dataset.labels)} if recipe.data.task == "classify" else {}),
        "data": {"data_licence": recipe.data.licence, "data_attribution": recipe.data.attribution},
        "dtype": str(dtype).removeprefix("torch."),
        "device": load.device(),
        "kernels": "plain: " + str(trainer.obstacle) if trainer.obstacle else "fused",
        "attention": attention.kernel(dtype),
        "processes": processes.count(),
        **({"divided": {"whole_bytes": trainer.shards.whole_bytes, "held_bytes": trainer.shards.held_bytes}} if trainer.shards else {}),
        "rows_at_once": trainer.division.rows,
        "recomputed_layers": trainer.recomputed,
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
        "predicted": predicted.figures(),
        "measured": {
            **measured,
            **({} if resumed else {"seconds": seconds, "tokens_per_s": tokens * trainer.state.epoch / seconds}),
        },
        "full_finetune_bytes": estimate.full_finetune_bytes(total),
        "notes": notes,
    }


def make_trainer(
    recipe: recipes.Recipe,
    model: Any,
    rows: Sequence[Encoded],
    valid: Sequence[Encoded],
    folder: Path,
    dtype: Any,
    *,
    divide: bool = False,
    callbacks: Sequence[Any] = (),
) -> loop.AnswerTrainer:
    """The trainer of a peft model: how much at once, which layers, which arithmetic are decided here; `divide`: the base among processes.

    Where the layers can be replaced by `layer.Layer` they are; else transformers' and peft's own run, in bf16 or fp16 under autocast.
    """
    import torch

    from edgelora.train import dealing, layer, loop, packing, shards

    train, cuda = recipe.train, load.device() == "cuda"
    lengths = [len(row.ids) for row in rows]
    longest = max([*lengths, *(len(row.ids) for row in valid)])
    obstacle = "train.dtype fp16" if dtype == torch.float16 else layer.obstacle(model)
    together = train.batch * train.accumulate
    if processes.count() > together:
        raise UsageError(
            f"{processes.count()} processes share {together} rows before an update (train.batch x train.accumulate)",
            "raise train.batch, or take fewer GPUs",
        )
    division = dealing.Division.of(train.batch, train.accumulate, processes.count())
    parts = shards.shard(model) if divide else None
    cut = fit.Cut(division, keep=not divide, recompute=model.config.num_hidden_layers if train.checkpointing else 0)
    layers = None
    if obstacle is None:
        if cuda:
            torch.cuda.empty_cache()
            free = min(processes.all_of(torch.cuda.mem_get_info()[0]))
            shape, trained = layer.shape(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
            reserved = fit.reserved(parts.whole_bytes, shape.layers, trained) if parts else 0.0
            cut = fit.cut(shape, lengths, together, processes.count(), free, recompute=train.checkpointing, kept_free=reserved)
        layers = layer.replace(model, dtype, keep=cut.keep, recompute=cut.recompute)
    elif train.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    recorded = cuda and layers is not None and cut.keep and layer.records(model, dtype)
    arguments = _arguments(recipe, folder, cut, dtype if layers is None else torch.float32)
    made = loop.AnswerTrainer(
        model=model,
        args=arguments,
        optimizers=(adapter.optimizer(model, train, arguments), None),
        rows=rows,
        valid=valid,
        collator=packing.Collator(longest, even=recorded),
        division=cut.division,
        layers=layers,
        recorded=recorded,
        callbacks=list(callbacks),
    )
    made.obstacle, made.recomputed, made.shards = obstacle, cut.recompute, parts
    _quiet(made)
    return made


def _arguments(recipe: recipes.Recipe, folder: Path, cut: fit.Cut, autocast: Any) -> Any:
    """`autocast`: the dtype that products are cast to where layers hold several; fp32 for none."""
    import torch
    from transformers import TrainingArguments

    train = recipe.train
    on_cpu = load.device() == "cpu"
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=cut.division.rows,
        per_device_eval_batch_size=cut.division.rows,
        gradient_accumulation_steps=cut.division.steps,
        num_train_epochs=train.epochs,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup,
        bf16=autocast == torch.bfloat16,
        fp16=autocast == torch.float16,
        use_cpu=on_cpu,
        optim="adamw_torch" if on_cpu else "adamw_torch_fused",
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_strategy="steps" if on_cpu else "no",  # on a GPU `loop.Watch` says when
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
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process uses one GPU; the Trainer would spread each batch over all that it sees
    return made


def _quiet(trainer: Any) -> None:
    """The Trainer prints its log to stdout, which belongs to the command's own result."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _other_attempts(folder: Path) -> list[str]:
    """What was begun beside `folder` with another recipe, base or data: it cannot be continued, and that is said."""
    others = [p for p in sorted(folder.parent.glob(".adapter-*.partial")) if p != folder and (p / _CHECKPOINTS).is_dir()]
    return [f"{p.name} holds an interrupted training of another recipe, base or data: not continued" for p in others]


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; others are removed."""
    from edgelora.train.loop import is_complete

    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for unfinished in [p for p in found if not is_complete(p)]:
        shutil.rmtree(unfinished)
    complete = [p for p in found if p.exists()]
    return complete[-1] if complete else None
