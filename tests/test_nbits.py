"""Blocks of few bits: what ONNX Runtime's own operators make of them, and errors against its own quantizer's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgelora.quant import compensate, nbits
from edgelora.quant.nbits import Layout

LAYOUTS = [Layout(4, 16, False), Layout(4, 32, True), Layout(8, 32, True), Layout(4, 32, False), Layout(4, 64, True)]


def matrix(rows: int = 24, columns: int = 160, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_t(5, (rows, columns)) * random.uniform(0.5, 2, (rows, 1)) + 0.1).astype(np.float32)


def run(node: str, inputs: dict[str, np.ndarray], stored: dict[str, np.ndarray], attributes: dict[str, int]) -> np.ndarray:
    """What ONNX Runtime computes with one contributed operator: `inputs` are fed, `stored` are initializers, in that order."""
    names = [*inputs, *stored] if node == "MatMulNBits" else [next(iter(stored)), *inputs, *[*stored][1:]]
    made = onnx.helper.make_node(node, names, ["y"], domain="com.microsoft", **attributes)
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    graph = onnx.helper.make_graph(
        [made],
        "g",
        [onnx.helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in inputs.items()],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 22), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    found: Any = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)
    return np.asarray(found[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("columns", [160, 150])  # the last block whole and not
def test_onnx_runtime_multiplies_with_these_values(layout: Layout, columns: int) -> None:
    made = nbits.quantize(matrix(columns=columns), layout)
    codes, zeros = made.packed()
    rows, blocks = made.scales.shape
    stored = {"B": codes.reshape(rows, blocks, -1), "scales": made.scales.reshape(-1)} | ({"zeros": zeros} if layout.zeros else {})
    attributes = {"K": columns, "N": rows, "bits": layout.bits, "block_size": layout.block, "accuracy_level": 1}
    found = run("MatMulNBits", {"A": np.eye(columns, dtype=np.float32)}, stored, attributes)
    np.testing.assert_allclose(found.T, made.values(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if 160 % layout.block == 0], ids=str)
def test_onnx_runtime_looks_up_these_values(layout: Layout) -> None:
    made = nbits.quantize(matrix(), layout)
    codes, zeros = made.packed()
    rows = len(made.scales)
    stored = {"data": codes.reshape(rows, -1), "scales": made.scales} | ({"zeros": zeros.reshape(rows, -1)} if layout.zeros else {})
    attributes = {"bits": layout.bits, "block_size": layout.block, "gather_axis": 0, "quantize_axis": 1}
    found = run("GatherBlockQuantized", {"ids": np.array([5, 0, 23])}, stored, attributes)
    np.testing.assert_allclose(found, made.values()[[5, 0, 23]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_was_packed_is_read_back(layout: Layout) -> None:
    made = nbits.quantize(matrix(columns=150), layout)
    codes, zeros = made.packed()
    again = nbits.coded(codes, made.scales.reshape(-1), zeros if layout.zeros else None, 150, layout)
    np.testing.assert_array_equal(again.values(), made.values())


def test_zeros_stay_zeros_and_few_values_are_exact() -> None:
    for layout in LAYOUTS:
        weights = np.zeros((3, 64), np.float32)
        weights[1] = np.tile(np.arange(-8, 8), 4) * 0.25  # sixteen steps
        found = nbits.quantize(weights, layout).values()
        assert not found[[0, 2]].any()
        np.testing.assert_allclose(found[1], weights[1], atol=1e-6)


def test_errors_are_below_those_of_onnx_runtimes_own_rounding() -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    weights = matrix(64, 320)
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(weights.T), "w")
    for zeros in (False, True):
        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=not zeros, bits=4)
        packed, scales, points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(onnx.numpy_helper.to_array(tensor))
        layout = Layout(4, 32, zeros)
        theirs = nbits.coded(packed, scales, points if zeros else None, 320, layout).values()
        ours = nbits.quantize(weights, layout).values()
        assert np.square(ours - weights).sum() < 0.95 * np.square(theirs - weights).sum()


def test_importance_moves_errors_to_where_they_cost_less() -> None:
    weights, counts = matrix(64, 64), np.where(np.arange(64) % 8 == 0, 50.0, 1.0).astype(np.float32)
    plain, weighed = (np.square(nbits.quantize(weights, Layout(4, 32, False), one).values() - weights) for one in (None, counts))
    assert (weighed @ counts).sum() < 0.8 * (plain @ counts).sum()


def test_compensation_lowers_the_error_of_the_outputs() -> None:
    """Inputs that go together: errors of one column are made up for by others. Measured on inputs that were not seen."""
    random = np.random.default_rng(3)
    mix = random.normal(size=(12, 96))
    seen, other = ((random.normal(size=(2000, 12)) @ mix + 0.3 * random.normal(size=(2000, 96))).astype(np.float32) for _ in range(2))
    moments = seen.T @ seen / len(seen)
    weights = matrix(40, 96)
    for zeros in (False, True):
        layout = Layout(4, 32, zeros)

        def error(taken_over: np.ndarray | None, layout: Layout = layout) -> float:
            made = nbits.quantize(weights, layout, np.diag(moments), taken_over).values()
            return float(np.square(other @ (made - weights).T).sum())

        assert error(compensate.feedback(moments, 0.05)) < 0.5 * error(None)
