"""Verification refuses a file that differs from its model, and names the part that differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest

from edgelora import artifact, environments, evaluate, models
from edgelora.data import chat
from edgelora.data.chat import Encoded
from edgelora.data.read import read
from edgelora.errors import VerifyError
from edgelora.export import FORMATS, stage, verify
from edgelora.export import gguf as export
from edgelora.export.reference import Reference
from edgelora.runtime import runtime
from edgelora.tuned import Tuned, tuned
from edgelora.weights import Checkpoint
from tests.gguf_files import rewritten
from tests.line import Line, edgelora, finished_folders

MAX_KL = 0.2  # 8 bits are about 0.04 away from this tiny model


@pytest.fixture(scope="module")
def rows(finished: Line) -> list[Encoded]:
    tokenizer = models.open_tokenizer(finished.one("model-*"))
    return [chat.encode(tokenizer, row) for row in read(finished.folder / "rows.jsonl").rows[:6]]


@pytest.fixture(scope="module")
def model(finished: Line, tiny_base: Path) -> Tuned:
    base = models.open_base(str(tiny_base), Path(), finished.out)
    return tuned(base, str(tiny_base), artifact.load(finished.one("adapter-*")))


@pytest.fixture(scope="module")
def reference(model: Tuned, rows: list[Encoded]) -> Reference:
    return model.as_trained(rows, 1)


Verify = Callable[..., dict[str, Any]]
Refused = Callable[..., tuple[str, str]]


@pytest.fixture
def check(finished: Line, reference: Reference, rows: list[Encoded], tmp_path: Path) -> Verify:
    """`verify` of a file made from the merged folder; `widest` is what it is made of in the widest type."""
    folder = finished.one("model-*")

    def run(file: Path, max_kl: float = MAX_KL, widest: Path | None = None, **more: Any) -> dict[str, Any]:
        module = stage.format_module("gguf" if file.suffix == ".gguf" else "onnx")

        def full_precision() -> Path:
            (tmp_path / "widest").mkdir()
            return widest or Path(module.write(folder, stage._widest(module), tmp_path / "widest", "widest", lambda share, text: None))

        merged = lambda: Reference(folder, Checkpoint(folder), None, rows, 1)  # noqa: E731
        return verify.verify(folder, file, module.RUNTIME, reference, rows, max_kl, 1, full_precision, merged, **more)

    return run


@pytest.fixture
def refused(check: Verify) -> Callable[..., tuple[str, str]]:
    """Message and hint with which a file is refused."""

    def run(*arguments: Any, **options: Any) -> tuple[str, str]:
        with pytest.raises(VerifyError) as caught:
            check(*arguments, **options)
        return caught.value.message, caught.value.hint

    return run


@pytest.fixture
def file(finished: Line) -> Path:
    return finished.one("gguf-*/*.gguf")


@pytest.fixture
def folder(finished: Line, tmp_path: Path) -> Path:
    """A copy of the exported ONNX folder."""
    return Path(shutil.copytree(finished.one("onnx-*/tiny-int8-onnx"), tmp_path / "tampered-onnx"))


def test_an_untouched_file_passes(file: Path, folder: Path, check: Verify, rows: list[Encoded], tmp_path: Path) -> None:
    for path in (rewritten(file, tmp_path / "copy.gguf", {}), folder):
        facts = check(path)
        assert facts["tokens_equal"] is facts["template_equal"] is True
        assert 0 < facts["kl"] < MAX_KL
        assert facts["rows"] == 6
        assert facts["tokens"] == sum(row.n_trained for row in rows)
        assert not (tmp_path / "widest").exists()


def test_gguf_template(file: Path, tmp_path: Path, refused: Refused) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    message, hint = refused(rewritten(file, tmp_path / "t.gguf", {"tokenizer.chat_template": template}))
    assert (
        message
        == "t.gguf: the chat template renders '[user] Hello\\n' where training saw '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n'"
    )
    assert hint == "the culprit is the chat template"


@pytest.mark.parametrize("pre", ["default", "llama-bpe"])
def test_gguf_pre_tokenizer(file: Path, tmp_path: Path, pre: str, refused: Refused) -> None:
    message, hint = refused(rewritten(file, tmp_path / "p.gguf", {"tokenizer.ggml.pre": pre}))
    assert message.startswith("p.gguf: token ids differ from the trained model's from position ")
    assert hint == "the culprit is the tokenizer: its pre-tokenizer or its merges were not carried over"


def test_gguf_vocabulary(file: Path, tmp_path: Path, refused: Refused) -> None:
    tokens = list(gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents())
    a, b = tokens.index("a"), tokens.index("b")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    message, hint = refused(rewritten(file, tmp_path / "v.gguf", {"tokenizer.ggml.tokens": tokens}))
    assert message.startswith("v.gguf: token ids differ")
    assert "the tokenizer" in hint


def test_gguf_end_of_sequence(finished: Line, file: Path, tmp_path: Path, refused: Refused) -> None:
    tokenizer = models.open_tokenizer(finished.one("model-*"))
    other = tokenizer.convert_tokens_to_ids("a")
    message, hint = refused(rewritten(file, tmp_path / "e.gguf", {"tokenizer.ggml.eos_token_id": other}))
    # llama.cpp goes on stopping at the old one, which it knows by name; at every "a" too is the fault.
    assert message.startswith(f"e.gguf: end-of-sequence differs: the model stops at id {tokenizer.eos_token_id}, the file at [{other}")
    assert hint == "the culprit is the end-of-sequence token: answers would end too late or too early"


def zeroed(name: str, raw: np.ndarray) -> np.ndarray:
    return np.zeros_like(raw) if name == "blk.1.ffn_down.weight" else raw


@pytest.mark.parametrize("more", [{}, {"finer": "name rows"}])
def test_gguf_weights(more: dict[str, str], file: Path, tmp_path: Path, refused: Refused) -> None:
    message, hint = refused(rewritten(file, tmp_path / "w.gguf", {}, zeroed), **more)
    assert message.startswith("w.gguf: KL ")
    assert message.endswith(f" nats a token from the trained model, more than evaluate.max_kl = {MAX_KL}")
    assert hint.startswith("the culprit is the weights: in full precision the KL is ")
    assert hint.endswith(f", so this type is too coarse for this model; {more.get('finer', 'choose a larger one')}")


def test_gguf_weights_that_are_no_numbers(file: Path, tmp_path: Path, refused: Refused) -> None:
    def broken(name: str, raw: np.ndarray) -> np.ndarray:
        return np.full_like(raw, np.nan) if name == "output_norm.weight" else raw

    message, hint = refused(rewritten(file, tmp_path / "n.gguf", {}, broken))
    assert message.startswith("n.gguf: KL nan nats a token")
    assert hint.startswith("the culprit is the weights")


def test_a_wrong_conversion_is_told_from_coarse_weights(finished: Line, file: Path, tmp_path: Path, refused: Refused) -> None:
    wrong = rewritten(file, tmp_path / "c.gguf", {"llama.rope.freq_base": 500.0})
    message, hint = refused(wrong, widest=wrong)  # the converter makes the same mistake in every type
    assert message.startswith("c.gguf: KL ")
    assert hint.startswith("the culprit is the conversion or the runtime: even in full precision the KL is ")


def test_onnx_template(folder: Path, refused: Refused) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant\n", "<|im_start|>bot\n"))
    message, hint = refused(folder)
    assert message.startswith(
        "tampered-onnx: the chat template renders '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>bot\\n' where training saw "
    )
    assert hint == "the culprit is the chat template"


def test_onnx_tokenizer(folder: Path, refused: Refused) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    for step in values["pre_tokenizer"]["pretokenizers"]:
        step["use_regex"] = step["type"] != "ByteLevel"  # words are no longer split from what is beside them
    (folder / "tokenizer.json").write_text(json.dumps(values))
    message, hint = refused(folder)
    assert message.startswith("tampered-onnx: token ids differ from the trained model's from position ")
    assert hint == "the culprit is the tokenizer: its pre-tokenizer or its merges were not carried over"


def test_onnx_end_of_sequence(finished: Line, folder: Path, refused: Refused) -> None:
    tokenizer = models.open_tokenizer(finished.one("model-*"))
    old, new = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": new}))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "a"'))
    message, hint = refused(folder)
    assert message == f"tampered-onnx: end-of-sequence differs: the model stops at id {old}, the file at [{new}]"
    assert hint == "the culprit is the end-of-sequence token: answers would end too late or too early"


def test_onnx_weights(folder: Path, refused: Refused) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    scales = next(t for t in graph.initializer if "layers.1" in t.name and "down_proj" in t.name and "scale" in t.name.lower())
    place = {entry.key: entry.value for entry in scales.external_data}
    with (folder / place["location"]).open("r+b") as data:
        data.seek(int(place.get("offset", 0)))
        data.write(bytes(int(place["length"])))
    message, hint = refused(folder)
    assert message.startswith("tampered-onnx: KL ")
    assert hint.startswith("the culprit is the weights: in full precision the KL is ")


@pytest.mark.parametrize("damage", ["theta", "epsilon", "heads"])
def test_onnx_built_from_other_settings(finished: Line, damage: str, refused: Refused, tmp_path: Path) -> None:
    """A builder that reads a setting wrongly exits 0 and writes a file that loads: only its answers tell."""
    model = Path(shutil.copytree(finished.one("model-*"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    other = {
        "theta": {"rope_parameters": config["rope_parameters"] | {"rope_theta": 500.0}},
        "epsilon": {"rms_norm_eps": 0.5},
        "heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    }[damage]
    (model / "config.json").write_text(json.dumps(config | other))
    wrong = stage.format_module("onnx").write(model, "fp32", tmp_path, "wrong", lambda share, text: None)
    message, hint = refused(wrong, widest=wrong)
    assert message.startswith("wrong-fp32-onnx: KL ")
    assert hint.startswith("the culprit is the conversion or the runtime: even in full precision the KL is ")


def test_runtimes_of_one_file_must_agree(finished: Line, folder: Path, rows: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    found = verify.further(folder, "onnxruntime", ("onnxruntime-genai",), rows, 1)["onnxruntime-genai"]
    assert 0 <= found.pop("kl") < 1e-3
    assert set(found.values()) == {True}, found
    genai = runtime("onnxruntime-genai")
    other = lambda path, threads: genai_open(finished.one("base-onnx-*/base-tiny-int8-onnx"), threads)  # noqa: E731
    genai_open = genai.open
    monkeypatch.setattr(genai, "open", other)
    with pytest.raises(VerifyError, match="tampered-onnx: onnxruntime-genai and onnxruntime disagree about it: KL "):
        verify.further(folder, "onnxruntime", ("onnxruntime-genai",), rows, 1)


def test_a_refused_export_leaves_nothing(finished: Line, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "copy")
    out = tmp_path / "copy" / "runs" / "tiny"
    before = finished_folders(out)
    done = edgelora("run", "tiny.yaml", "--set", "evaluate.max_kl=1e-6", cwd=tmp_path / "copy")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: base-tiny-q8_0.gguf: KL ")
    assert "more than evaluate.max_kl = 1e-06\nthe culprit is the weights: in full precision the KL is " in done.err
    left = finished_folders(out)
    assert before.items() <= left.items()
    assert {name.partition("-")[0] for name in left.keys() - before.keys()} <= {"model"}  # of which max_kl is an input
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [".lock"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_widest_type_that_is_exact(name: str, finished: Line, model: Tuned, rows: list[Encoded], tmp_path: Path) -> None:
    """What `verify` compares a coarse file with; else the blame would be wrong."""
    module = stage.format_module(name)
    needed = getattr(module, "ENVIRONMENT", None)
    if needed and not environments.installed(needed):
        pytest.skip(f"make the environment with edgelora doctor --install {needed}")
    folder = finished.one("model-*")
    into = artifact.load(folder).facts["kept"]
    weights = {"weights": model.merged(into)} if module.MERGES else {}
    widest = module.write(folder, stage._widest(module), tmp_path, "widest", lambda share, text: None, **weights)
    exact = Reference(folder, Checkpoint(folder), None, rows, 1)
    with runtime(module.RUNTIME).open(widest, 1) as session:
        found = evaluate.divergence_summary(evaluate.divergence(exact, session, rows))
    assert found["kl"] < verify._EXACT_KL


def test_a_merge_far_from_what_was_trained_is_the_culprit(
    finished: Line, model: Tuned, reference: Reference, rows: list[Encoded], tmp_path: Path
) -> None:
    """In full precision the file is what was merged, and that is not what was trained."""
    folder, into = finished.one("model-*"), model.merged("16bit")
    far = export.write(folder, "f16", tmp_path, "far", lambda share, text: None, weights=into)
    merged = Reference(folder, into, None, rows, 1)
    with pytest.raises(VerifyError, match=r"far-f16\.gguf: KL ") as caught:
        verify.verify(folder, far, "llama.cpp", reference, rows, 0.01, 1, lambda: far, lambda: merged)
    assert caught.value.hint.startswith("the culprit is the merge: in full precision it is ")
