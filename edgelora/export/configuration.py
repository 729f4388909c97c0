"""config.json as the model runs: what it leaves out filled in, and older ways of writing the rotation brought into one form.

transformers does that too, but takes torch and seconds of imports along. So what it fills in stands here once more; a test takes
every key out of every architecture's config.json and asks transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgelora import models
from edgelora.errors import ModelError
from edgelora.export import architectures

Settings = dict[str, Any]

_HINT = "name a folder that save_pretrained wrote"
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # never left out
_LLAMA: Settings = {
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # a head's share of the hidden size
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": None,
}
_QWEN2 = _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
_DEFAULTS: Mapping[str, Settings] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "smollm3": _QWEN2
    | {"num_key_value_heads": 4, "sliding_window": None, "tie_word_embeddings": True, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "phi3": _LLAMA | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "gemma3_text": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "rope_parameters": None,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
}
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window")  # null says something else than nothing does
_LARGEST = 3e38  # of a float in 32 bits
_THETA = {"smollm3": 2000000.0, "gemma3_text": 1000000.0}  # of the others 10000
_KINDS: Mapping[str, type] = {
    **dict.fromkeys(_SHAPE, int),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"), int),
    **dict.fromkeys(("sliding_window", "sliding_window_pattern", "no_rope_layer_interval"), int),
    **dict.fromkeys(("rms_norm_eps", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"), float),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), float),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), float),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "use_bidirectional_attention"), bool),
    **dict.fromkeys(("hidden_act", "hidden_activation"), str),
    **dict.fromkeys(("no_rope_layers", "layer_types"), list),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
}
# What a kind of rotary scaling cannot be without.
_SCALED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def of(model: Path) -> SimpleNamespace:
    """The settings of a Hugging Face folder, with `rope_parameters` as transformers 5 has them.

    ModelError, naming the setting, for one that is missing or not of its kind, and for an architecture that is not known here.
    """
    written = models.config(model)
    kind = str(written.get("model_type"))
    architectures.of(kind)
    try:
        return SimpleNamespace(**_completed(kind, {key: _checked(key, value) for key, value in written.items()}))
    except ValueError as error:
        raise ModelError(f"cannot read {model / 'config.json'}: {error}", _HINT) from error


def opened(model: Path) -> Any:
    """The same as transformers' own object, for what is handed on to its code."""
    from transformers import AutoConfig

    architectures.of(str(models.config(model).get("model_type")))
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except Exception as error:  # transformers refuses values in its own ways
        raise ModelError(f"cannot read {model / 'config.json'}: {error}", _HINT) from error


def _completed(kind: str, written: Settings) -> Settings:
    """Every setting of a model of this kind."""
    defaults = _DEFAULTS[kind]
    settings = defaults | written
    for key in (*_SHAPE, *(key for key, value in defaults.items() if value is not None and key not in _NULLABLE)):
        _needed(key, settings.get(key))
    layers = architectures.checked_layers(settings["num_hidden_layers"])
    settings["num_key_value_heads"] = settings["num_key_value_heads"] or settings["num_attention_heads"]
    settings["head_dim"] = _needed("head_dim", settings["head_dim"] or settings["hidden_size"] // settings["num_attention_heads"])
    if kind in ("qwen2", "qwen3") and not settings["use_sliding_window"]:
        settings["sliding_window"] = None
    if kind == "smollm3":
        every = settings["no_rope_layer_interval"]
        settings["no_rope_layers"] = settings["no_rope_layers"] or [int((i + 1) % every != 0) for i in range(layers)]
    if kind == "gemma3_text":
        every = settings["sliding_window_pattern"]
        settings["layer_types"] = settings["layer_types"] or [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
        ]
        if len(settings["layer_types"]) != layers:
            raise ValueError(f"layer_types speaks of {len(settings['layer_types'])} layers, it has {layers}")
    settings["rope_parameters"] = _rotations(kind, settings)
    return settings


def _rotations(kind: str, settings: Settings) -> Settings:
    """The rotation; of Gemma one for layers that see everything and one for those that see a window."""
    scaling, theta = settings.get("rope_scaling") or {}, settings.get("rope_theta") or _THETA.get(kind, 10000.0)
    if kind != "gemma3_text":
        return _rotation(kind, scaling or settings["rope_parameters"] or {}, theta, settings)
    both = settings["rope_parameters"] or {}
    far, near = (_checked("rope_parameters", both.get(which)) or {} for which in ("full_attention", "sliding_attention"))
    return {
        "full_attention": _rotation(kind, far | scaling, theta, settings),
        "sliding_attention": _rotation(kind, near, settings.get("rope_local_base_freq") or 10000.0, settings),
    }


def _rotation(kind: str, written: Settings, theta: float, settings: Settings) -> Settings:
    rope = {"rope_type": written.get("type", "default"), "rope_theta": theta} | written
    part = settings.get("partial_rotary_factor") or (1.0 if kind == "phi3" else None)
    if part is not None:
        rope.setdefault("partial_rotary_factor", part)
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        if kind == "phi3":
            rope["original_max_position_embeddings"] = settings["original_max_position_embeddings"]
        else:
            rope.setdefault("original_max_position_embeddings", settings["max_position_embeddings"])
    if kind == "phi3" and rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"  # its older names
    for key in ("rope_theta", *_SCALED.get(str(rope["rope_type"]), ())):
        _needed(key, rope.get(key))
    turned = settings["head_dim"] * _needed("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] == "longrope":
        for key in ("short_factor", "long_factor"):
            if not isinstance(rope.get(key), list) or len([_needed("factor", value) for value in rope[key]]) != int(turned) // 2:
                raise ValueError(f"{key} of its rotation is not {int(turned) // 2} numbers")
    return rope


def _checked(key: str, value: Any) -> Any:
    """The value of a setting; ValueError when it is not of the setting's kind. What is not known here is nobody's business."""
    kind = _KINDS.get(key)
    if kind is None or value is None:
        return value
    if kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _LARGEST
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ValueError(f"{key} is {value!r}"[:200])
    return value


def _needed(key: str, value: Any) -> Any:
    """The same where null says nothing."""
    if value is None:
        raise ValueError(f"it says no {key}")
    return _checked(key, value)
