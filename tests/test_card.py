"""What goes with a file that ships: model card and checksums."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import yaml

from edgelora.export import beside, card

FACTS = {
    "file": "bot-q4_k_m.gguf",
    "format": "gguf",
    "type": "q4_k_m",
    "runtime": "llama.cpp",
    "size_bytes": 105_500_000,
    "kl": 0.045,
    "kl_low": 0.041,
    "kl_high": 0.051,
    "top1": 0.9,
    "rows": 16,
    "tokens": 617,
}


def test_the_card_names_base_data_and_obligations(tmp_path: Path) -> None:
    origin = card.Origin("SmolLM2-135M-Instruct", "apache-2.0", "cc-by-4.0", "the City of Kobe")
    text = card.write(tmp_path, FACTS, origin, "bot", [("llama.cpp", "llama-cli -m bot-q4_k_m.gguf")]).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["base_model"], front["base_model_relation"]) == ("apache-2.0", "SmolLM2-135M-Instruct", "quantized")
    assert "| `bot-q4_k_m.gguf` | 105.5 MB | 0.045 [0.041, 0.051] nats a token | 90% |" in text
    assert "Measured on 16 rows, 617 tokens, in llama.cpp." in text
    assert "- Base: SmolLM2-135M-Instruct, apache-2.0. Keep the base's licence text and its NOTICE" in text
    assert "- Training data by the City of Kobe: cc-by-4.0. Name the author and the licence" in text
    assert "llama-cli -m bot-q4_k_m.gguf" in text
    assert str(tmp_path) not in text


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    text = card.write(tmp_path, FACTS, card.Origin("mine"), "bot", []).read_text()
    assert "- Base: mine, licence unknown. Unknown: find out before you publish." in text
    assert "licence not stated (`data.licence` in the recipe). Unknown: find out" in text


@pytest.mark.parametrize(
    ("licence", "asked"),
    [
        ("cc-by-4.0", "Name the author and the licence"),
        ("cc-by-nc-4.0", "Commercial use is not allowed"),
        ("cc-by-sa-3.0", "under the same licence"),
        ("llama3.2", "Built with Llama"),
        ("gemma", "Gemma Terms of Use"),
        ("Apache-2.0", "NOTICE"),
        ("homemade", "Not known here: read it"),
        (None, "Unknown"),
    ],
)
def test_obligations(licence: str | None, asked: str) -> None:
    assert asked in card.obligations(licence)


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: gemma\ntags: [x]\n---\n# hi\n", "gemma"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nlicense: other\n---\n", None),
    ],
)
def test_the_licence_of_a_folder(readme: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert card.licence_of(tmp_path) == licence


def test_a_folder_without_a_readme(tmp_path: Path) -> None:
    assert card.licence_of(tmp_path) is None


def test_checksums(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.gguf").write_bytes(b"a")
    (tmp_path / "deep" / "b.onnx").write_bytes(b"b")
    assert beside.checksums(tmp_path).read_text().splitlines() == [
        f"{hashlib.sha256(b'a').hexdigest()}  a.gguf",
        f"{hashlib.sha256(b'b').hexdigest()}  deep/b.onnx",
    ]
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True).returncode == 0
