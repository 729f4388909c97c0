"""Which ggml type every tensor of a file gets, for llama.cpp's named file types.

A name such as q4_k_m is a mixture: llama.cpp gives some tensors more bits than others, and a tensor whose rows are
not a multiple of the wanted type's block a type with smaller blocks. The rules are those of `llama_model_quantize`
(llama.cpp, src/llama-quant.cpp), for models without experts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgelora.errors import ModelError
from edgelora.quant import ggml
from edgelora.quant.ggml import Type, block_size


@dataclass(frozen=True)
class FileType:
    """A named file type: the type most tensors get, llama.cpp's number for the name (llama.h), one line about it."""

    base: Type
    code: int
    about: str


FILE_TYPES = {
    "f32": FileType(Type.F32, 0, "32-bit floats: exact, for debugging"),
    "f16": FileType(Type.F16, 1, "16-bit floats: the reference that others are compared with"),
    "bf16": FileType(Type.BF16, 32, "bfloat16: for weights whose range f16 cannot hold"),
    "q8_0": FileType(Type.Q8_0, 7, "8.5 bits a weight: nearly lossless"),
    "q6_k": FileType(Type.Q6_K, 18, "6.6 bits a weight"),
    "q5_k_m": FileType(Type.Q5_K, 17, "5.5 bits a weight, more for half of attn_v and ffn_down"),
    "q5_k_s": FileType(Type.Q5_K, 16, "5.5 bits a weight"),
    "q5_1": FileType(Type.Q5_1, 9, "6 bits a weight, with an offset a block"),
    "q5_0": FileType(Type.Q5_0, 8, "5.5 bits a weight, blocks of 32"),
    "q4_k_m": FileType(Type.Q4_K, 15, "4.5 bits a weight, more for half of attn_v and ffn_down: the usual choice"),
    "q4_k_s": FileType(Type.Q4_K, 14, "4.5 bits a weight, more for the first attn_v and ffn_down"),
    "q4_1": FileType(Type.Q4_1, 3, "5 bits a weight, with an offset a block"),
    "q4_0": FileType(Type.Q4_0, 2, "4.5 bits a weight, blocks of 32: the fastest on many processors"),
    "iq4_nl": FileType(Type.IQ4_NL, 25, "4.5 bits a weight on an uneven grid, blocks of 32"),
    "iq4_xs": FileType(Type.IQ4_XS, 30, "4.25 bits a weight on an uneven grid"),
    "q3_k_l": FileType(Type.Q3_K, 13, "3.4 bits a weight, 5.5 for attn_v, attn_output and ffn_down"),
    "q3_k_m": FileType(Type.Q3_K, 12, "3.4 bits a weight, more for attn_v, attn_output and ffn_down"),
    "q3_k_s": FileType(Type.Q3_K, 11, "3.4 bits a weight"),
    "iq3_m": FileType(Type.IQ3_S, 27, "3.4 bits a weight on a lattice, more for attn_v and attn_output"),
    "iq3_s": FileType(Type.IQ3_S, 26, "3.4 bits a weight on a lattice"),
    "iq3_xs": FileType(Type.IQ3_S, 22, "3.3 bits a weight on a lattice; needs an importance matrix"),
    "iq3_xxs": FileType(Type.IQ3_XXS, 23, "3.06 bits a weight on a lattice; needs an importance matrix"),
    "q2_k": FileType(Type.Q2_K, 10, "2.6 bits a weight, more for attn_v, attn_output and ffn_down"),
    "q2_k_s": FileType(Type.Q2_K, 21, "2.6 bits a weight; needs an importance matrix"),
    "iq2_m": FileType(Type.IQ2_S, 29, "2.7 bits a weight on a lattice; needs an importance matrix"),
    "iq2_s": FileType(Type.IQ2_XS, 28, "2.5 bits a weight on a lattice; needs an importance matrix"),
    "iq2_xs": FileType(Type.IQ2_XS, 20, "2.3 bits a weight on a lattice; needs an importance matrix"),
    "iq2_xxs": FileType(Type.IQ2_XXS, 19, "2.06 bits a weight on a lattice; needs an importance matrix"),
    "iq1_m": FileType(Type.IQ1_M, 31, "1.75 bits a weight on a lattice; needs an importance matrix"),
    "iq1_s": FileType(Type.IQ1_S, 24, "1.56 bits a weight on a lattice; needs an importance matrix"),
    "q2_0": FileType(Type.Q2_0, 41, "2.25 bits a weight: for models trained to four values a weight"),
    "tq2_0": FileType(Type.TQ2_0, 37, "2.06 bits a weight: for models trained to three values a weight"),
    "tq1_0": FileType(Type.TQ1_0, 36, "1.69 bits a weight: for models trained to three values a weight"),
    "q1_0": FileType(Type.Q1_0, 40, "1.125 bits a weight: for models trained to two values a weight"),
}
# llama.cpp's other names, and what they would be here.
_REFUSED = {
    "mxfp4_moe": "it is for models of experts: of any other llama.cpp makes q8_0; write q8_0, or set --tensor-type 'ffn=mxfp4'",
    "nvfp4": "llama.cpp quantizes single tensors to it, not files: set --tensor-type 'ffn=nvfp4'",
}

_FLOATS = (Type.F32, Type.F16, Type.BF16)
# A type with large blocks, and the one with blocks of 32 that stands in for it on other row lengths.
_FALLBACK = {
    **dict.fromkeys((Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS), Type.IQ4_NL),
    **dict.fromkeys((Type.Q2_0, Type.Q2_K, Type.Q3_K, Type.TQ1_0, Type.TQ2_0), Type.Q4_0),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
# Without an importance matrix these would be noise, so llama.cpp writes them for no matrix of a layer.
_NEEDING_IMPORTANCE = (Type.IQ3_XXS, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_M, Type.IQ1_S)
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

    @property
    def fell_back(self) -> bool:
        return self.type != self.wanted


def file_type(name: str) -> FileType:
    """Look a file type up by name; ModelError with the nearest names when there is none."""
    if name in _REFUSED:
        raise ModelError(f"GGUF type {name!r} cannot be a whole file here", _REFUSED[name])
    if name not in FILE_TYPES:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), FILE_TYPES, n=3)
        raise ModelError(
            f"unknown GGUF type {name!r}", f"did you mean {', '.join(near)}?" if near else f"known types: {', '.join(FILE_TYPES)}"
        )
    return FILE_TYPES[name]


def plan(
    tensors: Mapping[str, tuple[int, ...]], name: str, shape: Shape, importance: bool = False, by_hand: Sequence[str] = ()
) -> dict[str, Choice]:
    """The type of every tensor.

    `tensors`: GGUF name -> shape in C order, so the last number is the row length. `importance`: whether an
    importance matrix is at hand, which changes a few rules. `by_hand`: "PATTERN=TYPE", see `overrides`. Vectors and
    norms stay 32-bit.
    """
    base = file_type(name).base
    mix = _MIXTURES.get(name, _plain)
    tied = "output.weight" not in tensors
    chosen = overrides([tensor for tensor, dims in tensors.items() if _is_matrix(tensor, dims)], by_hand)
    choices = {}
    for tensor, dims in tensors.items():
        if not _is_matrix(tensor, dims):
            choices[tensor] = Choice(Type.F32, Type.F32)
            continue
        if tensor in chosen:
            wanted = chosen[tensor]
        elif base in _FLOATS:
            wanted = base
        elif tensor == "output.weight" or (tied and tensor == "token_embd.weight"):
            wanted = _head(name, base, dims[-1])
        elif tensor == "token_embd.weight":
            wanted = _EMBEDDING.get(name, base)
        elif match := _LAYER.fullmatch(tensor):
            place = _Place(base, match[2], int(match[1]), shape, importance)
            wanted = _at_least_5_bits(place, mix(place)) if mix not in (_iq1, _iq2) else mix(place)
        else:
            wanted = base
        choices[tensor] = Choice(_fitting(tensor, wanted, dims[-1]), wanted)
    return choices


def overrides(matrices: Sequence[str], by_hand: Sequence[str]) -> dict[str, Type]:
    """Tensor -> type, for the tensors that `by_hand` names.

    An entry is "PATTERN=TYPE" as for `llama-quantize --tensor-type`: a regular expression searched for anywhere in the
    tensor's name, in lower case; of several that match the first counts. ModelError for an unknown type and for an
    entry that changes nothing.
    """
    found: dict[str, Type] = {}
    for entry in by_hand:
        pattern, sign, type_name = entry.rpartition("=")
        if not (sign and pattern and type_name):
            raise ModelError(f"tensor type {entry!r} is not PATTERN=TYPE", "for instance ffn_down=q6_k")
        if type_name.upper() not in Type.__members__:
            raise ModelError(f"tensor type {entry!r}: unknown type {type_name!r}", f"known: {', '.join(t.name.lower() for t in Type)}")
        try:
            matching = [name for name in matrices if re.search(pattern.lower(), name)]
        except re.error as error:
            raise ModelError(f"tensor type {entry!r}: the pattern is no regular expression: {error}", "for instance ffn_down") from error
        kinds = dict.fromkeys(re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in matrices)
        if not matching:
            raise ModelError(f"tensor type {entry!r} matches no matrix of this model", f"its matrices: {', '.join(kinds)}")
        if not set(matching) - set(found):
            raise ModelError(f"tensor type {entry!r} changes nothing: earlier entries took all that it matches", "put it before them")
        found = dict.fromkeys(matching, Type[type_name.upper()]) | found
    return found


def lacking_importance(choices: Mapping[str, Choice], name: str, importance: Mapping[str, object]) -> str | None:
    """The first tensor that llama.cpp would refuse to quantize without the importance that is missing, None when there is none."""
    for tensor, choice in choices.items():
        needed = choice.type in _NEEDING_IMPORTANCE or (name == "q2_k_s" and choice.type == Type.Q2_K)
        if needed and tensor not in importance and tensor.startswith("blk."):
            return tensor
    return None


def gains_from_importance(choices: Mapping[str, Choice]) -> bool:
    """Whether any quantizer of this plan looks at an importance matrix."""
    return any(choice.type not in ggml.UNWEIGHTED for choice in choices.values())


def bits_a_weight(choices: Mapping[str, Choice], tensors: Mapping[str, tuple[int, ...]]) -> float:
    """The bits that a weight takes on average over all tensors, norms included."""
    sizes = {tensor: math.prod(dims) for tensor, dims in tensors.items()}
    return sum(sizes[tensor] * ggml.bits(choice.type) for tensor, choice in choices.items()) / sum(sizes.values())


def _is_matrix(tensor: str, dims: tuple[int, ...]) -> bool:
    return len(dims) >= 2 and tensor.endswith(".weight") and not tensor.endswith("_norm.weight")


def _fitting(tensor: str, wanted: Type, columns: int) -> Type:
    if columns % block_size(wanted) == 0:
        return wanted
    if wanted not in _FALLBACK and block_size(wanted) > 32:
        raise ModelError(
            f"{tensor} has rows of {columns} weights, not a multiple of {wanted.name.lower()}'s blocks of {block_size(wanted)}",
            "llama.cpp has no type to fall back to; choose another one",
        )
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if columns % block_size(smaller) == 0 else Type.F16


# ---- mixtures ----


def _head(name: str, base: Type, columns: int) -> Type:
    """The output matrix is the most sensitive: 6 bits, or 5 where everything else is coarse."""
    if base == Type.Q8_0 or columns % block_size(base):
        return Type.Q8_0
    return Type.Q5_K if name.startswith(("iq1", "iq2")) or name == "iq3_xxs" else Type.Q6_K


# Of an embedding that is not the head too; as coarse as the rest it would cost more than it saves.
_EMBEDDING = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), Type.Q2_K),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), Type.IQ3_S),
    **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), Type.Q4_K),
}


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
    def is_query_or_key(self) -> bool:
        return self.name in ("attn_q.weight", "attn_k.weight")

    @property
    def is_attention_output(self) -> bool:
        return self.name == "attn_output.weight"

    @property
    def is_gate_or_up(self) -> bool:
        return self.name in ("ffn_gate.weight", "ffn_up.weight")

    @property
    def is_down(self) -> bool:
        return self.name == "ffn_down.weight"

    @property
    def shares_values(self) -> bool:
        """Four or more query heads share a key-value head, so attn_v is small."""
        return self.shape.heads // self.shape.kv_heads >= 4

    @property
    def is_first(self) -> bool:
        """Of the first eighth of the layers."""
        return self.layer < self.shape.layers // 8

    @property
    def is_last(self) -> bool:
        return self.layer >= 7 * self.shape.layers // 8

    @property
    def is_sensitive(self) -> bool:
        """The first and last eighth of the layers and every third between."""
        return self.is_first or self.is_last or (self.layer - self.shape.layers // 8) % 3 == 2


def _at_least_5_bits(place: _Place, type: Type) -> Type:
    """Of the 70B models attn_v is an eighth of attn_q, so more bits cost nearly nothing."""
    is_70b = place.shape.layers == 80 and (
        place.shape.architecture == "qwen2" or (place.shape.architecture == "llama" and place.shape.heads != place.shape.kv_heads)
    )
    return Type.Q5_K if is_70b and place.is_value and type in (Type.Q3_K, Type.Q4_K) else type


def _plain(place: _Place) -> Type:
    return place.base


def _first_down(other: Type) -> Callable[[_Place], Type]:
    """With an importance matrix the first ffn_down layers get an offset a block: without one they can go astray."""
    return lambda place: other if place.is_down and place.is_first and place.importance else place.base


def _iq1(place: _Place) -> Type:
    if place.is_value:
        return Type.Q4_K if place.shares_values else Type.Q2_K
    if place.is_down and place.is_first:
        return Type.Q2_K
    return Type.IQ2_XXS if place.is_attention_output and place.base in (Type.IQ1_S, Type.IQ1_M) else place.base


def _iq2(place: _Place) -> Type:
    if place.is_value:
        return Type.Q4_K if place.shares_values else Type.IQ3_S
    return Type.IQ3_S if (place.is_down and place.is_first) or place.is_attention_output else place.base


def _q2_k(place: _Place) -> Type:
    if place.is_value:
        return Type.Q4_K if place.shares_values else Type.Q3_K
    return Type.Q3_K if place.is_down or place.is_attention_output else place.base


def _q2_k_s(place: _Place) -> Type:
    return Type.Q4_K if (place.is_value and place.shares_values) or (place.is_down and place.is_first) else place.base


def _iq3_xxs(place: _Place) -> Type:
    if place.is_value:
        return Type.Q4_K if place.shares_values else Type.IQ3_XXS if place.importance else Type.IQ3_S
    if place.is_query_or_key:
        return Type.IQ2_S
    if place.is_down and not place.importance:
        return Type.Q4_K if place.is_first else Type.Q3_K
    return Type.IQ3_S if place.is_attention_output else place.base


def _iq3_xs(place: _Place) -> Type:
    between = place.is_gate_or_up and not place.is_first and not place.is_last
    return Type.IQ3_XXS if place.is_query_or_key or between else _iq3_s(place)


def _iq3_s(place: _Place) -> Type:
    return Type.Q4_K if place.is_value and place.shares_values else place.base


def _iq3_m(place: _Place) -> Type:
    return Type.Q4_K if place.is_value or place.is_attention_output or (place.is_down and place.is_first) else place.base


def _q3_k_m(place: _Place) -> Type:
    if place.is_value:
        return Type.Q5_K if place.layer < 2 else Type.Q4_K
    if place.is_down:
        return Type.Q5_K if place.layer < place.shape.layers // 16 else Type.Q4_K
    return Type.Q4_K if place.is_attention_output else place.base


def _q3_k_l(place: _Place) -> Type:
    return Type.Q5_K if place.is_value or place.is_down or place.is_attention_output else place.base


def _k_s(place: _Place) -> Type:
    return Type.Q5_K if (place.is_value and place.layer < 4) or (place.is_down and place.is_first) else place.base


def _k_m(place: _Place) -> Type:
    return Type.Q6_K if (place.is_value or place.is_down) and place.is_sensitive else place.base


def _iq4(place: _Place) -> Type:
    first_down = place.is_down and place.is_first and not place.importance
    return Type.Q5_K if first_down or (place.is_value and place.shares_values) else place.base


_MIXTURES: Mapping[str, Callable[[_Place], Type]] = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), _iq1),
    **dict.fromkeys(("iq2_s", "iq2_m"), _iq2),
    "q2_k": _q2_k,
    "q2_k_s": _q2_k_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_xs": _iq3_xs,
    "iq3_s": _iq3_s,
    "iq3_m": _iq3_m,
    "q3_k_m": _q3_k_m,
    "q3_k_l": _q3_k_l,
    "q4_0": _first_down(Type.Q4_1),
    "q5_0": _first_down(Type.Q5_1),
    "q4_k_s": _k_s,
    "q4_k_m": _k_m,
    "q5_k_m": _k_m,
    "iq4_nl": _iq4,
    "iq4_xs": _iq4,
}
