"""A Hugging Face tokenizer as GGUF metadata, from tokenizer.json and tokenizer_config.json as they are written.

transformers runs some tokenizers of the hub otherwise than they are written, by the class that they name. What is trained and
shipped is what it ran, and lies in the folder that `Tuned.describe` writes.

llama.cpp knows pre-tokenizers by name. The name is found from what the tokenizer does (the structure of its backend),
never from what the model is called; a structure that is not in the table is an error, since a near miss changes ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from edgelora.errors import ModelError
from edgelora.runtime.text import FolderText

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS, _BYTES = ("ByteLevel", True), ("ByteLevel", False)

# (steps, whether a whole word of the vocabulary skips the merges) -> llama.cpp's name.
PRE_TOKENIZERS = {
    ((_GPT2_WORDS,), False): "gpt-2",
    ((("Digits", True), _GPT2_WORDS), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "dbrx",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
    ((("Split", _GPT4O), _BYTES), False): "gpt-4o",
}


def metadata(model: Path, vocabulary: int) -> dict[str, Any]:
    """GGUF keys of the tokenizer in folder `model` for an embedding of `vocabulary` rows.

    Raises ModelError for a tokenizer that is missing, damaged, or does what llama.cpp cannot.
    """
    text = FolderText(model)
    backend = text.backend()
    bpe = backend["model"]
    if bpe["type"] != "BPE" or bpe.get("dropout") or bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
        raise _unknown("tokenizer model", {k: v for k, v in bpe.items() if k not in ("vocab", "merges")})
    texts, types = _tokens(bpe["vocab"], backend["added_tokens"], vocabulary)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in bpe["merges"]]
    if bpe["byte_fallback"]:
        keys = _sentencepiece(backend, texts, types, merges, text)
    else:
        keys = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_tokenizer(backend),
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        }
    _check_distinct(texts)
    keys |= {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": [int(t) for t in types]}
    return keys | _special(text) | _chat_templates(text.chat_templates)


def _tokens(vocab: dict[str, int], added: Iterable[dict[str, Any]], size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types by id; rows of the embedding that no token uses are filled."""
    texts = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    added = list(added)
    biggest = max([*vocab.values(), *(token["id"] for token in added)], default=-1)
    if biggest >= size:
        raise ModelError(
            f"the tokenizer has id {biggest} but the model only {size} rows of embedding", "resize the embedding before export"
        )
    for text, i in vocab.items():
        texts[i], types[i] = text, TokenType.NORMAL
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ModelError(
                f"token {token['content']!r} strips spaces or wants word borders, which GGUF cannot say",
                "save it without lstrip, rstrip, single_word",
            )
        texts[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return texts, types


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    # llama.cpp does not normalize: NFC changes ids only of text that is not in NFC already, which is rare.
    if backend["normalizer"] not in (None, {"type": "NFC"}):
        raise _unknown("normalizer", backend["normalizer"])
    steps = backend["pre_tokenizer"]
    listed = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps]
    found = (tuple(_step(step) for step in listed), bool(backend["model"].get("ignore_merges")))
    if found not in PRE_TOKENIZERS:
        raise _unknown("pre-tokenizer", steps)
    return PRE_TOKENIZERS[found]


def _step(step: dict[str, Any] | None) -> tuple[Any, ...]:
    """A pre-tokenizer step as the little that decides where it splits."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return ("ByteLevel", words)
        case {"type": "Digits", "individual_digits": single}:
            return ("Digits", single)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return ("Split", regex)
        case _:
            return (json.dumps(step),)


def _sentencepiece(
    backend: dict[str, Any], texts: list[str], types: list[TokenType], merges: list[tuple[str, ...]], text: FolderText
) -> dict[str, Any]:
    """llama.cpp joins the neighbours whose joined text has the highest score, so a token scores by its first merge."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    scores = [-float(rank.get(token, len(merges))) for token in texts]
    for token in backend["added_tokens"]:
        i, added = token["id"], token["content"]
        if "▁" in added and types[i] == TokenType.USER_DEFINED:
            if token["normalized"]:
                texts[i] = added.replace("▁", " ")  # llama.cpp looks for added tokens before it replaces spaces
            elif added in rank:
                types[i] = TokenType.NORMAL  # found in raw text only, where no ▁ stands; else made by merges
    byte_ids = [backend["model"]["vocab"].get(f"<0x{byte:02X}>") for byte in range(256)]
    if None in byte_ids:
        raise ModelError(
            f"the tokenizer has no token <0x{byte_ids.index(None):02X}> to fall back to", "llama.cpp needs all 256 byte tokens"
        )
    for i in byte_ids:
        types[i] = TokenType.BYTE
    unknown = text.special_id("unk_token")
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _space_prefix(backend, bool(text.chat_templates)),
    }


def _space_prefix(backend: dict[str, Any], chat: bool) -> bool:
    """Whether text that begins, or follows a special token, gets a space put before it."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer, pre = backend["normalizer"], backend["pre_tokenizer"]
    if normalizer == {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]} and pre is None:
        return True
    if normalizer == spaces and (pre is None or pre.get("pattern") == {"String": " "}):  # no space is left to split at
        return False
    match normalizer, pre:
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            # 'first' prefixes the text's very beginning only, and llama.cpp cannot: a rendered chat begins with
            # a special token and so never has that prefix, plain text always has it.
            return not chat if scheme == "first" else scheme == "always"
        case _:
            raise _unknown("normalizer and pre-tokenizer", [normalizer, pre])


def _special(text: FolderText) -> dict[str, Any]:
    """Ids of the special tokens and whether encoding adds them, seen by encoding a word."""
    bare, whole = text.tokenize("a"), text.surrounded("a")
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    before, after = whole[: starts[0]], whole[starts[0] + len(bare) :]
    bos, eos = text.special_id("bos_token"), text.special_id("eos_token")
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise _unknown("post-processor", {"before": before, "after": after})
    others = [i for i in text.stop_ids if i != eos]
    ids = {
        "bos": bos,
        "eos": eos,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unknown": text.special_id("unk_token"),
        "padding": text.special_id("pad_token"),
    }
    keys: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    return keys | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _chat_templates(templates: Mapping[str, str]) -> dict[str, Any]:
    """The templates verbatim; 'default' is the one that llama.cpp uses."""
    others = {name: text for name, text in templates.items() if name != "default"}
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    if others:
        keys["tokenizer.chat_templates"] = list(others)
    return keys | ({"tokenizer.chat_template": templates["default"]} if templates.get("default") else {})


def _check_distinct(texts: list[str]) -> None:
    """llama.cpp aborts the whole process on a vocabulary that holds a text twice."""
    if len(set(texts)) != len(texts):
        seen: set[str] = set()
        twice = next(text for text in texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise ModelError(f"the tokenizer holds the token {twice!r} twice", "remove one of them")


def _unknown(what: str, found: Any) -> ModelError:
    return ModelError(
        f"GGUF export does not know this {what}: {json.dumps(found, ensure_ascii=False)[:400]}",
        "llama.cpp must split text the same way; known pre-tokenizers: "
        + ", ".join(sorted(set(PRE_TOKENIZERS.values())))
        + ", SentencePiece BPE",
    )
