"""PiSSA: train the largest part of every matrix, keep what is left frozen (Meng et al. 2024).

W = R + (alpha / r) B A, where B A holds the r largest singular values of W. The residual R becomes a base of its own, written
in bf16 and held in NF4 like any other while B and A are trained; it is taken from the 16-bit weights, because of a base that is
already in 4 bits nothing but its rounding errors would be decomposed. R has smaller values than W, so NF4 rounds it less.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import artifact, models, settings, weights
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.errors import ModelError
from edgelora.train import adapter, load

_ITERATIONS = 16  # of the randomized decomposition; the paper's choice: as good as the exact one and some hundred times faster
_MORE = 8  # singular values computed beyond r, so that the r-th is right too
_BESIDE = ("*.json", "*.jinja", "*.model")  # the tokenizer and the configuration
START = "start"  # the folder of the first B and A, PEFT's format


def start(train: recipes.Train, base: models.Base, out: Path, progress: Callable[[float, str], None]) -> models.Base:
    """The base that training begins on: `base` itself, or for PiSSA its residual, made once below `out`, with the first B and A."""
    if train.variant != "pissa":
        return base
    made = artifact.build(
        out,
        "residual",
        "residual",
        lambda folder: _split(base.folder, train, folder, progress),
        made_from={"base": base.key},
        recipe={"r": train.r, "alpha": train.alpha, "targets": recipes.as_dict(train)["targets"]},
        versions=artifact.versions_of("torch", "peft"),
    )
    return dataclasses.replace(base, folder=made.path, key=made.key, start=made.path / START)


def start_of(adapter: Artifact, base: models.Base, out: Path, progress: Callable[[float, str], None]) -> models.Base:
    """The base that `adapter` was trained on: `base` itself, or its residual, made again unless it is still below `out`.

    ModelError when the adapter's manifest does not say how it was trained.
    """
    if adapter.facts.get("variant") != "pissa":
        return base
    problems: list[str] = []
    train = settings.build(recipes.Train, adapter.recipe.get("train"), "train.", problems)
    if problems:
        raise ModelError(f"{adapter.path.name}/{artifact.MANIFEST} is damaged: {problems[0]}", "remove the folder and train again")
    return start(train, base, out, progress)


class _Residual(weights.Checkpoint):
    """`folder`'s weights without the low-rank part `parts`: layer -> (scaled B, A)."""

    def __init__(self, folder: Path, parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        super().__init__(folder)
        self._parts = parts

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        values = super().rows(name, first, last)
        if name in self._parts:
            b, a = self._parts[name]
            values -= b[first:last] @ a
        return values


def _split(base: Path, train: recipes.Train, folder: Path, progress: Callable[[float, str], None]) -> dict[str, Any]:
    from safetensors.numpy import save_file

    source = weights.Checkpoint(base)
    layers = adapter.targeted(source.shapes, train.targets)
    scale = np.float32(train.alpha / train.r)
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    stored: dict[str, np.ndarray] = {}
    for number, layer in enumerate(layers):
        progress(number / len(layers), f"decomposing {layer}")
        b, a = _largest(source.rows(f"{layer}.weight"), train.r, layer)
        parts[f"{layer}.weight"] = b, a
        stored |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b / scale}
    weights.write(_Residual(base, parts), folder, lambda share, name: None)
    for pattern in _BESIDE:
        for file in base.glob(pattern):
            if file.name not in (artifact.MANIFEST, "model.safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)
    (folder / START).mkdir()
    save_file(stored, folder / START / "adapter_model.safetensors")
    adapter.config(train).save_pretrained(folder / START)
    models.tidy(folder / START, "")
    return {"layers": len(layers), "r": train.r}


def _largest(matrix: np.ndarray, r: int, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """B (rows, r) and A (r, columns), float32, whose product is the best approximation of `matrix` of rank r; each takes half of it."""
    import torch

    least = min(matrix.shape)
    if r > least:
        raise ModelError(f"train.r: {r} is more than the rank of {layer} ({least}), which PiSSA decomposes", f"write {least} or less")
    values = torch.from_numpy(matrix).to(load.device())
    with torch.random.fork_rng(devices=[values.device] if values.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(values, q=min(r + _MORE, least), niter=_ITERATIONS)
    root = s[:r].sqrt()
    return np.ascontiguousarray((u[:, :r] * root).cpu().numpy()), np.ascontiguousarray((v[:, :r] * root).T.cpu().numpy())
