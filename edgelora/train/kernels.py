"""Triton kernels for what `elementwise` and `loss` do; same names, same arguments. One pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x, weight, out, x.stride(0), out.stride(0), width, eps, BLOCK=block, num_warps=_warps(block))


def rms_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    residual: torch.Tensor,
    again: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm_backward[(rows,)](
        x, weight, grad, residual, out, x if again is None else again, residual.stride(0), out.stride(0), width, eps,
        AGAIN=again is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def copy(x: torch.Tensor, out: torch.Tensor) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _copy[(rows,)](x, out, x.stride(0), out.stride(0), width, BLOCK=block, num_warps=_warps(block))


def split_heads(
    qkv: torch.Tensor, heads: tuple[int, int, int], cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, size = qkv.shape[0], qkv.shape[1] // sum(heads)
    q, k, v = (torch.empty(tokens, count, size, dtype=qkv.dtype, device=qkv.device) for count in heads)
    _turned(qkv, q, cos, sin, 1.0)
    _turned(qkv[:, heads[0] * size :], k, cos, sin, 1.0)
    _turned(qkv[:, (heads[0] + heads[1]) * size :], v, None, None, 1.0)
    return q, k, v


def join_heads(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, out: torch.Tensor
) -> None:
    begin = 0
    for d, c, s in ((dq, cos, sin), (dk, cos, sin), (dv, None, None)):
        width = d.shape[1] * d.shape[2]
        _turned(d.contiguous().view(-1, width), out[:, begin : begin + width].unflatten(1, d.shape[1:]), c, s, -1.0)
        begin += width


def _turned(x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, sign: float) -> None:
    """The rows of x, head by head, rotated where cos is given, into out (tokens, heads, size)."""
    tokens, heads, size = out.shape
    _rotate[(tokens,)](
        x, out, x if cos is None else cos, x if sin is None else sin, x.stride(0), out.stride(0), heads, sign,
        HALF=size // 2, HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(size // 2), TURN=cos is not None,
    )  # fmt: skip


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    rows, both = gate_up.shape
    grid = (rows, triton.cdiv(both // 2, _COLUMNS))
    _swiglu[grid](gate_up, out, gate_up.stride(0), out.stride(0), both // 2, BLOCK=_COLUMNS)


def swiglu_backward(gate_up: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, again: torch.Tensor) -> None:
    rows, both = gate_up.shape
    grid = (rows, triton.cdiv(both // 2, _COLUMNS))
    _swiglu_backward[grid](
        gate_up, grad, out, again, gate_up.stride(0), grad.stride(0), out.stride(0), again.stride(0), both // 2, BLOCK=_COLUMNS
    )


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](logits, labels, losses, logits.stride(0), vocabulary, BLOCK=8192, num_warps=16)
    return losses.sum()


_COLUMNS = 1024


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _rms_norm(X, W, Y, x_stride, y_stride, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(X + row * x_stride + at, inside, 0.0).to(tl.float32)
    w = tl.load(W + at, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    tl.store(Y + row * y_stride + at, x * scale * w, inside)


@triton.jit
def _copy(X, Y, x_stride, y_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    tl.store(Y + row * y_stride + at, tl.load(X + row * x_stride + at, at < width), at < width)


@triton.jit
def _rms_norm_backward(X, W, G, R, DX, Y, r_stride, d_stride, width, eps, AGAIN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    begin = row * width
    x = tl.load(X + begin + at, inside, 0.0).to(tl.float32)
    w = tl.load(W + at, inside, 0.0).to(tl.float32)
    g = tl.load(G + begin + at, inside, 0.0).to(tl.float32) * w
    r = tl.load(R + row * r_stride + at, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    x = x * scale
    mean = tl.sum(x * g) / width
    tl.store(DX + row * d_stride + at, r + scale * (g - x * mean), inside)
    if AGAIN:
        tl.store(Y + begin + at, x * w, inside)


@triton.jit
def _rotate(X, Y, COS, SIN, x_stride, y_stride, heads, sign, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (at < HALF)
    place = head * (2 * HALF) + at
    first = tl.load(X + row * x_stride + place, inside, 0.0).to(tl.float32)
    second = tl.load(X + row * x_stride + place + HALF, inside, 0.0).to(tl.float32)
    if TURN:
        c = tl.load(COS + row * (2 * HALF) + at, at < HALF, 0.0).to(tl.float32)
        s = tl.load(SIN + row * (2 * HALF) + at, at < HALF, 0.0).to(tl.float32) * sign
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    tl.store(Y + row * y_stride + place, first, inside)
    tl.store(Y + row * y_stride + place + HALF, second, inside)


@triton.jit
def _swiglu(GU, Y, in_stride, out_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(GU + row * in_stride + at, inside, 0.0).to(tl.float32)
    up = tl.load(GU + row * in_stride + width + at, inside, 0.0).to(tl.float32)
    tl.store(Y + row * out_stride + at, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _swiglu_backward(GU, G, D, Y, in_stride, g_stride, d_stride, y_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(GU + row * in_stride + at, inside, 0.0).to(tl.float32)
    up = tl.load(GU + row * in_stride + width + at, inside, 0.0).to(tl.float32)
    g = tl.load(G + row * g_stride + at, inside, 0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    active = gate * open_
    tl.store(D + row * d_stride + at, g * up * (open_ + active * (1 - open_)), inside)
    tl.store(D + row * d_stride + width + at, g * active, inside)
    tl.store(Y + row * y_stride + at, active * up, inside)


@triton.jit
def _cross_entropy(L, T, LOSS, stride, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    L += row * stride
    label = tl.load(T + row)
    at = tl.arange(0, BLOCK)
    if label < 0:
        for begin in range(0, vocabulary, BLOCK):
            tl.store(L + begin + at, tl.zeros([BLOCK], tl.float32), begin + at < vocabulary)
        tl.store(LOSS + row, 0.0)
    else:
        highest = -float("inf")
        mass = 0.0
        for begin in range(0, vocabulary, BLOCK):
            x = tl.load(L + begin + at, begin + at < vocabulary, -float("inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(x))
            mass = mass * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
            highest = higher
        chosen = tl.load(L + label).to(tl.float32)
        tl.store(LOSS + row, tl.log(mass) + highest - chosen)
        tl.debug_barrier()
        for begin in range(0, vocabulary, BLOCK):
            x = tl.load(L + begin + at, begin + at < vocabulary, -float("inf")).to(tl.float32)
            p = tl.exp(x - highest) / mass
            tl.store(L + begin + at, tl.where(begin + at == label, p - 1, p), begin + at < vocabulary)
