"""onnxruntime-genai as a runtime: the scores of plain ONNX Runtime, its greedy tokens, and no folder that asks for more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelora import size
from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.export import onnx as onnx_export
from edgelora.runtime import onnx_genai, onnx_runtime
from tests.tiny_models import tiny_model

IDS = [3 + (7 * i) % 200 for i in range(170)]  # more than one chunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("genai")
    return onnx_export.write(tiny_model("llama", root / "hf"), "int8", root, "tiny", lambda share, text: None)


def test_scores_are_those_of_onnx_runtime(folder: Path) -> None:
    with onnx_genai.open(folder, 1) as genai, onnx_runtime.open(folder, 1) as plain:
        ours, theirs = genai.score(IDS), plain.score(IDS)
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-4
        assert np.array_equal(genai.score(IDS, first=150), ours[150:])
        assert genai.tokenize("It's a test.") == plain.tokenize("It's a test.")
        assert genai.stop_ids == plain.stop_ids


def test_greedy_tokens_are_those_of_onnx_runtime_beyond_every_end(folder: Path) -> None:
    with onnx_genai.open(folder, 1) as genai, onnx_runtime.open(folder, 1) as plain:
        expected = list(plain.generate(IDS[:9], 40, ()))
        assert list(genai.generate(IDS[:9], 40, ())) == expected
        assert list(genai.generate(IDS[:9], 40, (expected[5],))) == expected[: expected.index(expected[5])]
        assert list(genai.generate(IDS[:9], 0, ())) == []
    # also where the id at which the library would stop by itself comes in the middle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_genai, "_vocabulary", lambda folder: expected[3] + 1)
        with onnx_genai.open(folder, 1) as genai:
            assert list(genai.generate(IDS[:9], 40, ())) == expected


def test_what_a_session_refuses(folder: Path) -> None:
    with onnx_genai.open(folder, 1) as session:
        with pytest.raises(Unsupported, match="an empty sequence"):
            session.score([])
        with pytest.raises(Unsupported, match="300 tokens do not fit into the 256"):
            session.score([1] * 300)
        with pytest.raises(ValueError, match="first is 9"):
            session.score([1, 2], first=9)
        tokens = session.generate(IDS[:4], 5, ())
        next(tokens)
        session.score(IDS[:4])
        with pytest.raises(EdgeloraError, match="in the middle of generate"):
            next(tokens)
    with pytest.raises(EdgeloraError, match="was closed"):
        session.score([1])


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "genai_config.json"
        values = json.loads(path.read_text())
        change(values["model"])
        path.write_text(json.dumps(values))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (changed(lambda m: m["decoder"]["session_options"].update(custom_ops_library="evil.so")), "session option custom_ops_library"),
        (changed(lambda m: m["decoder"]["session_options"].update(provider_options=[{"cuda": {}}])), "asks for provider_options"),
        (changed(lambda m: m["decoder"].update(filename="../other/model.onnx")), "graph '../other/model.onnx'"),
        (changed(lambda m: m["decoder"].update(pipeline=[])), "asks for pipeline"),
        (changed(lambda m: m.update(vision={"filename": "vision.onnx"})), "asks for model.vision"),
        (changed(lambda m: m.pop("decoder")), "describes no decoder"),
        (changed(lambda m: m.update(vocab_size="many")), "describes no decoder"),
        (changed(lambda m: m["decoder"].update(head_size=1 << 50)), "wants a cache of 2 heads of 1125899906842624 values in 3 layers"),
        (changed(lambda m: m["decoder"].pop("num_hidden_layers")), "its decoder has 2 heads of 16 values in None layers"),
        (changed(lambda m: m.update(context_length=0)), "context_length is 0"),
        (lambda folder: (folder / "genai_config.json").unlink(), "holds no genai_config.json"),
        (lambda folder: (folder / "genai_config.json").write_text("[1]"), "holds no object"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "is missing or a link"),
    ],
)
def test_folders_that_ask_for_more_are_refused(damage: Callable[[Path], Any], words: str, folder: Path, tmp_path: Path) -> None:
    hostile = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(hostile)
    with pytest.raises((ModelError, Unsupported)) as caught:
        onnx_genai.open(hostile, 1)
    assert words in caught.value.message


def test_version_names_the_library() -> None:
    assert onnx_genai.version().startswith("onnxruntime-genai 0.")


def test_bytes_a_token_reads(folder: Path, tmp_path: Path) -> None:
    """Tied: the table is the output layer, and everything but the graph is read. Untied: the table is only looked up."""
    tied = size.read(folder).by("group")
    assert onnx_genai.bytes_per_token(folder) == sum(n for name, n in tied.items() if name not in ("metadata", "padding"))
    untied = onnx_export.write(
        tiny_model("llama", tmp_path / "hf", tie_word_embeddings=False), "int8", tmp_path, "untied", lambda s, t: None
    )
    groups = size.read(untied).by("group")
    assert groups["embedding"] > 0
    assert onnx_genai.bytes_per_token(untied) == sum(n for name, n in groups.items() if name not in ("metadata", "padding", "embedding"))
