"""The tokenizer of a GGUF file, rebuilt so that it gives llama.cpp's ids: the way back from `edgelora.export.gguf_tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from edgelora.errors import ModelError
from edgelora.export.gguf_tokenizer import PRE_TOKENIZERS
from edgelora.gguf_header import Header

_OTHER = "use the model's safetensors as base"
# llama.cpp's further names for one and the same way to split (llama-vocab.cpp, llama_vocab::impl::load)
_SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"), "llama-bpe"),
    **dict.fromkeys(("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"), "qwen2"),
    **dict.fromkeys(("llama4", "kanana2", "talkie"), "gpt-4o"),
    "smaug-bpe": "dbrx",
}
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def special_ids(header: Header) -> dict[str, int]:
    """Role (bos, eos, eot, eom, unknown, padding) -> token id, of those that the file names and has."""
    size = len(header.metadata.get("tokenizer.ggml.tokens", ()))
    named = {role: header.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in (*_ROLES, "eot", "eom")}
    return {role: i for role, i in named.items() if isinstance(i, int) and 0 <= i < size}


def tokenizer(header: Header) -> Any:
    """A PreTrainedTokenizerFast. ModelError for a kind of tokenizer that is not known, or keys that contradict one another."""
    from transformers import PreTrainedTokenizerFast

    name = header.path.name
    try:
        backend = _backend(header)
    except ModelError as error:
        raise ModelError(f"{name}: {error.message}", error.hint) from error
    except Exception as error:  # missing keys, and what tokenizers makes of merges without their tokens
        cause = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ModelError(f"{name}: its tokenizer cannot be read: {cause}", _OTHER) from error
    special = special_ids(header)
    # None is said aloud: a model type's own tokenizer class would fill in a token of its own
    roles = {word: backend.id_to_token(special[role]) if role in special else None for role, word in _ROLES.items()}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)
    made.chat_template = _chat_template(header.metadata)
    return made


def _backend(header: Header) -> Any:
    from tokenizers import AddedToken

    keys, special = header.metadata, special_ids(header)
    kind = keys.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"a tokenizer of kind {kind!r} is not known", f"known: gpt2 and llama; or {_OTHER}")
    types = [TokenType(number) for number in keys["tokenizer.ggml.token_type"]]
    stored = list(keys["tokenizer.ggml.tokens"])
    # llama.cpp looks for added tokens before it replaces spaces, so in SentencePiece vocabularies too they stand with spaces
    spaced = {i for i, type in enumerate(types) if kind == "llama" and type == TokenType.USER_DEFINED and " " in stored[i]}
    texts = [text.replace(" ", "▁") if i in spaced else text for i, text in enumerate(stored)]
    vocab = {text: i for i, text in enumerate(texts) if types[i] != TokenType.UNUSED}
    if len(vocab) + types.count(TokenType.UNUSED) != len(texts):
        raise ModelError("its vocabulary holds a token twice", "download it again")
    if kind == "gpt2":
        backend, starts = _byte_level(keys, vocab)
    else:
        backend, starts = _sentencepiece(keys, vocab, texts[special["unknown"]]), True
    for text, i in vocab.items():
        if types[i] in (TokenType.CONTROL, TokenType.UNKNOWN):
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif types[i] == TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(text, special=False, normalized=i in spaced)])
    _surround(backend, keys, special, starts)
    return backend


def _byte_level(keys: Mapping[str, Any], vocab: dict[str, int]) -> tuple[Any, bool]:
    """Byte-level BPE, and whether texts start with bos unless the file says otherwise."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = keys.get("tokenizer.ggml.pre", "default")
    split = next((how for how, known in PRE_TOKENIZERS.items() if known == _SAME.get(name, name)), None)
    if split is None:
        raise ModelError(
            f"its pre-tokenizer {name!r} is not known", f"known: {', '.join(sorted(set(PRE_TOKENIZERS.values())))}; or {_OTHER}"
        )
    made = {
        "ByteLevel": lambda words: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words),
        "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
        "Split": lambda regex: pre_tokenizers.Split(Regex(regex), "isolated"),
    }
    steps, whole_words = split
    merges = [tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence([made[kind](detail) for kind, detail in steps])
    backend.decoder = decoders.ByteLevel()
    return backend, whole_words


def _sentencepiece(keys: Mapping[str, Any], vocab: dict[str, int], unknown: str) -> Any:
    """SentencePiece's BPE: of neighbours the pair is joined whose token scores highest, so scores order the merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = list(keys["tokenizer.ggml.scores"])
    merges = []
    for text in sorted(vocab, key=lambda text: (-scores[vocab[text]], vocab[text])):
        halves = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown))
    prefix = keys.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _surround(backend: Any, keys: Mapping[str, Any], special: Mapping[str, int], starts: bool) -> None:
    """Put bos and eos around texts where the file says so; `starts`: whether bos is put there if it says nothing."""
    from tokenizers import processors

    wanted = {"bos": keys.get("tokenizer.ggml.add_bos_token", starts), "eos": keys.get("tokenizer.ggml.add_eos_token", False)}
    ids = {role: special[role] for role, added in wanted.items() if added and role in special}
    before, after = ([backend.id_to_token(ids[role])] if role in ids else [] for role in ("bos", "eos"))
    if ids:
        named = [(backend.id_to_token(i), i) for i in ids.values()]
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=named)


def _chat_template(keys: Mapping[str, Any]) -> str | dict[str, str] | None:
    default = keys.get("tokenizer.chat_template")
    others = {name: keys.get(f"tokenizer.chat_template.{name}") for name in keys.get("tokenizer.chat_templates", ())}
    named = {name: text for name, text in {"default": default, **others}.items() if isinstance(text, str)}
    return named if len(named) > 1 else named.get("default")
