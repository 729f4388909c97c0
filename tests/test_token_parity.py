"""Whatever the text is, an exported file splits it as the model was trained: random Unicode, and every script at once."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelora import models
from edgelora.export import gguf
from edgelora.runtime import llama_cpp
from tests.tiny_models import tiny_model

KINDS = ("smollm", "gpt-2", "qwen2", "llama-bpe", "sentencepiece", "gemma")

_SPACES = st.text(" \t\n\r\u00a0\u2003\u3000\u200b", max_size=6)
_DIGITS = st.text("0123456789٣४½²", max_size=6)
_SCRIPTS = st.text("aZéßΩждあ漢字한글ไทยहिन्दीعربيעב", max_size=8)
_MARKS = st.text("'’\"`.,;:!?-_/\\()[]{}<>|@#$%^&*+=~…—、。", max_size=5)
_CONTRACTIONS = st.sampled_from(["I'm", "don't", "WE'LL", "'s", "they'Ve", "l'été"])
_JOINED = st.sampled_from(["👩‍👩‍👧‍👦", "🇯🇵", "e\u0301", "क्षि", "<|im_end|>", "<think>", "▁"])
TEXT = st.lists(st.one_of(st.text(max_size=12), _SPACES, _DIGITS, _SCRIPTS, _MARKS, _CONTRACTIONS, _JOINED), max_size=8).map("".join)


class Pair:
    """A tokenizer and the GGUF file made of it, in llama.cpp."""

    def __init__(self, kind: str, folder: Path) -> None:
        model = tiny_model("llama", folder, tokenizer=kind)
        self.tokenizer = models.open_tokenizer(model)
        self.vocabulary = llama_cpp.open_vocabulary(gguf.write(model, "q8_0", folder, "tiny", lambda share, name: None))


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.vocabulary.close()


@given(text=TEXT)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_split_alike(pair: Pair, text: str) -> None:
    text = unicodedata.normalize("NFC", text)  # some tokenizers compose what they read, llama.cpp does not
    assert pair.vocabulary.tokenize(text) == list(pair.tokenizer(text, add_special_tokens=False)["input_ids"])
