"""A decoder layer of the llama kind as one step of autograd, with its backward pass written out.

transformers and peft stay the source of the model: what is replaced is the `forward` of each decoder layer. Against theirs, queries, keys and
values are one product and gate and up another, the low-rank products ride along (`projection`), nothing is cast to fp32 and
back, and what is cheap to make again is not kept: of a layer stay the input, q k v, the attention's output, the sum after it, and gate and up.
With `recompute` only the input stays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgelora.train import attention, elementwise
from edgelora.train.fit import KINDS, Shape
from edgelora.train.packing import Documents
from edgelora.train.projection import Projection, Scratch


def obstacle(model: Any) -> str | None:
    """Why the layers of a peft model cannot be replaced, None when they can."""
    base = model.get_base_model()
    config = base.config
    if config.model_type not in KINDS:
        return f"model type {config.model_type}"
    if config.hidden_act not in ("silu", "swish") or getattr(config, "attention_dropout", None):
        return "its activation or attention dropout"
    for name, module in base.named_modules():
        if hasattr(module, "base_layer"):
            if module.active_adapters != ["default"] or getattr(module, "lora_variant", None) or module.merged:
                return f"the kind of adapter on {name}"
            if not isinstance(module.lora_dropout["default"], nn.Identity):
                return "train.dropout"
            if module.lora_A["default"].bias is not None or module.lora_B["default"].bias is not None:
                return f"a bias in the adapter on {name}"
            if ".layers." not in f".{name}":
                return f"an adapter on {name}"
    return None


def records(model: Any, dtype: torch.dtype) -> bool:
    """Whether a step can be recorded as a CUDA graph: attention in blocks and rotary embeddings that depend on the longest row wait for the device."""
    if attention.kernel(dtype) == "blocks":
        return False
    rope = getattr(model.config, "rope_parameters", None) or {}
    return rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")


def shape(model: Any) -> Shape:
    """The sizes of a model whose layers can be replaced."""
    decoder = model.get_base_model().get_decoder()
    first, config = decoder.layers[0], model.config
    heads = first.self_attn.head_dim
    linear = [getattr(m, "base_layer", m) for m in first.modules() if hasattr(m, "base_layer") or type(m).__name__.startswith("Linear")]
    sizes = {id(m): m.in_features * m.out_features for m in linear}
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        attention=config.num_attention_heads * heads,
        keys=config.num_key_value_heads * heads,
        linear=config.num_hidden_layers * sum(sizes.values()),
    )


def replace(model: Any, dtype: torch.dtype, *, keep: bool, recompute: int = 0) -> Layers:
    """Let the decoder layers of a peft model run as `Layer`s; the first `recompute` of them keep only their inputs."""
    decoder = model.get_base_model().get_decoder()
    device = next(model.parameters()).device
    scratch = Scratch(dtype, device)
    made = [Layer(layer, dtype, keep=keep, joint=device.type == "cuda", scratch=scratch) for layer in decoder.layers]
    for number, (layer, fast) in enumerate(zip(decoder.layers, made, strict=True)):
        fast.recompute = number < recompute
        layer.forward = fast
    return Layers(decoder, made)


@dataclass(frozen=True)
class Layers:
    """The replaced layers of a model."""

    decoder: Any
    layers: list[Layer]

    def adapt(self) -> None:
        """Take over the adapter's present values; before every pass that follows a change."""
        for layer in self.layers:
            for projection in layer.projections:
                projection.adapt()

    def restore(self) -> None:
        for layer in self.decoder.layers:
            del layer.forward


class Layer:
    """What one decoder layer computes, on (1, tokens, hidden)."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, *, keep: bool, joint: bool, scratch: Scratch) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        make = functools.partial(Projection, dtype=dtype, keep=keep, joint=joint, scratch=scratch)
        self.qkv, self.o = make([attn.q_proj, attn.k_proj, attn.v_proj]), make([attn.o_proj])
        self.gate_up, self.down = make([mlp.gate_proj, mlp.up_proj]), make([mlp.down_proj])
        self.projections = (self.qkv, self.o, self.gate_up, self.down)
        self.parameters = [p for projection in self.projections for p in projection.parameters]
        self.norms = [(n.weight.detach(), n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.heads = (*(size // attn.head_dim for size in self.qkv.sizes),)
        self.scale: float = attn.scaling
        self.rotates = bool(getattr(attn, "use_rope", True))
        self.window: int | None = getattr(attn, "sliding_window", None)
        self.recompute = False

    def __call__(self, hidden: torch.Tensor, *, position_embeddings: Any, documents: Documents, **kwargs: Any) -> torch.Tensor:
        cos, sin = (t[0] for t in position_embeddings)
        out: torch.Tensor = _Step.apply(self, documents, cos, sin, hidden[0], *self.parameters)
        return out.unsqueeze(0)

    def forward(self, x: torch.Tensor, docs: Documents, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """The layer's output and what its backward pass needs."""
        tokens, hidden = x.shape
        buffer = self.qkv.inputs(tokens)
        elementwise.rms_norm(x, *self.norms[0], buffer[:, :hidden])
        qkv, low_qkv = self.qkv.forward(buffer)
        heads = elementwise.split_heads(qkv, self.heads, *((cos, sin) if self.rotates else (None, None)))
        del qkv
        attended, kept = attention.forward(*heads, docs, self.scale, self.window)
        flat = attended.view(tokens, -1)
        y, low_o = self.o.forward(self._filled(self.o.inputs(tokens), flat))
        middle = y.add_(x)
        buffer = self.gate_up.inputs(tokens)
        elementwise.rms_norm(middle, *self.norms[1], buffer[:, :hidden])
        gate_up, low_gate_up = self.gate_up.forward(buffer)
        buffer = self.down.inputs(tokens)
        elementwise.swiglu(gate_up, buffer[:, : gate_up.shape[1] // 2])
        y, low_down = self.down.forward(buffer)
        out = y.add_(middle)
        return out, [x, cos, sin, heads, attended, kept, middle, gate_up, low_qkv, low_o, low_gate_up, low_down]

    def backward(self, grad: torch.Tensor, docs: Documents, saved: list[Any], need_input: bool) -> tuple[Any, list[torch.Tensor]]:
        """The gradient of the input (None unless asked for) and those of `parameters`."""
        x, cos, sin, heads, attended, kept, middle, gate_up, low_qkv, low_o, low_gate_up, low_down = saved
        saved.clear()
        tokens = x.shape[0]
        # The second half: out = middle + down(silu(gate) * up).
        buffer = self._filled(self.down.gradients(tokens), grad)
        dh, low = self.down.backward(buffer)
        both = self.gate_up.gradients(tokens)
        again = torch.empty_like(dh)
        elementwise.swiglu_backward(gate_up, dh, both, again)
        found_down = self.down.backward_adapter(buffer, again, low_down, low)
        del dh, gate_up, again, buffer
        dn, low = self.gate_up.backward(both)
        again = torch.empty_like(x) if self.gate_up.rank else None
        buffer = self.o.gradients(tokens)
        inner = buffer[:, : grad.shape[1]]
        elementwise.rms_norm_backward(middle, *self.norms[1], dn, grad, again, inner)
        found_gate_up = self.gate_up.backward_adapter(both, again, low_gate_up, low)
        del both, dn, again, middle
        # The first half: middle = x + o(attention(q, k, v)).
        da, low = self.o.backward(buffer)
        found_o = self.o.backward_adapter(buffer, attended.view(tokens, -1), low_o, low)
        q, k, v = heads
        d = attention.backward(da.view(attended.shape), q, k, v, attended, docs, self.scale, self.window, kept)
        buffer = self.qkv.gradients(tokens)
        dq, dk, dv = d
        elementwise.join_heads(dq, dk, dv, cos if self.rotates else None, sin if self.rotates else None, buffer)
        del d, dq, dk, dv, q, k, v, da, heads, attended, kept
        dn, low = self.qkv.backward(buffer, need_input=need_input)
        again = torch.empty_like(x) if self.qkv.rank else None
        dx = None
        if need_input:
            dx = torch.empty_like(x)
            elementwise.rms_norm_backward(x, *self.norms[0], dn, inner, again, dx)
        elif again is not None:
            elementwise.rms_norm(x, *self.norms[0], again)
        found_qkv = self.qkv.backward_adapter(buffer, again, low_qkv, low)
        return dx, [*found_qkv, *found_o, *found_gate_up, *found_down]

    @staticmethod
    def _filled(buffer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`x` in a buffer with room behind it; x itself where there is none."""
        if buffer.shape[1] == x.shape[1]:
            return x
        elementwise.copy(x, buffer[:, : x.shape[1]])
        return buffer


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, docs: Documents, cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor, *adapter: Any) -> Any:
        out, saved = layer.forward(x, docs, cos, sin)
        # Kept on the context and not by save_for_backward: each is let go as soon as the backward pass has used it.
        ctx.layer, ctx.docs, ctx.saved = layer, docs, [x, cos, sin] if layer.recompute else saved
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        saved, ctx.saved = ctx.saved, None
        if ctx.layer.recompute:
            saved = ctx.layer.forward(saved[0], ctx.docs, *saved[1:])[1]
        dx, found = ctx.layer.backward(grads[0].contiguous(), ctx.docs, saved, ctx.needs_input_grad[4])
        return None, None, None, None, dx, *found
