"""ONNX with 4-bit or 8-bit weights, written by onnxruntime-genai's model builder and tidied for shipping.

What it writes runs in plain ONNX Runtime, in onnxruntime-genai and in their mobile builds.
Options that break the file are out of reach (`onnx_presets`).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError, UsageError
from edgelora.export import architectures, configuration, onnx_builder, onnx_graph, onnx_optimum, onnx_presets
from edgelora.progress import Progress
from edgelora.quant import moments
from edgelora.quant.curvature import Moments
from edgelora.runtime import onnx_runtime
from edgelora.weights import Checkpoint

DEFAULT_TYPE = "int4-mixed"
TYPES = onnx_presets.TYPES
EXPORTERS = ("builder", "optimum")
RUNTIME = "onnxruntime"
FURTHER = ("onnxruntime-genai",)
MERGES = False
APART = False
OPTIONS = frozenset({"importance", "block", "activations", "exporter", "target"})
CALIBRATION = "moments"
REQUIRES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "tokenizers", "torch", "transformers")

_TEXT = re.compile(r"(tokenizer|special_tokens|added_tokens|chat_template|vocab|merges).*")
_KEPT = re.compile(rf"model\.onnx(\.data)?|genai_config\.json|{_TEXT.pattern}")
# CPU seconds and bytes: a fixed part (imports), and a part for every weight.
_SECONDS = (5.0, {"int4": 2.6e-8, "int4-mixed": 1.95e-7, "int8": 3.1e-8, "fp32": 1.4e-8})
_PEAK_BYTES = (6e8, {"int4": 6.8, "int4-mixed": 11.3, "int8": 6.8, "fp32": 4.0})
# Where the model lay and how it was found: nobody else's business.
_PRIVATE_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "local_files_only", "is_local")


def write(
    model: Path,
    type: str,
    folder: Path,
    name: str,
    progress: Progress,
    importance: Moments | None = None,
    block: int | None = None,
    activations: str | None = None,
    exporter: str | None = None,
) -> Path:
    """Write ``folder/<name>-<type>-onnx`` from the Hugging Face folder `model` and return it.

    It holds model.onnx and model.onnx.data, genai_config.json, the tokenizer with its chat template, and config.json and
    generation_config.json, so that onnxruntime, onnxruntime-genai and AutoTokenizer all open it. `importance`, the second
    moments of every matrix's inputs on training rows, rounds weights by what matters; the graph stays the same.
    `block` and `activations`: see `onnx_presets`; `exporter` is "optimum" or None for the
    builder; optimum takes neither of the three.
    Raises Unsupported for a combination that is known to break or to compute something else, ModelError when the
    builder refuses the model or what it wrote does not load, ToolMissing without optimum's environment; OSError on a full disk.
    """
    target = folder / f"{name}-{type}-onnx"
    scratch = folder / ".onnx-builder"
    shutil.rmtree(scratch, ignore_errors=True)
    built = scratch / "model"
    try:
        for place in (built, scratch / "home", scratch / "tmp"):
            place.mkdir(parents=True)
        if exporter == "optimum":
            _refuse_builders_settings(block, activations)
            onnx_optimum.write(model, type, built, scratch.resolve(), progress)
            for path in model.iterdir():
                if _TEXT.fullmatch(path.name):
                    shutil.copyfile(path, built / path.name)
        else:
            _build(model, type, built, scratch, progress, importance, block, activations)
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


def _build(
    model: Path,
    type: str,
    built: Path,
    scratch: Path,
    progress: Progress,
    importance: Moments | None,
    block: int | None,
    activations: str | None,
) -> None:
    """Fill `built` by onnxruntime-genai's builder."""
    config, shapes = _config(model), _shapes(model)
    options = onnx_presets.options_of(type, config, shapes, block, activations)
    measured = importance if gains_from_importance(model, type) else None
    share = 1.0 if measured is None else 0.6  # of the time, that the builder takes
    source = onnx_builder.readable(model.resolve(), scratch)
    onnx_builder.run(source, options, scratch.resolve(), _layers(config), lambda done, text: progress(share * done, text))
    progress(0.9 * share, "tidying the graph")
    described = configuration.opened(model)
    rounding = None
    if measured is not None:
        from edgelora.export import onnx_rounding

        rounding = partial(
            onnx_rounding.rounded,
            weights=Checkpoint(model),
            config=described,
            moments=measured,
            progress=lambda done, text: progress(share * 0.9 + (0.95 - share * 0.9) * done, text),
        )
    onnx_graph.tidy(built, type, _is_tied(config, shapes), _attention(described), rounding)


def gains_from_importance(model: Path, type: str, exporter: str | None = None) -> bool:
    """Whether weights of this type are rounded coarsely enough that training rows should say how, and the model's tensors are known."""
    return gains_of(_config(model), type, exporter)


def gains_of(config: Mapping[str, Any], type: str, exporter: str | None = None) -> bool:
    """The same from a model's configuration."""
    return exporter != "optimum" and type.startswith("int4") and config.get("model_type") in architectures.ARCHITECTURES


def calibration(path: Path) -> Moments:
    """What `write` takes as `importance`, from the file that was measured."""
    return Moments(path)


def predict_bytes(
    model: Path,
    type: str,
    name: str = "",
    importance: object = None,
    block: int | None = None,
    activations: str | None = None,
    exporter: str | None = None,
) -> int:
    """Estimate the bytes of the folder that `write` would leave, from config.json and the safetensors headers alone.

    Weights are counted exactly as the presets store them; the graph is taken as some hundred bytes for every tensor.
    `name`, `importance` and `activations` change nothing here. Raises Unsupported as `write` does.
    """
    config, shapes = _config(model), _shapes(model)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")
    beside = sum((model / n).stat().st_size for n in names if (model / n).is_file())
    if exporter == "optimum":
        _refuse_builders_settings(block, activations)
        onnx_optimum.check(type, config)
        return onnx_optimum.predict_bytes(shapes, type) + beside
    onnx_presets.options_of(type, config, shapes, block, activations)
    return bytes_of(config, shapes, type, block) + beside


def bytes_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str, block: int | None = None) -> int:
    """The same of the builder's graph alone, from a model's shape."""
    layers, block = _layers(config), onnx_presets.block_of(type, shapes, block)
    packed = not any("q_norm" in name for name in shapes)  # the builder joins q, k and v: they share their bits
    total = _rope_bytes(config)
    for name, shape in shapes.items():
        if len(shape) != 2:
            total += 4 * math.prod(shape)
        elif name not in ("model.embed_tokens.weight", "lm_head.weight"):
            total += _matrix_bytes(shape, type, block, _in_eight_bits(name, layers, packed))
    table = shapes["model.embed_tokens.weight"]
    total += _matrix_bytes(table, type, block, eight=True)  # the head; tied, it serves as the table too
    padded = table[1] % max(block, onnx_graph.BLOCK) != 0
    if not _is_tied(config, shapes) or (padded and type == "int8"):
        total += _matrix_bytes(table, "fp32" if padded or type == "fp32" else "int8", onnx_graph.BLOCK, eight=True)
    return total + len(shapes) * {"fp32": 600, "int4-mixed": 950}.get(type, 800) + (0 if packed else 2500 * layers)


def estimate_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str, importance: bool) -> dict[str, float]:
    """What `write` will need, an estimate: `peak_bytes` of memory, the builder's process or ours, and `seconds` of CPU time.

    The builder holds every matrix in float32 and the graph beside it. Fitted on two cores of an AMD EPYC
    (bench/onnx_int4.py); a slower processor takes longer.
    """
    table = shapes["model.embed_tokens.weight"]
    values = sum(math.prod(shape) for shape in shapes.values())
    if _is_tied(config, shapes):
        values += math.prod(table)  # the builder writes the head out
    own = {"peak_bytes": _PEAK_BYTES[0] + values * _PEAK_BYTES[1][type], "seconds": _SECONDS[0] + values * _SECONDS[1][type]}
    return moments.estimate(own, values, table[0]) if importance else own


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


def _refuse_builders_settings(block: int | None, activations: str | None) -> None:
    if block is not None or activations is not None:
        raise UsageError("block and activations are settings of the builder, and the exporter is optimum", "leave them or the exporter out")


def _attention(config: Any) -> list[onnx_graph.Attention]:
    """What each layer attends to, out of transformers' configuration."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    rotates = getattr(config, "no_rope_layers", None) or [1] * layers
    return [
        onnx_graph.Attention(window if window and kind == "sliding_attention" else -1, bool(turns))
        for kind, turns in zip(kinds, rotates, strict=True)
    ]


def _is_tied(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> bool:
    return bool(config.get("tie_word_embeddings", "lm_head.weight" not in shapes))


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
