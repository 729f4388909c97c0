"""What a training run will need, said before it starts. Estimates: labelled as such wherever they are shown."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import models
from edgelora import recipe as recipes
from edgelora.errors import ModelError
from edgelora.train import adapter, load

# Fitted on SmolLM2-135M, rows of up to 97 tokens: 8 and 16 rows on two CPU cores (3.8 and 5.6 GB; 186 and 214 tokens a
# CPU-second), 8 and 32 rows on one H100 (1.4 and 4.9 GB; 0.4 s a step, nearly all of it launches).
_FIXED_BYTES = {"cpu": 800e6, "cuda": 100e6}  # the libraries themselves
_ACTIVATION_BYTES = {"cpu": 47.0, "cuda": 18.0}  # saved a token, layer and unit of hidden + intermediate size; the CPU allocator keeps more
_MATMUL_EFFICIENCY = 0.5  # share of the probed matmul rate that element-wise work leaves
_LAUNCH_S = {"cpu": 0.0, "cuda": 0.013}  # host time to launch one layer's kernels, forward and backward


def training(folder: Path, train: recipes.Train, tokens: int, lengths: Sequence[int]) -> dict[str, float]:
    """Predicted peak memory (bytes; `peak_rss_bytes` on a CPU, `peak_gpu_bytes` on a GPU) and time (seconds) of a training run.

    `lengths` are the token counts of the rows, `tokens` their sum.
    """
    config, device = models.config(folder), load.device()
    try:
        layers, hidden, inner = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    except KeyError as error:
        raise ModelError(f"{folder.name}: its config.json names no {error.args[0]}", "choose a base of the llama kind") from None
    total = models.parameter_count(folder)
    embedding = config["vocab_size"] * hidden
    base = (total - embedding) * (0.55 if train.method == "qlora" else 2) + embedding * 2
    trained = adapter.parameters(models.shapes(folder), train) * 16  # fp32 weight, gradient and two Adam moments
    batch = train.batch * max(lengths)
    activations = batch * layers * (2 * hidden if train.checkpointing else _ACTIVATION_BYTES[device] * (hidden + inner))
    logits = batch * config["vocab_size"] * 4 * 3 / 2  # about half the tokens are answers; logits, softmax, gradient
    # Forward and backward through frozen weights: 2 each a weight and token; their own gradients are not needed.
    again = 3 / 2 if train.checkpointing else 1
    compute = 4 * again * total * tokens * train.epochs / (_matmul_rate(load.arithmetic(train.dtype)) * _MATMUL_EFFICIENCY)
    launches = len(lengths) / train.batch * train.epochs * layers * _LAUNCH_S[device] * again
    return {
        "peak_gpu_bytes" if device == "cuda" else "peak_rss_bytes": round(
            _FIXED_BYTES[device] + base * 1.3 + trained + activations + logits
        ),
        "seconds": round(max(compute, launches), 1),
    }


def peak_bytes(figures: Mapping[str, float]) -> float:
    """The memory that decides, of predicted or measured figures: the GPU's where one trains."""
    return figures["peak_gpu_bytes"] if "peak_gpu_bytes" in figures else figures["peak_rss_bytes"]


def full_finetune_bytes(parameters: int) -> int:
    """Weights, gradients and two Adam moments of full fine-tuning in mixed precision: 16 bytes a parameter (ZeRO, Rajbhandari et al. 2020)."""
    return 16 * parameters


def _matmul_rate(dtype: Any) -> float:
    """FLOP/s of one square matrix product on this device, best of three."""
    import torch

    size = 8192 if load.device() == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=load.device())
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
