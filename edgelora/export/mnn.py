"""MNN: a folder for Alibaba's MNN on phones, with its own tokenizer file, chat template and ends of answers inside.

Written in the environment "mnn" by llmexport, MNN's exporter. Weights are rounded to levels from the smallest to the largest value of
a block; while it runs, activations are rounded to 8 bits as they come. The exporter rounds what it reads, and reads float32
here: from a 16-bit checkpoint it would compute its levels in 16 bits too.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import environments, models
from edgelora.data import chat
from edgelora.errors import Unsupported, VerifyError
from edgelora.export import digits, elsewhere, on_grid, transformers4, verify
from edgelora.export.phone_readme import Phone
from edgelora.progress import Progress
from edgelora.quant import moments
from edgelora.quant.curvature import Moments
from edgelora.quant.nbits import Layout
from edgelora.runtime import mnn as runtime
from edgelora.runtime.text import FolderText

DEFAULT_TYPE = "int4"
TYPES = {
    "int4": "4-bit weights in blocks of 64, 8-bit activations, 4-bit embedding",
    "int8": "8-bit weights in blocks of 64, 8-bit activations, 8-bit embedding",
    "fp16": "16-bit floats, a bfloat16 embedding: nearly exact, and large",
}
RUNTIME = "mnn"
FURTHER: tuple[str, ...] = ()
REQUIRES = ("transformers", "tokenizers")
ENVIRONMENT = "mnn"
MERGES = False
APART = False
OPTIONS = frozenset({"importance"})
CALIBRATION = "moments"
PHONE = Phone(
    library=f"MNN {environments.versions(ENVIRONMENT)['MNN']} (CPU), built from its sources with -DMNN_BUILD_LLM=ON -DMNN_LOW_MEMORY=ON -DMNN_SUPPORT_TRANSFORMER_FUSE=ON",
    android="",
    kotlin="""\
// No Maven artifact: build libMNN.so with the NDK (project/android/build_64.sh), and this function's C++ below into a library of yours.
object Model {
    init { System.loadLibrary("answer") }
    external fun open(folder: String)
    external fun ask(question: String): String
}
// Model.open("$$filesDir/$file"), once and not on the main thread; then Model.ask("...")
""",
    ios="MNN.framework: package_scripts/ios/buildiOS.sh of MNN's sources with the same options; the C++ below in an Objective-C++ file (.mm)",
    swift="""\
// With a bridging header that declares  void modelOpen(const char *);  const char *modelAsk(const char *);
modelOpen(Bundle.main.path(forResource: "$file", ofType: nil)!)

func ask(_ question: String) -> String { String(cString: modelAsk(question)) }
""",
    cpp="""\
#include <llm/llm.hpp>
#include <sstream>
using namespace MNN::Transformer;

static Llm *llm;
static std::string said;

extern "C" void modelOpen(const char *folder) {
    llm = Llm::createLLM(std::string(folder) + "/config.json");
    llm->load();
}

extern "C" const char *modelAsk(const char *question) {
    std::ostringstream out;
    llm->reset();                                 // each question begins anew
    llm->response(std::string(question), &out);  // the folder's template goes around it
    said = out.str();
    return said.c_str();
}
""",
)


calibration, gains_from_importance, gains_of = on_grid.calibration, on_grid.gains_from_importance, on_grid.gains_of

# Architectures whose graph was held against the model itself, on tiny models of them.
ARCHITECTURES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_BLOCK = 64
_GRID = Layout(4, _BLOCK, zeros=True, short=True)
_BITS = {"int4": 4, "int8": 8, "fp16": 16}
_KEPT = ("llm.mnn", "llm.mnn.weight", "llm_config.json", "config.json", "tokenizer.mtok", "embeddings_bf16.bin")
_LAYER_BYTES = 16_500  # of the graph


def write(model: Path, type: str, folder: Path, name: str, progress: Progress, importance: Moments | None = None) -> Path:
    """Write the folder ``folder/<name>-<type>-mnn`` from the Hugging Face folder `model` and return it.

    `importance`, the second moments of every matrix's inputs on training rows, rounds `int4` by what matters.
    Raises Unsupported for a model that was not tried, ToolMissing without the environment, VerifyError when MNN's template
    engine renders otherwise than training did, ModelError with the exporter's own last words when it fails.
    """
    _, shapes = _check(model, type)
    target = folder / f"{name}-{type}-mnn"
    with elsewhere.scratch(folder) as scratch:
        # Relative names: the exporter takes a path with "bge" or "gte" anywhere in it for another kind of model.
        kept = ("model.embed_tokens.weight",) if "lm_head.weight" in shapes else ()  # in 16 bits
        source, progress = on_grid.source(model, type, _GRID, importance, scratch, progress, kept)
        described, built = transformers4.described(source.resolve(), scratch), scratch / "built"
        digits.as_pattern(described / "tokenizer.json")
        options = ["--quant_bit", str(_BITS[type]), "--quant_block", str(_BLOCK), *(["--seperate_embed"] if type == "fp16" else [])]
        job = {"model": described.name, "output": built.name, "options": options, "on_grid": source != model}
        job["stop_ids"] = list(FolderText(model).stop_ids)
        elsewhere.run(ENVIRONMENT, job, scratch.resolve(), model, lambda share, text: progress(0.9 * share, text))
        for path in built.iterdir():
            if path.name not in _KEPT:
                path.unlink()  # the graph once more as JSON, and the paths of this machine
        _settle(built, context(model))
        _without_prefix(built / "tokenizer.mtok")
        progress(0.9, "rendering the chat template in MNN")
        _same_rendering(model, built)
        shutil.rmtree(target, ignore_errors=True)
        built.rename(target)
    progress(1.0, "written")
    return target


context = elsewhere.context


def predict_bytes(model: Path, type: str, name: str = "", importance: object = None) -> int:
    """Estimate the bytes of the folder, from the shapes and the tokenizer. Raises Unsupported as `write` does."""
    config, shapes = _check(model, type)
    return bytes_of(vars(config), shapes, type) + int(0.36 * (model / "tokenizer.json").stat().st_size)


def bytes_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str) -> int:
    """The same from a model's shape. A head that shares the embedding's weights is stored once, but in 16 bits."""
    total = int(config["num_hidden_layers"]) * _LAYER_BYTES + 2000
    table = shapes["model.embed_tokens.weight"]
    if type == "fp16" or "lm_head.weight" in shapes:
        total += 2 * math.prod(table)
    for name, shape in shapes.items():
        if len(shape) < 2:
            total += 8 * math.prod(shape)
        elif name != "model.embed_tokens.weight" or "lm_head.weight" not in shapes:
            scales = 0 if type == "fp16" else shape[1] // _block(shape[1]) * 8
            total += shape[0] * (shape[1] * _BITS[type] // 8 + scales)
    return total


def estimate_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], type: str, importance: bool) -> dict[str, float]:
    """What `write` will need, an estimate: `peak_bytes` of memory and `seconds` of CPU time.

    Fitted on two cores of an x86-64 machine; a slower processor takes longer.
    """
    values = sum(math.prod(shape) for shape in shapes.values())
    own = {"peak_bytes": 5e8 + 7.0 * values, "seconds": 4 + 0.15 * int(config["num_hidden_layers"]) + 3e-8 * values}
    return moments.estimate(own, values, shapes["model.embed_tokens.weight"][0]) if importance else own


def _check(model: Path, type: str) -> tuple[Any, Mapping[str, Sequence[int]]]:
    config, shapes = elsewhere.tried(model, ARCHITECTURES, "MNN folders")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise Unsupported(f"MNN's exporter was not tried with the rotation {rope!r}", "export it as gguf instead")
    return config, shapes


def _block(width: int) -> int:
    """The exporter halves the block until rows are whole blocks."""
    return math.gcd(_BLOCK, width)


def _settle(built: Path, longest: int) -> None:
    """Settings of the answer that was verified: greedy, and as long as the model goes."""
    path = built / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"sampler_type": "greedy", "max_all_tokens": longest}, indent=2) + "\n", encoding="utf-8")


def _without_prefix(path: Path) -> None:
    """MNN would put a begin token before every text, and the chat template writes it already. The layout: there/run_mnn.py."""
    kind, counts, ids, rest = path.read_bytes().split(b"\n", 3)
    special, stop, _ = counts.split()
    kept = b" ".join(ids.split()[: int(special) + int(stop)])
    path.write_bytes(b"\n".join((kind, b"%b %b 0" % (special, stop), kept, rest)))


def _same_rendering(model: Path, built: Path) -> None:
    tokenizer = models.open_tokenizer(model)
    with runtime.open(built, 1) as session:
        for conversation in verify.CONVERSATIONS:
            expected, found = chat.render(tokenizer, conversation, open_turn=True), session.library_render(conversation)
            if found != expected:
                raise VerifyError(
                    f"{model.name}: MNN's template engine renders {found[:80]!r} where training saw {expected[:80]!r}",
                    "the culprit is MNN's template engine: export it as gguf instead",
                )
