"""Rotary embeddings as GGUF files say them, and the way back: keys, and factors that are a tensor of their own.

A scaling that llama.cpp does not run for an architecture is a ModelError.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgelora.errors import ModelError


def head_dim(config: Any) -> int:
    """Numbers in a head, whether the configuration says it or not."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def short(value: float) -> float:
    """The shortest number that is the same in 32 bits: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def keys(config: Any, *kinds: str) -> dict[str, Any]:
    """Keys of the rotary embedding; `kinds` are the scalings that llama.cpp runs for this architecture."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    made: dict[str, Any] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)),
    }
    if kind not in ("default", *kinds):
        raise ModelError(
            f"rope_type {kind!r} of this {config.model_type} model cannot be written to GGUF", f"known here: default, {', '.join(kinds)}"
        )
    if kind in ("linear", "yarn"):
        made |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        own = {key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None}
        if own or rope.get("beta_fast", 32) != 32 or rope.get("beta_slow", 1) != 1 or not rope.get("truncate", True):
            raise ModelError(f"YaRN with settings of its own ({config.rope_parameters}) cannot be written to GGUF", "use factor alone")
        made["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return made


def settings(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of config.json out of a file's keys."""
    kind = keys.get("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind, "rope_theta": short(keys.get("rope.freq_base", 10000.0))}
    if kind in ("linear", "yarn"):
        rope["factor"] = short(keys["rope.scaling.factor"])
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    return rope


def llama3_factors(config: Any) -> dict[str, np.ndarray]:
    """Llama 3's rotary scaling is stored as the factor by which every frequency is divided (meta-llama/llama-models, apply_scaling).

    Pairs that turn often within the original context stay, those that hardly turn are slowed down by `factor`, between them it goes over.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return {}
    size, low, high = head_dim(config), rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * float(rope["rope_theta"]) ** -(np.arange(0, size, 2) / size) / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / (kept + (1 - kept) / rope["factor"])).astype(np.float32)}


def llama3_settings(keys: Mapping[str, Any], found: np.ndarray) -> dict[str, Any]:
    """The file holds the scaling's outcome alone; its four numbers are those of all Llama 3.1 and 3.2 models if they give it."""
    found, length = found.reshape(-1), int(keys["attention.key_length"])
    theta, factor = short(keys["rope.freq_base"]), short(found.max())
    for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32):
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": original}  # fmt: skip
        made = llama3_factors(SimpleNamespace(rope_parameters=rope, head_dim=length))["rope_freqs.weight"]
        if made.shape == found.shape and np.allclose(made, found, rtol=1e-5):
            return rope
    raise ModelError("its rope_freqs.weight is no scaling of Llama 3's", "use the model's safetensors as base")


def longrope_factors(config: Any) -> dict[str, np.ndarray]:
    """Phi-3's LongRoPE stores a divisor of every frequency, for short and for long texts."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return {}
    return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], dtype=np.float32) for kind in ("long", "short")}
