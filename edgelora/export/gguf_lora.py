"""A LoRA adapter as a GGUF file of its own: a few MB beside one shared base, put on and taken off while llama.cpp runs.

llama.cpp adds (alpha / r) B A x to W x (llama-adapter.h), so the file holds B and A as trained and alpha. Rows of q and k
stand in another order in a GGUF base than in a checkpoint; those are rows of B, and A is untouched. Beside it lies the
base, of any type, which many adapters share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION

from edgelora.errors import ModelError, UsageError
from edgelora.export import architectures, configuration, gguf, gguf_file
from edgelora.export.gguf_file import padded
from edgelora.quant import ggml, gguf_types
from edgelora.quant.importance import Importance
from edgelora.weights import Base, Checkpoint, Merged

DEFAULT_TYPE = "q8_0"
TYPES = gguf.TYPES  # of the base; the adapter is in 16 bits beside any of them
RUNTIME = gguf.RUNTIME
FURTHER = gguf.FURTHER
REQUIRES = gguf.REQUIRES
MERGES = True
APART = True
OPTIONS = gguf.OPTIONS
CALIBRATION = gguf.CALIBRATION
calibration = gguf.calibration
bytes_of = gguf.bytes_of  # of the base beside the adapter

BASE_NAME = "general.base_model.0.name"
_ADAPTER = "f16"


def predict_bytes(
    model: Path,
    type: str,
    name: str = "",
    importance: Importance | None = None,
    tensor_types: Sequence[str] = (),
    weights: Checkpoint | None = None,
) -> int:
    """The exact size of the adapter's file. Before there is an adapter (no `weights`) that of the base beside it."""
    if not isinstance(weights, Merged):
        return gguf.predict_bytes(model, type, f"{name}-base", importance, tensor_types, weights)
    pairs = _pairs(model, weights)
    return gguf_file.file_bytes(_metadata(model, type, name, pairs), [tensor for tensor, _ in _tensors(pairs)])


def write(
    model: Path,
    type: str,
    folder: Path,
    name: str,
    progress: Callable[[float, str], None],
    importance: Importance | None = None,
    tensor_types: Sequence[str] = (),
    weights: Checkpoint | None = None,
    threads: int = 0,
) -> Path:
    """Write ``folder/name-lora.gguf`` and, of the given `type`, the base that it goes with: ``folder/name-base-type.gguf``.

    `weights` is the adapter with its base; `model` needs config.json and the tokenizer alone. UsageError when there is
    no adapter, ModelError for what an adapter file cannot hold.
    """
    if not isinstance(weights, Merged):
        raise UsageError("gguf-lora is a base and an adapter beside it", "name a base as MODEL and its adapter with --adapter")
    pairs = _pairs(model, weights)
    base = Base(weights.folder, weights.held, weights.arithmetic)
    gguf.write(model, type, folder, f"{name}-base", progress, importance, tensor_types, base, threads=threads)
    tensors = list(_tensors(pairs))
    path = folder / f"{name}-lora.gguf"
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            head = gguf_file.header(_metadata(model, type, name, pairs), [tensor for tensor, _ in tensors])
            stream.write(head.ljust(padded(len(head)), b"\0"))
            for tensor, values in tensors:
                stream.write(ggml.quantize(values, tensor.type).tobytes().ljust(padded(tensor.bytes), b"\0"))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


gains_from_importance = gguf.gains_from_importance  # all three are the base's: beside it the adapter is small
mixture = gguf.mixture


Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # GGUF name -> (scaled B, A), float32, shapes (rows, r) and (r, columns)


def _pairs(model: Path, weights: Merged) -> Pairs:
    config = configuration.of(model)
    found = dict(weights.low_rank)
    pairs: Pairs = {}
    for name, source in architectures.of(config.model_type).tensors(config).items():
        if source.name not in found:
            continue
        b, a, lengths = found.pop(source.name)
        if lengths is not None:
            raise ModelError("a GGUF adapter holds A and B, but not what DoRA trains beside them", "merge it: export it with --format gguf")
        if source.change is not None:
            b = np.ascontiguousarray(source.change.do(b, config))
        pairs[name] = (b, a)
    if found or not pairs:
        left = min(found, default="nothing")
        raise ModelError(f"a GGUF adapter has no place for {left}", "merge it: export it with --format gguf")
    return pairs


def _metadata(model: Path, type: str, name: str, pairs: Pairs) -> dict[str, Any]:
    """`alpha` is r where B holds the whole scale: llama.cpp multiplies by alpha / r, and r may differ from matrix to matrix."""
    ranks = {len(a) for _, a in pairs.values()}
    if len(ranks) != 1:
        raise ModelError(
            f"the adapter has matrices of rank {sorted(ranks)}: a GGUF adapter has one alpha for all", "export it with --format gguf"
        )
    return {
        "general.architecture": architectures.of(configuration.of(model).model_type).name,
        "general.type": "adapter",
        "general.name": name,
        "general.file_type": gguf_types.FILE_TYPES[_ADAPTER].code,
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.base_model.count": 1,
        BASE_NAME: f"{name}-base-{type}",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(ranks.pop()),
    }


def _tensors(pairs: Pairs) -> Iterator[tuple[gguf_file.Tensor, np.ndarray]]:
    for name, (b, a) in pairs.items():
        for suffix, values in ((".lora_a", a), (".lora_b", b)):
            yield gguf_file.Tensor(name + suffix, values.shape, gguf_types.FILE_TYPES[_ADAPTER].base), values
