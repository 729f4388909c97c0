"""Which ggml type every tensor of a file gets, for llama.cpp's named file types.

A name such as q4_k_m is a mixture: llama.cpp gives some tensors more bits than others, and a tensor whose rows are
not a multiple of the wanted type's block a type with smaller blocks. The rules are those of `llama_model_quantize`
(llama.cpp, src/llama-quant.cpp), for models without experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from edgelora.errors import ModelError
from edgelora.quant.ggml import block_size


@dataclass(frozen=True)
class FileType:
    """A named file type: the type most tensors get, llama.cpp's number for the name, one line about it."""

    base: Type
    code: LlamaFileType
    about: str


FILE_TYPES = {
    "f32": FileType(Type.F32, LlamaFileType.ALL_F32, "32-bit floats: exact, for debugging"),
    "f16": FileType(Type.F16, LlamaFileType.MOSTLY_F16, "16-bit floats: the reference that others are compared with"),
    "bf16": FileType(Type.BF16, LlamaFileType.MOSTLY_BF16, "bfloat16: for weights whose range f16 cannot hold"),
    "q8_0": FileType(Type.Q8_0, LlamaFileType.MOSTLY_Q8_0, "8.5 bits a weight: nearly lossless"),
    "q6_k": FileType(Type.Q6_K, LlamaFileType.MOSTLY_Q6_K, "6.6 bits a weight"),
    "q5_k_m": FileType(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, "5.5 bits a weight, more for half of attn_v and ffn_down"),
    "q5_k_s": FileType(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S, "5.5 bits a weight"),
    "q5_1": FileType(Type.Q5_1, LlamaFileType.MOSTLY_Q5_1, "6 bits a weight, with an offset a block"),
    "q5_0": FileType(Type.Q5_0, LlamaFileType.MOSTLY_Q5_0, "5.5 bits a weight, blocks of 32"),
    "q4_k_m": FileType(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, "4.5 bits a weight, more for half of attn_v and ffn_down: the usual choice"),
    "q4_k_s": FileType(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, "4.5 bits a weight, more for the first attn_v and ffn_down"),
    "q4_1": FileType(Type.Q4_1, LlamaFileType.MOSTLY_Q4_1, "5 bits a weight, with an offset a block"),
    "q4_0": FileType(Type.Q4_0, LlamaFileType.MOSTLY_Q4_0, "4.5 bits a weight, blocks of 32: the fastest on many processors"),
    "iq4_nl": FileType(Type.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL, "4.5 bits a weight on an uneven grid, blocks of 32"),
    "iq4_xs": FileType(Type.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS, "4.25 bits a weight on an uneven grid"),
    "q3_k_m": FileType(Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_M, "3.4 bits a weight, more for attn_v, attn_output and ffn_down"),
    "q2_k": FileType(Type.Q2_K, LlamaFileType.MOSTLY_Q2_K, "2.6 bits a weight, more for attn_v, attn_output and ffn_down"),
}

_FLOATS = (Type.F32, Type.F16, Type.BF16)
# A type with blocks of 256 weights, and the one with blocks of 32 that stands in for it on other row lengths.
_FALLBACK = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Shape:
    """What of a model's shape the mixtures look at."""

    layers: int
    heads: int
    kv_heads: int
    architecture: str


@dataclass(frozen=True)
class Choice:
    """A tensor's type; `wanted` differs from it where the row length forced a fallback."""

    type: Type
    wanted: Type


def file_type(name: str) -> FileType:
    """Look a file type up by name; ModelError with the nearest names when there is none."""
    if name not in FILE_TYPES:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), FILE_TYPES, n=3)
        raise ModelError(
            f"unknown GGUF type {name!r}", f"did you mean {', '.join(near)}?" if near else f"known types: {', '.join(FILE_TYPES)}"
        )
    return FILE_TYPES[name]


def plan(tensors: Mapping[str, tuple[int, ...]], name: str, shape: Shape, importance: bool = False) -> dict[str, Choice]:
    """The type of every tensor.

    `tensors`: GGUF name -> shape in C order, so the last number is the row length. `importance`: whether an
    importance matrix is at hand, which changes a few rules. Vectors and norms stay 32-bit.
    """
    base = file_type(name).base
    tied = "output.weight" not in tensors
    mix = _MIXTURES.get(name, _plain)
    choices = {}
    for tensor, dims in tensors.items():
        if len(dims) < 2 or not tensor.endswith(".weight") or tensor.endswith("_norm.weight"):
            choices[tensor] = Choice(Type.F32, Type.F32)
        elif base in _FLOATS:
            choices[tensor] = Choice(base, base)
        else:
            if tensor == "output.weight" or (tied and tensor == "token_embd.weight"):
                wanted = _head(base, dims[-1])
            elif match := _LAYER.fullmatch(tensor):
                wanted = mix(_Place(base, match[2], int(match[1]), shape, importance))
            else:
                wanted = base
            choices[tensor] = Choice(_fitting(wanted, dims[-1]), wanted)
    return choices


def _head(base: Type, columns: int) -> Type:
    """The output matrix is the most sensitive: never below 6 bits."""
    return Type.Q8_0 if base == Type.Q8_0 or columns % block_size(base) else Type.Q6_K


def _fitting(wanted: Type, columns: int) -> Type:
    if columns % block_size(wanted) == 0:
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if columns % block_size(smaller) == 0 else Type.F16


@dataclass(frozen=True)
class _Place:
    """One matrix of a layer, for the mixtures below."""

    base: Type
    name: str
    layer: int
    shape: Shape
    importance: bool

    @property
    def is_value(self) -> bool:
        return self.name in ("attn_v.weight", "attn_qkv.weight")

    @property
    def is_down(self) -> bool:
        return self.name == "ffn_down.weight"

    @property
    def is_attention_output(self) -> bool:
        return self.name == "attn_output.weight"

    @property
    def shares_values(self) -> bool:
        """Four or more query heads share a key-value head, so attn_v is small."""
        return self.shape.heads // self.shape.kv_heads >= 4

    @property
    def is_sensitive(self) -> bool:
        """The first and last eighth of the layers and every third between."""
        eighth = self.shape.layers // 8
        return self.layer < eighth or self.layer >= 7 * self.shape.layers // 8 or (self.layer - eighth) % 3 == 2

    def at_least_5_bits(self, type: Type) -> Type:
        """Of the 70B models attn_v is an eighth of attn_q, so more bits cost nearly nothing."""
        is_70b = self.shape.layers == 80 and (
            self.shape.architecture == "qwen2" or (self.shape.architecture == "llama" and self.shape.heads != self.shape.kv_heads)
        )
        return Type.Q5_K if is_70b and self.is_value and type in (Type.Q3_K, Type.Q4_K) else type


def _plain(place: _Place) -> Type:
    return place.base


def _first_down(other: Type) -> Callable[[_Place], Type]:
    """With an importance matrix the first ffn_down layers get an offset a block: without one they can go astray."""

    def mix(place: _Place) -> Type:
        first = place.layer < place.shape.layers // 8
        return other if place.is_down and first and place.importance else place.base

    return mix


def _q2_k(place: _Place) -> Type:
    if place.is_value:
        return place.at_least_5_bits(Type.Q4_K if place.shares_values else Type.Q3_K)
    return Type.Q3_K if place.is_down or place.is_attention_output else place.base


def _q3_k_m(place: _Place) -> Type:
    if place.is_value:
        return Type.Q5_K if place.layer < 2 else place.at_least_5_bits(Type.Q4_K)
    if place.is_down:
        return Type.Q5_K if place.layer < place.shape.layers // 16 else Type.Q4_K
    return Type.Q4_K if place.is_attention_output else place.base


def _k_s(place: _Place) -> Type:
    if place.is_value:
        return Type.Q5_K if place.layer < 4 else place.at_least_5_bits(place.base)
    return Type.Q5_K if place.is_down and place.layer < place.shape.layers // 8 else place.base


def _k_m(place: _Place) -> Type:
    if (place.is_value or place.is_down) and place.is_sensitive:
        return Type.Q6_K
    return place.at_least_5_bits(place.base)


def _iq4(place: _Place) -> Type:
    first_down = place.is_down and place.layer < place.shape.layers // 8 and not place.importance
    return Type.Q5_K if first_down or (place.is_value and place.shares_values) else place.base


_MIXTURES: Mapping[str, Callable[[_Place], Type]] = {
    "q2_k": _q2_k,
    "q3_k_m": _q3_k_m,
    "q4_0": _first_down(Type.Q4_1),
    "q5_0": _first_down(Type.Q5_1),
    "q4_k_s": _k_s,
    "q4_k_m": _k_m,
    "q5_k_m": _k_m,
    "iq4_nl": _iq4,
    "iq4_xs": _iq4,
}
