"""Benches on other devices: an Android phone over adb, a Raspberry Pi or any Linux box over SSH.

    adb, ssh       two transports: run a command there, push and pull a file
    place          our folder on a device: what is pushed arrives whole, what runs there can be stopped, nothing is left behind
    about          what the device says of itself, and how warm it is
    elf            for which processor and system a program was built
    bench          one device after the other -> rows of a report
    llama_bench, executorch, litert_lm, mnn    runners: the command line of each tool, and how to read what it prints

A transport finds devices by what stands behind its name (`adb:SERIAL`, `ssh:USER@HOST`); a runner opens one kind of file
and is a module with:

    PROGRAM: str     # its file name in a folder of programs
    RUNTIME: str     # what a report calls it
    def opens(path: Path) -> bool
    def files(path: Path) -> list[Path]        # what the device needs of a model, the file that is opened first
    def commands(names: Sequence[str], threads: int, work: Work) -> list[list[str]]    # arguments, one list a start; `names` of files there
    def read(outputs: Sequence[str], threads: int, work: Work) -> list[Measured]    # Garbled when they hold something else
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from edgelora.errors import UsageError

TRANSPORTS = {"adb": "edgelora.device.adb", "ssh": "edgelora.device.ssh"}
RUNNERS = {
    "llama-bench": "edgelora.device.llama_bench",
    "executorch": "edgelora.device.executorch",
    "litert-lm": "edgelora.device.litert_lm",
    "mnn": "edgelora.device.mnn",
}


@dataclass(frozen=True)
class Done:
    """How a command on a device ended and what it said."""

    code: int
    out: str
    err: str


class Transport(Protocol):
    """A device within reach. Every method raises DeviceError when it is not, and DiskFull when it has no room."""

    name: str  # as the user wrote it, for errors
    base: str  # a folder there that may hold programs

    def run(self, command: str, limit_s: float) -> Done:
        """A command of the POSIX shell, waited for; what it ended with is no error of ours."""

    def push(self, sources: Sequence[Path], folder: str) -> None:
        """Files into a folder that is there, under their own names."""

    def pull(self, source: str, target: Path) -> None:
        """One file."""


class TransportModule(Protocol):
    def find(self, which: str) -> Sequence[Transport]:
        """The devices that `which` names; a transport may take '' for all that are attached."""


@dataclass(frozen=True)
class Work:
    """What a runner measures: each of the prompts read and continued by `decode_tokens`, `repeats` times."""

    prompt_tokens: tuple[int, ...]
    decode_tokens: int
    repeats: int


@dataclass(frozen=True)
class Measured:
    """One prompt length as a runner measured it, in milliseconds: loading and reading the prompt a sample a repeat,
    of later tokens the mean of each repeat. Loading is empty where the runner does not tell.
    """

    version: str
    prompt_tokens: int
    decode_tokens: int
    load_ms: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    decode_ms: tuple[float, ...]


class Garbled(ValueError):
    """A runner printed something else than its figures; the text says what."""


class RunnerModule(Protocol):
    PROGRAM: str
    RUNTIME: str

    def opens(self, path: Path) -> bool: ...

    def files(self, path: Path) -> list[Path]: ...

    def commands(self, names: Sequence[str], threads: int, work: Work) -> list[list[str]]: ...

    def read(self, outputs: Sequence[str], threads: int, work: Work) -> list[Measured]: ...


def find(names: Sequence[str]) -> list[Transport]:
    """The devices of `--device` options, in their order, each once. UsageError for a name of another form."""
    found: dict[str, Transport] = {}
    for name in dict.fromkeys(names):
        kind, _, which = name.partition(":")
        if kind not in TRANSPORTS:
            raise UsageError(f"--device {name!r} is no device", "known: here, adb, adb:SERIAL, ssh:USER@HOST")
        module = cast(TransportModule, importlib.import_module(TRANSPORTS[kind]))
        found |= {transport.name: transport for transport in module.find(which)}
    return list(found.values())


def runner_of(path: Path) -> RunnerModule:
    """The runner that opens `path`; UsageError when none does."""
    for name in RUNNERS.values():
        module = cast(RunnerModule, importlib.import_module(name))
        if module.opens(path):
            return module
    raise UsageError(
        f"{path} is nothing that a runner on a device opens" if path.exists() else f"{path} does not exist",
        "name a .gguf, .pte, .litertlm or .task file, or a folder with llm.mnn",
    )


def program_of(runner: RunnerModule, named: Sequence[Path]) -> Path:
    """The program that runs a runner's files: of `named` files and folders the first that is it or holds it.

    A single file is taken whatever it is called. UsageError when there is none.
    """
    for path in named:
        if path.is_dir() and (path / runner.PROGRAM).is_file():
            return path / runner.PROGRAM
        if path.is_file() and (path.name.startswith(runner.PROGRAM) or len(named) == 1):
            return path
    raise UsageError(
        f"no {runner.PROGRAM} among {', '.join(map(str, named))}",
        f"name the program {runner.PROGRAM}, or the folder it lies in, with --runner",
    )
