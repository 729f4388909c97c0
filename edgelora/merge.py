"""Merge: a base and an adapter in, one dense model out, W' = W + (alpha / r) B A.

A QLoRA adapter was trained on the rounded NF4 base, so there are two dense models it can become: added to the
16-bit base that the NF4 one was rounded from, or to the NF4 base written out in 16 bits, which is what training saw.
Tools disagree on which is right (llama.cpp #13485, unsloth #1089, peft #2105), so both are measured on `valid` against
the model as it was trained. Never merged: into the 4-bit weights themselves, which rounds the change away (peft #2321).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import artifact, evaluate, machine, models, weights
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data import chat
from edgelora.data.split import Dataset
from edgelora.errors import ModelError
from edgelora.train import load

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[float, str], None]


def merge(recipe: recipes.Recipe, base: models.Base, adapter: Artifact, dataset: Dataset, out: Path, progress: Progress) -> Artifact:
    """Write the merged model as a Hugging Face folder in bf16, with the tokenizer and template it was trained with."""
    method: load.Method = "qlora" if adapter.facts["method"] == "qlora" else "lora"
    return artifact.build(
        out,
        "model",
        "model",
        lambda folder: _merge(recipe, base, adapter, method, dataset, folder, progress),
        made_from={"base": base.key, "adapter": adapter.key, "valid": dataset.fingerprint("valid")},
        recipe={
            **recipes.as_dict(recipe.merge),
            "base_model": models.shown(recipe.base),
            "system": recipe.data.system,
            "task": recipe.data.task,
            "rows": recipe.evaluate.rows,
        },
        versions=artifact.versions_of("torch", "transformers", "peft", "bitsandbytes"),
        rows={"valid": "select"},
    )


def _merge(
    recipe: recipes.Recipe, base: models.Base, adapter: Artifact, method: load.Method, dataset: Dataset, folder: Path, progress: Progress
) -> dict[str, Any]:
    import torch

    from edgelora.runtime.torch_reference import TorchSession

    torch.set_num_threads(recipe.threads or machine.cores())
    _whole(adapter)
    tokenizer = models.open_tokenizer(base.folder)
    fitting = chat.encode_all(tokenizer, dataset.selecting, recipe.train.max_tokens)
    rows = [ids for _, ids in fitting[: recipe.evaluate.rows]]
    wanted = ["16bit"] if method == "lora" else ["nf4", "16bit"] if recipe.merge.base == "auto" else [recipe.merge.base]
    if method == "lora" and recipe.merge.base == "nf4":
        raise ModelError("merge.base nf4: this adapter was trained on the 16-bit base", "write merge.base: auto or 16bit")
    progress(0.0, "reading the model as trained")
    trained = _as_trained(base.folder, adapter.path, method, tokenizer, rows)
    candidates = []
    for number, name in enumerate(wanted):
        progress((number + 1) / (len(wanted) + 2), f"merging into the {name} base")
        merged = TorchSession(dense(base.folder, adapter.path, name), tokenizer)
        candidates.append({"base": name, **evaluate.divergence_summary(evaluate.divergence(trained, merged, rows))})
    kept = min(candidates, key=lambda c: c["loss"])
    progress(1 - 1 / (len(wanted) + 2), f"writing the {kept['base']} merge")
    weights.write(weights.Merged(base.folder, adapter.path, str(kept["base"])), folder, lambda share, name: None)
    _describe(base.folder, folder)
    tokenizer.chat_template = chat.with_system(tokenizer.chat_template, recipe.data.system)
    tokenizer.save_pretrained(folder)
    models.tidy(folder, models.shown(recipe.base))
    labels = {"labels": list(dataset.labels)} if recipe.data.task == "classify" else {}
    return {"kept": kept["base"], "why": _why(kept, candidates), "candidates": candidates, "base": base.name, **labels}


def _describe(base: Path, folder: Path) -> None:
    """The base's config.json and generation_config.json beside weights in bf16."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, local_files_only=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def dense(base: Path, adapter: Path, into: str) -> Any:
    """The fp32 model with `adapter` added to the base's own weights (`16bit`) or to its NF4 form written out (`nf4`)."""
    import torch

    model = load.load_base(base, "qlora" if into == "nf4" else "lora", torch.float32)
    if into == "nf4":
        model = models.as_dense(model.dequantize())
    return _adapted(model, adapter).merge_and_unload().eval()


def _whole(adapter: Artifact) -> None:
    """ModelError when a file of the adapter is missing or not the one that training wrote."""
    for name, digest in adapter.files.items():
        file = adapter.path / name
        if not file.is_file():
            raise ModelError(f"{adapter.path.name} lacks {name}", "remove the folder and train again")
        if artifact.sha256(file) != digest:
            raise ModelError(
                f"{adapter.path.name}/{name} is damaged: it is not the file that was written", "remove the folder and train again"
            )


def _adapted(model: Any, adapter: Path) -> Any:
    """`model` with the adapter beside its weights; ModelError when the adapter cannot be read."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter, local_files_only=True)
    except Exception as error:  # peft, safetensors and torch have no common error
        cause = " ".join(str(error).split())[:300]
        raise ModelError(f"{adapter.name} cannot be read: {cause}", "it is damaged: remove the folder and train again") from error


def _as_trained(base: Path, adapter: Path, method: load.Method, tokenizer: Any, rows: Sequence[chat.Encoded]) -> list[np.ndarray]:
    """The scores of the model as training left it, on rows: what every merge is compared with."""
    import torch

    from edgelora.runtime.torch_reference import TorchSession

    model = _adapted(load.load_base(base, method, torch.float32), adapter).eval()
    return evaluate.answer_scores(TorchSession(model, tokenizer), rows)


def _why(kept: dict[str, Any], candidates: Sequence[dict[str, Any]]) -> str:
    if len(candidates) == 1:
        return f"the only one asked for; valid loss {kept['loss']:.4f}, KL to the trained model {kept['kl']:.2g}"
    other = next(c for c in candidates if c is not kept)
    return (
        f"lower loss on valid: {kept['loss']:.4f} against {other['loss']:.4f} of the {other['base']} merge "
        f"(KL to the trained model {kept['kl']:.2g} against {other['kl']:.2g})"
    )
