"""LiteRT files: the model itself in LiteRT, LiteRT-LM's own answer, and a chat template that its engine cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgelora import environments, models
from edgelora.data import chat, template
from edgelora.errors import ModelError, Unsupported
from edgelora.export import litert, litert_template, on_grid, phone_readme, verify
from edgelora.runtime import litert_lm, runtime_of, torch_reference
from edgelora.runtime.text import FolderText
from tests.phone_files import assert_answers_alike, assert_computes, matrices, measured
from tests.test_onnx_export import IDS, calmed, kl, quiet
from tests.tiny_models import CHAT_TEMPLATE, tiny_model

there = pytest.mark.skipif(not environments.installed("litert"), reason="make the environment with edgelora doctor --install litert")
TALK = (("user", "Where is part 7?"), ("assistant", "In the lamp."), ("user", "{{ And }} part <b>8</b>?\n"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calmed(tiny_model("llama", tmp_path_factory.mktemp("hf") / "tiny"))


@pytest.fixture(scope="module")
def exact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return litert.write(model, "fp32", tmp_path_factory.mktemp("litert"), "tiny", quiet)


@there
@pytest.mark.slow
def test_a_file_is_the_model(model: Path, exact: Path) -> None:
    assert (exact.name, runtime_of(exact)) == ("tiny-fp32.litertlm", "litert-lm")
    with torch_reference.open(model, 1) as torch, litert_lm.open(exact, 1) as session:
        expected, found = torch.score(IDS), session.score(IDS)
        assert np.abs(expected - found).max() < 1e-3
        np.testing.assert_allclose(session.score(IDS, first=150), found[150:], atol=1e-5)  # a prompt in a block, its end token by token
        assert_answers_alike(torch, session)
        first, second = session.score_answers(IDS[:20], [IDS[20:23], IDS[30:32]])
        np.testing.assert_allclose(first, expected_at(found, 19, IDS[20:23]), atol=1e-4)
        assert second.shape == (2,)
        assert session.score([3] * 256).shape == (256, session.score([3]).shape[1])  # to the last row of the cache


def expected_at(rows: np.ndarray, at: int, ids: list[int]) -> np.ndarray:
    return rows[at + np.arange(len(ids)), ids]


@there
@pytest.mark.slow
def test_what_the_file_says_of_text_is_what_litert_lm_makes_of_it(model: Path, exact: Path) -> None:
    tokenizer = models.open_tokenizer(model)
    with litert_lm.open(exact, 1) as session:
        assert session.stop_ids == (tokenizer.eos_token_id,)
        for text in verify.PROBES:
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert session.tokenize(text) == session.library_tokenize(text) == expected
        for talk in (*verify.CONVERSATIONS, TALK):
            expected = chat.render(tokenizer, talk, open_turn=True)
            assert session.library_render(talk) == template.render(session.chat_template, talk, session.special_tokens) == expected


@there
@pytest.mark.slow
def test_litert_lm_itself_answers_what_litert_computes(exact: Path) -> None:
    """Its engine gives text alone: the same, up to a stop token or as many tokens."""
    with litert_lm.open(exact, 1) as session:
        same = []
        for question in ("The dog", "question: what is 7 x 8?", "日本語の文章"):
            prompt = template.render(session.chat_template, (("user", question),), {})
            ids = [*session.generate(session.tokenize(prompt), 24, session.stop_ids)]
            text = session.detokenize(ids)
            same.append(session.library_answer(prompt, 24).rstrip("�") == text.rstrip("�"))
        assert all(same)


@there
@pytest.mark.slow
@pytest.mark.parametrize(("type", "most"), [("int8", 0.05), ("int4", 0.6)])
def test_smaller_types(type: str, most: float, model: Path, exact: Path, tmp_path: Path) -> None:
    path = litert.write(model, type, tmp_path, "tiny", quiet)
    with litert_lm.open(exact, 1) as wide, litert_lm.open(path, 1) as session:
        assert kl(wide.score(IDS), session.score(IDS)) < most
    assert litert.predict_bytes(model, type) == pytest.approx(path.stat().st_size, rel=0.3)


@there
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma3_text"])
def test_weights_rounded_by_rows_are_in_the_file(arch: str, tmp_path: Path) -> None:
    model = calmed(tiny_model(arch, tmp_path / "hf"))
    moments = measured(model, tmp_path)
    path, source = litert.write(model, "int4", tmp_path, "tiny", quiet, moments), on_grid.opened(model, litert._GRID, moments)
    held = path.read_bytes()
    for name, codes, scales, _ in matrices(source, litert._GRID):
        assert (codes[:, ::2] & 15 | codes[:, 1::2] << 4).tobytes() in held, name
        assert scales.astype(np.float16).tobytes() in held, name
    with litert_lm.open(path, 1) as session:
        assert_computes(session, source, tmp_path)


@there
def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.litertlm").write_bytes(b"LITERTLM" + bytes(100))
    with pytest.raises(ModelError):
        litert_lm.open(tmp_path / "a.litertlm", 1)


TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "line end at the end": CHAT_TEMPLATE + "\n",
    "tokens by name": "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}",
    "lines and indents": "  {% for message in messages %}\n    {% if message['role'] == 'user' %}\nUser: {{ message['content'] | trim }}\n    {% endif %}\n{% endfor %}\nBot:",
    "the first message": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n' }}{% endif %}{{ messages[-1]['content'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_mended_template_renders_the_same(name: str) -> None:
    special = {"bos_token": '<s "quoted">', "eos_token": "</s>"}
    plain, mended = litert_template.candidates(TEMPLATES[name], special)
    assert plain == TEMPLATES[name]
    for talk in (*verify.CONVERSATIONS, TALK):
        assert template.render(mended, talk, {}) == template.render(plain, talk, special)


def test_a_mended_template_takes_what_the_engine_gives() -> None:
    """Contents as lists of parts, where the original fails."""
    plain, mended = (template._compiled(text) for text in litert_template.candidates(CHAT_TEMPLATE, {}))
    parts = [{"role": "user", "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": " to?"}]}]
    with pytest.raises(TypeError):
        plain.render(messages=parts)
    assert mended.render(messages=parts, add_generation_prompt=True) == template.render(CHAT_TEMPLATE, (("user", "Where to?"),), {})


def test_what_it_cannot_write(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "odd", intermediate_size=100)
    with pytest.raises(Unsupported, match=r"int4 rounds blocks of 32, and the rows of .*down_proj.weight have 100 values"):
        litert.predict_bytes(model, "int4")
    assert litert.predict_bytes(model, "int8") > 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}))
    with pytest.raises((Unsupported, ModelError), match="olmo2"):
        litert.write(model, "int8", tmp_path, "x", quiet)


def test_the_page_for_apps(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "llama")
    facts = {"file": "tiny-int4.litertlm", "size_bytes": 79_000_000}
    page = phone_readme.write(tmp_path, facts, litert.PHONE, FolderText(model), litert.context(model)).read_text(encoding="utf-8")
    assert 'implementation("com.google.ai.edge.litertlm:litertlm-android:' in page
    assert '"$filesDir/tiny-int4.litertlm"' in page
    assert "at most 256 tokens" in page
    assert "no released runtime for iOS" in page
