"""Which cores files take turns on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora.bench import cores


def machine(root: Path, cpus: dict[int, dict[str, str]]) -> Path:
    for cpu, files in cpus.items():
        for name, text in files.items():
            path = root / f"cpu{cpu}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="ascii")
    return root


def test_every_core_has_its_repeat(tmp_path: Path) -> None:
    assert cores.choices(tmp_path, [0, 1, 4], 1) == [(0,), (1,), (4,)]
    assert cores.choices(tmp_path, [0, 1, 4], 2) == [(0, 1), (1, 4), (4, 0)]
    assert cores.choices(tmp_path, [0, 1, 4], 3) == []  # all of them: no choice


def test_two_threads_of_one_core_are_not_two_cores(tmp_path: Path) -> None:
    root = machine(tmp_path, {cpu: {"topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}"} for cpu in range(4)})
    assert cores.choices(root, [0, 1, 2, 3], 1) == [(0,), (1,)]
    assert cores.choices(root, [1, 2, 3], 1) == [(1,), (2,)]
    assert cores.choices(root, [0, 1, 2, 3], 2) == []  # the kernel knows how to spread them


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_slow_cores_are_left_out(tmp_path: Path, name: str) -> None:
    root = machine(tmp_path, {cpu: {name: "1024" if cpu in (4, 5) else "446"} for cpu in range(6)})
    assert cores.choices(root, range(6), 1) == [(4,), (5,)]
    assert cores.choices(root, range(6), 4) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose its cores")
def test_threads_that_are_there_stay_too() -> None:
    core = min(os.sched_getaffinity(0))
    program = """
import os, sys, threading
from edgelora.bench import cores
over = threading.Event()
thread = threading.Thread(target=over.wait)
thread.start()
cores.stay_on([int(sys.argv[1])])
print(os.sched_getaffinity(0), os.sched_getaffinity(thread.native_id))
over.set()
"""
    said = subprocess.run([sys.executable, "-c", program, str(core)], capture_output=True, text=True, check=True).stdout
    assert said == f"{{{core}}} {{{core}}}\n"
