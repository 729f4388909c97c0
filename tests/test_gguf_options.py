"""What a user can say about a GGUF export beside its type, and what lies beside the file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from edgelora import artifact
from edgelora.gguf_header import read_header
from edgelora.quant import importance
from tests.line import Line, edgelora

RUN = ("--threads", 1)


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_header(file).tensors}


def test_types_by_hand(finished: Line, tmp_path: Path) -> None:
    line = ("export", finished.one("model-*"), "--format", "gguf", "--type", "q8_0", "--tensor-type", "ffn_down=f16", "--out", "out", *RUN)
    planned = edgelora(*line, "--dry-run", "--json", cwd=tmp_path).document
    made = edgelora(*line, "--json", cwd=tmp_path).document
    file = tmp_path / made["path"]
    assert {kind for name, kind in types(file).items() if "ffn_down" in name} == {"F16"}
    assert {kind for name, kind in types(file).items() if "ffn_up" in name} == {"Q8_0"}
    assert made["size_bytes"] == made["predicted_bytes"] == file.stat().st_size
    assert planned["weights"] == made["weights"]
    assert made["weights"]["types"]["f16"] == 3  # layers


def test_an_unknown_tensor_is_an_error_that_lists_what_exists(finished: Line, tmp_path: Path) -> None:
    done = edgelora("export", finished.one("model-*"), "--format", "gguf", "--tensor-type", "ffn_dwn=q8_0", "--dry-run", cwd=tmp_path)
    assert done.code == 3
    assert "error: tensor type 'ffn_dwn=q8_0' matches no matrix of this model\nits matrices: token_embd, attn_q" in done.err
    done = edgelora("export", finished.one("model-*"), "--format", "onnx", "--tensor-type", "ffn_down=q8_0", "--dry-run", cwd=tmp_path)
    assert (done.code, done.err) == (2, "error: onnx has no tensor_types\nleave it out, or export to gguf\n")


def test_fallbacks_are_said_before_and_after(finished: Line, tmp_path: Path) -> None:
    line = ("export", finished.one("model-*"), "--format", "gguf", "--type", "q6_k", "--out", "out", *RUN)
    said = "  q6_k needs rows of a multiple of 256: "
    for done in (edgelora(*line, "--dry-run", cwd=tmp_path), edgelora(*line, cwd=tmp_path)):
        assert done.code == 0
        assert said in done.out
        assert "have 64 and are q8_0, as in llama.cpp" in done.out
        assert " bits a weight" in done.out


def test_a_run_weighs_by_its_own_training_rows(finished: Line, tmp_path: Path) -> None:
    """The importance matrix is an artifact, measured once and found again by `export`."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    out = tmp_path / "copy" / "runs" / "tiny"
    exports = json.dumps([{"format": "gguf", "type": "q4_0"}, {"format": "gguf", "type": "iq4_nl"}, {"format": "gguf", "type": "q8_0"}])
    done = edgelora("run", "tiny.yaml", "--set", f"exports={exports}", cwd=tmp_path / "copy")
    assert done.code == 0, done.err
    (measured,) = out.glob("importance-*")
    made = artifact.load(measured)
    assert made.rows == {"train": "train"}
    weighed = {kind: artifact.load(next(out.glob(f"gguf-{kind}-*"))).facts["importance"] for kind in ("q4_0", "iq4_nl")}
    assert weighed == {"q4_0": True, "iq4_nl": True}
    assert "tiny-q4_0.gguf: " in done.out
    assert "rounded by importance" in done.out
    kept = artifact.load(next(out.glob("gguf-q4_0-*"))).facts["change"]["kept"]
    assert 0.5 < kept["q8_0"] < 1.5
    assert "q4_0 keeps " in done.out


def test_a_matrix_by_hand_changes_the_file(finished: Line, tmp_path: Path) -> None:
    model = finished.one("model-*")
    rows = [importance.Encoded(tuple(range(5, 40)), (False,) * 10 + (True,) * 25)]
    sums = importance.collect(importance.open_model(model), rows, 4, lambda share, text: None)
    importance.write(tmp_path / "mine.gguf", sums, "llama")
    line = ("export", model, "--format", "gguf", "--type", "q8_0", "--tensor-type", "attn_output=q5_1", *RUN, "--json")
    plain = edgelora(*line, "--out", "plain", cwd=tmp_path).document
    weighed = edgelora(*line, "--out", "weighed", "--imatrix", "mine.gguf", cwd=tmp_path).document
    assert (plain["importance"], weighed["importance"]) == (False, True)
    assert (tmp_path / plain["path"]).read_bytes() != (tmp_path / weighed["path"]).read_bytes()
    done = edgelora("export", model, "--format", "gguf", "--type", "q8_0", "--imatrix", "mine.gguf", cwd=tmp_path)
    assert done.code == 2
    assert "importance: true changes nothing: q8_0 is rounded the same with and without" in done.err


def test_an_adapter_beside_its_base(finished: Line, tiny_base: Path, tmp_path: Path) -> None:
    line = ("export", tiny_base, "--adapter", finished.one("adapter-*"), "--format", "gguf-lora", "--type", "f16", "--name", "bot", *RUN)
    made = edgelora(*line, "--out", "out", "--json", cwd=tmp_path).document
    file = tmp_path / made["path"]
    assert file.name == "bot-lora.gguf"
    assert made["kl"] < 5e-4  # of the pair, run together, to the model as trained
    assert made["size_bytes"] == made["predicted_bytes"] == file.stat().st_size
    assert made["base_file"] == "bot-base-f16.gguf"
    said = (file.parent / "Modelfile").read_text()
    assert "FROM ./bot-base-f16.gguf\nADAPTER ./bot-lora.gguf\n" in said
    done = edgelora("export", finished.one("model-*"), "--format", "gguf-lora", "--out", "out", *RUN, cwd=tmp_path)
    assert done.code == 2
    assert "gguf-lora is a base and an adapter beside it" in done.err
    (file.parent / made["base_file"]).unlink()
    done = edgelora("chat", file, cwd=tmp_path, stdin=b"hi\n")
    assert done.code == 3
    assert "is an adapter, and its base bot-base-f16 is not beside it" in done.err


def test_what_lies_beside_the_file(finished: Line) -> None:
    folder = finished.one("gguf-q8_0-*")
    assert {p.name for p in folder.iterdir()} == {"tiny-q8_0.gguf", "Modelfile", "README.md", "SHA256SUMS", artifact.MANIFEST}
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder).returncode == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "licence unknown. Unknown: find out before you publish." in card
    assert str(finished.folder) not in card


def test_the_command_of_the_card_serves_an_openai_endpoint(finished: Line) -> None:
    """As the model card says it, on a free port; asked once; stopped."""
    pytest.importorskip("uvicorn", reason="the server's packages are not installed")
    folder = finished.one("gguf-q8_0-*")
    card = (folder / "README.md").read_text(encoding="utf-8")
    line = next(line for line in card.splitlines() if line.startswith("python -m llama_cpp.server"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *line.replace("8080", str(port)).split()[1:], "--n_ctx", "128", "--n_threads", "1"]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    question = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is the Zorblax part 3?"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(question).encode(), {"content-type": "application/json"}
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    found = json.load(answer)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
    assert found["choices"][0]["message"]["role"] == "assistant"
    assert isinstance(found["choices"][0]["message"]["content"], str)
