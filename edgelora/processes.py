"""Training in several processes, a GPU each: who this process is among them, and how they are started.

They are started by `accelerate launch`, by hand or by `--gpus N`, and know each other through accelerate. The first one speaks
and writes; the others only train. What they do together is in `train.loop`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from edgelora.errors import EdgeloraError, Unsupported, UsageError

_GRACE_S = 20.0  # a launcher stops the others within a tenth of a second once one has ended
_TIMEOUT_H = 24  # the others wait while the first opens the base
_ELSEWHERE = {  # accelerate's own way to say how a model is spread, and its name
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def index() -> int:
    """Which of them this is; the first, 0, speaks and writes."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if count() > 1 else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Work with the other processes: each takes its GPU, and ends when its launcher is killed. Nothing to do for a single one.

    Unsupported when accelerate was told to split the model itself.
    """
    if split := next((name for variable, name in _ELSEWHERE.items() if os.environ.get(variable, "false").lower() == "true"), None):
        raise Unsupported(
            f"training under {split}: edgelora divides the base itself (by FSDP 2), and leaves the adapter whole",
            "launch without it; train.shard says when the base is divided",
        )
    if count() == 1:
        yield
        return
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=_TIMEOUT_H))
    yield
    state.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others do, and they find what it left."""
    if index():
        wait()
    yield
    if not index():
        wait()


def before_complaining(*, foreseen: bool) -> None:
    """Wait where another process knows better what went wrong: the first one when it went wrong in all (`foreseen`, an error with words
    of its own), the launcher when one is gone and the others notice. It stops this one meanwhile.
    """
    if count() > 1 and not (foreseen and index() == 0):
        time.sleep(_GRACE_S)


def leave(code: int) -> NoReturn:
    """End with that exit code; one of several at once, without taking leave of the others, which are not listening."""
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def told(value: Any) -> Any:
    """What the first process says, in all of them."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def all_of(value: float) -> list[float]:
    """The numbers of all processes, in their order."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[float] = gather_object([value])
    return found


def launch(arguments: Sequence[str], processes: int, *, silent: bool = False, debug: bool = False) -> None:
    """Run `edgelora ARGUMENTS` in that many processes of this machine, to their end; `silent`: without its standard output.

    SystemExit with the code of a process that failed and said why; EdgeloraError when one was killed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module", "edgelora.cli"]
    if not debug:
        logging.disable(logging.CRITICAL)  # the launcher's own account of a failure
    try:
        with _without_output() if silent else contextlib.nullcontext():
            launch_command(launch_command_parser().parse_args([*options, *arguments]))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        said = max(codes.values())  # of those that ended by themselves; SIGTERM is also the launcher's own way to stop the others
        killed = next((rank for rank, code in codes.items() if code < 0 and (code != -signal.SIGTERM or said < 0)), None)
        if killed is None:
            raise SystemExit(said) from error
        raise EdgeloraError(
            f"process {killed + 1} of {processes} was killed ({signal.Signals(-codes[killed]).name}); the others were stopped",
            "run the same command again, with any number of GPUs: it continues from the last checkpoint",
        ) from error
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Standard output of this process and of those it starts goes nowhere."""
    sys.stdout.flush()
    held = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(held, 1)
        os.close(held)


def check_gpus(wanted: int) -> None:
    """UsageError when this machine has fewer GPUs than that, or a launcher has started this process already."""
    import torch

    if count() > 1:
        raise UsageError("--gpus starts processes, and accelerate launch has started these", "leave one of them out")
    if (found := torch.cuda.device_count()) < wanted:
        raise UsageError(f"--gpus {wanted}: this machine has {found}", "name at most as many as there are")
