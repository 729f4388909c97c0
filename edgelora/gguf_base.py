"""A GGUF file as a base: written out as the Hugging Face folder that training reads, one tensor at a time.

What `edgelora.export` does on the way into a file is undone here from the same tables, so a base that is read and written
again is what it was. transformers reads GGUF files too, but as a whole, rounded to one type, without what stands in tensors
(Llama 3's rotary scaling), with a model type's defaults where a key is (Qwen 3's head size), and with other token ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import weights
from edgelora.errors import ModelError
from edgelora.export import architectures
from edgelora.gguf_header import Header, Tensor, read_header
from edgelora.gguf_vocabulary import special_ids, tokenizer
from edgelora.weights import Checkpoint

_OTHER = "use the model's safetensors as base"


def write(path: Path, folder: Path) -> dict[str, Any]:
    """Write the model of the GGUF file `path` into `folder`, in 16 bits or what the file holds if that is more; returns facts about it.

    ModelError for a file that is damaged, and for one of an architecture, tokenizer or setting that is not known here.
    """
    header = read_header(path)
    config, sources = _model(header)
    tokenizer(header).save_pretrained(folder)
    config.save_pretrained(folder)
    stops = special_ids(header)
    generation = {"bos_token_id": stops.get("bos"), "eos_token_id": [stops[n] for n in ("eos", "eot", "eom") if n in stops]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    stored = {tensor.type for tensor in header.tensors if len(tensor.shape) > 1}
    wide = next((type for type in ("F32", "F16") if type in stored), "BF16")
    source = _Stored(header, sources, config)
    weights.write(source, folder, lambda share, name: None, wide)
    return {
        "parameters": sum(math.prod(shape) for shape in source.shapes.values()),
        "architecture": config.model_type,
        "gguf_pre_tokenizer": header.metadata.get("tokenizer.ggml.pre"),
        "licence": header.metadata.get("general.license"),
    }


def _model(header: Header) -> tuple[Any, dict[str, tuple[Tensor, architectures.Source]]]:
    """The configuration as transformers knows it, and checkpoint name -> (tensor of the file, what was done to it)."""
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(f"{header.path.name} is one part of several", "join them first: llama-gguf-split --merge")
    model_type, architecture = architectures.of_gguf(str(header.metadata.get("general.architecture")))
    prefix = f"{architecture.name}."
    keys = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    tensors = {tensor.name: tensor for tensor in header.tensors}
    try:
        settings = architecture.settings(architectures.File(keys, tensors, lambda name: _read(header.path, tensors[name])))
        config = _config(model_type, settings, tensors["token_embd.weight"].shape[-1], special_ids(header))
        written = architecture.metadata(config)
        implied = architecture.vectors(config)
        wanted = architecture.tensors(config)
    except ModelError as error:
        raise ModelError(f"{header.path.name}: {error.message}", error.hint) from error
    except Exception as error:  # keys that are missing or of another type, and values that transformers refuses in its own ways
        cause = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ModelError(f"{header.path.name} cannot be read as a base: {cause}", _OTHER) from error
    _check_keys(header.path, keys, written)
    sources = {source.name: (tensors[key], source) for key, source in wanted.items() if key in tensors}
    left = set(tensors) - set(implied) - {tensor.name for tensor, _ in sources.values()}
    if left:
        raise ModelError(f"{header.path.name}: a {model_type} model has no place for {min(left)}", _OTHER)
    _check_shapes(header.path, config, {name: tensor.shape[::-1] for name, (tensor, _) in sources.items()})
    return config, sources


def _config(model_type: str, settings: Mapping[str, Any], vocabulary: int, special: Mapping[str, int]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ids = {f"{name}_token_id": special.get(key) for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    config = AutoConfig.for_model(model_type, **settings, **ids, vocab_size=vocabulary, dtype="bfloat16")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return config


def _check_keys(path: Path, stated: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """ModelError when an export of this configuration would say something else of rotation or attention than the file does."""
    for key, value in stated.items():
        if not key.startswith(("rope.", "attention.")) or key.startswith("attention.sliding_window"):
            continue
        ours = written.get(key)
        same = (
            np.float32(ours) == np.float32(value) if isinstance(ours, (int, float)) and isinstance(value, (int, float)) else ours == value
        )
        if not same:
            raise ModelError(f"{path.name}: {key} = {value} cannot be carried over to a configuration of transformers", _OTHER)


def _check_shapes(path: Path, config: Any, found: Mapping[str, tuple[int, ...]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = {name: tuple(weight.shape) for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ModelError(f"{path.name}: {name} has the shape {found.get(name)}, its keys say {wanted.get(name)}", "download it again")


class _Stored(Checkpoint):
    """The tensors of a GGUF file under their names in a checkpoint, in float32, with what an export did to them undone."""

    def __init__(self, header: Header, sources: Mapping[str, tuple[Tensor, architectures.Source]], config: Any) -> None:
        self._path, self._sources, self._config = header.path, sources, config
        self._last: tuple[str, np.ndarray] | None = None  # changed as a whole: ranges are asked for tensor by tensor

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape[::-1] for name, (tensor, _) in self._sources.items()}

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        tensor, source = self._sources[name]
        if source.change is None:
            return _read(self._path, tensor, first, last)
        if self._last is None or self._last[0] != name:
            self._last = name, self._undone(tensor, source.change.undo)
        return self._last[1][first:last]

    def _undone(self, tensor: Tensor, undo: Callable[[Any, Any], Any]) -> np.ndarray:
        values = _read(self._path, tensor).reshape(tensor.shape[::-1])
        return np.asarray(undo(values, self._config).reshape(-1, tensor.shape[0]))


def _read(path: Path, tensor: Tensor, first: int = 0, last: int | None = None) -> np.ndarray:
    """Rows [first, last) of a tensor, float32, shape (rows, columns)."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = math.prod(tensor.shape[1:])
    row_bytes, end = tensor.n_bytes // rows, rows if last is None else last
    data = np.fromfile(path, np.uint8, (end - first) * row_bytes, offset=tensor.offset + first * row_bytes)
    try:
        values = dequantize(data.reshape(-1, row_bytes), GGMLQuantizationType[tensor.type])
    except (NotImplementedError, KeyError) as error:
        raise ModelError(
            f"{path.name}: {tensor.name} is of type {tensor.type}, which cannot be read", "use a file of another type as base"
        ) from error
    return np.ascontiguousarray(values, dtype=np.float32)
