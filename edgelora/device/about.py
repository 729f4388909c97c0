"""What a device says of itself: what a figure measured on it depends on, and how warm and busy it is. Never a serial or a host's name."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelora import machine
from edgelora.device import Done, elf

_PROPERTIES = """
echo @uname; uname -m; uname -sr
echo @props; getprop 2>/dev/null
echo @cpuinfo; cat /proc/cpuinfo 2>/dev/null
echo @meminfo; grep MemTotal /proc/meminfo 2>/dev/null
echo @os; cat /etc/os-release 2>/dev/null
echo @board; tr -d '\\0' < /proc/device-tree/model 2>/dev/null
echo; true
"""
_STATE = """
for c in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
  echo "governor $(cat $c/scaling_governor 2>/dev/null)"; echo "clock $(cat $c/scaling_max_freq 2>/dev/null) $(cat $c/cpuinfo_max_freq 2>/dev/null)"
done
for z in /sys/class/thermal/thermal_zone*; do echo "zone $(cat $z/temp 2>/dev/null) $(cat $z/type 2>/dev/null)"; done
dumpsys thermalservice 2>/dev/null | grep 'Thermal Status'
for i in 1 2 3; do echo "load $(cat /proc/loadavg 2>/dev/null)"; sleep 0.1; done
true
"""
_EMULATORS = ("goldfish", "ranchu", "cutf_cvm")  # ro.hardware of Android's own emulators
_THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")  # android.os.PowerManager.THERMAL_STATUS_*
_PROCESSOR_ZONE = re.compile(r"cpu|soc|tsens|x86_pkg|big|little|silver|gold|apc", re.I)


@dataclass(frozen=True)
class About:
    """A device. `kind` names those whose figures may be compared; `runs` are the processors whose programs it takes, the native one
    first; `emulated` says why it is no real device, '' when nothing shows that.
    """

    name: str
    kind: str
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    os: str
    android: bool
    runs: tuple[str, ...]
    emulated: str

    def as_row(self) -> dict[str, Any]:
        """What a report holds of it."""
        found = {"name": self.name, "class": self.kind, "cpu": self.cpu, "cpu_features": list(self.cpu_features), "cores": self.cores}
        return {**found, "memory_bytes": self.memory_bytes, "os": self.os, "abi": ", ".join(self.runs), "emulated": bool(self.emulated)}


@dataclass(frozen=True)
class State:
    """A moment of a device: its governors, the hottest zone of its processor, Android's thermal status, the load of the last minute,
    threads that wanted a core just now (ours left out), and the share of its clock's maximum that it allows itself. None where it does not tell.
    """

    governor: str | None
    temperature_c: float | None
    thermal_status: str | None
    load_average: float | None
    running: float | None
    clock_share: float | None

    def as_row(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if value is not None}


def look(ask: Callable[[str], Done]) -> About:
    """Ask a device for its properties; `ask` runs a command there."""
    said = _sections(ask(_PROPERTIES).out)
    props = dict(re.findall(r"^\[([^\]]+)\]: \[([^\]]*)\]", said.get("props", ""), re.M))
    info, (kernel, *system) = said.get("cpuinfo", ""), said.get("uname", "").splitlines() or ["unknown"]
    cores = max(1, len(re.findall(r"^processor\s*:", info, re.M)))
    memory = re.search(r"(\d+) kB", said.get("meminfo", ""))
    rest = (machine.features_in(info), cores, int(memory[1]) * 1024 if memory else None)
    return _android(props, kernel, info, rest) if "ro.build.version.release" in props else _linux(said, kernel, system, info, rest)


def state(ask: Callable[[str], Done]) -> State:
    """Ask a device how it is now."""
    text = ask(_STATE).out
    governors = sorted(set(re.findall(r"^governor (\S+)", text, re.M)))
    zones = [(int(t), kind) for t, kind in re.findall(r"^zone (-?\d+) (.*)$", text, re.M)]
    heats = [t / (1000 if abs(t) >= 1000 else 1) for t, kind in zones if _PROCESSOR_ZONE.search(kind)]
    clocks = [int(now) / int(most) for now, most in re.findall(r"^clock (\d+) (\d+)$", text, re.M) if int(most)]
    status = re.search(r"Thermal Status: (\d)", text)
    loads = re.findall(r"^load ([\d.]+) \S+ \S+ (\d+)/", text, re.M)
    return State(
        ", ".join(governors) or None,
        max((heat for heat in heats if -40 < heat < 150), default=None),
        _THERMAL[min(int(status[1]), len(_THERMAL) - 1)] if status else None,
        float(loads[0][0]) if loads else None,
        statistics.median(max(0, int(running) - 1) for _, running in loads) if loads else None,
        round(min(clocks), 3) if clocks else None,
    )


def doubts(before: State, after: State, threads: int, cores: int) -> list[str]:
    """Reasons why something other than the file decided the figures taken between two moments, empty when nothing did."""
    why = []
    if after.thermal_status not in (None, "none"):
        why.append(f"the device calls its heat {after.thermal_status}")
    if after.clock_share is not None and after.clock_share < 1:
        why.append(f"the device held its clock down to {after.clock_share:.0%} of its maximum")
    if before.running is not None and before.running + threads > cores:  # the load of phones counts sleeping drivers too
        why.append(
            f"other programs ran beside our {threads} thread{'' if threads == 1 else 's'} on {cores} cores ({before.running:g} at a time)"
        )
    return why


def _android(props: Mapping[str, str], kernel: str, info: str, rest: tuple[list[str], int, int | None]) -> About:
    maker, model = props.get("ro.product.manufacturer", ""), props.get("ro.product.model", "")
    chip = (
        f"{props.get('ro.soc.manufacturer', '')} {props.get('ro.soc.model', '')}".strip() or props.get("ro.board.platform", "") or "unknown"
    )
    name = (model if model.lower().startswith(maker.lower()) else f"{maker} {model}").strip() or "Android device"
    abis = [abi for abi in (props.get("ro.product.cpu.abilist") or props.get("ro.product.cpu.abi", "")).split(",") if abi]
    runs = tuple(dict.fromkeys(elf.NAMES.get(abi, abi) for abi in abis)) or (elf.NAMES.get(kernel, kernel),)
    why = ""
    if "1" in (props.get("ro.boot.qemu"), props.get("ro.kernel.qemu")) or props.get("ro.hardware") in _EMULATORS:
        why = "it is an Android emulator"
    elif _foreign(runs, kernel, info):
        why = f"it says {runs[0]} and its kernel is {kernel}"
    release = f"Android {props['ro.build.version.release']} (API {props.get('ro.build.version.sdk', '?')})"
    return About(name, _slug(name), chip, tuple(rest[0]), *rest[1:], release, True, runs, why)


def _linux(said: Mapping[str, str], kernel: str, system: list[str], info: str, rest: tuple[list[str], int, int | None]) -> About:
    native = elf.NAMES.get(kernel, kernel)
    board, pretty = said.get("board", "").strip(), re.search(r'^PRETTY_NAME="?([^"\n]*)', said.get("os", ""), re.M)
    cpu = machine.cpu_name_in(info) or kernel
    kind = _slug(board) if board else f"{'x86' if native == 'x86_64' else native}-{rest[1]}core"
    runs = {"arm64": ("arm64", "arm"), "x86_64": ("x86_64", "x86")}.get(native, (native,))
    why = f"it says {native} on another processor" if _foreign(runs, kernel, info) else ""
    return About(board or cpu, kind, cpu, tuple(rest[0]), *rest[1:], pretty[1] if pretty else " ".join(system), False, runs, why)


def _foreign(runs: tuple[str, ...], kernel: str, info: str) -> bool:
    """Whether programs of that processor are translated: the kernel is another's, or its list of processors is (qemu-user passes it through)."""
    family = {"x86": "x86", "x86_64": "x86", "arm": "arm", "arm64": "arm"}
    claimed, own = family.get(runs[0], runs[0]), elf.NAMES.get(kernel, kernel)
    listed = "x86" if re.search(r"^vendor_id\s*:", info, re.M) else "arm" if re.search(r"^CPU implementer\s*:", info, re.M) else claimed
    return claimed != family.get(own, own) or claimed != listed


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^@(\w+)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"
