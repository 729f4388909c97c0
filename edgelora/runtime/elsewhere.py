"""A runtime that runs in an environment of its own: its library is never imported here, a process with that environment's Python serves it.

Requests and replies are lines of JSON (`there/serve.py` is the other end). A token costs one line, about 50 microseconds
of two processes, so what a bench reads off its clock is the library's work. `start` launches the process and waits until
the library is imported, as those of other runtimes are before a model is opened.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from edgelora import environments, errors
from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.runtime.answers import in_order
from edgelora.runtime.onnx_folder import log_softmax
from edgelora.runtime.text import FolderText

THERE = Path(__file__).with_name("there")
_CHUNK = 128  # tokens scored at once: bounds what goes through the pipe to 128 rows (33 MB at a vocabulary of 49k)


class Process:
    """Our end of a process that runs `there/serve.py` for the runtime `name`."""

    def __init__(self, name: str, python: Path, script: Path) -> None:
        self.name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        # Nothing of our own packages: the environment has its own, of other versions.
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env={**kept, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._streaming = False
        self._read()

    @property
    def id(self) -> int:
        return self._process.pid

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """The reply to one request; ModelError or Unsupported when the other end says so, ModelError when it died."""
        self._send(do, more)
        return self._read()

    def stream(self, do: str, **more: Any) -> Iterator[int]:
        """The tokens of a request; may be left in the middle."""
        self._send(do, more)
        self._streaming = True
        while "token" in (reply := self._read()):
            yield reply["token"]
        self._streaming = False

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._words.close()

    def _send(self, do: str, more: Mapping[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # reading tells what happened
            self._process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self._process.stdin.flush()
        while self._streaming:  # what was generated and nobody read
            self._streaming = "token" in self._line()

    def _read(self) -> dict[str, Any]:
        reply = self._line()
        if "error" in reply:
            self._streaming = False
            kind = getattr(errors, reply["error"])
            raise kind(f"{self.name}: {' '.join(reply['text'].split())[:400]}", "export the model again, or fetch the file again")
        return reply

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _death(self) -> ModelError:
        code = self._process.wait()
        self._words.seek(0)
        said = [line.strip() for line in self._words.read().decode("utf-8", "replace").splitlines() if line.strip()]
        how = f"died of signal {-code}" if code < 0 else f"ended with status {code}"
        return ModelError(f"the process of {self.name} {how}: {said[-1][:300] if said else 'it said nothing'}", "export the model again")


Opener = Callable[[Path, int], "Session"]  # (path, threads)


def start(environment: str, texts: Callable[[Path], Path], session: type[Session] | None = None) -> Opener:
    """Launch a process of `environment` that runs `there/run_ENVIRONMENT.py`, its library imported; what opens a file in it, once.

    `texts`: where, beside a file, tokenizer and chat template lie. ToolMissing when the environment is not installed.
    """
    process = Process(environment, environments.python(environment), THERE / f"run_{environment}.py")
    return lambda path, threads: (session or Session)(process, path, texts(path), threads)


class Session(FolderText):
    """See edgelora.runtime.Session. `process_id` is of the process that holds the model: its memory and time are the runtime's."""

    def __init__(self, process: Process, path: Path, texts: Path, threads: int) -> None:
        """Open `path` in `process`, which ends with this session; `texts` is the folder of tokenizer.json and chat template."""
        super().__init__(texts)
        self._path = path
        self._process: Process | None = process
        self._calls = 0
        try:
            self._facts = process.ask("open", path=str(path.absolute()), threads=threads)
        except EdgeloraError:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        return self._open().id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What the file itself says, where its format has a place for that."""
        return tuple(self._facts.get("stop_ids") or super().stop_ids)

    def library_tokenize(self, text: str) -> list[int]:
        """Ids by the tokenizer that the runtime's library brings along for apps."""
        return [int(i) for i in self._open().ask("tokenize", text=text)["ids"]]

    def score(self, ids: Sequence[int], first: int = 0) -> np.ndarray:
        if not 0 <= first <= len(ids):
            raise ValueError(f"first is {first}, expected 0 to {len(ids)}")
        self._begin(ids, len(ids))
        rows = [np.empty((0, self._facts["vocabulary"]), np.float32)]
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            keep = min(len(chunk), start + len(chunk) - first)
            logits = self._feed(chunk, start, max(1, keep))
            rows += [log_softmax(logits)] if keep > 0 else []
        return np.concatenate(rows)

    def score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        self._begin(prompt, len(prompt) + max(map(len, answers)) - 1)
        for start in range(0, len(prompt), _CHUNK):
            last = self._feed(prompt[start : start + _CHUNK], start, 1)
        return in_order(log_softmax(last), answers, lambda ids, at: log_softmax(self._feed(ids, len(prompt) + at, len(ids))))

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        self._begin(ids, len(ids) + max(0, max_new_tokens - 1))
        return self._continue(list(ids), max_new_tokens, stop, self._calls)

    def close(self) -> None:
        self._calls += 1
        if self._process is not None:
            self._process.close()
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _continue(self, ids: list[int], most: int, stop: Sequence[int], call: int) -> Iterator[int]:
        tokens = self._open().stream("generate", ids=ids, most=most, stop=list(stop)) if most > 0 else iter(())
        while True:
            if call != self._calls:
                raise EdgeloraError("this session was used or closed in the middle of generate()", "finish one call before the next")
            if (token := next(tokens, None)) is None:
                return
            yield token

    def _feed(self, ids: Sequence[int], at: int, keep: int) -> np.ndarray:
        """Raw predictions after the last `keep` of `ids`, float32, (keep, vocabulary)."""
        reply = self._open().ask("feed", ids=list(ids), at=at, keep=keep)
        return np.frombuffer(base64.b64decode(reply["data"]), np.float32).reshape(reply["shape"])

    def _begin(self, ids: Sequence[int], tokens: int) -> None:
        self._open()
        self._calls += 1
        if not ids:
            raise Unsupported("an empty sequence cannot be continued", "give at least one token, for instance the begin token")
        strange = next((i for i in ids if not 0 <= i < self._facts["vocabulary"]), None)
        if strange is not None:
            raise Unsupported(f"the id {strange} is not in the vocabulary of {self._path.name}", "tokenize with this model's own tokenizer")
        if tokens > self._facts["context"]:
            raise Unsupported(
                f"{tokens} tokens do not fit into the {self._facts['context']} that {self._path.name} was exported for",
                "give a shorter text",
            )

    def _open(self) -> Process:
        if self._process is None:
            raise EdgeloraError("the model was closed", "open it again")
        return self._process


class OwnText(Session):
    """A session of a file that holds its own chat template, for a library that renders it and answers in text."""

    @cached_property
    def chat_template(self) -> str | None:
        return str(self._text["chat_template"]) if self._text["chat_template"] else None

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        return dict(self._text.get("special_tokens", {}))

    def library_render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The conversation by the library's own template engine, up to where the assistant begins."""
        return str(self._open().ask("render", messages=[list(message) for message in messages])["text"])

    def library_answer(self, prompt: str, max_new_tokens: int) -> str:
        """What the library itself greedily answers to a rendered prompt, up to a stop token."""
        self._calls += 1
        return str(self._open().ask("answer", prompt=prompt, most=max_new_tokens)["text"])

    @cached_property
    def _text(self) -> dict[str, Any]:
        return self._open().ask("text")
