"""ExecuTorch: what of a checkpoint goes where, what is refused, and tiny models through the real exporter and runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgelora import environments, tuned
from edgelora import recipe as recipes
from edgelora.errors import ModelError, Unsupported
from edgelora.export import configuration, executorch, on_grid, phone_readme, stage
from edgelora.export import executorch_layout as layout
from edgelora.runtime import executorch as runtime
from edgelora.runtime import torch_reference
from edgelora.runtime.text import FolderText
from edgelora.weights import Checkpoint
from tests.phone_files import assert_computes, matrices, measured
from tests.test_onnx_export import calmed
from tests.tiny_models import TEXTS, tiny_model, tiny_tokenizer

there = pytest.mark.skipif(
    not environments.installed("executorch"), reason="make the environment with edgelora doctor --install executorch"
)
FACTS = {"file": "bot-int4.pte", "size_bytes": 94_700_000}


def quiet(share: float, text: str) -> None:
    pass


# --- where a tensor goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", layout.ARCHITECTURES)
def test_every_row_of_a_checkpoint_has_one_place(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch, tmp_path)
    config, shapes = configuration.of(model), Checkpoint(model).shapes
    taken = sorted(rows for name, rows in layout.tensors(config, shapes).items() if name != "output.weight" or "lm_head.weight" in shapes)
    covered: dict[str, int] = {}
    for source, first, end in taken:
        assert first == covered.get(source, 0)  # neither a gap nor twice
        covered[source] = end
    assert covered == {name: shape[0] for name, shape in shapes.items()}


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, attention_bias=True)
    config, shapes = configuration.of(model), Checkpoint(model).shapes
    with pytest.raises(Unsupported, match=r"the tensor layers\.0\.attention\.wo\.bias has no place in ExecuTorch's transformer"):
        layout.tensors(config, shapes)


@pytest.mark.parametrize(
    ("arch", "changes", "type", "message"),
    [
        ("gemma3_text", {}, "int4", "ExecuTorch's transformer is no 'gemma3_text' model"),
        ("smollm3", {}, "int4", "ExecuTorch's transformer is no 'smollm3' model"),
        ("mistral", {"sliding_window": 64}, "fp32", "attention in a window of 64 tokens is not exported"),
        ("llama", {"hidden_act": "gelu"}, "int8", "gated by silu, this model's by gelu"),
        ("llama", {"intermediate_size": 80}, "int4", "mlp.down_proj.weight has rows of 80 numbers, and XNNPACK's 4-bit blocks have 32"),
    ],
)
def test_what_would_compute_something_else_is_refused_before_work(
    arch: str, changes: dict[str, object], type: str, message: str, tmp_path: Path
) -> None:
    model = tiny_model(arch, tmp_path, **changes)
    with pytest.raises(Unsupported, match=message.replace(".", r"\.")):
        executorch.predict_bytes(model, type)
    if "rows of 80" in message:
        assert executorch.predict_bytes(model, "int8") > 0


def test_the_export_refuses_before_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3_text", tmp_path / "hf")
    source = tuned.plain(model, "key")
    monkeypatch.setattr(type(source), "as_trained", lambda *_: pytest.fail("the model ran"))
    said = {"name": "x", "rows": [], "rows_from": {}, "limits": recipes.Evaluate(), "threads": 1, "out": tmp_path / "out"}
    with pytest.raises(Unsupported, match="is no 'gemma3_text' model"):
        stage.export(source, recipes.Export("executorch"), **said, progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_window_longer_than_the_file_changes_nothing(tmp_path: Path) -> None:
    assert executorch.predict_bytes(tiny_model("mistral", tmp_path, sliding_window=256), "int4") > 0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_rotations_are_those_of_transformers(rope: dict[str, object]) -> None:
    arch = "phi3" if "partial_rotary_factor" in rope else "llama"
    config = AutoConfig.for_model(
        arch, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, pad_token_id=0,
        max_position_embeddings=256, rope_parameters=rope,
    )  # fmt: skip
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    found, factor = layout.frequencies(config, 256)
    np.testing.assert_allclose(found, rotary.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(rotary.attention_scaling)


# --- what lies beside the file --------------------------------------------------------------------------------------


def test_composition_is_taken_out_of_the_tokenizer_that_ships(tmp_path: Path) -> None:
    for kind in ("qwen2", "smollm"):
        tiny_tokenizer(kind).save_pretrained(tmp_path / kind)
        file = tmp_path / kind / "tokenizer.json"
        before, texts = json.loads(file.read_text()), FolderText(tmp_path / kind)
        ids = [texts.tokenize(text) for text in TEXTS]
        executorch._without_composing(file)
        after = json.loads(file.read_text())
        assert after.pop("normalizer") is None
        assert before.pop("normalizer") == ({"type": "NFC"} if kind == "qwen2" else None)
        assert after == before
        assert [FolderText(tmp_path / kind).tokenize(text) for text in TEXTS] == ids


def test_the_page_for_the_apps_developer(tmp_path: Path) -> None:
    tiny_tokenizer("smollm").save_pretrained(tmp_path)
    text = phone_readme.write(tmp_path, FACTS, executorch.PHONE, FolderText(tmp_path), 2048).read_text()
    pinned = environments.versions("executorch")["executorch"]
    assert f'implementation("org.pytorch:executorch-android:{pinned}")' in text
    assert '"$filesDir/bot-int4.pte", "$filesDir/tokenizer.json"' in text
    assert 'val prompt = "<|im_start|>user\\n$question<|im_end|>\\n<|im_start|>assistant\\n"' in text
    assert 'let prompt = "<|im_start|>user\\n\\(question)<|im_end|>\\n<|im_start|>assistant\\n"' in text
    assert 'path("bot-int4", "pte")' in text
    assert "An answer ends at `<|im_end|>` (id 2)." in text
    assert "95 MB, at most 2048 tokens" in text
    assert "Ship it as an asset pack of its own (Google Play allows 1.5 GB each)" in text
    assert "Core ML is not written" in text
    assert "they were not compiled where this file was made" in text
    assert str(tmp_path) not in text


def test_the_page_knows_what_a_string_of_kotlin_must_not_hold(tmp_path: Path) -> None:
    tiny_tokenizer("smollm").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text('{{ "$a \\"b\\" \\\\ " + messages[0].content }}')
    large = {"file": "bot-int8.pte", "size_bytes": 1_600_000_000}
    text = phone_readme.write(tmp_path, large, executorch.PHONE, FolderText(tmp_path), 99).read_text()
    assert r'val prompt = "\$a \"b\" \\ $question"' in text
    assert r'let prompt = "$a \"b\" \\ \(question)"' in text
    assert "larger than an asset pack" in text
    android = phone_readme.Phone("X", "x:y:1", "load($file)\n", "", "")
    assert "no released runtime for iOS" in phone_readme.write(tmp_path, FACTS, android, FolderText(tmp_path), 99).read_text()


# --- the real exporter and runtime ----------------------------------------------------------------------------------


@there
@pytest.mark.slow
@pytest.mark.parametrize("arch", layout.ARCHITECTURES)
def test_in_full_precision_a_file_is_the_model(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch, tmp_path / "hf", num_hidden_layers=2)
    path = executorch.write(model, "fp32", tmp_path, "tiny", quiet)
    with runtime.open(path, 1) as session, torch_reference.open(model, 1) as reference:
        ids = reference.tokenize("".join(TEXTS[:3]))[:60]
        expected, found = reference.score(ids), session.score(ids)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert session.stop_ids == reference.stop_ids
        assert [session.tokenize(text) for text in TEXTS] == [reference.tokenize(text) for text in TEXTS]
        made = list(session.generate(ids[:9], 12, ()))
        assert made == list(reference.generate(ids[:9], 12, ()))
        answers = [made[:4], made[:2] + made[5:7]]
        for ours, theirs in zip(session.score_answers(ids, answers), reference.score_answers(ids, answers), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(
        ["tiny-fp32.pte", *(name for name in executorch._BESIDE if (model / name).is_file())]
    )


@there
@pytest.mark.slow
def test_a_rounded_file_answers_alike_and_a_damaged_one_says_so(tmp_path: Path) -> None:
    model = tiny_model("qwen2", tmp_path / "hf", num_hidden_layers=2)
    paths = {type: executorch.write(model, type, tmp_path, "tiny", quiet) for type in ("int4", "int8")}
    with torch_reference.open(model, 1) as reference:
        ids = reference.tokenize("".join(TEXTS[:3]))[:60]
        expected = reference.score(ids).astype(np.float64)
    kl = {}
    for type, path in paths.items():
        with runtime.open(path, 1) as session:
            found = session.score(ids).astype(np.float64)
        kl[type] = float((np.exp(expected) * (expected - found)).sum(-1).mean())
        assert path.stat().st_size == pytest.approx(executorch.predict_bytes(model, type), rel=0.15)  # a tiny file is mostly program
    assert 1e-6 < kl["int8"] < 0.1
    assert 5 * kl["int8"] < kl["int4"] < 3  # random weights take rounding badly; uniform guesses would be at 6
    cut = tmp_path / "cut.pte"
    cut.write_bytes(paths["int4"].read_bytes()[:-4000])
    with pytest.raises(ModelError, match="executorch"):
        runtime.open(cut, 1)


@there
@pytest.mark.slow
def test_weights_rounded_by_rows_are_in_the_file(tmp_path: Path) -> None:
    model = calmed(tiny_model("llama", tmp_path / "hf", num_hidden_layers=2))
    moments = measured(model, tmp_path)
    path, source = executorch.write(model, "int4", tmp_path, "tiny", quiet, moments), on_grid.opened(model, executorch._GRID, moments)
    held = path.read_bytes()
    for name, codes, scales, _ in matrices(source, executorch._GRID):
        upper = (codes + 8).astype(np.uint8)
        assert (upper[:, ::2] | upper[:, 1::2] << 4).tobytes() in held, name
        assert torch.from_numpy(scales).bfloat16().view(torch.int16).numpy().tobytes() in held, name
        if name == "model.embed_tokens.weight":  # as a table once more
            assert (upper[:, ::2] << 4 | upper[:, 1::2]).tobytes() in held
            assert scales.tobytes() in held
    with runtime.open(path, 1) as session:
        assert_computes(session, source, tmp_path)
