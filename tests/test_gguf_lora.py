"""Adapters as GGUF files: llama.cpp with base and adapter computes what torch does with both."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from edgelora.errors import ModelError, UsageError
from edgelora.export import gguf_lora
from edgelora.gguf_header import base_of
from edgelora.runtime import llama_cpp as runtime
from edgelora.weights import Merged
from tests.test_gguf_export import MAX_KL, kl, quiet, token_ids, torch_scores, vocabulary
from tests.tiny_models import ARCHITECTURES, tiny_model


def adapted(base: Path, folder: Path, **changes: object) -> Path:
    """A random adapter on every linear layer, large enough that it changes what the model says."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | changes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    tuned.save_pretrained(folder)
    return folder


def scores_with_adapter(base: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return torch.log_softmax(PeftModel.from_pretrained(model, adapter)(torch.tensor([ids])).logits[0].double(), -1)


def llama_scores(file: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    f32 = llama_cpp.GGML_TYPE_F32
    llm = llama_cpp.Llama(str(file), lora_path=str(adapter), n_ctx=128, logits_all=True, type_k=f32, type_v=f32, n_threads=1, verbose=False)
    try:
        llm.eval(ids)
        return torch.log_softmax(torch.tensor(np.array(llm.scores[: len(ids)])).double(), -1)
    finally:
        llm.close()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_with_the_adapter_is_torch_with_the_adapter(arch: str, tmp_path: Path) -> None:
    base = tiny_model(arch, tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter")
    ids = token_ids(vocabulary(base))
    expected = scores_with_adapter(base, adapter, ids)
    assert kl(torch_scores(base, ids), expected) > 1e-2  # else the comparison would prove little
    weights = Merged(base, adapter, "16bit")
    file = gguf_lora.write(base, "f16", tmp_path, "tiny", quiet, weights=weights)
    assert (file.name, base_of(file)) == ("tiny-lora.gguf", tmp_path / "tiny-base-f16.gguf")
    assert kl(expected, llama_scores(tmp_path / "tiny-base-f16.gguf", file, ids)) < MAX_KL
    assert file.stat().st_size == gguf_lora.predict_bytes(base, "f16", "tiny", weights=weights)


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"target_modules": ["q_proj", "k_proj"]}, {"r": 3}], ids=str)
def test_scale_and_targets(changes: dict[str, object], tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", **changes)
    ids = token_ids(vocabulary(base))
    file = gguf_lora.write(base, "f32", tmp_path, "tiny", quiet, weights=Merged(base, adapter, "16bit"))
    assert kl(scores_with_adapter(base, adapter, ids), llama_scores(tmp_path / "tiny-base-f32.gguf", file, ids)) < MAX_KL


def test_the_session_of_an_adapter_runs_it_on_its_base(tmp_path: Path) -> None:
    base = tiny_model("qwen2", tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter")
    ids = token_ids(vocabulary(base))
    file = gguf_lora.write(base, "f16", tmp_path, "tiny", quiet, weights=Merged(base, adapter, "16bit"))
    with runtime.open(file, 1) as session:
        scores = torch.tensor(session.score(ids)).double()
        longer = torch.tensor(session.score(ids * 5)).double()  # needs a larger context: the adapter stays on
    assert kl(scores_with_adapter(base, adapter, ids), scores) < 1e-3
    assert kl(scores_with_adapter(base, adapter, ids * 5), longer) < 1e-3
    assert runtime.bytes_per_token(file) > runtime.bytes_per_token(tmp_path / "tiny-base-f16.gguf")
    (tmp_path / "tiny-base-f16.gguf").unlink()
    with pytest.raises(ModelError, match="is an adapter, and its base tiny-base-f16 is not beside it"):
        runtime.open(file, 1)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    weights = Merged(base, adapted(base, tmp_path / "adapter"), "16bit")
    reader = gguf.GGUFReader(gguf_lora.write(base, "f16", tmp_path, "tiny", quiet, weights=weights))
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert (found["general.type"], found["adapter.type"], found["general.architecture"]) == ("adapter", "lora", "llama")
    assert found["adapter.lora.alpha"] == 4  # r: the scale alpha / r stands in B
    assert {t.name for t in reader.tensors if t.name.startswith("blk.1.attn_q")} == {
        "blk.1.attn_q.weight.lora_a",
        "blk.1.attn_q.weight.lora_b",
    }


def test_what_an_adapter_file_cannot_be(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    with pytest.raises(UsageError, match="gguf-lora is a base and an adapter beside it"):
        gguf_lora.write(base, "f16", tmp_path, "tiny", quiet)
    weights = Merged(base, adapted(base, tmp_path / "adapter"), "16bit")
    weights.low_rank["lm_head.weight"] = weights.low_rank["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"a GGUF adapter has no place for lm_head\.weight"):
        gguf_lora.write(base, "f16", tmp_path, "tiny", quiet, weights=weights)
    assert list(tmp_path.glob("*.gguf")) == []
