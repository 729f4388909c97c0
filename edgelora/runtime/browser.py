"""A page in Chromium that runs a model, driven through Playwright: the machinery that wllama and onnxruntime-web share.

    this process --lines of JSON--> driver.mjs (Node) --Playwright--> Chromium: page, worker, threads
         \\____ page_server: pages, libraries, the model ____________________/

What is timed is timed by the page itself, with performance.now(): an isolated page's clock counts in steps of 5 µs. Processor time
and memory are those of Chromium's processes (Node's are not counted), as the kernel tells them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

from edgelora import environments
from edgelora.errors import EdgeloraError, ModelError, ToolMissing, Unsupported
from edgelora.runtime.page_server import PageServer
from edgelora.runtime.process_tree import ProcessTree
from edgelora.runtime.timing import Timing

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CONTEXT = 1024  # tokens that a session has room for unless it is told otherwise
_START_S, _CALL_S = 120.0, 900.0


@dataclass(frozen=True)
class Prompt:
    """One prompt in both forms that pages take."""

    ids: Sequence[int]
    text: str


@dataclass(frozen=True)
class Said:
    """Tokens that the browser wrote or was made to write, their log-probabilities, and the likeliest id at each place."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[int, ...]


def chromium() -> str:
    """The path of Chromium; ToolMissing with the command that installs it."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        raise ToolMissing("Chromium is not installed", "apt-get install -y chromium")
    return found


def modules() -> Path:
    """The folder of the environment's JavaScript libraries; ToolMissing when it, or Node, is absent."""
    place = environments.require("web") / "node_modules"
    if shutil.which("node") is None:
        raise ToolMissing("Node is not installed", "apt-get install -y nodejs npm")
    return place


def library(package: str) -> str:
    """The version of one of the environment's libraries."""
    return str(json.loads((modules() / package / "package.json").read_text(encoding="utf-8"))["version"])


class Page:
    """One page of ours in a Chromium of its own, and its functions.

    Raises ToolMissing without Chromium, Node or the environment; EdgeloraError with the page's last words when it crashes or takes too long.
    """

    def __init__(self, name: str, libraries: Mapping[str, str], model: Path) -> None:
        """`libraries`: place on the server -> folder below node_modules; `model`: file or folder, served as `model/`."""
        program, place = chromium(), modules()
        self._name, self.url = name, ""
        self._after = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None
        with contextlib.ExitStack() as started:
            pages = started.enter_context(resources.as_file(resources.files("edgelora.runtime") / "web"))
            profile = started.enter_context(tempfile.TemporaryDirectory(prefix="edgelora-chromium-", ignore_cleanup_errors=True))
            self._words = started.enter_context(tempfile.TemporaryFile())
            places = {"page": pages, **{at: place / folder for at, folder in libraries.items()}, "model": model}
            server = started.enter_context(PageServer(places))
            about = {
                "playwright": (place / "playwright-core" / "index.mjs").as_uri(),
                "executable": program,
                "profile": profile,
                "url": f"{server.origin}/page/{name}.html",
                "sandbox": os.geteuid() != 0,  # Chromium's sandbox refuses to work for root
            }
            self.url = str(about["url"])
            self._process = subprocess.Popen(
                ["node", str(pages / "driver.mjs"), json.dumps(about)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                text=True,
                start_new_session=True,
            )
            started.callback(self._end)
            self.tree = ProcessTree(self._process.pid)
            self.browser = str(self._reply(_START_S, None)["browser"])
            self._after = started.pop_all()

    def call(self, name: str, on_event: Callable[[], None] | None = None, **args: Any) -> dict[str, Any]:
        """What the page's function gives. `on_event` is called when the page says that something happened on the way."""
        if self._process is None:
            raise EdgeloraError(f"the page of {self._name} is closed", "open the file again")
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"call": name, "args": args}) + "\n")
            self._process.stdin.flush()
        return self._reply(_CALL_S, on_event)

    def close(self) -> None:
        """End the browser. Safe to call twice."""
        self._after.close()

    def _reply(self, limit_s: float, on_event: Callable[[], None] | None) -> dict[str, Any]:
        assert self._process and self._process.stdout
        late = threading.Timer(limit_s, self._kill)
        late.start()
        try:
            for line in self._process.stdout:
                reply = json.loads(line)
                if "result" in reply:
                    return dict(reply["result"])
                if "error" in reply:
                    raise self._failure(reply["error"], reply["crashed"])
                if on_event:
                    on_event()
            raise self._failure(self._last_words() if late.is_alive() else f"no answer within {limit_s:.0f} s", True)
        finally:
            late.cancel()

    def _failure(self, words: str, crashed: bool) -> EdgeloraError:
        """The error that the page's words amount to. A page that crashed is closed."""
        words = " ".join(words.removeprefix("page.evaluate: ").removeprefix("Error: ").split())[:400]
        if crashed:
            self.close()
            return EdgeloraError(f"{self._name} in Chromium ended: {words}", "measure a smaller file or fewer tokens, or free some memory")
        if "invalid UTF-8" in words:
            return Unsupported(
                f"{self._name} cannot tell of a token that is a part of a character", "compare on texts whose characters are whole tokens"
            )
        return ModelError(
            f"{self._name} cannot run the file: {words}", "export the model again, or see whether the runtime knows its types"
        )

    def _last_words(self) -> str:
        self._words.seek(0)
        said = [line.strip() for line in self._words.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return next((line for line in said if "Error" in line), said[-1] if said else "it said nothing")

    def _end(self) -> None:
        process, self._process = self._process, None
        assert process and process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the driver closes the browser and ends
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()

    def _kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)


class BrowserSession:
    """A model in a page; see `edgelora.runtime.Session`. `text` is the native runtime's reading of the same file's tokenizer.

    Beyond a Session it can be timed, since its clocks are the browser's, and asked for what `Said` holds.
    """

    def __init__(self, page: Page, text: Any, spell: Callable[[Sequence[int]], str], load: Mapping[str, Any]) -> None:
        self.page = page
        self._text, self._spell = text, spell
        self.chat_template, self.special_tokens, self.stop_ids = text.chat_template, text.special_tokens, text.stop_ids
        try:
            with page.tree.watched():
                loaded = page.call("load", **load)
        except BaseException:
            self.close()
            raise
        self.load_ms = float(loaded["load_ms"])
        self.version = str(loaded["version"])
        if not loaded["isolated"] or loaded["threads"] != load["threads"]:
            self.close()
            raise EdgeloraError(
                f"Chromium gives {loaded['threads']} threads and not {load['threads']}",
                "measure with --threads 1, or another version of it",
            )

    def tokenize(self, text: str) -> list[int]:
        return list(self._text.tokenize(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._text.detokenize(ids))

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        """See Session.generate; all tokens come at once. `stop` may hold no more than the file's own stop ids."""
        if set(stop) - set(self.stop_ids):
            raise Unsupported("a browser's answer ends at the file's own stop tokens alone", "leave other stop ids away")
        for token in self.answer(ids, max_new_tokens).ids:
            if token in stop:
                return
            yield token

    def score(self, ids: Sequence[int], first: int = 0) -> Any:
        raise Unsupported(
            "a browser gives the probabilities of an answer's tokens, not of the whole vocabulary", "score it in its native runtime"
        )

    def score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Any:
        raise Unsupported("a browser is not asked for labels", "score the file in its native runtime")

    def time(self, ids: Sequence[int], decode_tokens: int) -> Timing:
        """Read a prompt and make `decode_tokens` more tokens than the first."""
        marks = [self.page.tree.cpu_s()]
        found = self._call("time", ids, lambda: marks.append(self.page.tree.cpu_s()), n=decode_tokens)
        marks.append(self.page.tree.cpu_s())
        if len(found["decode_ms"]) != decode_tokens:
            raise EdgeloraError(f"the browser made {len(found['decode_ms'])} tokens and not {decode_tokens}", "measure with fewer tokens")
        return Timing(len(ids), found["ttft_ms"], tuple(found["decode_ms"]), marks[1] - marks[0], marks[2] - marks[1])

    def answer(self, ids: Sequence[int], most: int) -> Said:
        """The greedy answer of at most `most` tokens, the stop token that ended it included."""
        return _said(self._call("answer", ids, most=most, stop=list(self.stop_ids), told=True))

    def write(self, ids: Sequence[int], most: int) -> str:
        """The text of `answer`, special tokens left out."""
        found = self._call("answer", ids, most=most, stop=list(self.stop_ids), told=False)
        return str(found["text"]) if "text" in found else self.detokenize(found["ids"])

    def follow(self, ids: Sequence[int], answer: Sequence[int]) -> Said:
        """The answer that is given, as if the browser had written it. wllama may spell the same text in other tokens, so they come back.

        Unsupported where wllama has no words for the likeliest token, which may be a part of a character.
        """
        text = self._spell([i for i in answer if i not in self.stop_ids])
        return _said(self._call("follow", ids, answer=list(answer), text=text, most=len(text.encode()) + 1))

    def close(self) -> None:
        self.page.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, name: str, ids: Sequence[int], on_event: Callable[[], None] | None = None, **args: Any) -> dict[str, Any]:
        if not ids:
            raise Unsupported("an empty sequence cannot be continued", "give at least one token, for instance the begin token")
        prompt = {"ids": list(ids), "text": self._spell(ids)}
        found = self.page.call(name, on_event, prompt=prompt, **args)
        if found["prompt_tokens"] not in (len(ids), len(ids) + 1):  # wllama puts a begin token in front where the file says so
            raise ModelError(
                f"the browser reads a prompt of {len(ids)} tokens as {found['prompt_tokens']}", "the culprit is the tokenizer: export again"
            )
        return found


def _said(found: Mapping[str, Any]) -> Said:
    return Said(tuple(found["ids"]), tuple(found["logprobs"]), tuple(found["likeliest"]))
