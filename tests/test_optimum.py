"""The second ONNX exporter: settings put back where transformers 4 looks, and graphs equal to the builder's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgelora import environments
from edgelora.errors import Unsupported, UsageError
from edgelora.export import onnx as onnx_export
from edgelora.export import onnx_optimum, transformers4
from edgelora.runtime import onnx_runtime, runtimes_of
from tests.test_onnx_export import IDS, calmed, kl, quiet
from tests.tiny_models import ARCHITECTURES, tiny_model

there = pytest.mark.skipif(not environments.installed("optimum"), reason="make the environment with edgelora doctor --install optimum")


@there
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_exporters_agree(arch: str, tmp_path: Path) -> None:
    """Two ways that share no code: every log-probability within a thousandth of their spread."""
    model = calmed(tiny_model(arch, tmp_path / arch))
    scores = {}
    for exporter in onnx_export.EXPORTERS:
        place = tmp_path / exporter
        place.mkdir()
        folder = onnx_export.write(model, "fp32", place, arch, quiet, exporter=exporter)
        with onnx_runtime.open(folder, threads=1) as session:
            scores[exporter] = session.score(IDS)
    assert np.abs(scores["builder"] - scores["optimum"]).max() < 1e-3 * scores["builder"].std()


@there
@pytest.mark.slow
@pytest.mark.parametrize(("type", "most"), [("int4", 0.3), ("fp16", 1e-4)])
def test_smaller_types(type: str, most: float, tmp_path: Path) -> None:
    model = calmed(tiny_model("qwen2", tmp_path / "qwen2"))
    folders = [onnx_export.write(model, kind, tmp_path, "x", quiet, exporter="optimum") for kind in ("fp32", type)]
    assert runtimes_of(folders[1]) == ("onnxruntime",)
    scores = []
    for folder in folders:
        with onnx_runtime.open(folder, threads=1) as session:
            scores.append(session.score(IDS))
            assert np.array_equal(session.score(IDS, first=150), scores[-1][150:])
            greedy = list(session.generate(IDS[:20], 6, ()))
            assert greedy[0] == scores[-1][19].argmax()
            first, second = session.score_answers(IDS[:20], [IDS[20:23], IDS[30:32]])
            expected = session.score(IDS[:23])[19:22]
            np.testing.assert_allclose(first, expected[np.arange(3), IDS[20:23]], atol=2e-2)
            assert second.shape == (2,)
    assert kl(*scores) < most
    size = sum(path.stat().st_size for path in folders[1].iterdir())
    assert onnx_export.predict_bytes(model, type, exporter="optimum") == pytest.approx(size, rel=0.3)


def test_settings_go_back_where_transformers_4_looks() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    found = transformers4.config({"model_type": "llama", "dtype": "bfloat16", "rope_parameters": rope})
    assert found == {
        "model_type": "llama",
        "torch_dtype": "float32",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "type": "llama3", "factor": 8.0},
    }
    both = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert transformers4.config({"rope_parameters": both}) == {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert transformers4.tokenizer({"tokenizer_class": "TokenizersBackend"}) == {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_no_code_of_a_model_goes_along(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "llama")
    (model / "modeling_own.py").write_text("raise SystemExit('run')")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    folder = transformers4.described(model, tmp_path)
    assert not [*folder.glob("*.py")]
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").resolve() == (model / "model.safetensors").resolve()


def test_what_it_cannot_write(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "llama")
    with pytest.raises(Unsupported, match="the exporter optimum has no type 'int8'"):
        onnx_export.predict_bytes(model, "int8", exporter="optimum")
    with pytest.raises(Unsupported, match="the ONNX builder writes no fp16"):
        onnx_export.predict_bytes(model, "fp16")
    with pytest.raises(UsageError, match="settings of the builder"):
        onnx_export.write(model, "int4", tmp_path, "x", quiet, block=32, exporter="optimum")
    with pytest.raises(Unsupported, match="traces a model at one length"):
        onnx_optimum.check("fp32", {"rope_parameters": {"rope_type": "longrope"}})
