"""Linear layers with LoRA that share an input, as one matrix product: y = x W' + bias, W' = W + s B A.

Queries, keys and values (or gate and up) are one product over their stacked weights. The low-rank part costs no pass over the
output: the input is stored with room for x A behind it, and one product runs over both,

    [x | x A'] [W | B]'        forward, A' = s A
    [g | g B] [W ; A']         backward

so a single matrix [[W, B], [A', .]] serves both directions. That needs the weights written out in 16 bits; where memory does not
allow it they stay in 4 bits, are written out into one shared buffer for each use, and the low-rank part is added to the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Projection:
    """The peft (or plain) linear layers `modules`, which share their input.

    `parameters` are the trainable A and B of each in turn; `adapt` copies them into the arithmetic's dtype and has to run after
    every change of theirs. Buffers are (tokens, width + rank) where the low-rank part rides along, else (tokens, width).
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, *, keep: bool, joint: bool, scratch: Scratch) -> None:
        self.modules = [getattr(m, "base_layer", m) for m in modules]
        adapted = [(i, m) for i, m in enumerate(modules) if hasattr(m, "base_layer")]
        self.scale = adapted[0][1].scaling["default"] if adapted else 1.0
        self.parameters = [p for _, m in adapted for p in (m.lora_A["default"].weight, m.lora_B["default"].weight)]
        self.inner = self.modules[0].in_features
        self.sizes = [m.out_features for m in self.modules]
        self.outer = sum(self.sizes)
        self.rank = sum(a.shape[0] for a in self.parameters[::2])
        self.dtype, self.scratch = dtype, scratch
        device = self.modules[0].weight.device
        self.joint = joint and keep and self.rank > 0
        extra = self.rank if self.joint else 0
        self.kept = torch.zeros(self.outer + extra, self.inner + extra, dtype=dtype, device=device) if keep else None
        if self.joint:
            assert self.kept is not None
            self.down, self.up = self.kept[self.outer :, : self.inner], self.kept[: self.outer, self.inner :]
        else:
            self.down = torch.zeros(self.rank, self.inner, dtype=dtype, device=device)
            self.up = torch.zeros(self.outer, self.rank, dtype=dtype, device=device)
        # (rows of B in `up`, columns of B in `up`) of each adapted layer
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        ranks = [a.shape[0] for a in self.parameters[::2]]
        self.places = [
            (slice(ends[i] - self.sizes[i], ends[i]), slice(sum(ranks[:n]), sum(ranks[: n + 1]))) for n, (i, _) in enumerate(adapted)
        ]
        biases = [m.bias for m in self.modules]
        self.bias: torch.Tensor | None = None
        if any(b is not None for b in biases):
            parts = [torch.zeros(n, device=device) if b is None else b for n, b in zip(self.sizes, biases, strict=True)]
            self.bias = torch.cat([part.to(dtype) for part in parts])
        if self.kept is not None:
            self._write_out(self.kept[: self.outer, : self.inner])
            for module, end, size in zip(self.modules, ends, self.sizes, strict=True):
                if not _is_4bit(module):
                    module.weight.data = self.kept[end - size : end, : self.inner]  # once is enough
        self.adapt()

    def adapt(self) -> None:
        """Take over the adapter's present values."""
        with torch.no_grad():
            for (rows, columns), a, b in zip(self.places, self.parameters[::2], self.parameters[1::2], strict=True):
                torch.mul(a, self.scale, out=self.down[columns]) if a.dtype == self.dtype else self.down[columns].copy_(a * self.scale)
                self.up[rows, columns].copy_(b)

    def inputs(self, tokens: int) -> torch.Tensor:
        """A buffer whose first `inner` columns take the input."""
        return self._buffer(tokens, self.inner)

    def gradients(self, tokens: int) -> torch.Tensor:
        """A buffer whose first `outer` columns take the gradient of the output."""
        return self._buffer(tokens, self.outer)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output (tokens, outer) for a filled buffer of `inputs`, and x A' (tokens, rank) for the backward pass."""
        low = None
        if self.joint:
            assert self.kept is not None
            torch.mm(x[:, : self.inner], self.down.t(), out=x[:, self.inner :])
            low = x[:, self.inner :].clone()  # the buffer is not kept
            y = torch.mm(x, self.kept[: self.outer].t())
        else:
            y = torch.mm(x, self._weight().t())
            if self.rank:
                low = torch.mm(x, self.down.t())
                y.addmm_(low, self.up.t())
        if self.bias is not None:
            y += self.bias
        return y, low

    def backward(self, grad: torch.Tensor, *, need_input: bool = True) -> tuple[Any, torch.Tensor | None]:
        """The gradient of the input (tokens, inner) for a filled buffer of `gradients`, and that of x A' (tokens, rank)."""
        g = grad[:, : self.outer]
        if self.joint:
            assert self.kept is not None
            low: torch.Tensor | None = torch.mm(g, self.up, out=grad[:, self.outer :])
            return (torch.mm(grad, self.kept[:, : self.inner]) if need_input else None), low
        low = torch.mm(g, self.up) if self.rank else None
        if not need_input:
            return None, low
        dx = torch.mm(g, self._weight())
        if low is not None:
            dx.addmm_(low, self.down)
        return dx, low

    def backward_adapter(
        self, grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None, low_grad: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The gradients of `parameters` from those of the output and of x A', the input (tokens, inner) and x A'."""
        if low is None or low_grad is None:
            return []
        da, db = _product(low_grad.t(), x), _product(grad[:, : self.outer].t(), low)
        if self.scale != 1:
            da *= self.scale
        return [part for rows, columns in self.places for part in (da[columns], db[rows, columns])]

    def _buffer(self, tokens: int, width: int) -> torch.Tensor:
        return torch.empty(tokens, width + (self.rank if self.joint else 0), dtype=self.dtype, device=self.down.device)

    def _weight(self) -> torch.Tensor:
        """The stacked weights (outer, inner)."""
        if self.kept is not None:
            return self.kept[: self.outer, : self.inner]
        if len(self.modules) == 1 and not _is_4bit(self.modules[0]):
            weight: torch.Tensor = self.modules[0].weight
            return weight
        out = self.scratch.take(self.outer * self.inner).view(self.outer, self.inner)
        self._write_out(out)
        return out

    def _write_out(self, into: torch.Tensor) -> None:
        begin = 0
        with torch.no_grad():
            for module, size in zip(self.modules, self.sizes, strict=True):
                part = into[begin : begin + size]
                begin += size
                if not _is_4bit(module):
                    part.copy_(module.weight)
                    continue
                from bitsandbytes.functional import dequantize_4bit

                weight, state = module.weight, _state(module)
                if part.is_cuda and part.is_contiguous() and part.dtype == state.dtype:
                    dequantize_4bit(weight.data, state, out=part)
                else:
                    part.copy_(dequantize_4bit(weight.data, state))


class Scratch:
    """One buffer for weights that are written out for a single use."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self._buffer = torch.empty(0, dtype=dtype, device=device)

    def take(self, count: int) -> torch.Tensor:
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self._buffer.dtype, device=self._buffer.device)
        return self._buffer[:count]


def _is_4bit(module: nn.Module) -> bool:
    return _state(module) is not None


def _state(module: nn.Module) -> Any:
    """What the 4 bits of a weight mean, None for one in 16 or 32; a weight that is divided (`shards`) leaves it to its module."""
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32, which is what the adapter's gradients are kept in."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()
