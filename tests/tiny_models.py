"""Tiny random models and tokenizers, built in code and saved as Hugging Face folders.

The weights are large enough that a model says something: its predictions are far from uniform and depend on the
order of what came before. So an error in a rotation, a norm or a name shows in its outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and it isn't the dog's fault.",
    "I've seen 3.14159 and 2024; we'll pay 1,234,567 yen, they'd said. It'S HERE'S WE'LL",
    "line one\nline two\n\n\nline five\r\n\ttabbed  two   three spaces   \n",
    "日本語の文章です。東京タワーは333メートルの高さがあります。",
    "emoji 😀👩‍👩‍👧 and accents: naïve café, Straße, Ελληνικά, русский",
    "def f(x):\n    return x**2 + y_1  # comment\n\n<tag attr='v'>",
    "question: what is 7 x 8? answer: 56. ½ ² ٣ १२३",
    " leading space, trailing space ",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# Beside the common shape, what a model type needs to be itself at this size.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 32, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 5},
    "phi3": {"tie_word_embeddings": False},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
}
ARCHITECTURES = tuple(_OWN)
_TOKENIZER = {
    "llama": "smollm",
    "mistral": "sentencepiece",
    "qwen3": "qwen2",
    "qwen2": "qwen2",
    "smollm3": "llama-bpe",
    "gemma3_text": "gemma",
}


def tiny_model(
    arch: str, folder: Path, *, tokenizer: str | None = None, dtype: torch.dtype = torch.float16, seed: int = 0, **config_changes: Any
) -> Path:
    """Save a random model of model type `arch` with a tokenizer into `folder` and return it.

    Weights are rounded to float16, so a float16 file holds them exactly. `config_changes` go into the configuration;
    `tokenizer` names a kind that `tiny_tokenizer` knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fast = tiny_tokenizer(tokenizer or _TOKENIZER.get(arch, "smollm"))
    fast.save_pretrained(folder)
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    config = tiny_config(arch, **({"vocab_size": len(fast)} | ids | config_changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_random(name, weight, arch.startswith("gemma")).half().float())
    model.to(dtype).save_pretrained(folder)
    return folder


def tiny_config(arch: str, **changes: Any) -> Any:
    """The configuration of a tiny model of model type `arch`."""
    return AutoConfig.for_model(arch, **(_SHAPE | _OWN[arch] | changes))


def _random(name: str, weight: torch.Tensor, gemma: bool) -> torch.Tensor:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return weight + 1 + 0.3 * torch.randn_like(weight)  # of queries and keys larger, see below
    if name.endswith("norm.weight"):
        return weight + 0.3 * torch.randn_like(weight)  # around what transformers starts with: zero for Gemma, else one
    if weight.ndim == 1:
        return 0.5 * torch.randn_like(weight)
    if "embed_tokens" in name or "lm_head" in name:
        # Gemma multiplies embeddings by sqrt(hidden_size) and gives its final norm a gain around one.
        return (0.3 if gemma else 0.4) * torch.randn_like(weight)
    # Queries and keys twice as large, so that attention picks rather than averages.
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.5
    return gain * torch.randn_like(weight) / weight.shape[-1] ** 0.5


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer trained on TEXTS: smollm, gpt-2, qwen2, llama-bpe, sentencepiece, metaspace or gemma."""
    backend = _SPM[kind](TEXTS) if kind in _SPM else _byte_level(kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if kind in _SPM else "<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>" if kind in _SPM else None,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(kind: str) -> Tokenizer:
    kinds: dict[str, list[Any]] = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    }
    steps = kinds[kind]
    backend = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if kind == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", backend.token_to_id("<|im_start|>"))]
        )
    return backend


def _sentencepiece_bpe(texts: list[str], special: list[str]) -> models.BPE:
    """What transformers makes of a SentencePiece BPE file: bytes for rare characters, and every way to make a token as a merge."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts[:5], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    made = json.loads(trained.to_str())["model"]
    tokens = list(dict.fromkeys(left + right for left, right in made["merges"]))
    characters = sorted(text for text in made["vocab"] if len(text) == 1)
    vocab = {text: i for i, text in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *tokens, *characters])}
    merges = []
    for token in tokens:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")


def _llama_style(texts: list[str]) -> Tokenizer:
    backend = Tokenizer(_sentencepiece_bpe(texts, ["<unk>", "<s>", "<|endoftext|>"]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", *SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def _gemma_style(texts: list[str]) -> Tokenizer:
    backend = Tokenizer(_sentencepiece_bpe(texts, ["<|endoftext|>", "<s>", "<unk>"]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", *SPECIAL, "<unk>"])
    backend.add_tokens([AddedToken("▁▁▁▁", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def _metaspace_style(texts: list[str]) -> Tokenizer:
    """Newer Llama and Mistral files: only the very beginning of a text gets a space put before it."""
    backend = _llama_style(texts)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


_SPM = {"sentencepiece": _llama_style, "metaspace": _metaspace_style, "gemma": _gemma_style}
