"""The command that measures files on this machine and on devices within reach, or estimates them on others."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import lines
from edgelora.cli.output import PATH, Output, Progress, command
from edgelora.errors import EdgeloraError, UsageError

if TYPE_CHECKING:
    from edgelora.device.bench import Elsewhere
    from edgelora.recipe import Bench

_HERE = "here"  # of --device: this machine


@click.command()
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--threads", help="Threads, e.g. 4 or 1,2,4; default all cores, on another device 1, 2, 4, ... up to all.")
@click.option("--prompt-tokens", help="Prompt lengths, e.g. 32,128.")
@click.option("--repeats", type=click.IntRange(3), help="Repeats of every measurement; default 5, here 15 of several files.")
@click.option(
    "--runtime", "runtimes", multiple=True, help="Runtime to measure in, or all that open the file; default the first. Repeatable."
)
@click.option(
    "--device",
    "targets",
    multiple=True,
    metavar="DEVICE",
    help="Where to measure: here (the default), adb for every attached phone, adb:SERIAL, ssh:USER@HOST. Repeatable.",
)
@click.option("--runner", "programs", type=PATH, multiple=True, help="Program that runs the file on a device, or its folder. Repeatable.")
@click.option("--browser", is_flag=True, help="Also measure in Chromium: GGUF in wllama, ONNX in onnxruntime-web.")
@click.option("--rows", type=PATH, help="Rows (question, answer): the quality of the very files beside their speed.")
@click.option("--reference", type=PATH, help="With --rows: the model to measure the divergence (KL) from, e.g. its 16-bit export.")
@click.option("--most", type=click.IntRange(1), default=60, show_default=True, help="Rows read at most.")
@click.option("--estimate", metavar="DEVICES", help="Measure nothing: estimate the decode speed on these devices, comma-separated, or all.")
@click.option("--devices", type=PATH, help="Table of devices for --estimate; default edgelora/devices.yaml.")
@click.option("-o", "--output", type=PATH, help="Write report.html, report.md and report.json into this folder.")
@command
def bench(
    echo: Output,
    files: tuple[Path, ...],
    threads: str | None,
    prompt_tokens: str | None,
    repeats: int | None,
    runtimes: tuple[str, ...],
    targets: tuple[str, ...],
    programs: tuple[Path, ...],
    browser: bool,
    rows: Path | None,
    reference: Path | None,
    most: int,
    estimate: str | None,
    devices: Path | None,
    output: Path | None,
) -> None:
    """Load time, time to first token, prefill and decode speed, memory, CPU time and share of the memory's bandwidth of exported files.

    Several files take turns, and each is told from the first: faster, slower, or no more than chance. With --rows also their loss,
    answers and accuracy; with --browser also in Chromium, and whether the files answer alike there; with --device on a phone or another
    box; with --estimate what other devices should reach, without measuring.

    \b
    Example:  edgelora bench a.gguf b.gguf --rows held-out.csv -o page
    """
    from edgelora import machine
    from edgelora import report as reports
    from edgelora.report import turns

    if reference and not rows:
        raise UsageError("--reference needs rows to compare on", "for instance --rows held-out.csv")
    if devices and estimate is None:
        raise UsageError("--devices is a table for --estimate", "name the devices too, for instance --estimate all")
    if len({path.name for path in files}) < len(set(files)):
        raise UsageError("two files of the same name cannot be told apart in a report", "rename one of them")
    here = not targets or _HERE in targets
    failures: list[EdgeloraError] = []
    if estimate is not None:
        if rows or targets or browser:
            option = "--rows" if rows else "--device" if targets else "--browser"
            raise UsageError("--estimate runs no file", f"leave --estimate or {option} away")
        found: dict[str, Any] = {"estimates": _estimates(files, estimate, devices, runtimes)}
        said = [lines.estimate(row) for row in found["estimates"]]
    else:
        away = _away(files, tuple(name for name in targets if name != _HERE), programs)
        settings, counts = _settings(prompt_tokens, repeats), _counts(threads)
        named = [(path, name) for path in files for name in _runtimes(path, runtimes, browser)] if here else []
        if (runtimes or browser) and not here:
            option = "--browser" if browser else "--runtime"
            raise UsageError(f"{option} chooses among the runtimes of this machine", "leave it away, or add --device here")
        _check_browser(named)
        most_threads = counts[-1] if counts else machine.cores()
        with echo.progress() as progress:
            found = _quality(files, rows, reference, most, most_threads, progress) if rows else {}
            found |= _agreement(named, rows, most, most_threads, progress)
            timed = _here(named, _telling_apart(settings, files, repeats), counts or (machine.cores(),), progress)
            outcome = away.bench(settings, counts, lambda share, text: progress("devices", share, text))
        failures = outcome.failures
        told = turns.compared(timed)
        said = [*map(lines.bench, timed), *map(turns.sentence, told), *map(lines.device_bench, outcome.rows)]
        said += map(lines.quality, found.get("losses", []))
        said += map(lines.agreement, found.get("agreement", []))
        said += [*map(lines.divergence, found.get("divergence", [])), *map(lines.accuracy, found.get("accuracy", []))]
        beside = {"in_turns": told, "devices": outcome.devices}
        found = {"bench": [*timed, *outcome.rows], **{key: rows for key, rows in beside.items() if rows}, **found}
        found = {"machine": machine.describe(), **found} if here else found
        if not found["bench"]:
            raise _together(failures)
    if output is not None:
        written = reports.write(_document(output.name, files, found, estimate is None, here), output)
        said += [f"wrote {path}" for path in written.values()]
    echo.result(found, *said)
    if failures:
        raise _together(failures)


def _away(files: tuple[Path, ...], names: tuple[str, ...], programs: tuple[Path, ...]) -> Elsewhere:
    """Where to measure besides this machine; what cannot be found is an error before anything is measured."""
    from edgelora import device
    from edgelora.device import bench as benches

    if programs and not names:
        raise UsageError("--runner is a program for another device", "name the device too, for instance --device adb")
    if names and not programs:
        raise UsageError(
            f"--device {names[0]} needs the program that runs the file there", "for instance --runner llama.cpp/build-android/bin"
        )
    return benches.Elsewhere(device.find(names), benches.jobs(files, programs) if names else [])


def _together(failures: Sequence[EdgeloraError]) -> EdgeloraError:
    """One error of all that went wrong."""
    if len(failures) == 1:
        return failures[0]
    return EdgeloraError("; ".join(error.message for error in failures), "; ".join(dict.fromkeys(error.hint for error in failures)))


def _settings(prompt_tokens: str | None, repeats: int | None) -> Bench:
    from edgelora.recipe import Bench

    settings = Bench()
    if prompt_tokens is not None:
        settings = dataclasses.replace(settings, prompt_tokens=_numbers("--prompt-tokens", prompt_tokens, "32,128"))
    return dataclasses.replace(settings, repeats=repeats) if repeats else settings


def _telling_apart(settings: Bench, files: Sequence[Path], asked: int | None) -> Bench:
    """Of several files the reader wants to know which is faster: repeats enough for a verdict."""
    from edgelora import speeds

    return dataclasses.replace(settings, repeats=speeds.REPEATS) if len(files) > 1 and not asked else settings


def _counts(threads: str | None) -> tuple[int, ...]:
    return _numbers("--threads", threads, "1,2,4") if threads is not None else ()


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    if not all(n.strip().isdigit() and int(n) > 0 for n in text.split(",")):
        raise UsageError(f"{option} {text!r} are not counts above 0", f"for instance {option} {example}")
    return tuple(dict.fromkeys(int(n) for n in text.split(",")))


def _here(named: list[tuple[Path, str]], settings: Bench, counts: tuple[int, ...], progress: Progress) -> list[dict[str, Any]]:
    """Rows of this machine, for each number of threads."""
    from functools import partial

    from edgelora import bench as benches
    from edgelora.progress import part

    told, rows = partial(progress, "bench"), []
    for number, threads in enumerate(counts if named else ()):
        rows += benches.bench_all(named, settings, threads, part(told, number, len(counts)))
    return rows


def _quality(
    files: tuple[Path, ...], rows: Path, reference: Path | None, most: int, threads: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    from edgelora.bench import quality
    from edgelora.cli.use import labels_of
    from edgelora.data.read import read

    table = read(rows).rows[:most]
    return quality.measured(
        files, table, rows.stem, labels_of(files[0]), reference, threads, lambda share, text: progress("evaluate", share, text)
    )


def _agreement(
    named: list[tuple[Path, str]], rows: Path | None, most: int, threads: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Whether files answer in a browser as they do natively; nothing where none is measured in one."""
    from edgelora.runtime import IN_BROWSER

    if not any(name in IN_BROWSER.values() for _, name in named):
        return {}
    from edgelora.bench import agreement
    from edgelora.data.read import read

    table = read(rows).rows[:most] if rows else []
    return {"agreement": agreement.of_browsers(named, table, rows.stem if rows else "", threads, lambda s, t: progress("browser", s, t))}


def _check_browser(named: list[tuple[Path, str]]) -> None:
    """What a browser needs is asked for before anything is measured."""
    from edgelora.runtime import IN_BROWSER

    if any(name in IN_BROWSER.values() for _, name in named):
        from edgelora.runtime import browser

        browser.chromium()
        browser.modules()


def _estimates(files: tuple[Path, ...], names: str, table: Path | None, runtimes: tuple[str, ...]) -> list[dict[str, Any]]:
    from edgelora import roofline
    from edgelora.size import traffic

    known = roofline.load(table) if table else roofline.load()
    devices = roofline.chosen(known, [name.strip() for name in names.split(",") if name.strip()])
    found = []
    for path in files:
        read = traffic.bytes_per_token(path)
        for device in devices:
            for runtime in dict.fromkeys(runtimes) or (roofline.runtime_for(path),):
                found.append(roofline.estimate(known, device, runtime, path.name, read).as_row())
    return found


def _document(name: str, files: tuple[Path, ...], found: dict[str, Any], measured: bool, here: bool) -> dict[str, Any]:
    """The report of these files, with the command that repeats it: names only, no places on this machine."""
    from datetime import UTC, datetime

    from edgelora import artifact, device, roofline
    from edgelora import report as reports
    from edgelora.runtime import IN_BROWSER, runtime_of

    about: dict[str, Any] = {
        "created": datetime.now(UTC).date().isoformat(),
        "edgelora": artifact.versions_of()["edgelora"],
        "commands": [_repeat(click.get_current_context(), files)],
    }
    if measured and here:
        about |= {
            "machine": found["machine"],
            "versions": artifact.versions_of("llama-cpp-python", "onnxruntime", "onnxruntime-genai", "torch")
            | {row["runtime"]: row["runtime_version"].partition(" ")[2] for row in found["bench"] if row["runtime"] in IN_BROWSER.values()},
        }
    runtime = (runtime_of if here else lambda path: device.runner_of(path).RUNTIME) if measured else roofline.runtime_for
    listed = [(path, runtime(path), artifact.sha256(path) if path.is_file() else None) for path in dict.fromkeys(files)]
    return reports.of_files(name or "bench", listed, about, {k: v for k, v in found.items() if k != "machine"})


def _repeat(context: click.Context, files: tuple[Path, ...]) -> str:
    """The command line, with every path cut to its last name, and of devices how they are reached but not which ones they are."""
    words = ["edgelora", "bench", *(path.name for path in files)]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if not isinstance(option, click.Option) or option.name in ("output", "quiet", "as_json") or value == option.default or not value:
            continue
        if option.is_flag:
            words.append(option.opts[-1])
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [
                option.opts[-1],
                item.name if isinstance(item, Path) else _nameless(str(item)) if option.name == "targets" else str(item),
            ]
    return shlex.join(words)


def _nameless(target: str) -> str:
    """A device without its serial, user or host."""
    kind, found, _ = target.partition(":")
    return f"{kind}:{'USER@HOST' if kind == 'ssh' else 'SERIAL'}" if found else target


def _runtimes(path: Path, asked: tuple[str, ...], browser: bool) -> tuple[str, ...]:
    """The runtimes to measure a file in: those asked for, all that open it, or its first; and with `browser` its browser's."""
    from edgelora.runtime import IN_BROWSER, browser_of, runtimes_of

    own = runtimes_of(path)
    able = (*own, *((IN_BROWSER[own[0]],) if own[0] in IN_BROWSER else ()))
    added = (browser_of(path),) if browser else ()
    if "all" in asked:
        return (*own, *added)
    if unable := [name for name in asked if name not in able]:
        raise UsageError(f"{path.name} is not opened by {unable[0]!r}", f"it is opened by {', '.join(able)}")
    return tuple(dict.fromkeys((*(asked or own[:1]), *added)))
