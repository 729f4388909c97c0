"""GGUF files against torch: what llama.cpp computes and how it splits text must be what the checkpoint means."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgelora.errors import ModelError
from edgelora.export import architectures
from edgelora.export import gguf as export
from tests.tiny_models import ARCHITECTURES, CHAT_TEMPLATE, TEXTS, tiny_model

TOKENS = 48
MAX_KL = 1e-4


def quiet(share: float, what: str) -> None:
    pass


def to_f16(model: Path) -> Path:
    return export.write(model, "f16", model, "tiny", quiet)


def token_ids(vocabulary: int) -> list[int]:
    return torch.randint(0, vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def torch_scores(model: Path, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities by transformers in float32, shape (len(ids), vocabulary)."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    with torch.no_grad():
        return torch.log_softmax(reference(torch.tensor([list(ids)])).logits[0].double(), -1)


def llama_scores(file: Path, ids: Sequence[int]) -> torch.Tensor:
    """The same by llama.cpp, with a 32-bit key-value cache."""
    f32 = llama_cpp.GGML_TYPE_F32
    llm = llama_cpp.Llama(
        str(file), n_ctx=max(128, len(ids)), logits_all=True, type_k=f32, type_v=f32, n_threads=1, n_threads_batch=1, verbose=False
    )
    try:
        llm.eval(list(ids))
        return torch.log_softmax(torch.tensor(np.array(llm.scores[: len(ids)])).double(), -1)
    finally:
        llm.close()


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def kl_of_f16(model: Path) -> float:
    ids = token_ids(vocabulary(model))
    return kl(torch_scores(model, ids), llama_scores(to_f16(model), ids))


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of an architecture, made once."""
    made: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in made:
            made[arch] = tiny_model(arch, tmp_path_factory.mktemp(arch))
        return made[arch]

    return get


# ---- what llama.cpp computes ----


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_f16_scores_are_those_of_torch(arch: str, models: Callable[[str], Path]) -> None:
    assert kl_of_f16(models(arch)) < MAX_KL


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiny_models_say_something(arch: str, models: Callable[[str], Path]) -> None:
    """Without this the comparison above would prove little."""
    ids = token_ids(vocabulary(models(arch)))
    scores = torch_scores(models(arch), ids)
    entropy = -(scores.exp() * scores).sum(-1).mean()
    assert 0.05 < entropy / math.log(scores.shape[-1]) < 0.5
    shuffled = [ids[i] for i in torch.randperm(TOKENS - 1, generator=torch.Generator().manual_seed(2))] + ids[-1:]
    moved = torch_scores(models(arch), shuffled)[-1] - scores[-1]
    assert moved.square().mean().sqrt() >= scores[-1].std()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "own head size, untied": ("llama", {"head_dim": 24, "tie_word_embeddings": False}),
    "untied qwen3": ("qwen3", {"tie_word_embeddings": False}),
    # llama.cpp takes the long factors when the context it is opened with is longer than the original one.
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 256,
                "short_factor": [1 + i / 8 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
            },
        },
    ),
    "linear gemma": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_score_as_in_torch(variant: str, tmp_path: Path) -> None:
    arch, changes = VARIANTS[variant]
    assert kl_of_f16(tiny_model(arch, tmp_path, **changes)) < MAX_KL


def test_bfloat16_and_sharded_checkpoints(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "one", dtype=torch.bfloat16)
    whole = export.write(model, "bf16", tmp_path, "whole", quiet)
    ids = token_ids(vocabulary(model))
    assert kl(torch_scores(model, ids), llama_scores(whole, ids)) < 5e-3  # llama.cpp rounds activations to bfloat16 too
    written = next(tensor for tensor in gguf.GGUFReader(whole).tensors if tensor.name == "blk.1.ffn_down.weight")
    stored = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert written.data.tobytes() == stored.view(torch.int16).numpy().tobytes()
    shard(model)
    assert export.write(model, "bf16", tmp_path, "parts", quiet).read_bytes() == whole.read_bytes().replace(b"whole", b"parts")


def shard(model: Path) -> None:
    """Split model.safetensors in two, with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / file)
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}})
    )
    (model / "model.safetensors").unlink()


# ---- errors that the comparison must see ----


def mutate(monkeypatch: pytest.MonkeyPatch, arch: str, **changes: Any) -> None:
    monkeypatch.setitem(architectures.ARCHITECTURES, arch, dataclasses.replace(architectures.of(arch), **changes))


def test_unpermuted_queries_and_keys_are_seen(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {name: dataclasses.replace(source, change=None) for name, source in architectures.of("llama").layer.items()}
    mutate(monkeypatch, "llama", layer=plain)
    assert kl_of_f16(models("llama")) > 1e-2


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral"])
def test_wrong_rope_theta_is_seen(arch: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = architectures.of(arch).metadata
    mutate(monkeypatch, arch, metadata=lambda config: right(config) | {"rope.freq_base": 20000.0})
    assert kl_of_f16(models(arch)) > 1e-2


def test_norms_without_the_one_are_seen(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "gemma3_text", final_norm=None)
    assert kl_of_f16(models("gemma3_text")) > 1e-2


def test_missing_llama3_factors_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, changes = VARIANTS["llama3 rope"]
    mutate(monkeypatch, "llama", vectors=lambda config: {})
    assert kl_of_f16(tiny_model(arch, tmp_path, **changes)) > 1e-2


# ---- the file ----


@pytest.mark.parametrize("type", [name for name in export.TYPES if name != "q1_0"])  # rows of 64 do not fit its blocks of 128
def test_size_is_predicted_to_the_byte(type: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    seen: list[float] = []
    file = export.write(models("llama"), type, tmp_path, "größe", lambda share, what: seen.append(share))
    assert file == tmp_path / f"größe-{type}.gguf"
    assert file.stat().st_size == export.predict_bytes(models("llama"), type, "größe")
    assert 0 <= file.stat().st_size - export.predict_bytes(models("llama"), type) <= len("größe".encode()) + 31
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_same_input_same_bytes(models: Callable[[str], Path], tmp_path: Path) -> None:
    files = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        files.append(export.write(models("llama"), "q4_k_m", tmp_path / place, "tiny", quiet).read_bytes())
    assert files[0] == files[1]


def test_metadata(models: Callable[[str], Path]) -> None:
    file = to_f16(models("mistral"))
    found = fields(file)
    assert str(models("mistral")) not in str(found)
    wanted = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 1,
        "llama.context_length": 256,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: found[key] for key in wanted} == wanted


def test_a_sliding_window_limits_the_promised_context(tmp_path: Path) -> None:
    file = to_f16(tiny_model("mistral", tmp_path, sliding_window=64))
    assert fields(file)["llama.context_length"] == 64


# ---- the tokenizer ----

TOKENIZERS = {
    "smollm": "smollm",
    "gpt-2": "gpt-2",
    "qwen2": "qwen2",
    "llama-bpe": "llama-bpe",
    "sentencepiece": "default",
    "gemma": "default",
}
CHAT = [{"role": "user", "content": " Hello  there, 3 x 12345?"}, {"role": "assistant", "content": "日本語 it's\n\n😀"}]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, tokenizer=kind)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    llm = llama_cpp.Llama(str(to_f16(model)), vocab_only=True, verbose=False)
    chat = str(tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))
    # The space that 'metaspace' puts before a plain text only, llama.cpp cannot: chats are what counts.
    plain = [] if kind == "metaspace" else [*TEXTS, "".join(TEXTS), "<|im_start|> <think> x</think>", "    ▁▁▁▁ ", ""]
    try:
        for text in [chat, *plain]:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert llm.tokenize(text.encode(), add_bos=False, special=True) == ids, text
            if TOKENIZERS[kind] != "default":  # of SentencePiece a first space is kept by one and dropped by the other
                assert llm.detokenize(ids, special=True).decode() == text
        if plain:
            assert llm.tokenize(b"a", add_bos=True) == tokenizer("a").input_ids
        assert llm.metadata["tokenizer.ggml.pre"] == TOKENIZERS[kind]
        assert llm.metadata["tokenizer.chat_template"] == (model / "chat_template.jinja").read_text()
    finally:
        llm.close()


def test_other_stop_tokens_and_unused_rows(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, vocab_size=500)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    found = fields(to_f16(model))
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (2, 0)
    assert found["tokenizer.ggml.tokens"][499] == "[PAD499]"
    assert found["tokenizer.ggml.token_type"][499] == gguf.TokenType.UNUSED
    assert found["tokenizer.ggml.token_type"][found["tokenizer.ggml.tokens"].index("<think>")] == gguf.TokenType.USER_DEFINED
    assert found["tokenizer.ggml.token_type"][2] == gguf.TokenType.CONTROL


@pytest.mark.parametrize("name", ["my-Phi-3", "phi3"])
def test_a_name_does_not_change_ids(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp gives tokens other attributes in a file whose general.name contains phi-3."""
    text = "<|im_end|>  a"
    ids = AutoTokenizer.from_pretrained(models("llama"), local_files_only=True)(text).input_ids
    llm = llama_cpp.Llama(str(export.write(models("llama"), "f16", tmp_path, name, quiet)), vocab_only=True, verbose=False)
    try:
        assert llm.tokenize(text.encode(), add_bos=False, special=True) == ids
    finally:
        llm.close()


def test_several_chat_templates(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    found = fields(to_f16(model))
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert found["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def change_json(file: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def test_unknown_pre_tokenizer(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=r"does not know this pre-tokenizer.*Punctuation") as raised:
        to_f16(model)
    assert "smollm" in raised.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update({"extra": 481}), "the tokenizer has id 481 but the model only 481 rows"),
        (lambda t: t["added_tokens"][2].update(rstrip=True), "token '<|im_end|>' strips spaces"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), 'does not know this normalizer: {"type": "Lowercase"}'),
        (lambda t: t["added_tokens"][2].update(content="[PAD490]"), "the tokenizer holds the token '[PAD490]' twice"),
    ],
)
def test_tokenizers_that_gguf_cannot_hold(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, vocab_size=500 if "twice" in message else 481)
    change_json(model / "tokenizer.json", change)
    with pytest.raises(ModelError) as raised:
        to_f16(model)
    assert message in raised.value.message


def test_missing_tokenizer(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        to_f16(model)


# ---- errors ----


def test_unknown_type(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown GGUF type 'q4_km'") as raised:
        export.write(models("llama"), "q4_km", tmp_path, "tiny", quiet)
    assert raised.value.hint.startswith("did you mean q4_k_m")


def test_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="does not know the architecture 'mamba'") as raised:
        export.predict_bytes(tmp_path, "f16")
    assert raised.value.hint == "known: llama, mistral, qwen2, qwen3, smollm3, phi3, gemma3_text"


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", '{"model_type": "llama", "num_hidden_layers": 1000000000}', '{"model_type": "llama", "num_hidden_layers": "x"}'],
)
def test_damaged_config(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError):
        export.predict_bytes(tmp_path, "f16")


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' of this llama model is not what llama.cpp runs"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' of this qwen3 model",
        ),
        ("smollm3", {"no_rope_layer_interval": 2}, "no_rope_layers"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
    ],
)
def test_what_llama_cpp_cannot_run(arch: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        to_f16(tiny_model(arch, tmp_path, **changes))
    assert message in raised.value.message


def test_missing_shard(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        to_f16(model)


def test_index_that_leaves_its_folder(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ModelError, match=r"names '\.\./other\.safetensors'"):
        to_f16(model)


def test_damaged_weights_file(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        to_f16(model)


KEY = "model.layers.1.self_attn.k_proj.weight"


def put(model: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), model / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (KEY, torch.full((32, 64), float("nan")), f"{KEY} holds NaN or infinite weights"),
        (KEY, torch.full((32, 64), 1e6), f"{KEY} holds 1e+06, more than f16 can"),
        (KEY, torch.ones((30, 64)), f"{KEY} of shape (30, 64) does not fit config.json"),
        (KEY, torch.ones((32, 64), dtype=torch.uint8), f"{KEY} is stored as U8"),
        (KEY, None, f"the model lacks 1 tensors, the first is {KEY}"),
        ("model.layers.0.router.weight", torch.ones(2, 2), "no place for 1 tensors, the first is model.layers.0.router.weight"),
    ],
)
def test_weights_that_cannot_be_written(name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    put(model, name, tensor)
    with pytest.raises(ModelError) as raised:
        export.write(model, "f16", tmp_path, "tiny", quiet)
    assert message in raised.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
