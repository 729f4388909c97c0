"""How the builder's graph stores a matrix, changed: bits, block and zero points of a MatMulNBits or a GatherBlockQuantized node.

Both nodes say themselves how their matrix is stored, and hold codes, scales and zero points in three initializers
(onnxruntime docs/ContribOperators.md). So every matrix of a graph may be stored in its own way.
"""

from __future__ import annotations

import numpy as np
import onnx

from edgelora.export import onnx_rounding
from edgelora.export.onnx_graph import aligned
from edgelora.quant.nbits import Coded, Layout

# With or without zero points; a row must be a multiple of the block, since what fills a block up is stored and cannot be looked up.
LAYOUTS = {
    layout.name: layout
    for layout in (
        *(Layout(4, block, zeros) for block in (128, 64, 32, 16) for zeros in (False, True)),
        *(Layout(8, block, False) for block in (128, 64, 32)),
    )
}
_OPERATORS = ("MatMulNBits", "GatherBlockQuantized")
_ENTRY = 160  # bytes of the graph that one more initializer takes, with its places in the data file, but for its name
_SPARE = 32  # bytes of the graph that an initializer may grow by: more digits of a place, a longer name


def fitting(columns: int) -> dict[str, Layout]:
    """The layouts that a matrix with rows of `columns` weights may have."""
    return {name: layout for name, layout in LAYOUTS.items() if columns % layout.block == 0}


def stored_bytes(name: str, rows: int, columns: int, layout: Layout) -> int:
    """What the matrix `name` adds to graph and data file, at most: codes, scales, and zero points with their initializer."""
    blocks = columns // layout.block
    size = aligned(rows * columns * layout.bits // 8) + aligned(rows * blocks * 4)
    return size + (aligned(rows * -(-blocks * layout.bits // 8)) + _ENTRY + 3 * len(name) if layout.zeros else 0)


def bits(columns: int, layout: Layout) -> float:
    """Bits a weight, scales and zero points included."""
    blocks = columns // layout.block
    zeros = 8 * -(-blocks * layout.bits // 8) if layout.zeros else 0
    return layout.bits + (32 * blocks + zeros) / columns


def nodes(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Matrix -> the node that stores it. A tied embedding is looked up in the head's matrix, so it is none of its own."""
    heads = {node.input[2] for node in graph.node if node.op_type == "MatMulNBits"}
    return {
        onnx_rounding.matrix_of(node): node
        for node in graph.node
        if node.op_type == "MatMulNBits" or (node.op_type == "GatherBlockQuantized" and node.input[2] not in heads)
    }


def fixed_bytes(graph: onnx.GraphProto) -> int:
    """Bytes of graph and data file without what `store` gives, at most. `graph` has no zero points."""
    own = {name for node in nodes(graph).values() for name in (node.input[_codes(node)], node.input[2])}
    own |= {node.input[0] for node in _lookups(graph)}
    spans = {tuple(entry.value for entry in t.external_data[1:3]) for t in graph.initializer if t.name not in own}
    return int(graph.ByteSize()) + _SPARE * len(graph.initializer) + sum(aligned(int(length)) for _, length in spans)


def store(graph: onnx.GraphProto, matrix: str, made: Coded) -> dict[str, np.ndarray]:
    """Let the node of `matrix`, which has no zero points yet, store `made`, and whatever else looks it up; returns initializer -> its array."""
    node = nodes(graph)[matrix]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    rows, blocks = made.scales.shape
    codes, zeros = made.packed()
    bits, block = made.layout.bits, made.layout.block
    arrays = {node.input[2]: made.scales}
    tensors[node.input[2]].dims[:] = (rows, blocks)
    users = [other for other in graph.node if other.op_type in _OPERATORS and other.input[2] == node.input[2]]
    stale = {user.input[_codes(user)] for user in users} | {node.input[2]}
    for user in users:
        tensor = tensors[user.input[_codes(user)]]
        if user.op_type == "MatMulNBits":
            tensor.name = tensor.name.replace("_Q4", f"_Q{bits}G{block}")  # as the builder calls them
            user.name = user.name.replace("_Q4", f"_Q{bits}")
            tensor.dims[:] = (rows, blocks, block * bits // 8)
        else:
            tensor.dims[:] = (rows, blocks * block * bits // 8)
        user.input[_codes(user)] = tensor.name
        arrays[tensor.name] = codes
        for attribute in user.attribute:
            if attribute.name in ("bits", "block_size"):
                attribute.i = bits if attribute.name == "bits" else block
    if made.layout.zeros:
        name = f"{matrix}.MatMul.weight_zp"
        graph.initializer.add(name=name, data_type=onnx.TensorProto.UINT8, dims=(rows, zeros.size // rows))
        arrays[name] = zeros
        for user in users:
            user.input[:] = [*user.input[:3], name, *user.input[4:]]
    for value in [v for v in graph.value_info if v.name in stale]:
        graph.value_info.remove(value)
    return arrays


def _codes(node: onnx.NodeProto) -> int:
    """Which input of a node its codes are. Scales are the one at 2, zero points the one at 3 of both kinds."""
    return 1 if node.op_type == "MatMulNBits" else 0


def _lookups(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
