"""How ExecuTorch's transformer (examples/models/llama) calls what a Hugging Face checkpoint holds, and the settings it is built with.

Its rotation comes in both orders of a head's numbers; with Hugging Face's own no row of q or k has to move. What it would compute
differently from Hugging Face is Unsupported here, before any work begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgelora.errors import Unsupported
from edgelora.export.rotation import head_dim

Rows = tuple[str, int, int]  # a checkpoint's tensor, its first row and the row after its last

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
GROUP = 32  # XNNPACK's blocks of weights are a multiple of it
_INSTEAD = "export it as gguf instead"
_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_SPLIT = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_QK_NORM = {"attention.q_norm_fn": "self_attn.q_norm", "attention.k_norm_fn": "self_attn.k_norm"}


def check(config: Any, context: int) -> None:
    """Unsupported for a model that ExecuTorch's transformer cannot be, at up to `context` tokens. `config` is transformers' own."""
    if config.model_type not in ARCHITECTURES:
        raise Unsupported(
            f"ExecuTorch's transformer is no {config.model_type!r} model", f"it can be {', '.join(ARCHITECTURES)}; {_INSTEAD}"
        )
    if config.hidden_act != "silu":
        raise Unsupported(f"ExecuTorch's feed-forward is gated by silu, this model's by {config.hidden_act}", _INSTEAD)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < context:
        raise Unsupported(f"attention in a window of {window} tokens is not exported", _INSTEAD)


def tensors(config: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Rows]:
    """ExecuTorch's name -> rows of the checkpoint, for every tensor of both. Unsupported when one of the checkpoint has no place."""
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    names: dict[str, tuple[str, int, int | None]] = {"tok_embeddings.weight": ("model.embed_tokens.weight", 0, None)}
    names["norm.weight"] = ("model.norm.weight", 0, None)
    names["output.weight"] = ("lm_head.weight" if "lm_head.weight" in shapes else "model.embed_tokens.weight", 0, None)
    for i in range(config.num_hidden_layers):
        own, theirs = f"layers.{i}.", f"model.layers.{i}."
        whole = _LAYER if config.model_type == "phi3" else _LAYER | _SPLIT
        whole = whole | (_QK_NORM if config.model_type == "qwen3" else {})
        for name, source in whole.items():
            for end in (".weight", ".bias"):
                if end == ".weight" or theirs + source + end in shapes:
                    names[own + name + end] = (theirs + source + end, 0, None)
        if config.model_type == "phi3":
            q, k, gate = heads * width, kv * width, config.intermediate_size
            qkv, gate_up = theirs + "self_attn.qkv_proj.weight", theirs + "mlp.gate_up_proj.weight"
            names[own + "attention.wq.weight"] = (qkv, 0, q)
            names[own + "attention.wk.weight"] = (qkv, q, q + k)
            names[own + "attention.wv.weight"] = (qkv, q + k, q + 2 * k)
            names[own + "feed_forward.w1.weight"] = (gate_up, 0, gate)
            names[own + "feed_forward.w3.weight"] = (gate_up, gate, 2 * gate)
    used = {source for source, _, _ in names.values()}
    strange = sorted(({*shapes} - used) | {name for name in names if name.endswith((".wo.bias", ".w1.bias", ".w2.bias", ".w3.bias"))})
    if strange:
        raise Unsupported(f"the tensor {strange[0]} has no place in ExecuTorch's transformer", _INSTEAD)
    if absent := sorted(used - {*shapes}):
        raise Unsupported(f"the checkpoint lacks {absent[0]}", "save the model again")
    return {name: (source, first, shapes[source][0] if end is None else end) for name, (source, first, end) in names.items()}


def check_widths(shapes: Mapping[str, Sequence[int]]) -> None:
    """Unsupported for a matrix whose rows are no whole number of blocks: 4 bits cannot be written then."""
    odd = next((name for name, shape in shapes.items() if len(shape) == 2 and shape[1] % GROUP), None)
    if odd:
        raise Unsupported(f"{odd} has rows of {shapes[odd][1]} numbers, and XNNPACK's 4-bit blocks have {GROUP}", "choose int8")


def params(config: Any, shapes: Mapping[str, Sequence[int]], context: int) -> dict[str, Any]:
    """The arguments of ExecuTorch's `ModelArgs`. The rotation's frequencies are handed over beside them."""
    return {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim(config),
        "n_layers": config.num_hidden_layers,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "norm_eps": config.rms_norm_eps,
        "attention_qkv_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "use_qk_norm": config.model_type == "qwen3",
        "qk_norm_before_rope": config.model_type == "qwen3",
        "use_hf_rope": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache_op": True,
        "enable_dynamic_shape": True,
        "max_seq_len": context,
        "max_context_len": context,
    }


def frequencies(config: Any, context: int) -> tuple[list[float], float]:
    """Radians a token of every pair of numbers that is turned, and what the sines and cosines are multiplied with."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        turned = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
        return [float(rope["rope_theta"]) ** (-2 * i / turned) for i in range(turned // 2)], 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise Unsupported(f"the rotation {kind!r} is not known", _INSTEAD)
    found, factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=context)
    return [float(x) for x in found], float(factor)
