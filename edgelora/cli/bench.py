"""The command that measures files on this machine, or estimates them on others."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import click

from edgelora.cli import lines
from edgelora.cli.output import PATH, Output, Progress, command
from edgelora.errors import UsageError


@click.command()
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@click.option("--prompt-tokens", help="Prompt lengths, e.g. 32,128.")
@click.option("--repeats", type=click.IntRange(3), help="Repeats of every measurement.")
@click.option(
    "--runtime", "runtimes", multiple=True, help="Runtime to measure in, or all that open the file; default the first. Repeatable."
)
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
    threads: int | None,
    prompt_tokens: str | None,
    repeats: int | None,
    runtimes: tuple[str, ...],
    rows: Path | None,
    reference: Path | None,
    most: int,
    estimate: str | None,
    devices: Path | None,
    output: Path | None,
) -> None:
    """Load time, time to first token, prefill and decode speed, memory, CPU time and share of the memory's bandwidth of exported files.

    With --rows also their loss, answers and accuracy; with --estimate what other devices should reach, without measuring.

    \b
    Example:  edgelora bench a.gguf b.gguf --rows held-out.csv -o page
    """
    from edgelora import machine
    from edgelora import report as reports

    if reference and not rows:
        raise UsageError("--reference needs rows to compare on", "for instance --rows held-out.csv")
    if devices and estimate is None:
        raise UsageError("--devices is a table for --estimate", "name the devices too, for instance --estimate all")
    if len({path.name for path in files}) < len(set(files)):
        raise UsageError("two files of the same name cannot be told apart in a report", "rename one of them")
    if estimate is not None:
        if rows:
            raise UsageError("--estimate runs no file, so it cannot score rows", "leave one of the two away")
        found: dict[str, Any] = {"estimates": _estimates(files, estimate, devices, runtimes)}
        said = [lines.estimate(row) for row in found["estimates"]]
    else:
        found, said = _measured(echo, files, threads or machine.cores(), prompt_tokens, repeats, runtimes, rows, reference, most)
    found = {"machine": machine.describe(), **found} if estimate is None else found
    if output is not None:
        written = reports.write(_document(output.name, files, found, estimate is None), output)
        said += [f"wrote {path}" for path in written.values()]
    echo.result(found, *said)


def _measured(
    echo: Output,
    files: tuple[Path, ...],
    threads: int,
    prompt_tokens: str | None,
    repeats: int | None,
    runtimes: tuple[str, ...],
    rows: Path | None,
    reference: Path | None,
    most: int,
) -> tuple[dict[str, Any], list[str]]:
    """Sections of the report by name, and lines for people."""
    from edgelora import bench as benches
    from edgelora import recipe as recipes

    settings = recipes.Bench()
    if prompt_tokens is not None:
        if not all(n.strip().isdigit() and int(n) > 0 for n in prompt_tokens.split(",")):
            raise UsageError(f"--prompt-tokens {prompt_tokens!r} are not counts above 0", "for instance --prompt-tokens 32,128")
        settings = dataclasses.replace(settings, prompt_tokens=tuple(int(n) for n in prompt_tokens.split(",")))
    if repeats:
        settings = dataclasses.replace(settings, repeats=repeats)
    named = [(path, name) for path in files for name in _runtimes(path, runtimes)]
    with echo.progress() as progress:
        found = _quality(files, rows, reference, most, threads, progress) if rows else {}
        timed = benches.bench_all(named, settings, threads, lambda share, text: progress("bench", share, text))
    said = [lines.bench(row) for row in timed] + [lines.quality(row) for row in found.get("losses", [])]
    said += [lines.divergence(row) for row in found.get("divergence", [])] + [lines.accuracy(row) for row in found.get("accuracy", [])]
    return {"bench": timed, **found}, said


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


def _document(name: str, files: tuple[Path, ...], found: dict[str, Any], measured: bool) -> dict[str, Any]:
    """The report of these files, with the command that repeats it: names only, no places on this machine."""
    from datetime import UTC, datetime

    from edgelora import artifact, roofline
    from edgelora import report as reports
    from edgelora.runtime import runtime_of

    about: dict[str, Any] = {
        "created": datetime.now(UTC).date().isoformat(),
        "edgelora": artifact.versions_of()["edgelora"],
        "commands": [_repeat(click.get_current_context(), files)],
    }
    if measured:
        about |= {
            "machine": found["machine"],
            "versions": artifact.versions_of("llama-cpp-python", "onnxruntime", "onnxruntime-genai", "torch"),
        }
    runtime = runtime_of if measured else roofline.runtime_for
    listed = [(path, runtime(path), artifact.sha256(path) if path.is_file() else None) for path in dict.fromkeys(files)]
    return reports.of_files(name or "bench", listed, about, {k: v for k, v in found.items() if k != "machine"})


def _repeat(context: click.Context, files: tuple[Path, ...]) -> str:
    """The command line, with every path cut to its last name."""
    words = ["edgelora", "bench", *(path.name for path in files)]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if not isinstance(option, click.Option) or option.name in ("output", "quiet", "as_json") or value == option.default or not value:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [option.opts[-1], item.name if isinstance(item, Path) else str(item)]
    return shlex.join(words)


def _runtimes(path: Path, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The runtimes to measure a file in: those asked for, all that open it, or its first."""
    from edgelora.runtime import runtimes_of

    able = runtimes_of(path)
    if "all" in asked:
        return able
    if unable := [name for name in asked if name not in able]:
        raise UsageError(f"{path.name} is not opened by {unable[0]!r}", f"it is opened by {', '.join(able)}")
    return tuple(dict.fromkeys(asked)) or able[:1]
