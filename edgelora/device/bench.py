"""Files measured on other devices, one device after the other: rows of a report, and what each device was like before and after.

A file is started once to warm up, which finds what does not work and takes the peak of its memory; then its runner measures
with repeats of its own, for every number of threads. What an emulator measured is checked like any other result and never
shown: its rows tell that a file runs there, and hold no time, no speed and no memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgelora.bench import disturbance, size_bytes
from edgelora.device import Garbled, Measured, RunnerModule, Transport, Work, about, elf, program_of, runner_of
from edgelora.device.place import Place, Ran
from edgelora.errors import DeviceError, EdgeloraError, Unsupported
from edgelora.progress import Progress, part
from edgelora.recipe import Bench
from edgelora.size import traffic

_LIMIT_S = 900.0  # for one start of a runner
_SIGNALS = {
    4: "an instruction that its processor does not have: build the runner for an older one",
    6: "it gave up by itself",
    9: "the system killed it, usually for want of memory",
    11: "it read memory that is not its own",
}


@dataclass
class Outcome:
    """What came of it: rows of the bench, a row a device, and what went wrong on the way; rows from before a failure are kept."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    devices: list[dict[str, Any]] = field(default_factory=list)
    failures: list[EdgeloraError] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A file, the runner that opens it, and its program here; `model` and `tool` are the folders of both on the device."""

    path: Path
    runner: RunnerModule
    program: Path
    model: str
    tool: str

    @property
    def names(self) -> list[str]:
        return [f"./{self.model}/{path.name}" for path in self.runner.files(self.path)]


@dataclass(frozen=True)
class Elsewhere:
    """Files to measure on devices other than this machine."""

    devices: Sequence[Transport]
    jobs: Sequence[Job]

    def bench(self, settings: Bench, threads: Sequence[int], progress: Progress) -> Outcome:
        """One device after the other; no `threads` means 1, 2, 4, ... up to all cores. What goes wrong on a device ends its bench
        and stands in `failures`.
        """
        work, outcome = Work(settings.prompt_tokens, settings.decode_tokens, settings.repeats), Outcome()
        for number, device in enumerate(self.devices):
            try:
                _bench(device, self.jobs, threads, work, outcome, part(progress, number, len(self.devices)))
            except EdgeloraError as error:
                outcome.failures.append(error)
        return outcome


def jobs(paths: Sequence[Path], programs: Sequence[Path]) -> list[Job]:
    """Each file with the runner that opens it; `programs` are runners or folders of them. UsageError when one is missing."""
    runners = [runner_of(path) for path in paths]
    tools = [program_of(runner, programs) for runner in runners]
    return [
        Job(path, runner, tool, f"model{number}", f"tool{tools.index(tool)}")
        for number, (path, runner, tool) in enumerate(zip(paths, runners, tools, strict=True))
    ]


def _bench(device: Transport, jobs: Sequence[Job], threads: Sequence[int], work: Work, outcome: Outcome, progress: Progress) -> None:
    with Place(device) as place:
        seen = about.look(place.ask)
        for job in jobs:
            _fits(job.program, seen, device)
        seen = _told_apart(seen, [row["name"] for row in outcome.devices])
        before = about.state(place.ask)
        entry = {**seen.as_row(), "before": before.as_row()}
        outcome.devices.append(entry)
        _push(place, jobs, progress)
        counts = threads or sweep(seen.cores)
        peaks = {}
        for number, job in enumerate(jobs):
            progress(0.3 + 0.1 * number / len(jobs), f"{seen.name}: warming up {job.path.name}")
            peaks[job.model] = _warm_up(place, job, counts[-1], work, device)
        for step, (count, job) in enumerate((count, job) for count in counts for job in jobs):
            share = 0.4 + 0.6 * step / (len(counts) * len(jobs))
            progress(share, f"{seen.name}: {job.path.name}, {count} thread{'' if count == 1 else 's'}")
            start = about.state(place.ask)
            measured = _measure(place, job, count, work, device)
            end = about.state(place.ask)
            entry["after"] = end.as_row()
            why = about.doubts(start, end, count, seen.cores)
            outcome.rows += [_row(job, seen, count, one, peaks[job.model], before.load_average, why) for one in measured]


def _fits(program: Path, seen: about.About, device: Transport) -> None:
    """Unsupported when a program was built for another processor."""
    built = elf.read(program)
    if built is not None and built.machine not in seen.runs:
        raise Unsupported(
            f"{program.name} is built for {built.machine}, {device.name} runs {', '.join(seen.runs)}", f"build it for {seen.runs[0]}"
        )


def _push(place: Place, jobs: Sequence[Job], progress: Progress) -> None:
    """Every model into a folder of its own, and every program into one with the libraries that lie beside it."""
    sent = {job.model: job.runner.files(job.path) for job in jobs}
    links: dict[str, dict[str, str]] = {}
    for tool, program in {job.tool: job.program for job in jobs}.items():
        libraries = sorted(program.parent.glob("*.so*")) if _has_libraries(program) else []
        links[tool] = {library.name: str(library.readlink()) for library in libraries if _is_alias(library)}
        sent[tool] = [program, *(library for library in libraries if library.is_file() and not _is_alias(library))]
    place.prepare(list(sent), sum(source.stat().st_size for sources in sent.values() for source in sources))
    for number, (folder, sources) in enumerate(sent.items()):
        progress(0.3 * number / len(sent), f"pushing {sources[0].name}")
        place.push(sources, folder, links.get(folder, {}))


def _is_alias(library: Path) -> bool:
    """Whether it is a link to a file beside it, as `libx.so` to `libx.so.1`."""
    return library.is_symlink() and library.readlink().name == str(library.readlink())


def _has_libraries(program: Path) -> bool:
    """A program without a loader is linked statically and needs none; a script may start anything."""
    built = elf.read(program)
    return built is None or bool(built.loader)


def _warm_up(place: Place, job: Job, threads: int, work: Work, device: Transport) -> int | None:
    """One start with the longest prompt; the most memory it took, in bytes."""
    once = replace(work, prompt_tokens=(max(work.prompt_tokens),), repeats=1)
    ran = [_started(place, job, arguments, device, watch_memory=True) for arguments in job.runner.commands(job.names, threads, once)]
    _read(job, ran, threads, once, device)
    return max((one.peak_rss_bytes for one in ran if one.peak_rss_bytes), default=None)


def _measure(place: Place, job: Job, threads: int, work: Work, device: Transport) -> list[Measured]:
    ran = [_started(place, job, arguments, device) for arguments in job.runner.commands(job.names, threads, work)]
    return _read(job, ran, threads, work, device)


def _started(place: Place, job: Job, arguments: Sequence[str], device: Transport, watch_memory: bool = False) -> Ran:
    code, ran = place.start(f"{job.tool}/{job.program.name}", arguments, _LIMIT_S, watch_memory)
    if code == 0:
        return ran
    said = next((line.strip() for text in (ran.err, ran.out) for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    how = f"died of signal {code - 128}" if code > 128 else f"ended with status {code}"
    built = elf.read(job.program)
    if code in (126, 127) and built is not None and not built.for_android:
        hint = f"it wants {built.loader}, which Android does not have: build it with the NDK, or link it statically"
    else:
        hint = _SIGNALS.get(code - 128, f"run {job.program.name} on the device by hand to see more")
    raise DeviceError(f"{job.program.name} {how} on {device.name} with {job.path.name}: {said[:300]}", hint)


def _read(job: Job, ran: Sequence[Ran], threads: int, work: Work, device: Transport) -> list[Measured]:
    try:
        return job.runner.read([one.out if one.out.strip() else one.err for one in ran], threads, work)
    except Garbled as error:
        raise DeviceError(
            f"{job.program.name} on {device.name} printed no figures of {job.path.name}: {error}", f"is it a {job.runner.PROGRAM} of today?"
        ) from error


def _row(
    job: Job, seen: about.About, threads: int, one: Measured, peak: int | None, load_average: float | None, crowded: Sequence[str]
) -> dict[str, Any]:
    row = {
        "file": job.path.name,
        "runtime": job.runner.RUNTIME,
        "runtime_version": one.version,
        "device": seen.name,
        "device_class": seen.kind,
        "threads": threads,
        "prompt_tokens": one.prompt_tokens,
        "decode_tokens": one.decode_tokens,
        "size_bytes": size_bytes(job.path),
        "bytes_per_token": traffic.bytes_per_token(job.path),
    }
    if seen.emulated:
        return {**row, "emulated": True, "emulated_why": seen.emulated}
    ttft, decode = statistics.median(one.ttft_ms), statistics.median(one.decode_ms)
    why = [*crowded, *disturbance.in_samples(one.decode_ms, settled=True)]
    return {
        **row,
        **({"load_ms": statistics.median(one.load_ms)} if one.load_ms else {}),
        "ttft_ms": ttft,
        "prefill_tok_per_s": 1000 * one.prompt_tokens / ttft,
        "decode_tok_per_s": 1000 / decode,
        "peak_rss_bytes": peak,
        "load_average": load_average,
        "samples_ms": {"load": list(one.load_ms), "ttft": list(one.ttft_ms), "decode": list(one.decode_ms)},
        "crowded": bool(crowded),
        "noisy": bool(why),
        "noisy_why": "; ".join(why),
    }


def sweep(cores: int) -> list[int]:
    """1, 2, 4, ... and all cores: of phones the fastest number is rarely the largest."""
    counts = [1 << i for i in range(cores.bit_length()) if 1 << i <= cores]
    return counts if counts[-1] == cores else [*counts, cores]


def _told_apart(seen: about.About, names: Sequence[str]) -> about.About:
    """Two phones of one model bear numbers."""
    number = 1 + sum(name.partition(" #")[0] == seen.name for name in names)
    return replace(seen, name=f"{seen.name} #{number}") if number > 1 else seen
