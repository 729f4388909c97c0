"""Every mistake that an ONNX exporter can make and still exit 0, against torch: it must be seen. GGUF's stand in test_conversion.py.

The graph is the builder's own, from a model that was read wrongly; the models are tiny and say something (tests/tiny_models.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgelora.export import onnx as onnx_export
from edgelora.runtime import onnx_runtime
from tests.test_gguf_export import VARIANTS
from tests.test_onnx_export import IDS, kl, quiet, torch_scores
from tests.tiny_models import ARCHITECTURES, tiny_model

UNMISTAKABLE = 1e-2  # nats a token; a right graph is below 1e-6

Config = dict[str, Any]  # of config.json
Weights = dict[str, torch.Tensor]
Mistake = Callable[[Config, Weights], None]


def theta(config: Config, weights: Weights) -> None:
    rope = config["rope_parameters"]
    for one in rope.values() if "full_attention" in rope else [rope]:
        one["rope_theta"] /= 4


def no_scaling(config: Config, weights: Weights) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}


def epsilon(config: Config, weights: Weights) -> None:
    config["rms_norm_eps"] = 1e-5


def other_window(config: Config, weights: Weights) -> None:
    config["sliding_window"] *= 2


def tied_head(config: Config, weights: Weights) -> None:
    config["tie_word_embeddings"] = True
    del weights["lm_head.weight"]


def permuted(config: Config, weights: Weights) -> None:
    """Queries and keys in llama.cpp's order."""
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            weights[name] = weights[name].unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def without(ending: str, value: float) -> Mistake:
    """These weights left out, which is what a `value` everywhere comes to."""

    def mistake(config: Config, weights: Weights) -> None:
        found = [name for name in weights if name.endswith(ending)]
        assert found
        for name in found:
            weights[name] = torch.full_like(weights[name], value)

    return mistake


# name -> (architecture, what is special about the right model, the mistake)
MISTAKES: dict[str, tuple[str, Config, Mistake]] = {
    **{f"rope theta, {arch}": (arch, {}, theta) for arch in ARCHITECTURES},
    "rope scaling, llama": (*VARIANTS["llama3 rope"], no_scaling),
    "norm epsilon, llama": ("llama", {"rms_norm_eps": 0.1}, epsilon),
    "order of queries and keys, llama": ("llama", {}, permuted),
    **{f"{part} bias, qwen2": ("qwen2", {}, without(f"{part}_proj.bias", 0.0)) for part in "qkv"},
    **{f"{part} norm, qwen3": ("qwen3", {}, without(f"{part}_norm.weight", 1.0)) for part in "qk"},
    "window, gemma3_text": ("gemma3_text", {}, other_window),
    "window, mistral": ("mistral", {"sliding_window": 8}, other_window),
    "lost head, mistral": ("mistral", {}, tied_head),
}


def divergence(name: str, folder: Path) -> float:
    """KL of the graph of the model with this mistake from torch's model without it, nats a token."""
    arch, special, mistake = MISTAKES[name]
    right = tiny_model(arch, folder / "right", **special)
    wrong = Path(shutil.copytree(right, folder / "wrong"))
    config, weights = json.loads((wrong / "config.json").read_text()), load_file(wrong / "model.safetensors")
    mistake(config, weights)
    (wrong / "config.json").write_text(json.dumps(config))
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    with onnx_runtime.open(onnx_export.write(wrong, "fp32", folder, "wrong", quiet), threads=1) as session:
        scores = session.score(IDS)
    return kl(torch_scores(AutoModelForCausalLM.from_pretrained(right, dtype=torch.float32), IDS), scores)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    assert divergence(name, tmp_path) > UNMISTAKABLE
