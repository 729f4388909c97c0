"""How llama.cpp names and stores what a Hugging Face checkpoint holds, one `Architecture` for each model type, and the way back.

A tensor keeps its values or is changed in one of two ways: rows of q and k are put into the order that llama.cpp's
rotation wants (`pairs`), or one is added to a norm's weights because Hugging Face adds it at run time (`plus_one`).
What llama.cpp would compute differently from Hugging Face, and has no key for, is a ModelError here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.errors import ModelError
from edgelora.export import rotation

Metadata = dict[str, Any]
Settings = dict[str, Any]  # of config.json

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS


@dataclass(frozen=True)
class Change:
    """What is done to a checkpoint's tensor (numpy's or torch's) on its way into a GGUF file, given the configuration, and what undoes it.

    A head's rows stay among themselves, so any number of whole heads may be changed alone.
    """

    do: Callable[[Any, Any], Any]
    undo: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class File:
    """What a GGUF file says of a model: its keys below the architecture's name, its tensors' names, and their values, float32."""

    keys: Mapping[str, Any]
    names: Collection[str]
    read: Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor: its name and what is done to it on the way."""

    name: str
    change: Change | None = None
    optional: bool = False


@dataclass(frozen=True)
class Architecture:
    """`layer` maps a GGUF name (after ``blk.N.``) to its source (after ``model.layers.N.``).

    `metadata(config)` gives the keys below the architecture's name, `vectors(config)` further 32-bit tensors that
    the configuration implies; both raise ModelError for what llama.cpp cannot run. `settings(file)` is the way back: what
    of config.json a file's keys and such tensors say; KeyError or TypeError for keys that are not there or of another type.
    """

    name: str
    layer: Mapping[str, Source]
    metadata: Callable[[Any], Metadata]
    settings: Callable[[File], Settings]
    vectors: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    final_norm: Change | None = None

    def tensors(self, config: Any) -> dict[str, Source]:
        """GGUF name -> source, in file order, for the whole model."""
        named = {"token_embd.weight": Source("model.embed_tokens.weight")}
        for i in range(checked_layers(config.num_hidden_layers)):
            for name, source in self.layer.items():
                named[f"blk.{i}.{name}"] = Source(f"model.layers.{i}.{source.name}", source.change, source.optional)
        named["output_norm.weight"] = Source("model.norm.weight", self.final_norm)
        if not config.tie_word_embeddings:
            named["output.weight"] = Source("lm_head.weight")
        return named


def checked_layers(count: int) -> int:
    """The number of layers; ModelError for more than llama.cpp runs."""
    if not 0 < count <= _MAX_LAYERS:
        raise ModelError(f"{count} layers", f"llama.cpp runs models of 1 to {_MAX_LAYERS} layers")
    return count


def of(model_type: str) -> Architecture:
    """The architecture of a config.json's `model_type`; ModelError lists the known ones."""
    if model_type not in ARCHITECTURES:
        raise ModelError(f"GGUF export does not know the architecture {model_type!r}", f"known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def of_gguf(name: str) -> tuple[str, Architecture]:
    """The model type that reads GGUF files of the architecture `name`, and that architecture; ModelError lists the known ones."""
    for model_type, architecture in ARCHITECTURES.items():
        if architecture.name == name:
            return model_type, architecture
    known = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES.values()))
    raise ModelError(f"the GGUF architecture {name!r} is not known", f"known: {known}; or use the model's safetensors as base")


# ---- changes ----


def _pairs(weight: Any, config: Any) -> Any:
    """Hugging Face rotates element j of a head with element j + d/2, llama.cpp's NORM rotation 2j with 2j + 1."""
    return weight.reshape(-1, 2, rotation.head_dim(config) // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _halves(weight: Any, config: Any) -> Any:
    return weight.reshape(-1, rotation.head_dim(config) // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


pairs = Change(_pairs, _halves)
plus_one = Change(lambda w, config: w + 1, lambda w, config: w - 1)


# ---- hyper-parameters, and back ----


def _common(config: Any) -> Metadata:
    return {
        "context_length": _context_length(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": rotation.head_dim(config),
        "attention.value_length": rotation.head_dim(config),
        "vocab_size": config.vocab_size,
    }


def _common_settings(file: File) -> Settings:
    keys = file.keys
    heads = int(keys["attention.head_count"])
    return {
        "max_position_embeddings": keys["context_length"],
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": keys["block_count"],
        "intermediate_size": keys["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "rms_norm_eps": rotation.short(keys["attention.layer_norm_rms_epsilon"]),
        "head_dim": keys.get("attention.key_length", keys["embedding_length"] // heads),
        "rope_parameters": rotation.settings(keys),
        "tie_word_embeddings": "output.weight" not in file.names,
    }


def _context_length(config: Any) -> int:
    """llama.cpp runs these architectures without a sliding window, so the file promises no more than one window."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _require(config: Any, **wanted: Any) -> None:
    for key, value in wanted.items():
        if getattr(config, key, value) != value:
            raise ModelError(
                f"{key} {getattr(config, key)!r} of this {config.model_type} model is not what llama.cpp runs", f"llama.cpp runs {value!r}"
            )


def _llama_metadata(config: Any) -> Metadata:
    _require(config, hidden_act="silu")
    return _common(config) | rotation.keys(config, "linear", "yarn", "llama3")


def _llama_settings(file: File) -> Settings:
    settings = _common_settings(file) | {"attention_bias": "blk.0.attn_q.bias" in file.names, "mlp_bias": "blk.0.ffn_up.bias" in file.names}
    if "rope_freqs.weight" in file.names:
        settings["rope_parameters"] |= rotation.llama3_settings(file.keys, file.read("rope_freqs.weight"))
    return settings


def _qwen_metadata(config: Any) -> Metadata:
    _require(config, hidden_act="silu")
    return _common(config) | rotation.keys(config, "linear", "yarn")


def _smollm3_metadata(config: Any) -> Metadata:
    layers = range(1, config.num_hidden_layers + 1)
    _require(config, hidden_act="silu", use_sliding_window=False, no_rope_layers=[int(i % 4 != 0) for i in layers])
    return _common(config) | rotation.keys(config, "linear", "yarn")


def _qwen_settings(file: File) -> Settings:
    return _common_settings(file) | {"use_sliding_window": False}


def _phi3_metadata(config: Any) -> Metadata:
    _require(config, hidden_act="silu")
    keys = _common(config) | rotation.keys(config, "longrope")
    keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    keys["attention.sliding_window"] = 0
    if config.rope_parameters.get("rope_type") == "longrope":
        stretch = config.max_position_embeddings / config.original_max_position_embeddings
        factor = math.sqrt(1 + math.log(stretch) / math.log(config.original_max_position_embeddings)) if stretch > 1 else 1.0
        keys |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": factor}
    return keys


def _phi3_settings(file: File) -> Settings:
    keys, settings = file.keys, _common_settings(file)
    settings |= {"sliding_window": keys.get("attention.sliding_window") or None}
    settings["original_max_position_embeddings"] = keys.get("rope.scaling.original_context_length", keys["context_length"])
    rope = settings["rope_parameters"]
    if "rope_factors_long.weight" in file.names:
        factors = {
            f"{kind}_factor": [rotation.short(x) for x in file.read(f"rope_factors_{kind}.weight").reshape(-1)]
            for kind in ("long", "short")
        }
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": settings["original_max_position_embeddings"], **factors}
    rope["partial_rotary_factor"] = keys.get("rope.dimension_count", settings["head_dim"]) / settings["head_dim"]
    return settings


def _gemma3_metadata(config: Any) -> Metadata:
    # llama.cpp derives the attention scale from the head size (only of the 27B from the hidden size).
    scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    _require(config, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=scale, attn_logit_softcapping=None)
    _require(config, use_bidirectional_attention=False)
    far, near = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    if near.get("rope_type", "default") != "default" or far.get("rope_type", "default") not in ("default", "linear"):
        raise ModelError(
            f"rotary scaling {config.rope_parameters} of this Gemma 3 model cannot be written to GGUF", "known: linear, on full attention"
        )
    keys = _common(config) | {
        "context_length": config.max_position_embeddings,
        "rope.freq_base": float(far["rope_theta"]),
        "rope.freq_base_swa": float(near["rope_theta"]),
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }
    if far.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(far["factor"])}
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def _gemma3_settings(file: File) -> Settings:
    keys, settings = file.keys, _common_settings(file)
    layers, heads = int(keys["block_count"]), settings["num_attention_heads"]
    pattern = keys.get("attention.sliding_window_pattern", 6)  # a bool for every layer, or in older files every how many layers are not
    slides = [bool(x) for x in pattern] if not isinstance(pattern, int) else [(i + 1) % pattern != 0 for i in range(layers)]
    far = settings["rope_parameters"]
    return settings | {
        "rope_parameters": {
            "full_attention": far,
            "sliding_attention": {"rope_type": "default", "rope_theta": rotation.short(keys.get("rope.freq_base_swa", 10000.0))},
        },
        "sliding_window": keys["attention.sliding_window"],
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "query_pre_attn_scalar": keys["embedding_length"] // heads if layers == 62 else settings["head_dim"],
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "attn_logit_softcapping": None,
    }


# ---- tensors ----

_MLP = {
    "ffn_gate.weight": Source("mlp.gate_proj.weight"),
    "ffn_up.weight": Source("mlp.up_proj.weight"),
    "ffn_down.weight": Source("mlp.down_proj.weight"),
}
_PLAIN = {
    "attn_norm.weight": Source("input_layernorm.weight"),
    "attn_q.weight": Source("self_attn.q_proj.weight"),
    "attn_k.weight": Source("self_attn.k_proj.weight"),
    "attn_v.weight": Source("self_attn.v_proj.weight"),
    "attn_output.weight": Source("self_attn.o_proj.weight"),
    "ffn_norm.weight": Source("post_attention_layernorm.weight"),
    **_MLP,
}
_LLAMA = _PLAIN | {
    "attn_q.weight": Source("self_attn.q_proj.weight", pairs),
    "attn_k.weight": Source("self_attn.k_proj.weight", pairs),
}
_LLAMA_BIASES = {
    "attn_q.bias": Source("self_attn.q_proj.bias", pairs, optional=True),
    "attn_k.bias": Source("self_attn.k_proj.bias", pairs, optional=True),
    "attn_v.bias": Source("self_attn.v_proj.bias", optional=True),
    "attn_output.bias": Source("self_attn.o_proj.bias", optional=True),
    "ffn_gate.bias": Source("mlp.gate_proj.bias", optional=True),
    "ffn_up.bias": Source("mlp.up_proj.bias", optional=True),
    "ffn_down.bias": Source("mlp.down_proj.bias", optional=True),
}
_QWEN2 = _PLAIN | {
    "attn_q.bias": Source("self_attn.q_proj.bias"),
    "attn_k.bias": Source("self_attn.k_proj.bias"),
    "attn_v.bias": Source("self_attn.v_proj.bias"),
}
_QWEN3 = _PLAIN | {
    "attn_q_norm.weight": Source("self_attn.q_norm.weight"),
    "attn_k_norm.weight": Source("self_attn.k_norm.weight"),
}
_PHI3 = {
    "attn_norm.weight": Source("input_layernorm.weight"),
    "attn_qkv.weight": Source("self_attn.qkv_proj.weight"),
    "attn_output.weight": Source("self_attn.o_proj.weight"),
    "ffn_norm.weight": Source("post_attention_layernorm.weight"),
    "ffn_up.weight": Source("mlp.gate_up_proj.weight"),
    "ffn_down.weight": Source("mlp.down_proj.weight"),
}
_GEMMA3 = _PLAIN | {
    "attn_norm.weight": Source("input_layernorm.weight", plus_one),
    "attn_q_norm.weight": Source("self_attn.q_norm.weight", plus_one),
    "attn_k_norm.weight": Source("self_attn.k_norm.weight", plus_one),
    "post_attention_norm.weight": Source("post_attention_layernorm.weight", plus_one),
    "ffn_norm.weight": Source("pre_feedforward_layernorm.weight", plus_one),
    "post_ffw_norm.weight": Source("post_feedforward_layernorm.weight", plus_one),
}

_LLAMA_LIKE = Architecture("llama", _LLAMA | _LLAMA_BIASES, _llama_metadata, _llama_settings, rotation.llama3_factors)

ARCHITECTURES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": Architecture("qwen2", _QWEN2, _qwen_metadata, _qwen_settings),
    "qwen3": Architecture("qwen3", _QWEN3, _qwen_metadata, _qwen_settings),
    "smollm3": Architecture("smollm3", _LLAMA, _smollm3_metadata, _qwen_settings),
    "phi3": Architecture("phi3", _PHI3, _phi3_metadata, _phi3_settings, rotation.longrope_factors),
    "gemma3_text": Architecture("gemma3", _GEMMA3, _gemma3_metadata, _gemma3_settings, final_norm=plus_one),
}
