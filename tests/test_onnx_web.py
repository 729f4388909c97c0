"""The folder for browsers: transformers.js in Node and the page in Chromium answer as ONNX Runtime does, and nothing leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgelora import environments
from edgelora.data import template
from edgelora.errors import UsageError, VerifyError
from edgelora.export import onnx as onnx_export
from edgelora.export import onnx_web, verify
from edgelora.runtime import onnx_runtime
from tests.test_onnx_export import calmed, quiet
from tests.tiny_models import tiny_model

there = pytest.mark.skipif(
    not (environments.installed("web") and shutil.which("node")),
    reason="make the environment with edgelora doctor --install web (and Node)",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    model = calmed(tiny_model("llama", root / "hf", max_position_embeddings=1024))
    return onnx_export.write(model, "int4-mixed", root, "tiny", quiet)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return onnx_web.write(exported, "int4-mixed", tmp_path / "tiny-web")


@there
def test_what_lies_in_it(folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == [
        "chat.html",
        "config.json",
        "generation_config.json",
        "js/LICENCES.txt",
        "js/LICENSE-transformers.txt",
        "js/ort-wasm-simd-threaded.mjs",
        "js/ort-wasm-simd-threaded.wasm",
        "js/ort.wasm.bundle.min.mjs",
        "js/transformers.web.min.js",
        "onnx/model_q4.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    licences = (folder / "js" / "LICENCES.txt").read_text()
    assert licences.startswith("@huggingface/transformers 4.3.1, Apache-2.0, ")
    assert "\nonnxruntime-web 1." in licences


@there
def test_node_answers_as_onnx_runtime(folder: Path, exported: Path) -> None:
    found = onnx_web.check(folder, *verify.expected(exported, "onnxruntime", 1))
    assert found == {"version": "4.3.1", "same_text": True, "prompts": 2}


@there
def test_a_folder_that_answers_otherwise_is_refused(folder: Path, exported: Path) -> None:
    texts, prompts, rendered = verify.expected(exported, "onnxruntime", 1)
    with pytest.raises(VerifyError, match=r"transformers\.js renders '<\|im_start\|>user"):
        onnx_web.check(folder, texts, prompts, rendered + "x")
    with pytest.raises(VerifyError, match="answers otherwise from the first token on"):
        onnx_web.check(folder, texts, {prompt: [ids[0] + 1, *ids[1:]] for prompt, ids in prompts.items()}, rendered)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(VerifyError, match=r"transformers\.js splits .Hello world! .* otherwise"):
        onnx_web.check(folder, texts, prompts, rendered)
    (folder / "onnx" / "model_q4.onnx").write_bytes(b"no model")
    with pytest.raises(VerifyError, match=r"transformers\.js cannot run it: "):
        onnx_web.check(folder, texts, prompts, rendered)


@there
def test_a_name_that_transformers_js_takes_for_none(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"transformers\.js loads no folder called 'my bot-web'"):
        onnx_web.write(exported, "int4-mixed", tmp_path / "my bot-web")


@there
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_answers_in_chromium(folder: Path, exported: Path) -> None:
    with onnx_runtime.open(exported, 1) as session:
        ids = session.tokenize(template.render(session.chat_template, [("user", "Hello")], session.special_tokens))
        expected = session.detokenize([*session.generate(ids, 256, session.stop_ids)])
    playwright = environments.folder("web") / "node_modules" / "playwright-core" / "index.mjs"
    script = Path(__file__).parent / "browser.mjs"
    command = ["node", str(script), str(playwright), str(CHROMIUM), str(folder.parent), folder.name, "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ready"].startswith("Ready")
    assert (found["isolated"], found["outside"], found["errors"]) == (True, [], [])
    assert found["answer"][:20] == expected[:20]
    assert found["answer"]
