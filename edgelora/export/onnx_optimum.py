"""A second, independent way to ONNX: Hugging Face's exporter traces the model itself, onnxruntime's quantizer rounds the result.

It runs in an environment of its own (`edgelora doctor --install optimum`), since it wants transformers 4. Its graphs are the reference that the builder's are held against, and the way for architectures that
the builder lacks; they are larger and slower, and onnxruntime-genai does not run them.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import environments
from edgelora.errors import ModelError, Unsupported
from edgelora.export import child, transformers4
from edgelora.progress import Progress
from edgelora.runtime.onnx_folder import GRAPH

TYPES = ("fp32", "fp16", "int4")
BLOCK = 32
_GRAPH_BYTES = 3000  # of the graph, for every tensor of the model: it is written out node by node


def write(model: Path, type: str, built: Path, scratch: Path, progress: Progress) -> None:
    """Fill the folder `built` with model.onnx of the Hugging Face folder `model`.

    ToolMissing when the environment is not there, Unsupported for what this exporter cannot write, ModelError with the
    exporter's own last words when it fails.
    """
    check(type, json.loads((model / "config.json").read_text(encoding="utf-8")))
    python = environments.python("optimum")
    described = transformers4.described(model, scratch)
    progress(0.05, "tracing the model with optimum")
    command = [str(python), "-m", "optimum.exporters.onnx", "--model", str(described), "--task", "text-generation-with-past"]
    said: collections.deque[str] = collections.deque(maxlen=1)
    code = child.run(
        [*command, "--dtype", "fp32", str(scratch / "traced")],
        scratch,
        child.environment(scratch),
        lambda line: said.append(line.strip()) if line.strip() else None,
    )
    graph = scratch / "traced" / GRAPH
    if code or not graph.is_file():
        raise ModelError(
            f"optimum cannot export {model.name}: {said[-1][:400] if said else 'it printed nothing'}", "export it as GGUF instead"
        )
    progress(0.7, f"storing it as {type}")
    _store(graph, type, built / GRAPH)


def check(type: str, config: Mapping[str, Any]) -> None:
    """Unsupported for a type that this exporter cannot write, and for a rotation that a trace cannot hold."""
    if type not in TYPES:
        raise Unsupported(f"the exporter optimum has no type {type!r}", f"its types: {', '.join(TYPES)}; the others are the builder's")
    if (config.get("rope_parameters") or {}).get("rope_type") in ("longrope", "dynamic"):
        raise Unsupported("optimum traces a model at one length, and this one's rotation depends on the length", "leave the exporter out")


def predict_bytes(shapes: Mapping[str, Sequence[int]], type: str) -> int:
    """Estimate the bytes of model.onnx and its data. A head that shares the embedding's weights is written out."""
    sizes = dict(shapes)
    sizes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    total = len(sizes) * _GRAPH_BYTES
    for shape in sizes.values():
        if type == "int4" and len(shape) == 2:
            total += shape[0] * math.ceil(shape[1] / BLOCK) * (BLOCK // 2 + 4)
        else:
            total += math.prod(shape) * (2 if type == "fp16" else 4)
    return total


def _store(traced: Path, type: str, target: Path) -> None:
    import onnx

    graph = onnx.load(traced)
    if type == "int4":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        _write_head_out(graph.graph)
        quantizer = MatMulNBitsQuantizer(
            graph, block_size=BLOCK, is_symmetric=True, accuracy_level=4, op_types_to_quantize=("MatMul", "Gather")
        )
        quantizer.process()
        graph = quantizer.model.model
    elif type == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        graph = convert_float_to_float16(graph, keep_io_types=True)
    for part in (graph, graph.graph, *graph.graph.node):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    data = f"{GRAPH}.data"
    onnx.save(graph, target, save_as_external_data=True, all_tensors_to_one_file=True, location=data, size_threshold=1024)


def _write_head_out(graph: Any) -> None:
    """A head that shares the embedding's weights multiplies with their transpose, which the quantizer would leave in float32."""
    import numpy as np
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in tensors]:
        values = np.ascontiguousarray(numpy_helper.to_array(tensors[node.input[0]]).T)
        if values.ndim == 2:
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            graph.node.remove(node)
