"""Cross-entropy over trained tokens only, in pieces: the vocabulary-wide logits of all of them never exist at once."""

from __future__ import annotations

from typing import Any

import torch

_PIECE = {"cpu": 1 << 23, "cuda": 1 << 28}  # logits at once


class SummedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `labels` (-100: none) under hidden (rows, width) times the frozen head (vocabulary, width).

    The gradient is made with the loss, piece by piece, while a piece's logits are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor, cap: float | None) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(16, _PIECE[hidden.device.type] // head.shape[0])
        for begin in range(0, len(labels), rows):
            piece, wanted = hidden[begin : begin + rows], labels[begin : begin + rows]
            logits = torch.mm(piece, head.t())
            total += _loss_and_gradient(logits, wanted, cap)
            if grads is not None:
                torch.mm(logits, head, out=grads[begin : begin + rows])
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        return grads * outputs[0].to(grads.dtype), None, None, None


def _loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, cap: float | None) -> torch.Tensor:
    """The summed loss of the rows; their logits are replaced by the loss's gradient."""
    if logits.is_cuda and cap is None:
        from edgelora.train import kernels

        return kernels.cross_entropy(logits, labels)
    wide = logits.float()
    bent = None
    if cap is not None:
        bent = torch.tanh(wide / cap)
        wide = bent * cap
    counted = labels != -100
    at = labels.clamp(min=0).unsqueeze(1)
    highest = wide.amax(-1, keepdim=True)
    chosen = wide.gather(1, at) - highest
    wide = wide.sub_(highest).exp_() if bent is None else (wide - highest).exp_()
    mass = wide.sum(-1, keepdim=True)
    losses = (mass.log() - chosen).squeeze(1)
    wide.div_(mass)
    wide.scatter_add_(1, at, torch.full_like(chosen, -1.0))
    wide.mul_(counted.unsqueeze(1))
    if bent is not None:
        wide.mul_(1 - bent.square())
    logits.copy_(wide)
    return torch.where(counted, losses, 0.0).sum()
