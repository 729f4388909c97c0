"""The weights of the builder's graph, rounded anew: by what the training rows say matters, in the same bytes.

onnxruntime's quantizers look at weights alone. Here a block's scale is the one with the least error where inputs are
large, and every column makes up for the errors of those before it (`edgelora.quant.compensate`). Shapes, types, names
and nodes stay as the builder wrote them, so nothing changes for whoever runs the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgelora.errors import ModelError
from edgelora.export import architectures
from edgelora.progress import Progress
from edgelora.quant import compensate, nbits
from edgelora.quant.curvature import Moments
from edgelora.quant.nbits import Coded, Layout
from edgelora.weights import Checkpoint

_FAR = 0.35  # relative error above which a stored matrix is not the checkpoint's: 4 bits are near 0.1
_LAYER = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)_proj")
_PARTS = {"qkv": ("q", "k", "v")}


def rounded(
    graph: onnx.GraphProto, read: Callable[[str], np.ndarray], weights: Checkpoint, config: Any, moments: Moments, progress: Progress
) -> dict[str, np.ndarray]:
    """Tensor name -> its new bytes, for every matrix of 4 bits in `graph` whose inputs were measured.

    `read` gives the bytes of a stored tensor, `config` is transformers' of the model. Matrices of 8 bits stay: they are nearly exact.
    Raises ModelError when a stored matrix is not the checkpoint's: the graph would compute something else.
    """
    gguf_names = {source.name: name for name, source in architectures.of(config.model_type).tensors(config).items()}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    arrays: dict[str, np.ndarray] = {}
    for number, node in enumerate(nodes):
        progress(number / len(nodes), f"rounding {matrix_of(node)}")
        attributes = {a.name: a.i for a in node.attribute}
        if attributes["bits"] != 4:
            continue
        names = list(node.input)
        layout = Layout(4, attributes["block_size"], len(names) > 3 and bool(names[3]))
        pieces = parts(matrix_of(node), weights.shapes)
        values = np.concatenate([piece.read(weights) for piece in pieces])
        found = moments(gguf_names[pieces[0].tensor])  # all have the same inputs
        if found is None:
            continue
        stored = nbits.coded(
            read(names[1]), read(names[2]).view(np.float32), read(names[3]) if layout.zeros else None, values.shape[1], layout
        )
        _same(stored, values, node.name)
        made = nbits.quantize(values, layout, np.diag(found), compensate.feedback(found, compensate.SHRINK))
        codes, zeros = made.packed()
        arrays |= {names[1]: codes, names[2]: made.scales}
        if layout.zeros:
            arrays[names[3]] = zeros
    return arrays


@dataclass(frozen=True)
class Part:
    """Rows [first, last) of a checkpoint tensor; all without `last`."""

    tensor: str
    first: int = 0
    last: int | None = None

    def read(self, weights: Checkpoint) -> np.ndarray:
        """float32, shape (rows, columns)."""
        return weights.rows(self.tensor, self.first, self.last)

    def rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return (shapes[self.tensor][0] if self.last is None else self.last) - self.first


def matrix_of(node: onnx.NodeProto) -> str:
    """What a node's matrix is called, for instance model.layers.0.attn.qkv_proj."""
    return str(node.name).split("/MatMul")[0].split("/Gather")[0].lstrip("/").replace("/", ".")


def parts(matrix: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """What a matrix of the graph is made of, one below another, with the same inputs.

    The builder joins q, k and v where nothing stands between them, and takes apart what Phi-3 joins.
    """
    table = "model.embed_tokens.weight"
    if matrix in ("lm_head", "model.embed_tokens"):
        return (Part("lm_head.weight" if matrix == "lm_head" and "lm_head.weight" in shapes else table),)
    match = _LAYER.fullmatch(matrix)
    if not match:
        raise ModelError(f"the ONNX builder made a matrix that no tensor is known for: {matrix}", "export it with importance: false")
    layer, part, what = match.groups()
    prefix = f"model.layers.{layer}.{'self_attn' if part == 'attn' else 'mlp'}."
    names = [f"{prefix}{one}_proj.weight" for one in _PARTS.get(what, (what,))]
    if all(name in shapes for name in names):
        return tuple(Part(name) for name in names)
    if what == "qkv":
        return (Part(f"{prefix}qkv_proj.weight"),)
    whole = f"{prefix}gate_up_proj.weight"
    half = shapes[whole][0] // 2
    return (Part(whole, 0, half) if what == "gate" else Part(whole, half, 2 * half),)


def _same(stored: Coded, values: np.ndarray, node: str) -> None:
    error = float(np.linalg.norm(stored.values() - values) / max(float(np.linalg.norm(values)), 1e-30))
    if not error < _FAR:
        raise ModelError(
            f"the ONNX builder's {node} is not the model's: off by {error:.0%}", "export it with importance: false, and report this"
        )
