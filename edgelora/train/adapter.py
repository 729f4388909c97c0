"""What is trained: two thin matrices beside every targeted one, in four variants.

plain    W' = W + (alpha / r) B A                                             Hu et al. 2021
rslora   W' = W + (alpha / sqrt(r)) B A: the step stays as large at high r    Kalajdzievski 2023
dora     W' = m (W + (alpha / r) B A) / its norm, m and the norm a row        Liu et al. 2024
pissa    plain, but B A start as the largest part of W: see train/pissa.py    Meng et al. 2024

LoRA+ (`train.lora_plus`) gives B a learning rate so many times that of A, in any of them (Hayou et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import recipe as recipes
from edgelora.errors import ModelError


def targeted(shapes: Mapping[str, Sequence[int]], wanted: str | Sequence[str]) -> list[str]:
    """Names of the linear layers (without ``.weight``) that `train.targets` names, of weights by their names.

    ModelError lists the real names when one is unknown.
    """
    linear = [
        layer
        for layer, dot, kind in (name.rpartition(".") for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name)
        if kind == "weight"
    ]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    known = sorted({layer.rpartition(".")[2] for layer in linear})
    if unknown := [name for name in names if name not in (*known, "all-linear")]:
        raise ModelError(
            f"train.targets: the base has no {', '.join(unknown)}", f"its linear layers: {', '.join(known)}; or write all-linear"
        )
    return [layer for layer in linear if "all-linear" in names or layer.rpartition(".")[2] in names]


def parameters(shapes: Mapping[str, Sequence[int]], train: recipes.Train) -> int:
    """Trained weights: the sum of r (n_in + n_out) over the targeted layers; DoRA trains a magnitude a row of W as well."""
    sizes = [shapes[f"{layer}.weight"] for layer in targeted(shapes, train.targets)]
    return sum(train.r * (n_out + n_in) + (n_out if train.variant == "dora" else 0) for n_out, n_in in sizes)


def config(train: recipes.Train) -> Any:
    """PEFT's description of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=train.r,
        lora_alpha=train.alpha,
        lora_dropout=train.dropout,
        # a list: PEFT reads a lone name as a regular expression for the whole path
        target_modules="all-linear"
        if train.targets == "all-linear"
        else [train.targets]
        if isinstance(train.targets, str)
        else list(train.targets),
        use_rslora=train.variant == "rslora",
        use_dora=train.variant == "dora",
        task_type="CAUSAL_LM",
    )


def attach(model: Any, train: recipes.Train, start: Path | None = None) -> Any:
    """`model` with a fresh adapter beside its weights, or with the one in `start` (PEFT's format)."""
    from peft import PeftModel, get_peft_model

    if start is None:
        return get_peft_model(model, config(train))
    return PeftModel.from_pretrained(model, start, is_trainable=True, config=config(train), local_files_only=True)


def optimizer(model: Any, train: recipes.Train, arguments: Any) -> Any:
    """LoRA+: the optimizer that `arguments` (transformers' TrainingArguments) ask for, with a rate of its own for B. None for one rate."""
    if train.lora_plus is None:
        return None
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    options.pop("lr")
    return create_loraplus_optimizer(model, kind, lr=train.lr, loraplus_lr_ratio=train.lora_plus, **options)
