"""The weights of the builder's graph, rounded anew: by what the training rows say matters, in the same bytes.

onnxruntime's quantizers look at weights alone. Here a block's scale is the one with the least error where inputs are
large, and every column makes up for the errors of those before it (`edgelora.quant.compensate`). Shapes, types, names
and nodes stay as the builder wrote them, so nothing changes for whoever runs the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from edgelora.errors import ModelError
from edgelora.export import architectures
from edgelora.quant import compensate, nbits
from edgelora.quant.curvature import Moments
from edgelora.quant.nbits import Coded, Layout
from edgelora.weights import Checkpoint

Progress = Callable[[float, str], None]

SHRINK = 0.2  # of the correlations between inputs, which few rows estimate (bench/NOTES.md)
_FAR = 0.35  # relative error above which a stored matrix is not the checkpoint's: 4 bits are near 0.1
_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)_proj/MatMul")
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
        progress(number / len(nodes), f"rounding {node.name.split('/MatMul')[0].lstrip('/')}")
        attributes = {a.name: a.i for a in node.attribute}
        if attributes["bits"] != 4:
            continue
        names = list(node.input)
        layout = Layout(4, attributes["block_size"], len(names) > 3 and bool(names[3]))
        values, tensor = _matrix(node.name, weights, config)
        found = moments(gguf_names[tensor])
        if found is None:
            continue
        stored = nbits.coded(
            read(names[1]), read(names[2]).view(np.float32), read(names[3]) if layout.zeros else None, values.shape[1], layout
        )
        _same(stored, values, node.name)
        made = nbits.quantize(values, layout, np.diag(found), compensate.feedback(found, SHRINK))
        codes, zeros = made.packed()
        arrays |= {names[1]: codes, names[2]: made.scales}
        if layout.zeros:
            arrays[names[3]] = zeros
    return arrays


def _matrix(node: str, weights: Checkpoint, config: Any) -> tuple[np.ndarray, str]:
    """What a node multiplies with, float32, shape (outputs, inputs), and the name of a checkpoint tensor with the same inputs.

    The builder joins q, k and v where nothing stands between them, and takes apart what Phi-3 joins.
    """
    if node.startswith("/lm_head/"):
        name = "lm_head.weight" if "lm_head.weight" in weights.shapes else "model.embed_tokens.weight"
        return weights.rows(name), name
    match = _LAYER.match(node)
    if not match:
        raise ModelError(f"the ONNX builder made a matrix that no tensor is known for: {node}", "export it with importance: false")
    layer, part, what = match.groups()
    prefix = f"model.layers.{layer}.{'self_attn' if part == 'attn' else 'mlp'}."
    names = [f"{prefix}{one}_proj.weight" for one in _PARTS.get(what, (what,))]
    if all(name in weights.shapes for name in names):
        return np.concatenate([weights.rows(name) for name in names]), names[0]
    if what == "qkv":
        return weights.rows(f"{prefix}qkv_proj.weight"), f"{prefix}qkv_proj.weight"
    whole = f"{prefix}gate_up_proj.weight"
    half = weights.shapes[whole][0] // 2
    return (weights.rows(whole, 0, half) if what == "gate" else weights.rows(whole, half)), whole


def _same(stored: Coded, values: np.ndarray, node: str) -> None:
    error = float(np.linalg.norm(stored.values() - values) / max(float(np.linalg.norm(values)), 1e-30))
    if not error < _FAR:
        raise ModelError(
            f"the ONNX builder's {node} is not the model's: off by {error:.0%}", "export it with importance: false, and report this"
        )
