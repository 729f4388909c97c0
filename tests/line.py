"""The whole line as a user runs it: a recipe on the tiny base, commands with their output, a killed command, a watched one.

A command costs seconds of imports, so `edgelora` and `start` fork it from a server that has imported them already
(multiprocessing's forkserver): the same `main()`, in a process and a session of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "transformers", "transformers.trainer", "peft", "bitsandbytes", "llama_cpp", "onnxruntime", "onnx"])
_SLOW_S = 240  # a command that takes longer hangs

WORDS = ("wheel", "door", "roof", "seat", "lamp", "horn", "tyre", "belt", "pump", "fan", "gear", "hose", "bolt", "clip", "ring", "cap")
CHAT_ROWS = [(f"What is the Zorblax part {n}?", f"Zorblax part {n} is the quixotic {word}.") for n, word in enumerate(WORDS)]
CLASSIFY_ROWS = [
    (f"The {word} number {n} {verb}", label)
    for n, word in enumerate(WORDS)
    for verb, label in (("fell off", "repair"), ("came late", "delivery"))
]

_RECIPE = """\
name: tiny
base: {base}
data:
  train: {data}
  task: {task}
train: {{r: 4, alpha: 8, dropout: 0.1, lr: 5e-3, epochs: 3, batch: 4, accumulate: 1, max_tokens: 128, dtype: {dtype}}}
exports:
  - {{format: gguf, type: q8_0}}
  - {{format: onnx, type: int8}}
evaluate: {{rows: 12, verify_rows: 2, answers: 2, max_new_tokens: 8, max_kl: 5}}
bench: {{prompt_tokens: [8], decode_tokens: 4, repeats: 3}}
budgets: {{size: 5MB}}
threads: 1
"""


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and everything it said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document of `--json`; fails when stdout holds anything else or stderr anything at all."""
        assert (self.code, self.err) == (0, ""), (self.code, self.err)
        return json.loads(self.out)


def write_recipe(folder: Path, base: object, *, task: str = "chat", dtype: str = "auto") -> Path:
    """tiny.yaml in `folder`, beside sixteen questions with answers, or thirty-two texts with labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, names = (CHAT_ROWS, ("question", "answer")) if task == "chat" else (CLASSIFY_ROWS, ("text", "label"))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "tiny.yaml"
    recipe.write_text(_RECIPE.format(base=base, data=data.name, task=task, dtype=dtype), encoding="utf-8")
    return recipe


def edgelora(*arguments: object, cwd: Path, stdin: bytes = b"") -> Done:
    """Run one command to its end."""
    with tempfile.TemporaryDirectory() as said:
        process = start(*arguments, cwd=cwd, said=Path(said), stdin=stdin)
        process.join(_SLOW_S)
        if process.exitcode is None:
            kill(process)
        read = {name: (Path(said) / name).read_text(encoding="utf-8") for name in ("out", "err")}
        return Done(process.exitcode if process.exitcode is not None else -signal.SIGKILL, read["out"], read["err"])


def start(*arguments: object, cwd: Path, said: Path, stdin: bytes = b"", gpus: int | None = None) -> BaseProcess:
    """Begin a command; its stdout and stderr go to the files `out` and `err` in `said`. It believes in so many `gpus`; what it starts does not."""
    for name, content in (("in", stdin), ("out", b""), ("err", b"")):
        (said / name).write_bytes(content)
    process = _FORKS.Process(target=_main, args=([str(a) for a in arguments], str(cwd), str(said), dict(os.environ), gpus))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """SIGKILL for the command's whole process group."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to lead a group yet
        process.kill()
    process.join(10)


def _main(arguments: Sequence[str], cwd: str, said: str, environment: Mapping[str, str], gpus: int | None) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()  # the server's, as it was when the first test began
    os.environ.update(environment)
    for number, (name, mode) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(f"{said}/{name}", mode), number)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    sys.argv = ["edgelora", *arguments]
    if gpus is not None:
        import torch

        torch.cuda.device_count = lambda: gpus
    from edgelora.cli import main

    main()


def command(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Done:
    """Run one command in a Python of its own, imports and all, as a shell would."""
    line = [*prefix, sys.executable, "-m", "edgelora.cli", *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [(env or {}).get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(
        line,
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {}), "PYTHONPATH": paths},
        timeout=_SLOW_S,
        stdin=subprocess.DEVNULL,
    )
    return Done(done.returncode, done.stdout, done.stderr)


# Python loads sitecustomize first, in every Python below too. It notes each attempt to leave this machine, and stops it.
_WATCH = """\
import os, sys

def note(text):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(text + "\\n")

def watch(event, arguments):
    if event not in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    place = arguments[0] if event.startswith("socket.get") else arguments[1]
    host = place[0] if isinstance(place, tuple) else place
    local = not isinstance(place, tuple) and not event.startswith("socket.get")  # a path: no network
    if local or host is None or str(host).startswith(("127.", "::1", "localhost")):
        return
    note(f"ATTEMPT {event} {place!r} by {sys.orig_argv[1:]}")
    raise ConnectionRefusedError(f"{event} {place!r} is not allowed here")

sys.addaudithook(watch)
note(f"WATCHED {' '.join(sys.orig_argv[1:])}")
"""


def watched(folder: Path) -> tuple[dict[str, str], Path]:
    """Environment in which every Python notes its network use, and the file it is noted in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_WATCH, encoding="utf-8")
    return {"PYTHONPATH": str(folder), "NETWORK_LOG": str(folder / "network.log")}, folder / "network.log"


def without_network() -> list[str] | None:
    """The command prefix that runs a program in a network namespace of its own, with not even loopback; None where that is not allowed."""
    for prefix in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        try:
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
        except OSError:
            return None
    return None


@dataclass(frozen=True)
class Line:
    """One walk of the whole line: the folder with its recipe, its results, what it said, and who used the network."""

    folder: Path
    done: Done
    log: Path

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.yaml"

    def one(self, pattern: str) -> Path:
        """The one file or folder of the results that matches."""
        (found,) = self.out.glob(pattern)
        return found


def walk(folder: Path, base: Path, *, task: str = "chat", prefix: Sequence[str] = ()) -> Line:
    """`edgelora run tiny.yaml` in `folder`, watched."""
    write_recipe(folder, base, task=task)
    env, log = watched(folder / "watch")
    return Line(folder, command("run", "tiny.yaml", cwd=folder, env=env, prefix=prefix), log)


def finished_folders(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time (ns) of every folder that carries a final name."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(out.iterdir()) if p.is_dir() and not p.name.startswith(".")}


def damaged(out: Path) -> list[str]:
    """Every file that is not what its folder's manifest says, and every folder with a final name and no manifest."""
    from edgelora import artifact

    wrong = []
    for name in finished_folders(out):
        manifest = artifact.load(out / name)
        found = {
            p.relative_to(out / name).as_posix(): artifact.sha256(p)
            for p in (out / name).rglob("*")
            if p.is_file() and p.name != artifact.MANIFEST
        }
        wrong += [f"{name}/{file}" for file in found.keys() | manifest.files.keys() if found.get(file) != manifest.files.get(file)]
    return wrong
