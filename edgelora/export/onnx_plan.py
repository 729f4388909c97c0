"""ONNX files within a size: which layouts a matrix may have, what they cost, and the folder of a plan. See `edgelora.export` for the shape.

The builder writes its graph once, in 4 bits and blocks of 32: the frame. In it every matrix is then stored as the plan says.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from edgelora.errors import ModelError, Unsupported
from edgelora.export import architectures, configuration, onnx_graph, onnx_layout, onnx_rounding
from edgelora.export import onnx as exporter
from edgelora.export.onnx_layout import LAYOUTS
from edgelora.export.onnx_rounding import Part
from edgelora.progress import Progress
from edgelora.quant import nbits, sensitivity
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import Curvature, Moments
from edgelora.quant.nbits import Layout
from edgelora.quant.size_plan import Plan
from edgelora.runtime.onnx_folder import GRAPH
from edgelora.weights import Checkpoint

MEASURED = "onnx-curvature"
COMPETING = ("compensated",)  # nearest values were further away in every file measured (bench/NOTES.md)
ENDING = "-onnx"
SETTINGS = ("activations",)
PACKAGES = ("onnx", "onnxruntime", "onnxruntime-genai")
STANDS_FOR = "int4"  # the type whose frame, memory and name for browsers a planned file has
_FRAME = Layout(4, onnx_graph.BLOCK, zeros=False)
_TABLE = Layout(8, onnx_graph.BLOCK, zeros=False)  # an untied embedding's, in the frame


@dataclass(frozen=True)
class Piece:
    """A part of a matrix: where the checkpoint has it, its tensor's GGUF name, and what changes its rows to GGUF's order."""

    part: Part
    gguf: str
    change: Callable[[np.ndarray], np.ndarray]
    whole: int  # rows of the checkpoint's tensor

    def spread(self, values: np.ndarray) -> np.ndarray:
        """`values` at their rows of the whole tensor, 0 elsewhere."""
        if len(values) == self.whole:
            return values
        spread = np.zeros((self.whole, values.shape[1]), np.float32)
        spread[self.part.first : self.part.last] = values
        return spread


@dataclass(frozen=True)
class Matrix:
    """A matrix of the graph, of `shape` (outputs, inputs)."""

    name: str
    shape: tuple[int, int]
    found: tuple[Piece, ...]
    checkpoint: Checkpoint

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(piece.gguf for piece in self.found)

    def options(self) -> dict[str, tuple[int, float]]:
        rows, columns = self.shape
        return {
            name: (onnx_layout.stored_bytes(self.name, rows, columns, layout), onnx_layout.bits(columns, layout))
            for name, layout in onnx_layout.fitting(columns).items()
        }

    def read(self) -> np.ndarray:
        """float32, in the graph's order of rows."""
        return np.concatenate([piece.part.read(self.checkpoint) for piece in self.found])

    def costs(self, found: Curvature, rounding: Rounding, together: int) -> dict[str, float]:
        known = rounding.of(self.found[0].gguf)  # all pieces have the same inputs
        costs = dict.fromkeys(self.options(), 0.0)
        for piece in self.found:
            values = piece.change(piece.part.read(self.checkpoint))
            whole = piece.spread(values)
            common = sensitivity.taken_back(piece.gguf, whole, found) if whole is values else None
            for name in costs:
                errors = piece.spread(nbits.quantize(values, LAYOUTS[name], *known, rounding.pool).values() - values)
                costs[name] += sensitivity.error_cost(piece.gguf, whole, errors, found, common, together)
        return costs


def matrices(model: Path, name: str, weights: Checkpoint | None = None) -> tuple[int, dict[str, Matrix]]:
    """The bytes of everything else are an estimate here: the graph's own are known once the builder has written it.

    Raises Unsupported for rows that are no multiple of the frame's block.
    """
    checkpoint = weights or Checkpoint(model)
    shapes, config = checkpoint.shapes, configuration.of(model)
    sources = {source.name: (key, source.change) for key, source in architectures.of(config.model_type).tensors(config).items()}
    found = {}
    for key in _names(config):
        pieces = []
        for part in onnx_rounding.parts(key, shapes):
            gguf_name, change = sources.get(part.tensor, ("output.weight", None))
            pieces.append(Piece(part, gguf_name, _ordered(change, config), shapes[part.tensor][0]))
        columns = shapes[pieces[0].part.tensor][1]
        if columns % onnx_graph.BLOCK:
            raise Unsupported(
                f"onnx cannot be planned for this model: rows of {columns} weights hold no blocks of {onnx_graph.BLOCK}",
                "name a type, for instance int4, or export to gguf",
            )
        found[key] = Matrix(key, (sum(piece.part.rows(shapes) for piece in pieces), columns), tuple(pieces), checkpoint)
    held = sum(
        onnx_layout.stored_bytes(key, *matrix.shape, _TABLE if key == "model.embed_tokens" else _FRAME) for key, matrix in found.items()
    )
    return exporter.predict_bytes(model, STANDS_FOR, name) - held, found


def mixture(model: Path, name: str, plan: Plan, weights: Checkpoint | None = None) -> dict[str, Any]:
    found = matrices(model, name, weights)[1]
    total = sum(matrix.weights for matrix in found.values())
    held = sum(matrix.weights * matrix.options()[plan.types[key]][1] for key, matrix in found.items())
    return {"bits_a_weight": held / total, "types": dict(Counter(plan.types.values()).most_common()), "fallbacks": []}


@dataclass(frozen=True)
class Writer:
    """`frame` is the folder that the builder wrote."""

    described: Path
    name: str
    frame: Path
    found: Mapping[str, Matrix]
    fixed_bytes: int

    def write(self, plan: Plan, moments: Moments, rounding: Rounding, place: Path, progress: Progress) -> Path:
        unfit = next((key for key, kind in plan.types.items() if kind not in self.found[key].options()), None)
        if unfit:
            raise ModelError(f"the plan stores {unfit} as {plan.types[unfit]!r}, which it cannot be", "make a plan with --max-size")
        target = place / f"{self.name}{ENDING}"
        shutil.copytree(self.frame, target, ignore=shutil.ignore_patterns(f"{GRAPH}*"))
        model = onnx.load(self.frame / GRAPH, load_external_data=False)
        arrays: dict[str, np.ndarray] = {}
        for number, (key, matrix) in enumerate(self.found.items()):
            progress(number / len(self.found), f"rounding {key} to {plan.types[key]}")
            made = nbits.quantize(matrix.read(), LAYOUTS[plan.types[key]], *rounding.of(matrix.found[0].gguf), rounding.pool)
            arrays |= onnx_layout.store(model.graph, key, made)
        onnx_graph.repack(model.graph, self.frame, target, arrays)
        (target / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
        return target

    def widest(self, place: Path) -> Path:
        return exporter.write(self.described, "fp32", place, "widest", lambda share, text: None)


def open(
    described: Path,
    name: str,
    weights: Checkpoint,
    scratch: Path,
    threads: int,
    progress: Progress,
    activations: Literal["int8", "fp32"] | None = None,
) -> Writer:
    """Let the builder write the frame into `scratch`; ModelError when its matrices are not those that `matrices` foretold."""
    frame = exporter.write(described, STANDS_FOR, scratch, "frame", progress, block=onnx_graph.BLOCK, activations=activations)
    found = matrices(described, name, weights)[1]
    model = onnx.load(frame / GRAPH, load_external_data=False)
    held = {key: _shape(node, model.graph) for key, node in onnx_layout.nodes(model.graph).items()}
    strange = next((key for key in held.keys() | found.keys() if key not in found or held.get(key) != found[key].shape), None)
    if strange:
        raise ModelError(f"the ONNX builder stores {strange} otherwise than it should", "name a type instead of a size, and report this")
    beside = sum(path.stat().st_size for path in frame.iterdir() if not path.name.startswith(GRAPH))
    envelope = (frame / GRAPH).stat().st_size - model.graph.ByteSize()
    return Writer(described, name, frame, found, beside + envelope + onnx_layout.fixed_bytes(model.graph))


def _names(config: Any) -> list[str]:
    """Every matrix of the frame. The builder joins q, k and v of all these architectures where all three have the same bits."""
    inner = ("attn.qkv_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layers = [f"model.layers.{layer}.{what}" for layer in range(config.num_hidden_layers) for what in inner]
    return [*([] if config.tie_word_embeddings else ["model.embed_tokens"]), *layers, "lm_head"]


def _shape(node: onnx.NodeProto, graph: onnx.GraphProto) -> tuple[int, int]:
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        return settings["N"], settings["K"]
    rows, width = next(tensor.dims for tensor in graph.initializer if tensor.name == node.input[0])
    return rows, width * 8 // settings["bits"]


def _ordered(change: architectures.Change | None, config: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What brings a tensor's rows into GGUF's order, which gradients are kept in. Rows are rounded one by one, so any order costs the same."""
    if change is None:
        return lambda values: values
    return lambda values: np.ascontiguousarray(change.do(values, config))
