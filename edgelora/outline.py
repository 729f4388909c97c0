"""What a base looks like without its weights: enough to plan memory, time and sizes. Nothing is fetched, and torch is not needed.

A folder gives its config.json and weight headers, or its config.json alone; a GGUF file its header; a hub id what of it is in
the local cache, else the published shape in `bases.yaml`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora import models
from edgelora.errors import ModelError
from edgelora.gguf_header import Array, Header, read_header

TABLE = Path(__file__).with_name("bases.yaml")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TYPES = {"gemma3": "gemma3_text"}  # general.architecture of a GGUF file -> model_type, where the two differ


@dataclass(frozen=True)
class Outline:
    """A base's `config`, as config.json has it, and every weight's shape by its name, tied weights once.

    `known_from` says where that is known from. `folder` holds the weights, if they are on this disk; `gguf` is the file
    that a base comes in; `header_bytes` are what a GGUF file of it holds beside its weights, mostly the vocabulary.
    """

    name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    known_from: str
    folder: Path | None = None
    gguf: Path | None = None
    tokenizer: Path | None = None  # the file or folder that holds it
    header_bytes: int | None = None

    @property
    def here(self) -> bool:
        """Whether the base itself is on this disk."""
        return self.folder is not None or self.gguf is not None

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices: what is held in 4 bits, and what an adapter goes beside."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if len(shape) == 2 and ".layers." in name)

    @property
    def head(self) -> int:
        """Size of an attention head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])


def of(reference: str, folder: Path) -> Outline:
    """The outline of a recipe's `base:`. ModelError when its shape is known from nowhere."""
    found = models.find(reference, folder)
    if isinstance(found, str):
        local = models.cached(found)
        return _of_folder(local, found.partition("@")[0].split("/")[-1]) if local else published(found)
    return _of_folder(found, found.resolve().name) if found.is_dir() else _of_gguf(read_header(found))


def published(reference: str) -> Outline:
    """The outline of a hub id in the table; ModelError for any other."""
    import difflib

    name = reference.partition("@")[0]
    table = {model: entry["config"] for entry in _table() for model in entry["ids"]}
    if name not in table:
        near = difflib.get_close_matches(name, table, n=2)
        raise ModelError(
            f"the base {name} is not on this machine, and its shape is not known"
            + (f"; did you mean {' or '.join(near)}?" if near else ""),
            "download it, or name a folder that holds its config.json: --set base=FOLDER",
        )
    config = table[name]
    return Outline(name.split("/")[-1], config, shapes(config), "its published shape; the base itself is not on this machine")


def smaller(than: int) -> list[Outline]:
    """The published bases of fewer parameters, the largest first."""
    found = [Outline(entry["ids"][-1], entry["config"], shapes(entry["config"]), "its published shape") for entry in _table()]
    return sorted((o for o in found if o.parameters < than), key=lambda o: -o.parameters)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight's shape by its name, as transformers names and saves them, of a config.json's settings.

    ModelError for an architecture that is not known here or settings that are missing.
    """
    _check(config)
    hidden, inner, layers = (int(config[key]) for key in _NEEDED[:3])
    heads = int(config["num_attention_heads"])
    keys = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or hidden // heads)
    kind = config.get("model_type")
    attention = {"q_proj": (heads * size, hidden), "k_proj": (keys * size, hidden), "v_proj": (keys * size, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    biased: tuple[str, ...] = ()
    if kind in ("llama", "mistral", "smollm3"):
        biased = (*attention, "o_proj") if config.get("attention_bias") else ()
    elif kind == "qwen2":
        biased = tuple(attention)
    elif kind == "phi3":
        attention = {"qkv_proj": ((heads + 2 * keys) * size, hidden)}
        mlp = {"gate_up_proj": (2 * inner, hidden)}
    elif kind == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    elif kind != "qwen3":
        raise ModelError(f"the architecture {kind!r} is not known here", "known: llama, mistral, qwen2, qwen3, gemma3_text, phi3, smollm3")
    attention["o_proj"], mlp["down_proj"] = (hidden, heads * size), (hidden, inner)
    layer: dict[str, tuple[int, ...]] = {}
    for name, shape in attention.items():
        layer[f"self_attn.{name}.weight"] = shape
        if name in biased:
            layer[f"self_attn.{name}.bias"] = shape[:1]
    if kind in ("qwen3", "gemma3_text"):
        layer |= {f"self_attn.{name}.weight": (size,) for name in ("q_norm", "k_norm")}
    layer |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()} | {f"{name}.weight": (hidden,) for name in norms}
    table = (int(config["vocab_size"]), hidden)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    found |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    found["model.norm.weight"] = (hidden,)
    # transformers ties Gemma's and SmolLM3's head unless told otherwise, and no other's
    if not config.get("tie_word_embeddings", kind in ("gemma3_text", "smollm3")):
        found["lm_head.weight"] = table
    return found


def _check(config: Mapping[str, Any]) -> None:
    if missing := [key for key in _NEEDED if not isinstance(config.get(key), int) or config[key] < 1]:
        raise ModelError(f"the base's config.json names no {missing[0]}", "choose a base of the llama kind")


def _of_folder(folder: Path, name: str) -> Outline:
    config = models.config(folder)
    _check(config)
    tokenizer = folder if (folder / "tokenizer.json").exists() else None
    if found := models.shapes(folder):
        return Outline(name, config, found, "config.json and the weights' headers", folder, tokenizer=folder)
    return Outline(name, config, shapes(config), "config.json alone; no weights are beside it", tokenizer=tokenizer)


def _of_gguf(header: Header) -> Outline:
    """GGUF's names of the settings: docs/gguf.md of https://github.com/ggml-org/ggml."""
    kind = str(header.metadata.get("general.architecture", ""))
    rows = {tensor.name: tensor.shape for tensor in header.tensors}

    def number(key: str) -> Any:
        value = header.metadata.get(f"{kind}.{key}")
        return max(value) if isinstance(value, Array) else value  # a number for every layer

    config = {
        "model_type": _TYPES.get(kind, kind),
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("attention.key_length"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": rows["token_embd.weight"][1] if "token_embd.weight" in rows else None,
        "tie_word_embeddings": "output.weight" not in rows,
    }
    begin = min((tensor.offset for tensor in header.tensors), default=0)
    return Outline(
        header.path.stem, config, shapes(config), "the GGUF file's header", gguf=header.path, tokenizer=header.path, header_bytes=begin
    )


@functools.cache
def _table() -> list[Any]:
    import yaml

    return list(yaml.safe_load(TABLE.read_text(encoding="utf-8"))["bases"])
