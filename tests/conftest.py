"""Fixtures: a tiny base model in the shape of the embedded one, and a recipe for it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.line import Line, walk, without_network


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--corpora", type=Path, help="Folder with text corpora (lm/*.txt, faq_ja/*) for the token parity tests.")
    parser.addoption("--llama-cpp", type=Path, help="Folder of llama.cpp: vendor/llama.cpp of llama-cpp-python's unpacked sdist.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first: begun last, one would run alone while the other process waits."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No socket, and no hub model in a cache."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"tried to reach {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def corpora(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--corpora")
    if folder is None:
        pytest.skip("name a folder of corpora with --corpora DIR")
    return Path(folder)


@pytest.fixture(scope="session")
def llama_cpp_sources(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--llama-cpp")
    if folder is None:
        pytest.skip("name llama.cpp's folder with --llama-cpp DIR (vendor/llama.cpp of llama-cpp-python's unpacked sdist)")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import tiny_model

    return tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny-llama")


ROWS = [
    (f"What is part {n}?", f"Part {n} is the {word}.")
    for n, word in enumerate(
        ["wheel", "door", "roof", "seat", "lamp", "horn", "tyre", "belt", "pump", "fan", "gear", "hose", "bolt", "clip", "ring", "cap"]
    )
]


@pytest.fixture
def faq(tmp_path: Path) -> Path:
    """Sixteen rows of questions and answers, as JSONL."""
    file = tmp_path / "faq.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS), encoding="utf-8")
    return file


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_base: Path, faq: Path) -> Path:
    """A recipe that walks the whole line on the tiny base in seconds."""
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"""
name: tiny
base: {tiny_base}
data:
  train: {faq.name}
train: {{r: 4, alpha: 8, lr: 5e-3, epochs: 2, batch: 4, accumulate: 1, max_tokens: 128}}
exports:
  - {{format: gguf, type: q8_0}}
  - {{format: onnx, type: int8}}
evaluate: {{rows: 4, verify_rows: 2, answers: 2, max_new_tokens: 8, max_kl: 5}}
bench: {{prompt_tokens: [8], decode_tokens: 4, repeats: 3}}
budgets: {{size: 5MB}}
threads: 1
""",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Line:
    """The whole line on the tiny base, walked once. Read it, never change it."""
    line = walk(tmp_path_factory.mktemp("finished"), tiny_base)
    assert line.done.code == 0, line.done.err
    return line


@pytest.fixture(scope="session")
def again(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Line:
    """The same line in another empty folder; without any network, where this machine allows a network namespace."""
    return walk(tmp_path_factory.mktemp("again"), tiny_base, prefix=without_network() or ())


@pytest.fixture(scope="session")
def classified(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Line:
    """The whole line on labelled texts."""
    line = walk(tmp_path_factory.mktemp("classified"), tiny_base, task="classify")
    assert line.done.code == 0, line.done.err
    return line
