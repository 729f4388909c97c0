"""LiteRT: a .litertlm file for Google's LiteRT-LM on phones, with tokenizer, chat template and ends of answers inside.

Written in the environment "litert" by litert-torch and Google's quantizer. Integer types round activations to 8 bits as they come.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import environments, models
from edgelora.data import chat
from edgelora.errors import Unsupported
from edgelora.export import elsewhere, litert_template, on_grid, verify
from edgelora.export.phone_readme import Phone
from edgelora.progress import Progress
from edgelora.quant import moments
from edgelora.quant.curvature import Moments
from edgelora.quant.nbits import Layout
from edgelora.runtime.text import FolderText

DEFAULT_TYPE = "int4"
TYPES = {
    "int4": "4-bit weights in blocks of 32, 8-bit activations, 4-bit embedding",
    "int4-channel": "4-bit weights with one scale a row: for models trained to be rounded like that; others come out as gibberish and are refused",
    "int8": "8-bit weights by row, 8-bit activations, 8-bit embedding",
    "fp32": "32-bit floats: exact, and large",
}
RUNTIME = "litert-lm"
FURTHER: tuple[str, ...] = ()
REQUIRES = ("transformers", "tokenizers")
ENVIRONMENT = "litert"
MERGES = False
APART = False
OPTIONS = frozenset({"importance"})
CALIBRATION = "moments"
PHONE = Phone(
    library=f"LiteRT-LM {environments.versions(ENVIRONMENT)['litert-lm-api']} (CPU, XNNPACK); tokenizer and chat template are inside the file",
    android="com.google.ai.edge.litertlm:litertlm-android:0.18.0",
    kotlin="""\
import com.google.ai.edge.litertlm.*

val engine = Engine(EngineConfig(modelPath = "$$filesDir/$file", backend = Backend.CPU(), cacheDir = cacheDir.path))
engine.initialize()  // takes seconds: not on the main thread

suspend fun ask(question: String, show: (String) -> Unit) {
    val greedy = SamplerConfig(topK = 1, topP = 1.0, temperature = 1.0)
    engine.createConversation(ConversationConfig(samplerConfig = greedy)).use { conversation ->
        conversation.sendMessageAsync(question).collect { show(it.toString()) }  // the file's template goes around it
    }
}
""",
    ios="",
    swift="",
)


calibration, gains_from_importance, gains_of = on_grid.calibration, on_grid.gains_from_importance, on_grid.gains_of

# Architectures whose graph was held against the model itself, on tiny models of them.
ARCHITECTURES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
_ROUNDING = {"int4": "dynamic_wi4b32_afp32", "int4-channel": "dynamic_wi4_afp32", "int8": "dynamic_wi8_afp32", "fp32": None}
_BITS = {"int4": 4, "int4-channel": 4, "int8": 8, "fp32": 32}
_BLOCK = 32
_GRID = Layout(4, _BLOCK, zeros=False, short=True)
_READ = 128  # tokens of a prompt read at once
_LAYER_BYTES = 87_000  # of the graph, in both of its signatures
_SECTION = 16 * 1024


def write(model: Path, type: str, folder: Path, name: str, progress: Progress, importance: Moments | None = None) -> Path:
    """Write ``folder/<name>-<type>.litertlm`` from the Hugging Face folder `model` and return it.

    `importance`, the second moments of every matrix's inputs on training rows, rounds `int4` by what matters.
    Raises Unsupported for a model or a width that was not tried or cannot be, ToolMissing without the environment,
    VerifyError when LiteRT-LM's engine renders the chat template otherwise in every form that we know, ModelError with the
    exporter's own last words when it fails.
    """
    _check(model, type)
    path = folder / f"{name}-{type}.litertlm"
    with elsewhere.scratch(folder) as scratch:
        partial = scratch / path.name
        source, progress = on_grid.source(model, type, _GRID, importance, scratch, progress)
        job = _job(source, type) | {"scratch": str(scratch.resolve()), "output": str(partial.resolve())}
        job["grid"] = _BLOCK if source != model else None
        elsewhere.run(ENVIRONMENT, job, scratch.resolve(), model, progress)
        partial.replace(path)
    progress(1.0, "written")
    return path


context = elsewhere.context


def predict_bytes(model: Path, type: str, name: str = "", importance: object = None) -> int:
    """Estimate the bytes of the file, from the shapes and the tokenizer. Raises Unsupported as `write` does."""
    config, shapes = _check(model, type)
    tokenizer = len(zlib.compress((model / "tokenizer.json").read_bytes()))
    return bytes_of(vars(config), shapes, type) + tokenizer


def bytes_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str) -> int:
    """The same from a model's shape. A head that shares the embedding's weights is stored once."""
    total = int(config["num_hidden_layers"]) * _LAYER_BYTES + 4 * _SECTION
    for shape in shapes.values():
        if len(shape) < 2 or type == "fp32":
            total += 4 * math.prod(shape)
        else:
            scales = shape[1] // _BLOCK * 2 if type == "int4" else 24  # scale and zero point, once a signature
            total += shape[0] * (shape[1] * _BITS[type] // 8 + scales)
    return total


def estimate_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str, importance: bool) -> dict[str, float]:
    """What `write` will need, an estimate: `peak_bytes` of memory and `seconds` of CPU time, most of it tracing layer by layer.

    Fitted on two cores of an x86-64 machine; a slower processor takes longer.
    """
    values = sum(math.prod(shape) for shape in shapes.values())
    own = {"peak_bytes": 7e8 + 20.5 * values, "seconds": 8 + 1.45 * int(config["num_hidden_layers"]) + 4e-8 * values}
    return moments.estimate(own, values, shapes["model.embed_tokens.weight"][0]) if importance else own


def _check(model: Path, type: str) -> tuple[Any, Mapping[str, Sequence[int]]]:
    config, shapes = elsewhere.tried(model, ARCHITECTURES, "LiteRT files")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise Unsupported(f"litert-torch has no {rope} rotation", "export it as gguf instead")
    odd = next((name for name, shape in shapes.items() if len(shape) == 2 and shape[1] % _BLOCK), None)
    if type == "int4" and odd:
        raise Unsupported(f"int4 rounds blocks of {_BLOCK}, and the rows of {odd} have {shapes[odd][1]} values", "choose int8")
    return config, shapes


def _job(model: Path, type: str) -> dict[str, Any]:
    """What the other program is told; see there/write_litert.py."""
    tokenizer = models.open_tokenizer(model)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = tokenizer.get_chat_template()
    return {
        "model": str(model.resolve()),
        "tokenizer": str((model / "tokenizer.json").resolve()),
        "context": context(model),
        "block": min(_READ, context(model) // 2),
        "rounding": _ROUNDING[type],
        "stop_ids": list(FolderText(model).stop_ids),
        "templates": litert_template.candidates(template, special),
        "conversations": [(talk, chat.render(tokenizer, talk, open_turn=True)) for talk in verify.CONVERSATIONS],
    }
