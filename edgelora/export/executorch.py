"""ExecuTorch: a .pte file for phones, whose matrices XNNPACK multiplies; written in the environment "executorch".

Integer types round activations to 8 bits as they come. The tokenizer and its template ship beside the file; the ids that end
an answer stand in it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgelora import environments, models
from edgelora.export import configuration, elsewhere, on_grid
from edgelora.export import executorch_layout as layout
from edgelora.export.phone_readme import Phone
from edgelora.export.rotation import head_dim
from edgelora.progress import Progress
from edgelora.quant import moments
from edgelora.quant.curvature import Moments
from edgelora.quant.nbits import Layout
from edgelora.weights import Checkpoint

DEFAULT_TYPE = "int4"
TYPES = {
    "int4": "4-bit weights in groups of 32, 8-bit activations (8da4w), 4-bit embedding",
    "int8": "8-bit weights by row, 8-bit activations (8da8w), 8-bit embedding",
    "fp32": "32-bit floats: exact, and large",
}
RUNTIME = "executorch"
FURTHER: tuple[str, ...] = ()
REQUIRES = ("transformers", "tokenizers")
ENVIRONMENT = "executorch"
MERGES = False
APART = False
OPTIONS = frozenset({"importance"})
CALIBRATION = "moments"
PHONE = Phone(
    library=f"ExecuTorch {environments.versions(ENVIRONMENT)['executorch']} (CPU, XNNPACK)",
    android=f"org.pytorch:executorch-android:{environments.versions(ENVIRONMENT)['executorch']}",
    kotlin="""\
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

val model = LlmModule("$$filesDir/$file", "$$filesDir/tokenizer.json", 0f)
model.load()

fun ask(question: String, show: (String) -> Unit) {
    val prompt = $prompt
    model.resetContext()  // each question begins anew
    model.generate(prompt, $tokens, object : LlmCallback {
        override fun onResult(piece: String) = show(piece)
    }, false)
}
""",
    ios=f"Swift package https://github.com/pytorch/executorch, branch swiftpm-{environments.versions(ENVIRONMENT)['executorch']}: executorch_llm, backend_xnnpack, kernels_llm, kernels_optimized, kernels_quantized",
    swift="""\
import ExecuTorchLLM

func path(_ name: String, _ type: String) -> String { Bundle.main.path(forResource: name, ofType: type)! }
let runner = TextRunner(modelPath: path("$stem", "pte"), tokenizerPath: path("tokenizer", "json"))

func ask(_ question: String, show: @escaping (String) -> Void) throws {
    let prompt = $prompt
    runner.reset()
    try runner.generate(prompt, Config { $$0.temperature = 0; $$0.sequenceLength = $tokens; $$0.isEchoEnabled = false }, tokenCallback: show)
}
""",
    beside=("tokenizer.json",),
)


calibration, gains_from_importance, gains_of = on_grid.calibration, on_grid.gains_from_importance, on_grid.gains_of

_LAYER_BYTES = 25_000  # of the program
_GRID = Layout(4, layout.GROUP, zeros=False, short=True)
_BITS = {"int4": (4, layout.GROUP), "int8": (8, 0), "fp32": (0, 0)}
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def write(model: Path, type: str, folder: Path, name: str, progress: Progress, importance: Moments | None = None) -> Path:
    """Write ``folder/<name>-<type>.pte`` from the Hugging Face folder `model` and return it; the tokenizer's files go beside it.

    `importance`, the second moments of every matrix's inputs on training rows, rounds `int4` by what matters.
    Raises Unsupported for a model that ExecuTorch's transformer cannot be, ToolMissing without the environment, ModelError
    with the exporter's own last words when it fails.
    """
    job = _job(model, type)
    path = folder / f"{name}-{type}.pte"
    with elsewhere.scratch(folder) as scratch:
        partial = scratch / path.name
        source, progress = on_grid.source(model, type, _GRID, importance, scratch, progress)
        job |= {"folder": str(source.resolve()), "on_grid": source != model, "output": str(partial.resolve())}
        elsewhere.run(ENVIRONMENT, job, scratch.resolve(), model, progress)
        partial.replace(path)
    for file in _BESIDE:
        if (model / file).is_file():
            shutil.copyfile(model / file, folder / file)
    _without_composing(folder / "tokenizer.json")
    progress(1.0, "written")
    return path


def context(model: Path) -> int:
    """Tokens that a file holds; of a model that stretches a shorter rotation for longer texts (LongRoPE) no more than the shorter one's."""
    longest, rope = elsewhere.context(model), configuration.of(model).rope_parameters
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return int(min(longest, original or longest))


def predict_bytes(model: Path, type: str, name: str = "", importance: object = None) -> int:
    """Estimate the bytes of the .pte. Raises Unsupported as `write` does."""
    config, shapes = configuration.of(model), Checkpoint(model).shapes
    _check(config, shapes, type, context(model))
    return bytes_of(vars(config), shapes, type)


def bytes_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str) -> int:
    """The same from a model's shape: the embedding and the head are stored apart even where they share their weights."""
    table = shapes["model.embed_tokens.weight"]
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and name not in ("model.embed_tokens.weight", "lm_head.weight")]
    bits, group = _BITS[type]
    total = sum(4 * math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    for rows, columns in [*matrices, table]:  # the table once more as the head
        scales = columns // group * 2 if group else 4
        total += rows * ((columns * bits // 8 + scales) if bits else columns * 4)
    total += int(config["num_hidden_layers"]) * _LAYER_BYTES
    total += 8 * min(elsewhere.CONTEXT, int(config["max_position_embeddings"])) * head_dim(SimpleNamespace(**config))  # sines and cosines
    rows, columns = table
    total += rows * ((columns * bits // 8 + (columns // group * 4 if group else 4)) if bits else columns * 4)
    return total


def estimate_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str, importance: bool) -> dict[str, float]:
    """What `write` will need, an estimate: `peak_bytes` of memory and `seconds` of CPU time.

    Tracing and lowering layer by layer take most of the time, fitted on one busy core of x86-64.
    Peaks: 2.2 GB for a model of 135M in 4 bits, 0.5 GB for a tiny one.
    """
    values = sum(math.prod(shape) for shape in shapes.values())
    own = {"peak_bytes": 5e8 + 13.0 * values, "seconds": 8 + 15.0 * int(config["num_hidden_layers"]) + 1.5e-7 * values}
    return moments.estimate(own, values, shapes["model.embed_tokens.weight"][0]) if importance else own


def _check(config: Any, shapes: Mapping[str, Sequence[int]], type: str, context: int) -> dict[str, layout.Rows]:
    layout.check(config, context)
    if type == "int4":
        layout.check_widths(shapes)
    return layout.tensors(config, shapes)


def _job(model: Path, type: str) -> dict[str, Any]:
    """What the other program is told; see there/write_executorch.py."""
    config, shapes, longest = configuration.opened(model), Checkpoint(model).shapes, context(model)
    tensors = _check(config, shapes, type, longest)
    tokenizer = models.open_tokenizer(model)
    more = (
        json.loads((model / "generation_config.json").read_text()).get("eos_token_id")
        if (model / "generation_config.json").is_file()
        else None
    )
    ends = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    inv_freq, factor = layout.frequencies(config, longest)
    bits, group = _BITS[type]
    return {
        "tensors": tensors,
        "params": layout.params(config, shapes, longest),
        "inv_freq": inv_freq,
        "attention_factor": factor,
        "bits": bits,
        "group": group,
        "methods": {  # what ExecuTorch's runners ask a file
            "get_bos_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
            "get_eos_ids": list(dict.fromkeys(i for i in ends if i is not None)),
            "get_max_seq_len": longest,
            "get_max_context_len": longest,
            "get_n_layers": config.num_hidden_layers,
            "get_vocab_size": shapes["model.embed_tokens.weight"][0],
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
        },
    }


def _without_composing(tokenizer: Path) -> None:
    """Take Unicode composition (NFC) out of a tokenizer: ExecuTorch's own takes letters apart instead, and what people type is composed.

    pytorch/executorch's normalizer says of itself that it "may not handle all edge cases"; with it, "naïve" becomes other tokens.
    """
    values = json.loads(tokenizer.read_text(encoding="utf-8"))
    if (values.get("normalizer") or {}).get("type") == "NFC":
        tokenizer.write_text(json.dumps(values | {"normalizer": None}, ensure_ascii=False), encoding="utf-8")
