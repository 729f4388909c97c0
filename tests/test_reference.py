"""What files are compared with is what bitsandbytes, PEFT and transformers make of base and adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from edgelora import evaluate, models
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError
from edgelora.export import reference
from edgelora.export.reference import Reference
from edgelora.runtime.torch_reference import TorchSession
from edgelora.train import load
from edgelora.weights import Base
from tests.test_weights import adapter_for
from tests.tiny_models import ARCHITECTURES, TEXTS, tiny_model


def rows_for(base: Path) -> list[Encoded]:
    tokenizer = models.open_tokenizer(base)
    found = [tokenizer(text, add_special_tokens=False)["input_ids"][:60] for text in TEXTS]
    return [Encoded(tuple(ids), (False,) * 5 + (True,) * (len(ids) - 5)) for ids in found]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_scores_are_those_of_the_trained_model(arch: str, method: load.Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_TOKENS_AT_ONCE", 150)  # several groups
    base = tiny_model(arch, tmp_path / "base")
    adapter, rows = adapter_for(base, tmp_path / "adapter"), rows_for(base)
    trained = TorchSession(
        PeftModel.from_pretrained(load.load_base(base, method, torch.float32), adapter).eval(), models.open_tokenizer(base)
    )
    found = Reference(base, Base(base, "nf4" if method == "qlora" else "16bit"), adapter, rows, 1)
    for one, other in zip(found, evaluate.answer_scores(trained, rows), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    assert found.stop_ids == trained.stop_ids


def test_a_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never are the weights of two layers in memory, nor those of the embedding beside one."""
    base = tiny_model("mistral", tmp_path / "base")
    largest = 0
    fill = reference._Streamed._fill

    def watched(self: reference._Streamed, places: list[tuple[torch.nn.Module, str, str]]) -> None:
        nonlocal largest
        fill(self, places)
        if self.inner.base_model.__class__.__name__ != "Known":
            largest = max(largest, sum(p.numel() for p in self.inner.parameters() if p.device.type != "meta"))

    monkeypatch.setattr(reference._Streamed, "_fill", watched)
    source = Base(base, "nf4")
    Reference(base, source, None, rows_for(base), 1)
    layer = sum(int(np.prod(shape)) for name, shape in source.shapes.items() if ".layers.0." in name)
    assert largest == max(layer, int(np.prod(source.shapes["model.embed_tokens.weight"])))


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    base, other = tiny_model("llama", tmp_path / "base"), tiny_model("llama", tmp_path / "other", intermediate_size=128)
    with pytest.raises(ModelError, match="does not fit"):
        Reference(base, Base(base, "16bit"), adapter_for(other, tmp_path / "adapter"), rows_for(base), 1)


def test_an_adapter_that_lacks_a_half(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks the tensor"):
        Reference(base, Base(base, "16bit"), adapter, rows_for(base), 1)
