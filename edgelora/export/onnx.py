"""ONNX with 4-bit or 8-bit weights, written by onnxruntime-genai's model builder and tidied for shipping.

The builder runs in a process of its own (it rewrites sys.path, keeps a gigabyte or two, prints a lot) without network and
without credentials. What it writes runs in plain ONNX Runtime, in onnxruntime-genai and in their mobile builds.

Options that the builder accepts and that break the file are out of reach: the presets below are all there is.
Asymmetric default quantization of tied embeddings, for one, exits 0 and leaves a graph that names tensors it lacks.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from edgelora.errors import EdgeloraError, ModelError
from edgelora.runtime import onnx_runtime

DEFAULT_TYPE = "int4-mixed"
TYPES = {
    "int4": "4 bits, blocks of 32, nearest rounding: the smallest",
    "int4-mixed": "4 bits by k-quant, the sensitive matrices and the embedding in 8: recommended",
    "int8": "8 bits, blocks of 32: nearly exact, twice the size",
    "fp32": "no quantization: the reference",
}
RUNTIME = "onnxruntime"
REQUIRES = ("onnx", "onnxruntime", "onnxruntime_genai", "tokenizers")

_BUILDER = {  # type -> the builder's --precision and --extra_options
    "int4": ("int4", ("algo_config=default",)),
    "int4-mixed": ("int4", ("algo_config=k_quant_mixed",)),
    "int8": ("int8", ("algo_config=default",)),
    "fp32": ("fp32", ()),
}
_KEPT = re.compile(r"model\.onnx(\.data)?|genai_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*|vocab.*|merges\.txt")
_PRIVATE_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "local_files_only", "is_local")  # where the model lay, and how it was found

Progress = Callable[[float, str], None]


def write(model: Path, type: str, folder: Path, name: str, progress: Progress) -> Path:
    """Write ``folder/<name>-<type>-onnx`` from the Hugging Face folder `model` and return it.

    It holds model.onnx and model.onnx.data, genai_config.json, the tokenizer with its chat template, and config.json and
    generation_config.json, so that onnxruntime, onnxruntime-genai and AutoTokenizer all open it.
    Raises ModelError when the builder refuses the model or what it wrote does not load; OSError on a full disk.
    """
    if type not in TYPES:
        raise EdgeloraError(f"onnx has no type {type!r}", f"choose one of {', '.join(TYPES)}")
    target = folder / f"{name}-{type}-onnx"
    scratch = folder / ".onnx-builder"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        built = scratch / "model"
        for place in (built, scratch / "home", scratch / "tmp"):
            place.mkdir(parents=True)
        _run_builder(model.resolve(), type, scratch.resolve(), progress)
        progress(0.9, "tidying the graph")
        _tidy_graph(built)
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


def _run_builder(model: Path, type: str, scratch: Path, progress: Progress) -> None:
    """Run the builder into ``scratch/model``; ModelError with the last meaningful line of its output when it fails."""
    precision, options = _BUILDER[type]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(model), "--output", str(scratch / "model")]
    command += ["--precision", precision, "--execution_provider", "cpu", "--cache_dir", str(scratch / "cache")]
    command += ["--extra_options", "hf_token=false", *options]
    layers = max(1, int(_config(model).get("num_hidden_layers") or 1))
    tail: collections.deque[str] = collections.deque(maxlen=200)
    # Its own working folder, so that no onnx.py of the user's is imported; its own session, so that it dies whole.
    process = subprocess.Popen(
        command,
        cwd=scratch,
        env=_environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        for line in _lines(process):
            tail.append(line)
            if match := re.match(r"Reading layer (\d+)", line):
                progress(0.05 + 0.35 * int(match[1]) / layers, f"reading layer {match[1]} of {layers}")
            elif match := re.match(r"Progress: \[.*\] ([\d.]+)%", line):
                progress(0.4 + 0.5 * float(match[1]) / 100, "quantizing")
        code = process.wait()
    except BaseException:
        _kill(process)
        raise
    if code:
        raise _failure(tail, code, model)


def _failure(tail: collections.deque[str], code: int, model: Path) -> Exception:
    """The builder's own last words as an error; a full disk as the OSError it was."""
    for line in tail:
        if "no space left" in line.lower():
            return OSError(f"the ONNX builder: {line}")
    if code < 0:
        return ModelError(
            f"the ONNX builder was ended by {signal.Signals(-code).name} on {model.name}", "this is usually too little memory: close other programs"
        )
    last = next((line for line in reversed(tail) if line.strip() and not line.startswith((" ", "Progress:"))), "no output")
    return ModelError(f"the ONNX builder cannot export {model.name}: {last[:400]}", "export it as GGUF instead, or report this line to onnxruntime-genai")


def _environment(scratch: Path) -> dict[str, str]:
    """For the child only: no network, no credentials, one thread, every temporary file inside `scratch`."""
    ours = {name: value for name, value in os.environ.items() if not name.endswith("_TOKEN")}
    folders = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch / "tmp")) | {"HF_HOME": str(scratch / "home")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    return ours | folders | threads | fixed


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines of the child's output; a carriage return ends one too, as progress bars use it."""
    assert process.stdout is not None
    rest = b""
    while block := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
        *whole, rest = re.split(rb"[\r\n]+", rest + block)
        yield from (line.decode("utf-8", "replace") for line in whole)
    yield rest.decode("utf-8", "replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg") and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


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


def _tidy_graph(folder: Path) -> None:
    """Strip what tells where and when the graph was made, and write the cache's last dimension as a number.

    The builder stamps the commit of whatever git checkout it runs in into producer_version. It leaves that dimension
    symbolic, where transformers.js and our runtime want to read the head size.
    """
    path = folder / onnx_runtime.GRAPH
    model = onnx.load(path, load_external_data=False)
    model.producer_version = model.producer_version.partition("+")[0]
    head_size = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    path.write_bytes(model.SerializeToString(deterministic=True))


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
