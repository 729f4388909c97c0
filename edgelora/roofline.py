"""Estimates of decode speed on devices that are not at hand, always labelled as estimates.

    decode tok/s  =  efficiency(runtime) x bandwidth(device) / bytes that one token reads

The efficiency, the share of the data sheet's bandwidth that a runtime reaches, is fitted on published figures
(`devices.yaml`): the geometric mean of its rows. How far that can be trusted is computed from the same rows by leaving each
out in turn. Prefill, the key-value cache, heat and the rest of the phone's work are not modelled.

Source of the model: S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelora import hardware
from edgelora.errors import DataError, UsageError

TABLE = Path(__file__).with_name("devices.yaml")
ENOUGH = 3  # published rows of a runtime from which on leaving one out means something
RUNTIMES = {".gguf": "llama.cpp", ".onnx": "onnxruntime", ".pte": "executorch", ".litertlm": "litert-lm"}
_MAX_BYTES = 1 << 20
_NEAR = 0.8  # a file that reads less than this part of the smallest published one is outside of what was fitted
_SMALL = 2.0  # such a file may be this much slower: what a token costs besides its weights no longer hides (a judgement, no fit)
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the list the normal one.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class Device:
    key: str
    name: str
    bandwidth_gb_per_s: float
    source: str


@dataclass(frozen=True)
class Published:
    """A decode speed that others measured; `efficiency` is the share of the device's bandwidth that it used."""

    runtime: str
    device: str
    model: str
    bytes_per_token: float
    decode_tok_per_s: float
    source: str
    efficiency: float


@dataclass(frozen=True)
class Table:
    devices: Mapping[str, Device]
    published: tuple[Published, ...]

    def rows_of(self, runtime: str) -> list[Published]:
        """onnxruntime-genai is onnxruntime's kernels with another loop."""
        return [row for row in self.published if row.runtime == runtime.removesuffix("-genai")]


@dataclass(frozen=True)
class Estimate:
    """Tokens a second and the range that 19 of 20 devices should fall into; `trust` says how that is known."""

    file: str
    runtime: str
    device: str
    decode_tok_per_s: float
    low: float
    high: float
    bytes_per_token: int
    bandwidth_gb_per_s: float
    efficiency: float
    validated: bool
    trust: str
    source: str

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def load(path: Path = TABLE) -> Table:
    """The devices and published rows of a YAML file. DataError lists everything in it that cannot be used."""
    import yaml

    try:
        with path.open("rb") as stream:
            values = yaml.safe_load(stream.read(_MAX_BYTES))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "name a YAML file such as edgelora/devices.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}", "check the indentation at that line") from error
    problems: list[str] = []
    values = values if isinstance(values, dict) else {}
    devices = _devices(values.get("devices"), problems)
    published = _published(values.get("published"), devices, problems)
    hardware.refuse(path, TABLE, problems)
    return Table(devices, tuple(published))


def runtime_for(path: Path) -> str:
    """The runtime that a file's estimate is for; UsageError for what no runtime of the table opens."""
    suffix = ".onnx" if (path / "model.onnx").is_file() else path.suffix.lower()
    if suffix not in RUNTIMES:
        raise UsageError(
            f"no runtime to estimate {path.name} for", "name an exported file (.gguf, .pte, .litertlm) or a folder with model.onnx"
        )
    return RUNTIMES[suffix]


def chosen(table: Table, names: Sequence[str]) -> list[Device]:
    """The devices of those names, or every one for 'all'; UsageError names the first that the table does not have."""
    if "all" in names:
        return list(table.devices.values())
    return hardware.chosen(table.devices, names, "device", "--devices")


def estimate(table: Table, device: Device, runtime: str, file: str, bytes_per_token: int) -> Estimate:
    """What `runtime` should decode on `device` when one token reads that many bytes."""
    own = table.rows_of(runtime)
    rows = own or list(table.published)
    efficiency, spread = fit(rows, table, known_device=bool(own) and any(row.device == device.key for row in own))
    speed = efficiency * device.bandwidth_gb_per_s * 1e9 / bytes_per_token
    smallest = min(row.bytes_per_token for row in rows)
    small = bytes_per_token < _NEAR * smallest
    said = trust(table, runtime)
    if small:
        said = (
            f"not validated at this size, likely too fast: one token reads {bytes_per_token / 1e6:,.0f} MB, in the published figures "
            f"{smallest / 1e6:,.0f} MB or more; {said}"
        )
    return Estimate(
        file,
        runtime,
        device.name,
        speed,
        speed / (spread * _SMALL if small else spread),
        min(speed * spread, device.bandwidth_gb_per_s * 1e9 / bytes_per_token),  # nothing beats the memory itself
        bytes_per_token,
        device.bandwidth_gb_per_s,
        efficiency,
        len(own) >= ENOUGH and not small,
        said,
        device.source,
    )


def fit(rows: Sequence[Published], table: Table, known_device: bool) -> tuple[float, float]:
    """(efficiency, factor): the geometric mean of the rows' efficiencies, and by what to divide and multiply for 95 %.

    The factor holds the scatter between rows, and for a device without rows that between (runtime, device) pairs besides.
    """
    logs = [math.log(row.efficiency) for row in rows]
    within = statistics.stdev(logs) if len(logs) >= ENOUGH else _between(table)
    t = _T95[len(logs) - 2] if ENOUGH <= len(logs) < len(_T95) + 2 else 1.96
    scatter = t * within * math.sqrt(1 + 1 / len(logs))
    if not known_device:
        scatter = math.hypot(scatter, 1.96 * _between(table))
    return math.exp(statistics.fmean(logs)), math.exp(scatter)


def leave_one_out(table: Table, runtime: str, whole_devices: bool = False) -> list[tuple[Published, float]]:
    """Each published row and the relative error of predicting it from the runtime's other rows (0.1: 10 % too fast).

    With `whole_devices`, from the rows on other devices; a runtime that was measured on one device alone has none.
    """
    rows = table.rows_of(runtime)
    if len(rows) < ENOUGH:
        return []
    errors = []
    for left_out in rows:
        rest = [row for row in rows if (row.device != left_out.device if whole_devices else row is not left_out)]
        if rest:
            logs = [math.log(row.efficiency) for row in rest]
            errors.append((left_out, math.exp(statistics.fmean(logs)) / left_out.efficiency - 1))
    return errors


def trust(table: Table, runtime: str) -> str:
    """How well a runtime's estimates are founded, in words."""
    rows = table.rows_of(runtime)
    devices = len({row.device for row in rows})
    if not rows:
        return "not validated: no published figure of this runtime, the efficiency is borrowed from all others"
    many = f"{len(rows)} published figure{'' if len(rows) == 1 else 's'} on {devices} device{'' if devices == 1 else 's'}"
    if len(rows) < ENOUGH:
        return f"not validated: {many}"
    worst = max(abs(error) for _, error in leave_one_out(table, runtime))
    axis = "" if devices > 1 else "; other models are tested by this, other devices are not"
    return f"leaving each of {many} out: at most {worst:.0%} off{axis}"


def _between(table: Table) -> float:
    """Standard deviation of log efficiency between pairs of a runtime and a device."""
    pairs: dict[tuple[str, str], list[float]] = {}
    for row in table.published:
        pairs.setdefault((row.runtime, row.device), []).append(math.log(row.efficiency))
    means = [statistics.fmean(logs) for logs in pairs.values()]
    return statistics.stdev(means) if len(means) > 1 else math.log(2)


def _devices(values: Any, problems: list[str]) -> dict[str, Device]:
    found: dict[str, Device] = {}
    if not isinstance(values, dict) or not values:
        problems.append("devices: missing; it maps a short name to name, bandwidth_gb_per_s and source")
        return found
    for key, value in values.items():
        value = value if isinstance(value, dict) else {}
        bandwidth, source = _positive(value.get("bandwidth_gb_per_s")), value.get("source")
        if bandwidth is None:
            problems.append(f"devices.{key}.bandwidth_gb_per_s: {value.get('bandwidth_gb_per_s')!r} is not a number above 0")
        elif not isinstance(source, str) or not source.strip():
            problems.append(f"devices.{key}.source: missing; say where the bandwidth comes from")
        else:
            found[str(key)] = Device(str(key), str(value.get("name") or key), bandwidth, source)
    return found


def _published(values: Any, devices: Mapping[str, Device], problems: list[str]) -> list[Published]:
    found: list[Published] = []
    if not isinstance(values, list) or not values:
        problems.append("published: missing; the efficiencies are fitted on its rows")
        return found
    for number, value in enumerate(values):
        where, row = f"published[{number}]", value if isinstance(value, dict) else {}
        figures = {key: _positive(row.get(key)) for key in ("bytes_per_token", "decode_tok_per_s")}
        texts = {key: row.get(key) for key in ("runtime", "device", "model", "source")}
        bad = [key for key, figure in figures.items() if figure is None] + [k for k, text in texts.items() if not isinstance(text, str)]
        if bad:
            problems.append(f"{where}.{bad[0]}: {row.get(bad[0])!r} is no {'number above 0' if bad[0] in figures else 'text'}")
        elif texts["device"] not in devices:
            problems.append(f"{where}.device: {texts['device']!r} is not among the devices")
        else:
            read, speed = float(figures["bytes_per_token"] or 0), float(figures["decode_tok_per_s"] or 0)
            efficiency = read * speed / (devices[str(texts["device"])].bandwidth_gb_per_s * 1e9)
            found.append(
                Published(**{k: str(v) for k, v in texts.items()}, bytes_per_token=read, decode_tok_per_s=speed, efficiency=efficiency)
            )
    return found


def _positive(value: Any) -> float | None:
    """A number above zero, also where YAML 1.1 reads 873e6 as text."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None
