"""What a training run will need, said before it starts. Estimates: labelled as such wherever they are shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelora import models
from edgelora import recipe as recipes
from edgelora.train import load

_PROCESS_BYTES = 800e6  # Python, torch, transformers and bitsandbytes, loaded
# Saved activations, bytes a token, layer and unit of hidden + intermediate size (bf16 values, fp32 copies of the norms and
# of the adapters' inputs), and the share of the probed matmul rate that element-wise work leaves: both fitted on
# SmolLM2-135M on a CPU, 8 and 16 rows of up to 97 tokens (2.9 and 4.9 GB; 186 and 214 tokens a CPU-second).
_ACTIVATION_BYTES = 35.0
_MATMUL_EFFICIENCY = 0.5


def training(folder: Path, train: recipes.Train, tokens: int, lengths: Sequence[int]) -> dict[str, float]:
    """Predicted peak memory (bytes) and time (seconds) of a training run over rows of these token lengths."""
    config = models.config(folder)
    layers, hidden, inner = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    total = models.parameter_count(folder)
    embedding = config["vocab_size"] * hidden
    base = (total - embedding) * (0.55 if train.method == "qlora" else 2) + embedding * 2
    adapter = adapter_parameters(config, train) * 16  # fp32 weight, gradient and two Adam moments
    batch = train.batch * max(lengths)
    activations = batch * (2 * hidden * layers if train.checkpointing else _ACTIVATION_BYTES * (hidden + inner) * layers)
    logits = batch * config["vocab_size"] * 4 * 3 / 2  # about half the tokens are answers; logits, softmax, gradient
    # Forward and backward through frozen weights: 2 each a weight and token; their own gradients are not needed.
    flops = 4 * total * tokens * train.epochs * (3 / 2 if train.checkpointing else 1)
    return {
        "peak_rss_bytes": round(_PROCESS_BYTES + base * 1.3 + adapter + activations + logits),
        "seconds": round(flops / (_matmul_rate(load.arithmetic(train.dtype)[0]) * _MATMUL_EFFICIENCY), 1),
    }


def full_finetune_bytes(parameters: int) -> int:
    """Weights, gradients and two Adam moments of full fine-tuning in mixed precision: 16 bytes a parameter (ZeRO, Rajbhandari et al. 2020)."""
    return 16 * parameters


def adapter_parameters(config: dict[str, Any], train: recipes.Train) -> int:
    """Sum of r (n_in + n_out) over the targeted linear layers of a llama-shaped model."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = head * config["num_attention_heads"], head * config.get("num_key_value_heads", config["num_attention_heads"])
    shapes = {
        "q_proj": hidden + query,
        "k_proj": hidden + kv,
        "v_proj": hidden + kv,
        "o_proj": query + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    wanted = shapes if train.targets == "all-linear" else [train.targets] if isinstance(train.targets, str) else train.targets
    return int(train.r * config["num_hidden_layers"] * sum(shapes.get(name, 0) for name in wanted))


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
