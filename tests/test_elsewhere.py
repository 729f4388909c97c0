"""A runtime in a process of its own: the pipe, what comes through it, and every way in which the other end can fail."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelora import environments, machine
from edgelora.bench import rounds
from edgelora.errors import EdgeloraError, ModelError, ToolMissing, Unsupported
from edgelora.runtime import elsewhere, executorch, runtime_of, runtimes_of
from tests.tiny_models import tiny_tokenizer

SCRIPT = Path(__file__).with_name("there") / "run_bigram.py"


def opened(folder: Path, words: str = "") -> elsewhere.Session:
    path = folder / "model.bin"
    path.write_text(words)
    return elsewhere.Session(elsewhere.Process("bigram", Path(sys.executable), SCRIPT), path, folder, 1)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[elsewhere.Session]:
    folder = tmp_path_factory.mktemp("bigram")
    tiny_tokenizer("smollm").save_pretrained(folder)
    with opened(folder) as session:
        yield session


def test_scores_come_through_whole(session: elsewhere.Session) -> None:
    found = session.score([1, 2, 3])
    assert (found.shape, found.dtype) == ((3, 600), np.float32)
    norm = np.log(np.exp(5) + np.exp(4) + 598)
    assert found[2][[4, 5, 6]] == pytest.approx([5 - norm, 4 - norm, -norm], abs=1e-6)
    assert np.array_equal(session.score([1, 2, 3], 2), found[2:])
    assert session.score([1, 2, 3], 3).shape == (0, 600)
    assert session.score(list(range(40)), 39).shape == (1, 600)


def test_answers_share_their_prompt(session: elsewhere.Session) -> None:
    answers = [[4, 5], [4, 6, 7], [9]]
    found = session.score_answers([1, 2, 3], answers)
    for answer, scores in zip(answers, found, strict=True):
        rows = session.score([1, 2, 3, *answer[:-1]], 2)
        assert scores == pytest.approx(rows[np.arange(len(answer)), answer])


def test_tokens_are_streamed_and_a_stream_may_be_left(session: elsewhere.Session) -> None:
    assert list(session.generate([1, 2], 5, ())) == [3, 4, 5, 6, 7]
    assert list(session.generate([1, 2], 9, (5,))) == [3, 4]
    assert list(session.generate([1, 2], 0, ())) == []
    left = session.generate([1, 2], 30, ())
    assert [next(left), next(left)] == [3, 4]
    assert session.score([7])[0].argmax() == 8  # what was not read is not taken for the next answer
    with pytest.raises(EdgeloraError, match="in the middle of generate"):
        next(left)


def test_what_the_file_says_counts(session: elsewhere.Session) -> None:
    assert session.stop_ids == (49,)
    assert session.special_tokens["eos_token"] == "<|im_end|>"
    assert session.library_tokenize("ab") == [97, 98]
    assert session.detokenize(session.tokenize("The dog")) == "The dog"


def test_requests_that_cannot_be_met(session: elsewhere.Session) -> None:
    with pytest.raises(Unsupported, match=r"41 tokens do not fit into the 40 that model\.bin was exported for"):
        session.score([1] * 41)
    with pytest.raises(Unsupported, match="an empty sequence"):
        session.score([])
    with pytest.raises(Unsupported, match="the id 600 is not in the vocabulary"):
        session.score([600])
    with pytest.raises(Unsupported, match="bigram: forty-five"):
        session.score([45])
    assert session.score([44])[0].argmax() == 45  # and it goes on


def test_a_damaged_file_and_a_death_say_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bigram: ValueError: no such model"):
        opened(tmp_path, "damaged")
    with opened(tmp_path) as session, pytest.raises(ModelError, match="the process of bigram ended with status 3: a last word"):
        session.score([46])
    with opened(tmp_path) as session:
        os.kill(session.process_id, signal.SIGKILL)
        with pytest.raises(ModelError, match="the process of bigram died of signal 9"):
            session.score([1])
    with pytest.raises(EdgeloraError, match="the model was closed"):
        session.score([1])


def test_memory_and_time_are_those_of_the_process_that_works(tmp_path: Path) -> None:
    tiny_tokenizer("smollm").save_pretrained(tmp_path)
    _, small, light = rounds.measure(lambda: opened(tmp_path), (2,), 3, lambda: 0.0, machine.cpu_seconds)
    _, slow, heavy = rounds.measure(lambda: opened(tmp_path, "slow large"), (2,), 3, lambda: 0.0, machine.cpu_seconds)
    assert heavy - light == pytest.approx(30e6, rel=0.3)
    assert slow[0].decode_cpu_s == pytest.approx(3 * 0.05, rel=0.3)
    assert small[0].decode_cpu_s < 0.05


def test_without_its_environment_a_runtime_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(ToolMissing, match="the environment 'executorch' is not installed") as caught:
        executorch.open(tmp_path / "a.pte", 1)
    assert caught.value.hint == "edgelora doctor --install executorch"
    assert executorch.version() == f"ExecuTorch {environments.versions('executorch')['executorch']}"


def test_files_name_their_runtime(tmp_path: Path) -> None:
    (tmp_path / "a.pte").write_bytes(b"x")
    assert runtime_of(tmp_path / "a.pte") == "executorch"
    assert runtimes_of(tmp_path / "a.pte") == ("executorch",)
    with pytest.raises(ModelError, match=r"is not a model that can be run here") as caught:
        runtime_of(tmp_path)
    assert ".pte" in caught.value.hint
