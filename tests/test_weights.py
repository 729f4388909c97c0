"""Weights read and merged a range of rows at a time are those of bitsandbytes, PEFT and safetensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgelora import weights
from edgelora.errors import ModelError
from edgelora.export import gguf
from edgelora.train import load
from tests.line import ROOT
from tests.tiny_models import ARCHITECTURES, tiny_model


def adapter_for(base: Path, folder: Path, rslora: bool = False, targets: str | list[str] = "all-linear") -> Path:
    """A random LoRA on every linear layer (or on `targets`), written by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=24, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nf4_is_what_training_holds_bit_for_bit(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "VALUES_AT_ONCE", 1 << 10)  # several ranges even of a tiny matrix
    base = tiny_model(arch, tmp_path / "base")
    expected = load.load_base(base, "qlora", torch.float32).dequantize().state_dict()
    source = weights.Merged(base, adapter_for(base, tmp_path / "adapter"), "nf4")
    source.low_rank.clear()
    for name, shape in source.shapes.items():
        parts = [source.rows(name, first, last) for first, last in weights.ranges(shape)]
        assert torch.equal(torch.from_numpy(np.concatenate(parts)).reshape(shape), expected[name].float()), name


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_training_rounds_before_it_takes_four_bits(stored: torch.dtype, tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base", dtype=stored)
    expected = load.load_base(base, "qlora", torch.bfloat16).dequantize().state_dict()
    source = weights.Base(base, "nf4", "bfloat16")
    for name, shape in source.shapes.items():
        assert torch.equal(torch.from_numpy(source.rows(name)).reshape(shape).bfloat16(), expected[name]), name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_merge_is_that_of_peft(dtype: torch.dtype, rslora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "VALUES_AT_ONCE", 1 << 10)
    monkeypatch.setattr(weights, "_PRODUCTS", 1 << 8)
    base = tiny_model("qwen2", tmp_path / "base", dtype=dtype)
    adapter = adapter_for(base, tmp_path / "adapter", rslora)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    source = weights.Merged(base, adapter, "16bit")
    for name, shape in source.shapes.items():
        parts = [source.rows(name, first, last) for first, last in weights.ranges(shape)]
        np.testing.assert_allclose(np.concatenate(parts).reshape(shape), expected[name].numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_written_shards_are_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model("llama", tmp_path / "base")
    source = weights.Merged(base, adapter_for(base, tmp_path / "adapter"), "16bit")
    monkeypatch.setattr(weights, "_SHARD_BYTES", 60_000)
    made = tmp_path / "made"
    made.mkdir()
    weights.write(source, made, lambda share, name: None)
    files = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 1
    found = {name: tensor for file in set(files.values()) for name, tensor in load_file(made / file).items()}
    assert found.keys() == source.shapes.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.from_numpy(source.rows(name)).reshape(tensor.shape).to(torch.bfloat16)), name


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_neither_threads_nor_ranges_change_a_byte(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(arch, tmp_path / "base")
    merged = weights.Merged(base, adapter_for(base, tmp_path / "adapter"), "16bit")
    written = []
    for values, threads in ((1 << 20, 1), (1 << 10, 1), (1 << 10, 3)):
        monkeypatch.setattr(weights, "VALUES_AT_ONCE", values)
        written.append(gguf.write(base, "q4_0", tmp_path, "tiny", lambda share, name: None, weights=merged, threads=threads).read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_a_file_is_merged_and_written_without_torch_and_transformers(arch: str, tmp_path: Path) -> None:
    base = tiny_model(arch, tmp_path / "base", dtype=torch.bfloat16)
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgelora.export import gguf\nfrom edgelora.weights import Merged\n"
        "base, adapter, folder = map(Path, sys.argv[1:])\n"
        "gguf.write(base, 'q4_k_m', folder, 'tiny', lambda share, name: None, weights=Merged(base, adapter, '16bit'))\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'llama_cpp'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, base, adapter_for(base, tmp_path / "adapter"), tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"
    assert (tmp_path / "tiny-q4_k_m.gguf").is_file()


@pytest.mark.parametrize("into", ["16bit", "nf4"])
def test_an_adapter_is_added_once_however_often_rows_are_read(into: str, tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base", intermediate_size=96)  # blocks of NF4 cross the ends of down_proj's rows
    source = weights.Merged(base, adapter_for(base, tmp_path / "adapter"), into)
    for name in source.low_rank:
        once = source.rows(name).copy()
        np.testing.assert_array_equal(source.rows(name), once, err_msg=name)


@pytest.mark.parametrize("change", ["other base", "half", "no config"])
def test_adapters_that_cannot_be_merged(change: str, tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    config, file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if change == "other base":
        base = tiny_model("llama", tmp_path / "other", intermediate_size=128)
    elif change == "half":
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if "lora_A" in name))
        save_file(tensors, file)
    else:
        config.unlink()
    expected = {"other base": "does not fit", "half": "does not fit", "no config": "cannot be read"}[change]
    with pytest.raises(ModelError, match=expected):
        weights.Merged(base, adapter, "16bit")
