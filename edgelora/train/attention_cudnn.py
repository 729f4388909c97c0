"""cuDNN's attention over documents laid end to end: on a Hopper GPU 1.4 to 1.6 times as fast as torch's flash attention.

torch has cuDNN but not this use of it (no grouped heads behind ragged rows in its backward pass, no plan kept), so the graph
comes from NVIDIA's `cudnn` package (the extra `cuda`). Layout and offsets: cuDNN's documentation, "Scaled Dot Product Attention",
ragged tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from edgelora.train.dealing import rounded_up
from edgelora.train.packing import Documents

_HOPPER = 9  # the generation this was measured on


@functools.cache
def available() -> bool:
    """Whether this process's GPU and packages have it."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != _HOPPER:
        return False
    try:
        import cudnn
    except ImportError:
        return False
    return int(cudnn.backend_version()) >= 90600  # the first with ragged statistics


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, docs: Documents, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, like the queries (tokens, heads, size) in 16 bits, and the softmax's statistics, float32 (tokens, heads)."""
    plan = _plan_for(q, k, docs, scale, window)
    out, statistics = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
    _run(plan.forward, [q, k, v, out, statistics, *_places(docs, q, k)])
    return out, statistics


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    docs: Documents,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values."""
    plan = _plan_for(q, k, docs, scale, window)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _run(plan.backward, [q, k, v, out, grad, statistics, dq, dk, dv, *_places(docs, q, k)])
    return dq, dk, dv


def _places(docs: Documents, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where each document begins in queries, keys and statistics, in elements (int64), and its length (int32)."""
    heads, size = q.shape[1:]
    return docs.begin(heads * size), docs.begin(k.shape[1] * size), docs.begin(heads), docs.lengths


def _plan_for(q: torch.Tensor, k: torch.Tensor, docs: Documents, scale: float, window: int | None) -> _Plan:
    tokens, heads, size = q.shape
    return _plan(len(docs.lengths), docs.longest, rounded_up(tokens), heads, k.shape[1], size, scale, window, q.dtype, q.device.index)


@functools.lru_cache(maxsize=64)
def _plan(*shape: Any) -> _Plan:
    """Compiled once a shape (0.1 to 2 s)."""
    return _Plan(*shape)


class _Built:
    """A graph that runs: its inputs and outputs in the order in which `_run` is given them."""

    def __init__(self, graph: Any, tensors: list[Any], handle: Any) -> None:
        import cudnn

        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.graph, self.tensors, self.handle = graph, tensors, handle
        self.workspace = max(1, graph.get_workspace_size())  # bytes


class _Plan:
    """Both passes for `docs` documents of at most `longest` tokens, `total` in all: causal, a token seeing `window` of them with itself."""

    def __init__(
        self,
        docs: int,
        longest: int,
        total: int,
        heads: int,
        keys: int,
        size: int,
        scale: float,
        window: int | None,
        dtype: Any,
        device: int,
    ) -> None:
        import cudnn

        number, kind = cudnn.data_type, cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
        with torch.cuda.device(device):
            handle = cudnn.create_handle()
        masks = {
            "attn_scale": scale,
            "use_padding_mask": True,
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
            **({"diagonal_band_left_bound": window} if window is not None else {}),
        }

        def new() -> tuple[Any, list[Any]]:
            """A graph, and where documents begin in queries, keys and statistics, and how long they are."""
            graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=number.FLOAT, compute_data_type=number.FLOAT, handle=handle)
            entries = (
                ("at_q", docs + 1, number.INT64),
                ("at_k", docs + 1, number.INT64),
                ("at_s", docs + 1, number.INT64),
                ("lengths", docs, number.INT32),
            )
            return graph, [graph.tensor(name=n, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=t) for n, count, t in entries]

        def given(graph: Any, name: str, count: int, width: int, begins: Any, type_: Any = kind) -> Any:
            return rows(graph.tensor(name=name, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=type_), count, width, begins)

        def rows(tensor: Any, count: int, width: int, begins: Any) -> Any:
            """`count` heads of `width` numbers a token, documents end to end."""
            tensor.set_dim([docs, count, longest, width]).set_stride([longest * count * width, width, count * width, 1])
            tensor.set_ragged_offset(begins)
            return tensor

        graph, (at_q, at_k, at_s, lengths) = new()
        q, k, v = given(graph, "q", heads, size, at_q), given(graph, "k", keys, size, at_k), given(graph, "v", keys, size, at_k)
        out, statistics = graph.sdpa(name="forward", q=q, k=k, v=v, generate_stats=True, seq_len_q=lengths, seq_len_kv=lengths, **masks)
        rows(out.set_output(True), heads, size, at_q)
        rows(statistics.set_output(True).set_data_type(number.FLOAT), heads, 1, at_s)
        self.forward = _Built(graph, [q, k, v, out, statistics, at_q, at_k, at_s, lengths], handle)

        graph, (at_q, at_k, at_s, lengths) = new()
        q, k, v = given(graph, "q", heads, size, at_q), given(graph, "k", keys, size, at_k), given(graph, "v", keys, size, at_k)
        out, grad = given(graph, "out", heads, size, at_q), given(graph, "grad", heads, size, at_q)
        statistics = given(graph, "statistics", heads, 1, at_s, number.FLOAT)
        dq, dk, dv = graph.sdpa_backward(
            name="backward", q=q, k=k, v=v, o=out, dO=grad, stats=statistics, seq_len_q=lengths, seq_len_kv=lengths,
            max_total_seq_len_q=total, max_total_seq_len_kv=total, **masks,
        )  # fmt: skip
        for gradient, count, begins in ((dq, heads, at_q), (dk, keys, at_k), (dv, keys, at_k)):
            rows(gradient.set_output(True), count, size, begins)
        self.backward = _Built(graph, [q, k, v, out, grad, statistics, dq, dk, dv, at_q, at_k, at_s, lengths], handle)


def _run(built: _Built, values: list[torch.Tensor]) -> None:
    import cudnn

    device = values[0].device
    workspace = torch.empty(built.workspace, dtype=torch.uint8, device=device)
    cudnn.set_stream(handle=built.handle, stream=torch.cuda.current_stream(device).cuda_stream)
    built.graph.execute(dict(zip(built.tensors, values, strict=True)), workspace, handle=built.handle)
