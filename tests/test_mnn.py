"""MNN folders: the model itself in MNN, its own tokenizer and template engine, and an exporter that is kept from what it would do besides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgelora import environments, models
from edgelora.data import chat, template
from edgelora.errors import ModelError, Unsupported
from edgelora.export import digits, mnn, on_grid, phone_readme, verify
from edgelora.runtime import mnn as runtime
from edgelora.runtime import runtime_of, torch_reference
from edgelora.runtime.text import FolderText
from edgelora.weights import Checkpoint
from tests.phone_files import assert_answers_alike, assert_computes, matrices, measured
from tests.test_onnx_export import IDS, calmed, kl, quiet
from tests.tiny_models import tiny_model

there = pytest.mark.skipif(not environments.installed("mnn"), reason="make the environment with edgelora doctor --install mnn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calmed(tiny_model("llama", tmp_path_factory.mktemp("hf") / "tiny"))


@pytest.fixture(scope="module")
def wide(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mnn.write(model, "fp16", tmp_path_factory.mktemp("mnn"), "tiny", quiet)


@there
@pytest.mark.slow
def test_a_folder_is_the_model(model: Path, wide: Path) -> None:
    assert (wide.name, runtime_of(wide)) == ("tiny-fp16-mnn", "mnn")
    assert {path.name for path in wide.iterdir()} == set(mnn._KEPT)
    with torch_reference.open(model, 1) as torch, runtime.open(wide, 1) as session:
        expected, found = torch.score(IDS), session.score(IDS)
        assert kl(expected, found) < 1e-4
        np.testing.assert_allclose(session.score(IDS, first=150), found[150:], atol=1e-3)
        assert_answers_alike(torch, session)
        first, second = session.score_answers(IDS[:20], [IDS[20:23], IDS[30:32]])
        np.testing.assert_allclose(first, found[19 + np.arange(3), IDS[20:23]], atol=1e-3)
        assert second.shape == (2,)


@there
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["smollm", "llama-bpe", "gpt-2"])
def test_its_own_tokenizer_and_template_engine(tokenizer: str, tmp_path: Path) -> None:
    """Digits in every script, and no begin token before texts whose template writes it."""
    model = tiny_model("llama", tmp_path / "hf", tokenizer=tokenizer)
    known = models.open_tokenizer(model)
    with runtime.open(mnn.write(model, "int8", tmp_path, "tiny", quiet), 1) as session:
        assert session.stop_ids == (known.eos_token_id,)
        for text in (*verify.PROBES, "½²①٣१२३Ⅷ一二三 4 5 Ⅻ"):
            ids = known(text, add_special_tokens=False)["input_ids"]
            assert session.tokenize(text) == ids
            assert session.detokenize([*ids, known.eos_token_id]) == text
        for talk in verify.CONVERSATIONS:
            expected = chat.render(known, talk, open_turn=True)
            assert session.library_render(talk) == template.render(session.chat_template, talk, session.special_tokens) == expected


@there
@pytest.mark.slow
def test_mnn_itself_answers_what_we_drive_it_to(wide: Path) -> None:
    with runtime.open(wide, 1) as session:
        for question in ("The dog", "question: what is 7 x 8?", "日本語の文章"):
            prompt = template.render(session.chat_template, (("user", question),), session.special_tokens)
            ids = [*session.generate(session.tokenize(prompt), 24, session.stop_ids)]
            assert session.library_answer(prompt, 24).rstrip("�") == session.detokenize(ids).rstrip("�")


@there
@pytest.mark.slow
@pytest.mark.parametrize(("type", "most"), [("int8", 0.05), ("int4", 0.6)])
def test_smaller_types(type: str, most: float, model: Path, wide: Path, tmp_path: Path) -> None:
    folder = mnn.write(model, type, tmp_path, "tiny", quiet)
    with runtime.open(wide, 1) as exact, runtime.open(folder, 1) as session:
        assert kl(exact.score(IDS), session.score(IDS)) < most
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert mnn.predict_bytes(model, type) == pytest.approx(size, rel=0.1)
    assert runtime.bytes_per_token(folder) < size


@there
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_weights_rounded_by_rows_are_in_the_folder(arch: str, tmp_path: Path) -> None:
    model = calmed(tiny_model(arch, tmp_path / "hf"))
    moments = measured(model, tmp_path)
    kept = ("model.embed_tokens.weight",) if "lm_head.weight" in Checkpoint(model).shapes else ()
    folder, source = mnn.write(model, "int4", tmp_path, "tiny", quiet, moments), on_grid.opened(model, mnn._GRID, moments, kept)
    held = (folder / "llm.mnn.weight").read_bytes()
    for name, codes, scales, low in matrices(source, mnn._GRID):
        above = (codes - np.repeat(low / scales, codes.shape[1] // scales.shape[1], 1)).astype(np.uint8)
        rows = [*(above[:, ::2] << 4 | above[:, 1::2]), *np.stack([low + 8 * scales, scales], 2)]  # one by one: joined ones are taken apart
        assert all(row.tobytes() in held for row in rows), name
    with runtime.open(folder, 1) as session:
        assert_computes(session, source, tmp_path)


@there
@pytest.mark.slow
def test_its_converter_installs_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run the first pip on the path."""
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/installed\n")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", str(pip.parent), prepend=":")
    mnn.write(model, "int8", tmp_path, "tiny", quiet)
    assert not (tmp_path / "installed").exists()


@there
def test_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "llm.mnn").write_bytes(b"no graph")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        runtime.open(tmp_path, 1)


def test_what_the_exporter_is_given(tmp_path: Path) -> None:
    """Digits as a pattern, at any depth; a header without a begin token."""
    path = tmp_path / "tokenizer.json"
    rules = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}
    path.write_text(json.dumps({"pre_tokenizer": rules, "model": {"vocab": {"½": 0}}}))
    digits.as_pattern(path)
    found = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    assert found == {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}, "model": {"vocab": {"½": 0}}}
    path.write_bytes(b"430 4\n3 1 2\n0 1 2 9 1 7\n\x00\n\xff\n")
    mnn._without_prefix(path)
    assert path.read_bytes() == b"430 4\n3 1 0\n0 1 2 9\n\x00\n\xff\n"


def test_what_it_cannot_write(tmp_path: Path) -> None:
    for arch, words in (("gemma3_text", "MNN folders of gemma3_text models were not tried"), ("smollm3", "smollm3 models were not tried")):
        with pytest.raises(Unsupported, match=words):
            mnn.predict_bytes(tiny_model(arch, tmp_path / arch), "int4")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model("llama", tmp_path / "llama3", rope_parameters=rope | {"original_max_position_embeddings": 64})
    with pytest.raises(Unsupported, match="the rotation 'llama3'"):
        mnn.write(model, "int4", tmp_path, "x", quiet)


def test_the_page_for_apps(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "llama")
    facts = {"file": "tiny-int4-mnn", "size_bytes": 86_000_000}
    page = phone_readme.write(tmp_path, facts, mnn.PHONE, FolderText(model), mnn.context(model)).read_text(encoding="utf-8")
    assert "implementation(" not in page  # there is no such artifact
    assert '"$filesDir/tiny-int4-mnn"' in page
    assert 'forResource: "tiny-int4-mnn"' in page
    assert "Llm::createLLM" in page
