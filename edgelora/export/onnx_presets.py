"""What may be asked of onnxruntime-genai's builder: types by name, blocks, activations; what would break is refused before it runs.

Asymmetric default quantization of tied embeddings, for one, exits 0 and leaves a graph that names tensors it lacks: it is out of
reach. What the builder would compute wrongly without a word is refused, too (`_check_rotation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgelora.errors import EdgeloraError, Unsupported, UsageError
from edgelora.export import onnx_graph

TYPES = {
    "int4": "4 bits, blocks of 32: the smallest",
    "int4-mixed": "4 bits by k-quant, the sensitive matrices and the embedding in 8: recommended",
    "int8": "8 bits, blocks of 32: nearly exact",
    "fp32": "no quantization: the reference",
    "fp16": "16 bits, by the exporter optimum alone",
}
BLOCKS = (16, 32, 64, 128)  # weights that share a scale, as MatMulNBits and GatherBlockQuantized both take them on a CPU
ACTIVATIONS = {"int8": 4, "fp32": 1}  # MatMulNBits' accuracy_level: what a matrix's inputs are rounded to before it multiplies

_BUILDER = {  # type -> the builder's --precision and --extra_options
    "int4": ("int4", ("algo_config=default",)),
    "int4-mixed": ("int4", ("algo_config=k_quant_mixed",)),
    "int8": ("int8", ("algo_config=default",)),
    "fp32": ("fp32", ()),
}
# Rotary scalings that the builder carries over. It ignores others without a word, or writes wrong frequencies.
_ROTATIONS = {
    "llama": ("default", "llama3"),
    "mistral": ("default", "linear"),
    "qwen2": ("default", "linear"),
    "qwen3": ("default", "linear"),
    "smollm3": ("default",),
    "phi3": ("default", "longrope"),
    "gemma3_text": ("default",),
}


def options_of(
    type: str, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], block: int | None, activations: str | None
) -> list[str]:
    """The builder's arguments; refuses what would break."""
    if type not in TYPES:
        raise EdgeloraError(f"onnx has no type {type!r}", f"choose one of {', '.join(TYPES)}")
    if type not in _BUILDER:
        raise Unsupported(f"the ONNX builder writes no {type} for a CPU", "take int8, or --exporter optimum")
    if activations is not None and (type == "fp32" or activations not in ACTIVATIONS):
        known = "leave activations out" if type == "fp32" else f"known: {', '.join(ACTIVATIONS)}"
        raise UsageError(f"{type} has no activations in {activations}", known)
    _check_rotation(config)
    precision, options = _BUILDER[type]
    options += (f"block_size={block_of(type, shapes, block)}",)
    if activations is not None:
        options += (f"accuracy_level={ACTIVATIONS[activations]}",)
    # One cache for all layers: a shorter one for layers with a sliding window is nothing that other runtimes know.
    return ["--precision", precision, "--extra_options", "hf_token=false", "windowed_kv_cache=false", *options]


def block_of(type: str, shapes: Mapping[str, Sequence[int]], wished: int | None = None) -> int:
    """Values that share a scale: as wished, else 32, or 16 where k-quant meets rows of an odd number of 32s.

    Its 4-bit zero points are packed two to a byte over the whole matrix, so an odd number of blocks a row fails with
    "cannot reshape array" (onnxruntime, quantization/neural_compressor/weight_only.py). A block that is longer than what is left of
    a row is filled up with zeros that are stored, and the embedding cannot be looked up in it.
    """
    widths = sorted({shape[1] for shape in shapes.values() if len(shape) == 2})
    if wished is not None:
        _check_block(type, widths, wished)
        return wished
    for block in (onnx_graph.BLOCK, onnx_graph.BLOCK // 2):
        odd = [width for width in widths if -(-width // block) % 2]
        if type != "int4-mixed" or not odd:
            return block
    raise Unsupported(f"int4-mixed cannot pack a matrix {odd[0]} wide", "export type int4, int8 or a GGUF instead")


def _check_block(type: str, widths: Sequence[int], wished: int) -> None:
    if type == "fp32" or wished not in BLOCKS:
        known = ", ".join(map(str, BLOCKS))
        raise UsageError(f"{type} has no blocks of {wished}", "leave block out" if type == "fp32" else f"known: {known}")
    pairs = 2 if type == "int4-mixed" else 1
    fitting = [block for block in BLOCKS if not any(width % (pairs * block) for width in widths)]
    if wished not in fitting:
        width = next(width for width in widths if width % (pairs * wished))
        why = "an even number of " if pairs == 2 and width % wished == 0 else ""
        hint = f"choose {' or '.join(map(str, fitting))}" if fitting else "leave block out, or export a GGUF"
        raise Unsupported(f"{type}: rows of {width} weights do not hold {why}blocks of {wished}", hint)


def _check_rotation(config: Mapping[str, Any]) -> None:
    """Unsupported for a rotary embedding that the builder does not carry over: the file would answer wrongly."""
    kind = str(config.get("model_type"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for values in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        scaling = values.get("rope_type") or values.get("type") or "default"
        if kind in _ROTATIONS and scaling not in _ROTATIONS[kind]:
            raise Unsupported(
                f"the ONNX builder does not carry over the rotary scaling {scaling!r} of this {kind} model",
                "export it as GGUF, which does, or remove the scaling and keep to the context it was trained on",
            )
