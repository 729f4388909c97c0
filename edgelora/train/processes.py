"""Several processes on one machine, each with a share of every step's rows: torch.distributed over gloo, on loopback.

On a CPU this is how training uses more than one core well: most of a step is many small operations, which one process
runs one after the other however many threads it has (SmolLM2-135M on two cores: 400 tokens a second in two processes,
293 in one with two threads).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgelora import calm, machine
from edgelora.errors import EdgeloraError

Progress = Callable[[float, str], None]
_POLL_S = 0.2


def run(function: Callable[..., dict[str, Any]], processes: int, threads: int, progress: Progress, *arguments: Any) -> dict[str, Any]:
    """Call ``function(*arguments, progress)`` in every process and return what the first one returned.

    Each computes with ``threads // processes`` threads. With one process it is a plain call. What the facts call
    ``measured.peak_rss_bytes`` becomes the sum over all processes. An EdgeloraError of any process is raised here; when one
    dies, the others are stopped.
    """
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    if processes == 1:
        torch.set_num_threads(threads)
        return {**function(*arguments, progress), "processes": 1}
    context = torch.multiprocessing.get_context("spawn")
    messages = context.Queue()
    facts: dict[str, Any] = {}
    peaks: list[int] = []
    errors: list[Exception] = []

    def receive() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                kind, content = messages.get(timeout=_POLL_S)
                if kind == "progress":
                    progress(*content)
                elif kind == "facts":
                    facts.update(content)
                elif kind == "peak":
                    peaks.append(content)
                else:
                    errors.append(content)

    with tempfile.TemporaryDirectory(prefix="edgelora-") as folder, _environment(OMP_NUM_THREADS=str(threads // processes)):
        started = start_processes(
            _work,
            (processes, threads // processes, Path(folder) / "meeting-point", calm.is_calm(), messages, function, arguments),
            nprocs=processes,
            join=False,
        )
        try:
            while not started.join(timeout=0):
                receive()
            receive()
        except ProcessExitedException as error:
            receive()
            if errors:
                raise errors[0] from None
            name = error.signal_name or f"exit code {error.exit_code}"
            raise EdgeloraError(
                f"a training process was killed ({name})", "was there enough memory? the same command continues from the last checkpoint"
            ) from error
        finally:
            for process in started.processes:
                process.kill()
    facts["measured"]["peak_rss_bytes"] = sum(peaks)
    facts["processes"] = processes
    return facts


def _work(
    rank: int, processes: int, threads: int, meeting_point: Path, be_calm: bool, messages: Any, function: Any, arguments: Any
) -> None:
    """One process: meet the others, do the work, say what came out."""
    _die_with_parent()
    if be_calm:
        calm.calm_libraries()
    import torch

    torch.set_num_threads(threads)
    # accelerate reads these; gloo would otherwise talk over the network card.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=processes)
    progress = (lambda share, text: messages.put(("progress", (share, text)))) if rank == 0 else (lambda share, text: None)
    try:
        facts = function(*arguments, progress)
    except (EdgeloraError, OSError) as error:  # what the command line knows how to say
        messages.put(("error", error))
        messages.close()
        messages.join_thread()
        os._exit(1)  # the others may wait for this one in a collective call: no good-bye
    if rank == 0:
        messages.put(("facts", facts))
    messages.put(("peak", machine.peak_rss_bytes()))
    torch.distributed.destroy_process_group()


def count() -> int:
    """How many processes share this work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Until every process is here."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set for children that start meanwhile: bitsandbytes brings an OpenMP of its own, which asks nothing else for its threads."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _die_with_parent() -> None:
    """A killed command leaves nobody behind who writes into its folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h
