"""What machine this is, as far as a figure measured on it depends on it: never whose it is or what it is called."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgelora.errors import Unsupported

# The instruction sets that decide how fast low-bit models run, as /proc/cpuinfo spells them (x86, then arm64).
_FEATURES = (
    *("avx", "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
_CGROUPS = Path("/sys/fs/cgroup")
_DEVICES, _THERMAL = Path("/sys/devices"), Path("/sys/class/thermal")
_UNLIMITED = 1 << 60  # bytes; version 1 of cgroups writes a number near 2^63 for "no limit"


def describe() -> dict[str, Any]:
    """This machine as a JSON object.

    `class` names machines whose figures may be compared ("x86-2core", "arm64-4core", "h100-80gb"); `cores` are those
    this process may use; `memory_bytes` is what it may use at most; `gpu` is None where there is none.
    """
    gpus = _gpus()
    names = {name for name, _ in gpus}
    return {
        "class": _class(gpus),
        "cpu": _cpu_name(),
        "cpu_features": cpu_features(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "os": _os_name(),
        "python": platform.python_version(),
        "gpu": (f"{len(gpus)} x " if len(gpus) > 1 else "") + ", ".join(sorted(names)) if gpus else None,
        "load_average": load_average(),
    }


def cores() -> int:
    """Processors this process may keep busy: its affinity mask, and no more than its cgroup's quota of time."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus(_CGROUPS, _read("/proc/self/cgroup"))
    return max(1, min(found, int(quota))) if quota is not None else found


def memory_bytes() -> int:
    """Memory of the machine, or of the cgroup this process lives in where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [limit for limit, _ in cgroup_memory(_CGROUPS, _read("/proc/self/cgroup"))]
    return min([total, *limits])


def available_memory_bytes() -> int:
    """What can be allocated now without swapping, within the cgroup's limit and the process's own (`ulimit -d`).

    All memory where the kernel makes no estimate.
    """
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.M)
    free = [int(match[1]) * 1024 if match else memory_bytes()]
    free += [limit - used for limit, used in cgroup_memory(_CGROUPS, _read("/proc/self/cgroup"))]
    own, _ = resource.getrlimit(resource.RLIMIT_DATA)
    data = re.search(r"^VmData:\s+(\d+) kB", _read("/proc/self/status"), re.M)
    if own != resource.RLIM_INFINITY and data:
        free.append(own - int(data[1]) * 1024)
    return max(0, min(free))


def peak_rss_bytes(process: int | None = None) -> int:
    """The most memory that a process, this one unless told, has had resident at once. Of others only Linux tells.

    Linux's ru_maxrss survives exec: a child of a large process starts with its parent's peak. VmHWM does not.
    """
    match = re.search(r"^VmHWM:\s+(\d+) kB", _read(f"/proc/{process or 'self'}/status"), re.M)
    if match:
        return int(match[1]) * 1024
    if process not in (None, os.getpid()):
        raise Unsupported("this system does not tell the memory of another process", "bench this runtime on Linux")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds(process: int) -> float:
    """Processor time that a process has used so far, all its threads. Of others than this one only Linux tells."""
    if process == os.getpid():
        return time.process_time()
    try:
        return time.clock_gettime((~process << 3) | 2)  # how clock_getcpuclockid(3) names the clock of a process
    except OSError as error:
        raise Unsupported(f"the processor time of process {process} cannot be read: {error}", "bench this runtime on Linux") from error


def load_average() -> float:
    """Processes that wanted a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def others_running() -> int | None:
    """Threads beside the calling one that want a core at this moment; None where the kernel does not say."""
    match = re.match(r"\S+ \S+ \S+ (\d+)/", _read("/proc/loadavg"))
    return max(0, int(match[1]) - 1) if match else None


def cpu_ticks() -> tuple[int, int]:
    """Clock ticks that all processors have lived, and how many of them the hypervisor gave to others; zeros where nobody counts."""
    match = re.search(r"^cpu +([\d ]+)$", _read("/proc/stat"), re.M)
    ticks = [int(n) for n in match[1].split()][:8] if match else []  # user nice system idle iowait irq softirq steal; guests are in user
    return sum(ticks), ticks[7] if len(ticks) > 7 else 0


def heat_events() -> int:
    """How often the processors have throttled themselves because of heat since they were started; 0 where nobody counts."""
    return sum(int(_read(path).strip() or 0) for path in _DEVICES.glob("system/cpu/cpu*/thermal_throttle/core_throttle_count"))


def clock_held_down() -> bool:
    """Whether the kernel is holding a processor's clock below its maximum to cool it, as phones and boards do."""
    for folder in _THERMAL.glob("cooling_device*"):
        kind, state = _read(folder / "type").strip().lower(), _read(folder / "cur_state").strip()
        if ("cpufreq" in kind or kind == "processor") and state.isdigit() and int(state) > 0:
            return True
    return False


def quota_waits_s() -> float:
    """Seconds that the control groups' quota of processor time has kept this process waiting."""
    waits = 0.0
    for folder in _cgroup_folders(_CGROUPS, _read("/proc/self/cgroup"), "cpu"):
        match = re.search(r"^throttled_(usec|time) (\d+)$", _read(folder / "cpu.stat"), re.M)
        if match:
            waits += int(match[2]) / (1e6 if match[1] == "usec" else 1e9)
    return waits


def processor() -> str:
    """Name and instruction sets of this processor, as one text: machines of one class may have others."""
    return f"{_cpu_name()}, {' '.join(cpu_features())}"


def cpu_features() -> list[str]:
    """Instruction sets of this processor that matter to low-bit models; empty where the system does not list them."""
    return features_in(_read("/proc/cpuinfo"))


def features_in(cpuinfo: str) -> list[str]:
    """The same of the text of any machine's /proc/cpuinfo."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)
    found = set(match[1].split()) if match else set()
    return [name for name in _FEATURES if name in found] + (["neon"] if "asimd" in found else [])


def cgroup_cpus(root: Path, membership: str) -> float | None:
    """The tightest CPU quota, in cores, of the control groups that `membership` (/proc/self/cgroup) lists; None without one."""
    quotas = []
    for folder in _cgroup_folders(root, membership, "cpu"):
        both = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us").strip(),
            _read(folder / "cpu.cfs_period_us").strip(),
        ]
        if len(both) == 2 and both[0].isdigit() and both[1].isdigit() and int(both[1]):  # "max" and -1 are no limit
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def cgroup_memory(root: Path, membership: str) -> list[tuple[int, int]]:
    """(limit, use) in bytes of every control group above this process that has a limit. Page cache is not counted as use."""
    found = []
    for folder in _cgroup_folders(root, membership, "memory"):
        limit = _read(folder / "memory.max").strip() or _read(folder / "memory.limit_in_bytes").strip()
        if limit.isdigit() and int(limit) < _UNLIMITED:
            used = _read(folder / "memory.current").strip() or _read(folder / "memory.usage_in_bytes").strip()
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.M)
            found.append((int(limit), max(0, int(used or 0) - (int(cache[1]) if cache else 0))))
    return found


def _cgroup_folders(root: Path, membership: str, controller: str) -> list[Path]:
    """The process's own group of cgroups version 2 or 1 and every group around it, innermost first."""
    folders = [root]
    for line in membership.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers and (root / controllers).is_dir() else root / controller if controllers else root
        inner = Path(path.lstrip("/"))
        folders = [*(top / part for part in (inner, *inner.parents)), *folders]
    return list(dict.fromkeys(folders))


def _class(gpus: tuple[tuple[str, int], ...]) -> str:
    if gpus:
        name, memory = gpus[0]
        words = [w for w in re.split(r"[\s-]+", name.lower()) if w not in ("nvidia", "geforce", "tesla", "quadro")]
        numbered = next((i for i, word in enumerate(words) if any(c.isdigit() for c in word)), len(words) - 1)
        return (f"{len(gpus)}x-" if len(gpus) > 1 else "") + "-".join(words[: numbered + 1]) + f"-{round(memory / 2**30)}gb"
    kind = platform.machine().lower()
    kind = "x86" if kind in ("x86_64", "amd64", "i686") else "arm64" if kind in ("aarch64", "arm64") else kind
    return f"{kind}-{cores()}core"


@functools.cache
def _gpus() -> tuple[tuple[str, int], ...]:
    """(name, memory in bytes) of every NVIDIA GPU that the driver shows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        rows = [line.rsplit(",", 1) for line in lines if "," in line]
        return tuple((name.strip(), int(memory) << 20) for name, memory in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()  # the program is there and no driver answers: no GPU that could be used


def _cpu_name() -> str:
    return cpu_name_in(_read("/proc/cpuinfo")) or platform.processor() or platform.machine()


def cpu_name_in(cpuinfo: str) -> str:
    """The processor that the text of a /proc/cpuinfo names; '' when it names none."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    if match:
        return match[1].strip()
    part = re.search(r"^CPU implementer\s*:\s*(\S+)[\s\S]*?^CPU part\s*:\s*(\S+)", cpuinfo, re.M)
    return f"arm64 implementer {part[1]} part {part[2]}" if part else ""


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError, AttributeError):
        return f"{platform.system()} {platform.release()}"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def give_back_freed_memory() -> None:
    """Let glibc map every block of a MiB or more by itself, so that it goes back to the system when it is freed.

    By default that limit grows with the blocks that were freed, up to 32 MiB, and what a model read layer by layer lets go
    of stays with the process: 55 MB for every layer of a 7B. For this process, from here on; elsewhere nothing happens.
    mallopt(3), M_MMAP_THRESHOLD.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-3, 1 << 20)
