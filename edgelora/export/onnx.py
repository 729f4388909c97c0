"""ONNX with 4-bit or 8-bit weights, written by onnxruntime-genai's model builder and tidied for shipping.

The builder runs in a process of its own (it rewrites sys.path, keeps a gigabyte or two, prints a lot) without network and
without credentials. What it writes runs in plain ONNX Runtime, in onnxruntime-genai and in their mobile builds.

Options that the builder accepts and that break the file are out of reach: the presets below are all there is.
Asymmetric default quantization of tied embeddings, for one, exits 0 and leaves a graph that names tensors it lacks.
"""

from __future__ import annotations

import collections
import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx

from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.runtime import onnx_runtime

DEFAULT_TYPE = "int4-mixed"
TYPES = {
    "int4": "4 bits, blocks of 32, nearest rounding: the smallest",
    "int4-mixed": "4 bits by k-quant, the sensitive matrices and the embedding in 8: recommended",
    "int8": "8 bits, blocks of 32: nearly exact",
    "fp32": "no quantization: the reference",
}
RUNTIME = "onnxruntime"
REQUIRES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "tokenizers", "torch", "transformers")

_BLOCK = 32  # weights that share a scale
_DATA = f"{onnx_runtime.GRAPH}.data"
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
        _run_builder(model.resolve(), _builder_options(type, shapes), scratch.resolve(), _layers(config), progress)
        progress(0.9, "tidying the graph")
        _tidy_graph(built, type, tied)
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
    padded = table[1] % _BLOCK != 0
    if not _is_tied(config, shapes) or (padded and type == "int8"):
        total += _matrix_bytes(table, "fp32" if padded or type == "fp32" else "int8", _BLOCK, eight=True)
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
    for block in (_BLOCK, _BLOCK // 2):
        odd = [width for width in widths if -(-width // block) % 2]
        if type != "int4-mixed" or not odd:
            return block
    raise Unsupported(f"int4-mixed cannot pack a matrix {odd[0]} wide", "export type int4, int8 or a GGUF instead")


def _builder_options(type: str, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    precision, options = _BUILDER[type]
    return ["--precision", precision, "--extra_options", "hf_token=false", *options, f"block_size={_block(type, shapes)}"]


def _run_builder(model: Path, options: Sequence[str], scratch: Path, layers: int, progress: Progress) -> None:
    """Run the builder into ``scratch/model``; ModelError with the last meaningful line of its output when it fails."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(model), "--output", str(scratch / "model")]
    command += ["--execution_provider", "cpu", "--cache_dir", str(scratch / "cache"), *options]
    tail: collections.deque[str] = collections.deque(maxlen=200)
    # Its own working folder, so that no onnx.py of the user's is imported; its own session, so that it dies whole.
    with subprocess.Popen(
        command,
        cwd=scratch,
        env=_environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_us(),
    ) as process:
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
        cause = f"was ended by {signal.Signals(-code).name}"
        return ModelError(f"the ONNX builder {cause} on {model.name}", "this is usually too little memory: close other programs")
    said = (line for line in reversed(tail) if line.strip() and not line.startswith((" ", "Progress:")))
    last = next(said, "it printed nothing")[:400]
    return ModelError(f"the ONNX builder cannot export {model.name}: {last}", "export it as GGUF instead")


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


def _die_with_us() -> Callable[[], object] | None:
    """On Linux the kernel ends the builder when we die, however we die: else it writes into the next attempt's folder."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg") and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


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


def _tidy_graph(folder: Path, type: str, tied: bool) -> None:
    """Strip what tells where and when the graph was made, name the cache's head size, hold the embedding in few bits.

    The builder stamps the commit of whatever git checkout it runs in into producer_version. It leaves the cache's last
    dimension symbolic, where transformers.js and our runtime want to read the head size.
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
    table = _quantize_embedding(model.graph, folder, tied) if type != "fp32" else {}
    _repack(model.graph, folder, table)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _quantize_embedding(graph: onnx.GraphProto, folder: Path, tied: bool) -> dict[str, np.ndarray]:
    """Look embeddings up in a quantized table; returns the arrays that are to be written.

    Tied: the head's own table under a second name (two initializers, the same bytes of the data file). The builder
    reshapes the head's table at run time instead, which ONNX Runtime folds into a second copy in memory, or keeps the
    whole table in float32 beside it (int8). Untied: 8 bits in blocks of 32, q = round(w / s) + 128, s = max|w| / 127.
    """
    lookup = next((n for n in graph.node if n.name.startswith("/model/embed_tokens/") and "input_ids" in n.input), None)
    head = next((n for n in graph.node if n.name.startswith("/lm_head/") and n.op_type == "MatMulNBits"), None)
    tensors = {t.name: t for t in graph.initializer}
    settings = {a.name: a.i for a in head.attribute} if head else {}
    if lookup is None or head is None or settings["K"] % _BLOCK:  # padded rows: the builder's own lookup cuts the padding off
        return {}
    arrays: dict[str, np.ndarray] = {}
    if tied:
        alias = onnx.TensorProto()
        alias.CopyFrom(tensors[head.input[1]])
        alias.name = "model.embed_tokens.weight_quantized"
        alias.dims[:] = [settings["N"], settings["K"] * settings["bits"] // 8]
        names, bits, block = [alias.name, *head.input[2:]], settings["bits"], settings["block_size"]
        graph.initializer.append(alias)
    else:
        bits, block = 8, _BLOCK
        table, scales = _round_rows(_external_array(tensors[lookup.input[0]], folder), block)
        arrays = {"model.embed_tokens.weight_quantized": table, "model.embed_tokens.weight_scales": scales}
        names = list(arrays)
        for name, array in arrays.items():
            graph.initializer.add(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    _remove(graph, lookup.input[0])
    quantized = onnx.helper.make_node(
        "GatherBlockQuantized",
        [names[0], "input_ids", *names[1:]],
        [lookup.output[0]],
        "/model/embed_tokens/GatherBlockQuantized",
        domain="com.microsoft",
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    lookup.CopyFrom(quantized)
    return arrays


def _round_rows(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, width) float32 -> uint8 of the same shape and float32 scales (rows, width / block)."""
    rows, width = weight.shape
    table, scales = np.empty((rows, width), np.uint8), np.empty((rows, width // block), np.float32)
    for start in range(0, rows, 4096):  # a vocabulary of 262k rows is not held in float32
        part = np.asarray(weight[start : start + 4096]).reshape(-1, width // block, block)
        scale = np.abs(part).max(axis=-1) / np.float32(127)
        steps = np.rint(part / np.where(scale == 0, np.float32(1), scale)[..., None]) + 128
        table[start : start + 4096], scales[start : start + 4096] = steps.reshape(-1, width), scale
    return table, scales


def _external_array(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    entry = {e.key: e.value for e in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / entry["location"], dtype, "r", int(entry["offset"]), tuple(tensor.dims))


def _remove(graph: onnx.GraphProto, name: str) -> None:
    """Take the initializer `name`, or the node that makes it, out of the graph."""
    for tensor in [t for t in graph.initializer if t.name == name]:
        graph.initializer.remove(tensor)
    for node in [n for n in graph.node if name in n.output]:
        graph.node.remove(node)
    for value in [v for v in graph.value_info if v.name == name]:
        graph.value_info.remove(value)


def _repack(graph: onnx.GraphProto, folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the data file anew with what the graph still names, `arrays` included; equal spans are written once.

    Tensors of a mebibyte and more start at a multiple of 64 KiB, so that every system can map them into memory.
    """
    source, target = folder / _DATA, folder / f"{_DATA}.new"
    written: dict[tuple[str, str], int] = {}
    with source.open("rb") as old, target.open("wb") as new:
        for tensor in graph.initializer:
            entry = {e.key: e.value for e in tensor.external_data}
            array = arrays.get(tensor.name)
            length = int(entry["length"]) if array is None else array.nbytes
            span = (tensor.name, "") if array is not None else (entry["offset"], entry["length"])
            if span not in written:
                new.seek(-new.tell() % (1 << 16 if length >= 1 << 20 else 64), os.SEEK_CUR)
                written[span] = new.tell()
                if array is None:
                    old.seek(int(entry["offset"]))
                    _copy(old, new, length)
                else:
                    new.write(array.data)
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            for key, value in (("location", _DATA), ("offset", written[span]), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            tensor.data_location = onnx.TensorProto.EXTERNAL
    target.replace(source)


def _copy(old: BinaryIO, new: BinaryIO, length: int) -> None:
    while length:
        block = old.read(min(length, 1 << 22))
        if not block:
            raise ModelError("the ONNX builder wrote a data file that is too short", "run the export again")
        new.write(block)
        length -= len(block)


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
