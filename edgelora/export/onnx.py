"""ONNX with 4-bit or 8-bit weights, written by onnxruntime-genai's model builder and tidied for shipping.

What it writes runs in plain ONNX Runtime, in onnxruntime-genai and in their mobile builds.

Options that the builder accepts and that break the file are out of reach: the presets below are all there is.
Asymmetric default quantization of tied embeddings, for one, exits 0 and leaves a graph that names tensors it lacks.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.export import onnx_builder, onnx_graph
from edgelora.runtime import onnx_runtime

DEFAULT_TYPE = "int4-mixed"
TYPES = {
    "int4": "4 bits, blocks of 32, nearest rounding: the smallest",
    "int4-mixed": "4 bits by k-quant, the sensitive matrices and the embedding in 8: recommended",
    "int8": "8 bits, blocks of 32: nearly exact",
    "fp32": "no quantization: the reference",
}
RUNTIME = "onnxruntime"
MERGES = False
APART = False
OPTIONS: frozenset[str] = frozenset()
REQUIRES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "tokenizers", "torch", "transformers")

_BUILDER = {  # type -> the builder's --precision and --extra_options
    "int4": ("int4", ("algo_config=default",)),
    "int4-mixed": ("int4", ("algo_config=k_quant_mixed",)),
    "int8": ("int8", ("algo_config=default",)),
    "fp32": ("fp32", ()),
}
_KEPT = re.compile(r"model\.onnx(\.data)?|genai_config\.json|(tokenizer|special_tokens|added_tokens|chat_template|vocab|merges).*")
# Where the model lay and how it was found: nobody else's business.
_PRIVATE_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "local_files_only", "is_local")

Progress = Callable[[float, str], None]


def write(model: Path, type: str, folder: Path, name: str, progress: Progress) -> Path:
    """Write ``folder/<name>-<type>-onnx`` from the Hugging Face folder `model` and return it.

    It holds model.onnx and model.onnx.data, genai_config.json, the tokenizer with its chat template, and config.json and
    generation_config.json, so that onnxruntime, onnxruntime-genai and AutoTokenizer all open it.
    Raises ModelError when the builder refuses the model or what it wrote does not load; OSError on a full disk.
    """
    if type not in TYPES:
        raise EdgeloraError(f"onnx has no type {type!r}", f"choose one of {', '.join(TYPES)}")
    config, shapes = _config(model), _shapes(model)
    tied = _is_tied(config, shapes)
    target = folder / f"{name}-{type}-onnx"
    scratch = folder / ".onnx-builder"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        built = scratch / "model"
        for place in (built, scratch / "home", scratch / "tmp"):
            place.mkdir(parents=True)
        onnx_builder.run(model.resolve(), _builder_options(type, shapes), scratch.resolve(), _layers(config), progress)
        progress(0.9, "tidying the graph")
        onnx_graph.tidy(built, type, tied)
        _tidy_files(model, built)
        progress(0.95, "opening it in ONNX Runtime")
        with onnx_runtime.open(built, threads=1) as session:
            session.score([0])
        shutil.rmtree(target, ignore_errors=True)
        built.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    progress(1.0, "written")
    return target


def predict_bytes(model: Path, type: str, name: str = "") -> int:
    """Estimate the bytes of the folder that `write` would leave, from config.json and the safetensors headers alone.

    Weights are counted exactly as the presets store them; the graph is taken as some hundred bytes for every tensor.
    `name` changes nothing here.
    """
    if type not in TYPES:
        raise EdgeloraError(f"onnx has no type {type!r}", f"choose one of {', '.join(TYPES)}")
    config, shapes = _config(model), _shapes(model)
    layers, block = _layers(config), _block(type, shapes)
    packed = not any("q_norm" in name for name in shapes)  # the builder joins q, k and v: they share their bits
    total = _rope_bytes(config)
    for name, shape in shapes.items():
        if len(shape) != 2:
            total += 4 * math.prod(shape)
        elif name not in ("model.embed_tokens.weight", "lm_head.weight"):
            total += _matrix_bytes(shape, type, block, _in_eight_bits(name, layers, packed))
    table = shapes["model.embed_tokens.weight"]
    total += _matrix_bytes(table, type, block, eight=True)  # the head; tied, it serves as the table too
    padded = table[1] % onnx_graph.BLOCK != 0
    if not _is_tied(config, shapes) or (padded and type == "int8"):
        total += _matrix_bytes(table, "fp32" if padded or type == "fp32" else "int8", onnx_graph.BLOCK, eight=True)
    total += len(shapes) * {"fp32": 600, "int4-mixed": 950}.get(type, 800) + (0 if packed else 2500 * layers)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")
    return total + sum((model / n).stat().st_size for n in names if (model / n).is_file())


def _matrix_bytes(shape: Sequence[int], type: str, block: int, eight: bool) -> int:
    """A matrix of (outputs, inputs): packed values, a float32 scale a block, and a zero point a block for k-quant."""
    rows, width = shape
    if type == "fp32":
        return 4 * rows * width
    blocks = -(-width // block)
    bits = 8 if type == "int8" or (eight and type == "int4-mixed") else 4
    zeros = -(-blocks * bits // 8) if type == "int4-mixed" else 0
    return rows * (blocks * (block * bits // 8 + 4) + zeros)


def _in_eight_bits(name: str, layers: int, packed: bool) -> bool:
    """Whether the builder's k_quant_mixed keeps this matrix in 8 bits: llama.cpp's use_more_bits() on value and down."""
    match = re.search(r"\.layers\.(\d+)\..*?(\w+)\.weight$", name)
    if not match:
        return False
    i = int(match[1])
    sensitive = i < layers / 8 or i >= 7 * layers / 8 or (i - round(layers / 8)) % 3 == 2
    return sensitive and match[2] in ("v_proj", "qkv_proj", "down_proj", *(("q_proj", "k_proj") if packed else ()))


def _rope_bytes(config: Mapping[str, Any]) -> int:
    """The tables of cosines and sines, float32, a row for every position the model knows."""
    head = config.get("head_dim") or config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    rope = config.get("rope_parameters") or {}
    tables = sum(isinstance(value, dict) for value in rope.values()) or 1  # one for each kind of layer
    return int(tables * config.get("max_position_embeddings", 0) * head * 4)


def _layers(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or 1)


def _is_tied(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> bool:
    return bool(config.get("tie_word_embeddings", "lm_head.weight" not in shapes))


def _block(type: str, shapes: Mapping[str, Sequence[int]]) -> int:
    """Values that share a scale: 32, or 16 where k-quant meets rows of an odd number of 32s.

    Its 4-bit zero points are packed two to a byte over the whole matrix, so an odd number of blocks a row fails with
    "cannot reshape array" (onnxruntime, quantization/neural_compressor/weight_only.py).
    """
    widths = sorted({shape[1] for shape in shapes.values() if len(shape) == 2})
    for block in (onnx_graph.BLOCK, onnx_graph.BLOCK // 2):
        odd = [width for width in widths if -(-width // block) % 2]
        if type != "int4-mixed" or not odd:
            return block
    raise Unsupported(f"int4-mixed cannot pack a matrix {odd[0]} wide", "export type int4, int8 or a GGUF instead")


def _builder_options(type: str, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    precision, options = _BUILDER[type]
    return ["--precision", precision, "--extra_options", "hf_token=false", *options, f"block_size={_block(type, shapes)}"]


def _config(model: Path) -> dict[str, Any]:
    path = model / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{model} has no config.json", "name a Hugging Face folder") from None
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}", "save the model again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is damaged: it holds no settings", "save the model again")
    return values


def _shapes(model: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor, from the headers of the *.safetensors files."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(model.glob("*.safetensors")):
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(stream.read(length))
            shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, LookupError, TypeError) as error:
            raise ModelError(f"{path} is damaged: {error}", "save the model again") from error
    if "model.embed_tokens.weight" not in shapes:
        raise ModelError(f"{model} holds no tensor model.embed_tokens.weight", "only decoder models saved by transformers are exported")
    return shapes


def _tidy_files(model: Path, built: Path) -> None:
    """Keep what a runtime needs, bring the Hugging Face configurations along, and take private paths out of both."""
    for path in built.iterdir():
        if not _KEPT.fullmatch(path.name):
            path.unlink()
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, built / name)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (path := built / name).is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            clean = {key: value for key, value in values.items() if key not in _PRIVATE_KEYS}
            path.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
