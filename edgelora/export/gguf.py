"""GGUF, llama.cpp's format: one file with the weights, the tokenizer and the chat template.

The checkpoint is read one tensor at a time and quantized in row ranges, so neither a 16-bit file nor the whole model
in memory is needed. The same input gives the same bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION

from edgelora import machine
from edgelora.errors import ModelError
from edgelora.export import architectures, configuration, gguf_file, gguf_tokenizer, rotation
from edgelora.export.gguf_file import padded
from edgelora.quant import compensate, ggml, gguf_types
from edgelora.quant import importance as importances
from edgelora.quant.importance import Importance
from edgelora.weights import Checkpoint, ranges

DEFAULT_TYPE = "q4_k_m"
TYPES = {name: kind.about for name, kind in gguf_types.FILE_TYPES.items()}
RUNTIME = "llama.cpp"
FURTHER: tuple[str, ...] = ()
REQUIRES = ("gguf", "llama_cpp")
MERGES = True
APART = False
OPTIONS = frozenset({"importance", "tensor_types"})
CALIBRATION = "importance"

_RANGES_AHEAD = 4  # of one tensor and for each thread: quantized, or waiting for it, ahead of what is written
_HEADER_BYTES = 45  # a token of the vocabulary, its merges included: 36 (SmolLM2) to 61 (Llama 3)


def predict_bytes(
    model: Path,
    type: str,
    name: str = "",
    importance: Importance | None = None,
    tensor_types: Sequence[str] = (),
    weights: Checkpoint | None = None,
) -> int:
    """The exact size of what `write` would make with the same arguments, from headers alone.

    The header holds `name`: without it the answer is short by at most its length in UTF-8 plus 31 bytes of padding. An
    empty `importance` stands for one that will be measured; ModelError for a type that is noise without one.
    """
    layout = _Layout.of(model, type, name, importance, tensor_types, weights)
    if importance is None:
        layout.check_importance(type, {})
    return layout.data_start + sum(padded(tensor.bytes) for tensor in layout.tensors)


def bytes_of(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], type: str, tensor_types: Sequence[str] = (), header: int | None = None
) -> int:
    """The size of a file of which nothing is on this disk but its shape: exact to what `header` (its vocabulary) holds.

    `config` are config.json's settings, `shapes` its weights' by their names. As if an importance matrix were at hand.
    """
    architecture = architectures.of(str(config["model_type"]))
    settings = SimpleNamespace(**{"num_key_value_heads": config["num_attention_heads"], **config})
    settings.tie_word_embeddings = "lm_head.weight" not in shapes
    names = {key: source.name for key, source in architecture.tensors(settings).items() if source.name in shapes}
    found = {key: shapes[name] for key, name in names.items()}
    shape = gguf_types.Shape(settings.num_hidden_layers, settings.num_attention_heads, settings.num_key_value_heads, architecture.name)
    choices = gguf_types.plan(found, type, shape, True, tensor_types)
    weights = sum(padded(math.prod(dims[:-1]) * ggml.row_bytes(choices[key].type, dims[-1])) for key, dims in found.items())
    return weights + (_HEADER_BYTES * int(config["vocab_size"]) if header is None else header)


def gains_from_importance(model: Path, type: str, tensor_types: Sequence[str] = (), weights: Checkpoint | None = None) -> bool:
    """Whether any tensor of the file is quantized by a method that looks at an importance matrix."""
    return gguf_types.gains_from_importance(_Layout.of(model, type, "", None, tensor_types, weights).choices)


def calibration(path: Path) -> Importance:
    """What `write` takes as `importance`, from the file that was measured."""
    return importances.read(path)


def mixture(
    model: Path,
    type: str,
    importance: Importance | None = None,
    tensor_types: Sequence[str] = (),
    weights: Checkpoint | None = None,
) -> dict[str, Any]:
    """What the matrices of the file will be: how many of each type, bits a weight over all, and every fallback.

    A fallback: `tensors` of them, whose rows of `columns` weights are no multiple of the wanted type's block.
    """
    layout = _Layout.of(model, type, "", importance, tensor_types, weights)
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    types = Counter(layout.choices[name].type.name.lower() for name in matrices)
    fallbacks = Counter((c.wanted, c.type, shapes[name][-1]) for name, c in layout.choices.items() if c.fell_back)
    return {
        "bits_a_weight": gguf_types.bits_a_weight(layout.choices, shapes),
        "types": dict(types.most_common()),
        "fallbacks": [
            {
                "wanted": wanted.name.lower(),
                "block": ggml.block_size(wanted),
                "type": stands_in.name.lower(),
                "columns": columns,
                "tensors": count,
            }
            for (wanted, stands_in, columns), count in fallbacks.items()
        ],
    }


def layer_matrices(model: Path, type: str, weights: Checkpoint) -> tuple[dict[str, str], dict[str, ggml.Type]]:
    """Of every matrix of a layer, by its GGUF name: its name in the checkpoint, and the type it gets."""
    layout = _Layout.of(model, type, "", None, (), weights)
    found = {t.name: t for t in layout.tensors if t.source is not None and len(t.shape) > 1 and t.name.startswith("blk.")}
    return {name: t.source.name for name, t in found.items() if t.source}, {name: t.type for name, t in found.items()}


def matrices(model: Path, name: str, weights: Checkpoint | None = None) -> tuple[int, dict[str, Matrix]]:
    """Bytes of the file without the matrices that may take one type or another, and those matrices, in file order."""
    layout = _Layout.of(model, "f16", name, None, (), weights)
    chosen = {tensor.name: tensor for tensor in layout.tensors if tensor.type == ggml.Type.F16 and tensor.source is not None}
    rest = layout.data_start + sum(padded(tensor.bytes) for tensor in layout.tensors if tensor.name not in chosen)
    return rest, {key: Matrix(tensor.shape, partial(_values, tensor, layout)) for key, tensor in chosen.items()}


@dataclass(frozen=True)
class Matrix:
    """A matrix of the file: its shape, and a function that reads its weights, float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def bytes(self, type: ggml.Type) -> int:
        """What it takes in the file, padding included."""
        return padded(math.prod(self.shape[:-1]) * ggml.row_bytes(type, self.shape[-1]))


def write(
    model: Path,
    type: str,
    folder: Path,
    name: str,
    progress: Callable[[float, str], None],
    importance: Importance | None = None,
    tensor_types: Sequence[str] = (),
    weights: Checkpoint | None = None,
    rounding: compensate.Rounding | None = None,
    threads: int = 0,
) -> Path:
    """Write ``folder/name-type.gguf`` from the Hugging Face folder `model` and return its path.

    `weights`: where the weights come from if not from `model`, for instance a `Merged` that adds an adapter to each as
    it is read; then `model` needs config.json and the tokenizer alone.

    `importance`: GGUF tensor name -> float32, shape (columns,), the mean square of each column's input; with it the
    quantizers weigh errors as llama.cpp does with an importance matrix. `tensor_types`: "PATTERN=TYPE", see
    `gguf_types.overrides`. `rounding`: how matrices are rounded, if not by ggml with `importance`. `threads` merge and
    quantize (0: as many as there are cores). `progress(share, tensor name)` is called as tensors are written.

    Raises ModelError, naming the culprit, for a model that is damaged or that llama.cpp cannot run, and for a type that
    is noise without an importance matrix when there is none. No half file is left under the final name.
    """
    layout = _Layout.of(model, type, name, importance, tensor_types, weights)
    layout.check_importance(type, importance or {})
    header = layout.header
    path = folder / f"{name}-{type}.gguf"
    partial = path.with_name(f".{path.name}.partial")
    total = layout.data_start + sum(padded(tensor.bytes) for tensor in layout.tensors)
    threads = threads or machine.cores()
    try:
        with partial.open("wb") as stream, layout.checkpoint.shared(), ThreadPoolExecutor(threads) as pool:
            stream.write(header.ljust(layout.data_start, b"\0"))
            for tensor, blocks in groupby(_packed(layout, importance, rounding, pool, _RANGES_AHEAD * threads), itemgetter(0)):
                progress(stream.tell() / total, tensor)
                stream.writelines(block for _, block in blocks)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    progress(1.0, path.name)
    return path


# ---- layout ----


@dataclass(frozen=True)
class _Tensor(gguf_file.Tensor):
    """One tensor of the file: `source` in the checkpoint, or `values` that the configuration implies."""

    source: architectures.Source | None = None
    values: np.ndarray | None = None


@dataclass(frozen=True)
class _Layout:
    """Everything about the file but the weights. The tokenizer is read when the header is asked for."""

    model: Path
    name: str
    type: gguf_types.FileType
    architecture: architectures.Architecture
    config: Any
    checkpoint: Checkpoint
    tensors: tuple[_Tensor, ...]
    choices: Mapping[str, gguf_types.Choice]

    @classmethod
    def of(
        cls,
        model: Path,
        type: str,
        name: str,
        importance: Importance | None,
        tensor_types: Sequence[str],
        weights: Checkpoint | None = None,
    ) -> _Layout:
        file_type = gguf_types.file_type(type)
        config = configuration.of(model)
        architecture = architectures.of(config.model_type)
        checkpoint = weights or Checkpoint(model)
        if checkpoint.unties:
            config.tie_word_embeddings = False
        sources = _matched(architecture.tensors(config), checkpoint, config)
        vectors = architecture.vectors(config)
        shapes = {key: checkpoint.shapes[source.name] for key, source in sources.items()} | {key: v.shape for key, v in vectors.items()}
        shape = gguf_types.Shape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, architecture.name)
        types = gguf_types.plan(shapes, type, shape, importance is not None, tensor_types)
        tensors = tuple(_Tensor(key, shapes[key], types[key].type, sources.get(key), vectors.get(key)) for key in shapes)
        return cls(model, name, file_type, architecture, config, checkpoint, tensors, types)

    def check_importance(self, type: str, importance: Importance) -> None:
        """ModelError when the matrix that a coarse type needs is absent, or is one of another model."""
        columns = {tensor.name: tensor.shape[-1] for tensor in self.tensors}
        strange = next((name for name, means in importance.items() if columns.get(name) != len(means)), None)
        if strange:
            raise ModelError(
                f"the importance matrix is of another model: its {strange} has {len(importance[strange])} columns",
                "measure it on this model's training rows",
            )
        if lacking := gguf_types.lacking_importance(self.choices, type, importance):
            kind = self.choices[lacking].type.name
            raise ModelError(
                f"{type} without an importance matrix is noise ({lacking} would be {kind})",
                "`edgelora run` measures one on your training rows, --imatrix names one; or choose a type of more bits",
            )

    @cached_property
    def header(self) -> bytes:
        architecture = self.architecture
        metadata = {
            "general.architecture": architecture.name,
            "general.type": "model",
            "general.name": _plain_name(self.name),
            "general.file_type": int(self.type.code),
            "general.quantization_version": GGML_QUANT_VERSION,
            **{f"{architecture.name}.{key}": value for key, value in architecture.metadata(self.config).items()},
            **gguf_tokenizer.metadata(self.model, self.checkpoint.shapes["model.embed_tokens.weight"][0]),
        }
        return gguf_file.header(metadata, self.tensors)

    @property
    def data_start(self) -> int:
        return padded(len(self.header))


def _plain_name(name: str) -> str:
    """llama.cpp makes every special token of a model called phi-3 swallow the spaces after it (llama-vocab.cpp), so none is called that."""
    return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


# ---- weights ----


def _values(tensor: _Tensor, layout: _Layout, first: int = 0, last: int | None = None) -> np.ndarray:
    """Rows [first, last) as the file has them before they are quantized, float32; whole heads where a change goes by heads."""
    assert tensor.source is not None
    name, change = tensor.source.name, tensor.source.change
    values = layout.checkpoint.rows(name, first, last)
    if change is None:
        return values
    stored = values if len(tensor.shape) > 1 else values[0]
    try:
        return np.asarray(change.do(stored, layout.config).reshape(values.shape))
    except ValueError as error:
        raise ModelError(f"{name} of shape {tensor.shape} does not fit config.json: {error}", "copy the model again") from error


def _packed(
    layout: _Layout, importance: Importance | None, rounding: compensate.Rounding | None, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[str, bytes]]:
    """Every tensor's name and bytes, a range of rows at a time and in order: read, merged and quantized in `pool`, at most `ahead` of them early.

    numpy and ggml release Python's lock meanwhile. The ranges depend on the model alone, so the bytes are the same for any number
    of threads. No worker waits where a tensor ends.
    """
    waiting: deque[tuple[str, Future[bytes]]] = deque()
    for tensor, pack in _pieces(layout, importance, rounding):
        waiting.append((tensor, pool.submit(pack)))
        if len(waiting) > ahead:
            name, first = waiting.popleft()
            yield name, first.result()
    for name, rest in waiting:
        yield name, rest.result()


def _pieces(
    layout: _Layout, importance: Importance | None, rounding: compensate.Rounding | None
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Every tensor's name and a function that makes a range of its rows; the last one ends where the next tensor begins."""

    def pack(tensor: _Tensor, quantize: Callable[..., np.ndarray], rows: tuple[int, int]) -> bytes:
        packed = _quantized(_values(tensor, layout, *rows), tensor, quantize)
        return packed.ljust(len(packed) + padded(tensor.bytes) - tensor.bytes, b"\0") if rows[1] == math.prod(tensor.shape[:-1]) else packed

    for tensor in layout.tensors:
        if tensor.source is None:
            yield tensor.name, partial(np.asarray(tensor.values, dtype="<f4").tobytes().ljust, padded(tensor.bytes), b"\0")
            continue
        quantize, at_once = partial(ggml.quantize, type=tensor.type, importance=(importance or {}).get(tensor.name)), 0
        if rounding is not None and len(tensor.shape) > 1:
            quantize, at_once = partial(rounding.quantize, tensor.name, type=tensor.type), compensate.values_at_once(tensor.shape[-1])
        for rows in ranges(tensor.shape, rotation.head_dim(layout.config) if tensor.source.change else 1, at_once):
            yield tensor.name, partial(pack, tensor, quantize, rows)


def _quantized(values: np.ndarray, tensor: _Tensor, quantize: Callable[..., np.ndarray]) -> bytes:
    assert tensor.source is not None
    name, type = tensor.source.name, tensor.type
    lowest, highest = values.min(), values.max()  # NaN if any value is
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ModelError(f"{name} holds NaN or infinite weights", "the training diverged: lower the learning rate and train again")
    if type == ggml.Type.F16 and max(-lowest, highest) > np.finfo(np.float16).max:
        raise ModelError(f"{name} holds {max(-lowest, highest):.3g}, more than f16 can", "choose bf16 or f32")
    try:
        return quantize(values=values).tobytes()
    except ModelError as error:
        raise ModelError(f"{name}: {error.message}", error.hint) from error


def _matched(wanted: Mapping[str, architectures.Source], checkpoint: Checkpoint, config: Any) -> dict[str, architectures.Source]:
    """The tensors to write; every tensor of the checkpoint must be among them."""
    found = {key: source for key, source in wanted.items() if source.name in checkpoint.shapes or not source.optional}
    missing = [source.name for source in found.values() if source.name not in checkpoint.shapes]
    if missing:
        raise ModelError(f"the model lacks {len(missing)} tensors, the first is {missing[0]}", "copy or merge the model again")
    left = set(checkpoint.shapes) - {source.name for source in found.values()}
    if config.tie_word_embeddings:
        left.discard("lm_head.weight")  # a copy of the embedding
    if left:
        raise ModelError(
            f"GGUF export has no place for {len(left)} tensors, the first is {min(left)}", f"is this a plain {config.model_type} model?"
        )
    return found
