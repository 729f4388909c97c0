"""Whatever the text is, an exported file splits it as the model was trained: random Unicode, and every script at once."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelora import models, tuned
from edgelora.data import chat
from edgelora.export import gguf, verify
from edgelora.runtime import llama_cpp
from edgelora.weights import Checkpoint
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


@pytest.mark.parametrize(
    ("kind", "named"),
    [("sentencepiece", "LlamaTokenizer"), ("gemma", "GemmaTokenizer"), ("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")],
)
def test_a_tokenizer_of_the_hub_ships_as_transformers_runs_it(kind: str, named: str, tmp_path: Path) -> None:
    """These classes put parts of a tokenizer together in code, whatever its files say."""
    hub = tiny_model("llama", tmp_path / "hub", tokenizer=kind, vocab_size=600)
    written = hub / "tokenizer_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"tokenizer_class": named}))
    tokenizer = models.open_tokenizer(hub)
    assert type(tokenizer).__name__ == named
    (tmp_path / "described").mkdir()
    described = tuned.plain(hub, "key").described(tmp_path / "described", True)
    file = gguf.write(described, "q8_0", tmp_path, "tiny", lambda share, name: None, weights=Checkpoint(hub))
    with llama_cpp.open_vocabulary(file) as vocabulary:
        assert vocabulary.stop_ids[0] == tokenizer.eos_token_id
        for talk in verify.CONVERSATIONS:
            text = chat.render(tokenizer, talk, open_turn=True)
            assert vocabulary.tokenize(text) == list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in verify.PROBES if named != "LlamaTokenizer" else ():  # it puts a space before plain text, llama.cpp cannot
            text = unicodedata.normalize("NFC", text)
            assert vocabulary.tokenize(text) == list(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(text=TEXT)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_split_alike(pair: Pair, text: str) -> None:
    text = unicodedata.normalize("NFC", text)  # some tokenizers compose what they read, llama.cpp does not
    assert pair.vocabulary.tokenize(text) == list(pair.tokenizer(text, add_special_tokens=False)["input_ids"])
