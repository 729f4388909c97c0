"""Graphics cards, what they can do by their data sheets, and what an hour of one costs: `gpus.yaml`, or a table of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora import hardware, settings
from edgelora.errors import DataError, RecipeError
from edgelora.train.estimate import Device

TABLE = Path(__file__).with_name("gpus.yaml")
# The share of the data sheet that programs reach: 789 of 989 TFLOP/s and 2.98 of 3.35 TB/s on one H100, taken for all cards.
_REACHED_MATMUL, _REACHED_BANDWIDTH = 0.80, 0.89


@dataclass(frozen=True)
class Gpu:
    """A row of the table. `dollars` are for an hour of one card, `price` says where and when that was read."""

    key: str
    name: str
    memory_mib: float
    bandwidth_gb_per_s: float
    matmul_tflop_per_s: float
    source: str
    dollars: float
    price: str
    cpus: int = 8
    hopper: bool = False

    @property
    def device(self) -> Device:
        return Device(
            self.name,
            "cuda",
            self.memory_mib * 2**20,
            self.matmul_tflop_per_s * 1e12 * _REACHED_MATMUL,
            self.bandwidth_gb_per_s * 1e9 * _REACHED_BANDWIDTH,
            attention="cuDNN" if self.hopper else "flash",
        )


@dataclass(frozen=True)
class Table:
    yen_a_dollar: float
    gpus: Mapping[str, Gpu]

    def chosen(self, names: Sequence[str]) -> list[Gpu]:
        """The cards of those names, every one for none; UsageError for the first that the table does not have."""
        return hardware.chosen(self.gpus, names, "GPU", "--prices") or list(self.gpus.values())


def load(path: Path = TABLE) -> Table:
    """The cards of a YAML file. DataError lists everything in it that cannot be used."""
    try:
        values = settings.read(path, "")
    except RecipeError as error:
        raise DataError(error.message, f"name a YAML file such as edgelora/{TABLE.name}") from error
    problems: list[str] = []
    yen = values.get("yen_a_dollar", 150)
    if not _positive(yen):
        problems.append(f"yen_a_dollar: {yen!r} is not a number above 0")
    rows = values.get("gpus")
    found = {}
    for key, row in rows.items() if isinstance(rows, dict) else ():
        gpu = settings.build(Gpu, {"name": str(key), **row, "key": str(key)} if isinstance(row, dict) else row, f"gpus.{key}.", problems)
        if gpu is not None:
            numbers = ("memory_mib", "bandwidth_gb_per_s", "matmul_tflop_per_s", "cpus")
            problems += [f"gpus.{key}.{n}: {getattr(gpu, n)!r} should be above 0" for n in numbers if not _positive(getattr(gpu, n))]
            if gpu.dollars < 0:
                problems.append(f"gpus.{key}.dollars: {gpu.dollars!r} should be 0 (your own card) or more")
            found[str(key)] = gpu
    if not found and not problems:
        problems.append("gpus: missing; it maps a short name to memory, rates and dollars an hour")
    hardware.refuse(path, TABLE, problems)
    return Table(float(yen), found)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
