"""What happens between the matrix products of a decoder layer, forward and backward: in Triton kernels on a GPU, in torch elsewhere."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row; `out` may have a longer row stride."""
    if x.is_cuda:
        from edgelora.train import kernels

        return kernels.rms_norm(x, weight, eps, out)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(weight * (wide * scale).to(x.dtype))
    return None


def rms_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    residual: torch.Tensor,
    again: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out = `residual` + the gradient of x for `grad` of the normed rows; the normed rows themselves go into `again`, if given.

    The rows of `residual` and `out` may be longer.
    """
    if x.is_cuda:
        from edgelora.train import kernels

        return kernels.rms_norm_backward(x, weight, eps, grad, residual, again, out)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    wide *= scale
    if again is not None:
        again.copy_(weight * wide.to(x.dtype))
    g = grad * weight
    wide *= (wide * g).mean(-1, keepdim=True).neg_()
    out.copy_(wide.add_(g).mul_(scale).add_(residual))
    return None


def copy(x: torch.Tensor, out: torch.Tensor) -> None:
    """The rows of `x` into those of `out`, which may be longer."""
    if x.is_cuda:
        from edgelora.train import kernels

        return kernels.copy(x, out)
    out.copy_(x)
    return None


def split_heads(
    qkv: torch.Tensor, heads: tuple[int, int, int], cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (tokens, heads, size) of the product's rows, queries and keys rotated. cos and sin are (tokens, size), their halves alike."""
    if qkv.is_cuda:
        from edgelora.train import kernels

        return kernels.split_heads(qkv, heads, cos, sin)
    q, k, v = (t.contiguous() for t in qkv.view(qkv.shape[0], sum(heads), -1).split(heads, 1))
    if cos is not None and sin is not None:
        _rotate(q, cos, sin)
        _rotate(k, cos, sin)
    return q, k, v


def join_heads(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, out: torch.Tensor
) -> None:
    """The gradients of queries, keys and values side by side in the rows of `out`, those of queries and keys turned back."""
    if out.is_cuda:
        from edgelora.train import kernels

        return kernels.join_heads(dq, dk, dv, cos, sin, out)
    begin = 0
    for d, turned in ((dq, True), (dk, True), (dv, False)):
        width = d.shape[1] * d.shape[2]
        into = out[:, begin : begin + width].unflatten(1, d.shape[1:])
        into.copy_(d)
        if turned and cos is not None and sin is not None:
            _rotate(into, cos, -sin)
        begin += width
    return None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    first, second = x.chunk(2, -1)
    c, s = (t[:, None, : t.shape[1] // 2] for t in (cos, sin))
    x.copy_(torch.cat((first * c - second * s, second * c + first * s), -1))


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """silu(gate) * up into `out`, whose rows may be longer."""
    if gate_up.is_cuda:
        from edgelora.train import kernels

        return kernels.swiglu(gate_up, out)
    gate, up = gate_up.chunk(2, -1)
    torch.mul(silu(gate), up, out=out)
    return None


def swiglu_backward(gate_up: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, again: torch.Tensor) -> None:
    """The gradients of gate and up into the first columns of `out`; silu(gate) * up once more into `again`."""
    if gate_up.is_cuda:
        from edgelora.train import kernels

        return kernels.swiglu_backward(gate_up, grad, out, again)
    width = gate_up.shape[1] // 2
    gate, up = gate_up.chunk(2, -1)
    active = silu(gate)
    torch.mul(active, up, out=again)
    out[:, width : 2 * width] = active.mul_(grad)
    out[:, :width] = torch.ops.aten.silu_backward(grad * up, gate)
    return None
