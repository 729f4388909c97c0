"""A LoRA adapter as a GGUF file of its own: a few MB beside one shared base, put on and taken off while llama.cpp runs.

llama.cpp adds (alpha / r) B A x to W x (llama-adapter.h), so the file holds B and A as trained and alpha. Rows of q and k
stand in another order in a GGUF base than in a checkpoint; those are rows of B, and A is untouched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION

from edgelora.errors import ModelError
from edgelora.export import architectures, gguf_file
from edgelora.export.gguf import model_config
from edgelora.export.gguf_file import padded
from edgelora.quant import ggml, gguf_types
from edgelora.weights import Checkpoint, low_rank

DEFAULT_TYPE = "f16"
TYPES = {name: gguf_types.FILE_TYPES[name].about for name in ("f16", "bf16", "f32")}


def predict_bytes(base: Path, adapter: Path, type: str, name: str) -> int:
    """The exact size of what `write` would make with the same arguments."""
    pairs = _pairs(base, adapter)
    return gguf_file.file_bytes(_metadata(base, type, name, pairs), [tensor for tensor, _ in _tensors(pairs, type)])


def write(base: Path, adapter: Path, type: str, folder: Path, name: str, progress: Callable[[float, str], None]) -> Path:
    """Write ``folder/name-lora-type.gguf`` from PEFT's folder `adapter`, trained on the Hugging Face folder `base`.

    ModelError for what an adapter file cannot hold.
    """
    pairs = _pairs(base, adapter)
    tensors = list(_tensors(pairs, type))
    path = folder / f"{name}-lora-{type}.gguf"
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            head = gguf_file.header(_metadata(base, type, name, pairs), [tensor for tensor, _ in tensors])
            stream.write(head.ljust(padded(len(head)), b"\0"))
            for number, (tensor, values) in enumerate(tensors):
                progress(number / len(tensors), tensor.name)
                stream.write(ggml.quantize(values, tensor.type).tobytes().ljust(padded(tensor.bytes), b"\0"))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # GGUF name -> (scaled B, A), float32, shapes (rows, r) and (r, columns)


def _pairs(base: Path, adapter: Path) -> Pairs:
    import torch

    config = model_config(base)
    found = low_rank(adapter, Checkpoint(base).shapes)
    pairs: Pairs = {}
    for name, source in architectures.of(config.model_type).tensors(config).items():
        if source.name not in found:
            continue
        b, a = found.pop(source.name)
        if source.change is not None:
            b = source.change(torch.from_numpy(b), config).contiguous().numpy()
        pairs[name] = (b, a)
    if found or not pairs:
        left = min(found, default="nothing")
        raise ModelError(f"{adapter.name}: a GGUF adapter has no place for {left}", "merge it: export it with --format gguf")
    return pairs


def _metadata(base: Path, type: str, name: str, pairs: Pairs) -> dict[str, Any]:
    """`alpha` is r where B holds the whole scale: llama.cpp multiplies by alpha / r, and r may differ from matrix to matrix."""
    ranks = {len(a) for _, a in pairs.values()}
    if len(ranks) != 1:
        raise ModelError(
            f"the adapter has matrices of rank {sorted(ranks)}: a GGUF adapter has one alpha for all", "export it with --format gguf"
        )
    return {
        "general.architecture": architectures.of(model_config(base).model_type).name,
        "general.type": "adapter",
        "general.name": name,
        "general.file_type": gguf_types.FILE_TYPES[type].code,
        "general.quantization_version": GGML_QUANT_VERSION,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(ranks.pop()),
    }


def _tensors(pairs: Pairs, type: str) -> Iterator[tuple[gguf_file.Tensor, np.ndarray]]:
    for name, (b, a) in pairs.items():
        for suffix, values in ((".lora_a", a), (".lora_b", b)):
            yield gguf_file.Tensor(name + suffix, values.shape, gguf_types.FILE_TYPES[type].base), values
