"""Causal attention inside each document of a batch, never between two.

On a GPU one launch of cuDNN's (`attention_cudnn`) or of torch's variable-length flash attention; elsewhere document by document and in
blocks of queries, so that nothing of the size tokens x tokens is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from edgelora.train import attention_cudnn
from edgelora.train.packing import Documents

NAME = "edgelora_documents"  # among transformers' attention implementations
_BLOCK = 256  # queries at once
_KEPT = 256  # tokens: the probabilities of documents up to this length are kept for the backward pass, longer ones made again

_HALVES = (torch.bfloat16, torch.float16)

Saved = tuple[Any, ...]


def register() -> None:
    """Make this attention known to transformers. It needs no mask: a name without a mask function gets none."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _for_transformers)


def kernel(dtype: torch.dtype) -> str:
    """What computes attention on this machine."""
    if torch.cuda.is_available() and dtype in _HALVES:
        return "cuDNN" if attention_cudnn.available() else "flash"
    return "blocks"


def _for_transformers(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(1, heads, tokens, head size) in, (1, tokens, heads, head size) out."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Attention.apply(q, k, v, kwargs["documents"], scale, kwargs.get("sliding_window"))
    return out.unsqueeze(0), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, docs: Documents, scale: float, window: int | None) -> Any:
        out, saved = forward(q, k, v, docs, scale, window)
        ctx.save_for_backward(q, k, v, out)
        ctx.rest = docs, scale, window, saved
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        docs, scale, window, saved = ctx.rest
        q, k, v, out = ctx.saved_tensors
        return (*backward(grads[0].contiguous(), q, k, v, out, docs, scale, window, saved), None, None, None)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, docs: Documents, scale: float, window: int | None = None
) -> tuple[torch.Tensor, Saved]:
    """Queries (tokens, heads, size), keys and values (tokens, fewer heads, size); the output is like the queries. `window`: how many tokens one sees."""
    if _on_gpu(q) and attention_cudnn.available():
        out, statistics = attention_cudnn.forward(q, k, v, docs, scale, window)
        return out, (statistics,)
    if _on_gpu(q):
        left = window - 1 if window is not None and window < docs.longest else -1
        out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, docs.starts, docs.starts, docs.longest, docs.longest, 0.0, True, False,
            scale=scale, window_size_left=left, window_size_right=0 if left >= 0 else -1,
        )  # fmt: skip
        return out, (lse, rng, unused, left)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kept = []
    for begin, end, first, short in _blocks(docs, window):
        p = _probabilities(q[begin:end], k[first:end], scale, window)
        _ungrouped(p @ v[first:end].transpose(0, 1), out[begin:end])
        kept.append(p if short else None)
    return out, (kept,)


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    docs: Documents,
    scale: float,
    window: int | None,
    saved: Saved,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values."""
    if _on_gpu(q) and attention_cudnn.available():
        return attention_cudnn.backward(grad, q, k, v, out, saved[0], docs, scale, window)
    if _on_gpu(q):
        lse, rng, unused, left = saved
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, docs.starts, docs.starts, docs.longest, docs.longest, 0.0, True, rng, unused,
            scale=scale, window_size_left=left, window_size_right=0 if left >= 0 else -1,
        )  # fmt: skip
        return dq, dk, dv
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    for (begin, end, first, _), p in zip(_blocks(docs, window), saved[0], strict=True):
        keys, values = k[first:end], v[first:end]
        if p is None:
            p = _probabilities(q[begin:end], keys, scale, window)
        queries, g = _grouped(q[begin:end], keys.shape[1]), _grouped(grad[begin:end], keys.shape[1])
        dv[first:end] += (p.transpose(1, 2) @ g).transpose(0, 1)
        dp = g @ values.permute(1, 2, 0)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        _ungrouped(torch.baddbmm(dp.new_empty(()), ds, keys.transpose(0, 1), beta=0, alpha=scale), dq[begin:end])
        dk[first:end] += torch.baddbmm(dp.new_empty(()), ds.transpose(1, 2), queries, beta=0, alpha=scale).transpose(0, 1)
    return dq, dk, dv


def _on_gpu(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in _HALVES


def _blocks(docs: Documents, window: int | None) -> Iterator[tuple[int, int, int, bool]]:
    """(first query, end, first key, whether the document is short) of every block of queries."""
    for start, stop in docs.bounds:
        for begin in range(start, stop, _BLOCK):
            first = start if window is None else max(start, begin - window + 1)
            yield begin, min(stop, begin + _BLOCK), first, stop - start <= _KEPT


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(tokens, heads, size) as (key heads, heads of each x tokens, size)."""
    tokens, heads, size = x.shape
    return x.reshape(tokens, groups, heads // groups, size).permute(1, 2, 0, 3).reshape(groups, -1, size)


def _ungrouped(x: torch.Tensor, into: torch.Tensor) -> None:
    tokens, heads, size = into.shape
    groups = x.shape[0]
    into.view(tokens, groups, heads // groups, size).copy_(x.view(groups, heads // groups, tokens, size).permute(2, 0, 1, 3))


def _probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """Softmax over the keys that each query sees, (key heads, heads of each x queries, keys). The last query sees the last key."""
    queries, groups, keys = q.shape[0], k.shape[1], k.shape[0]
    scores = torch.baddbmm(q.new_empty(()), _grouped(q, groups), k.permute(1, 2, 0), beta=0, alpha=scale)
    last = torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)  # the last key that each query sees
    key = torch.arange(keys, device=q.device)
    hidden = key > last
    if window is not None:
        hidden |= key <= last - window
    scores.view(groups, -1, queries, keys).masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
