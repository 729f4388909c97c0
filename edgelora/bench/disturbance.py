"""What made a figure doubtful: other programs, a hypervisor, a quota, heat, or samples that do not agree.

The first four come from outside and are read from the kernel before and after; a row that they touched is `crowded` and
proves nothing about a file. The rest is only seen in the samples: the row is `noisy`, and the reader is told why.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora import machine

_SPREAD = 0.15  # between the decode medians of the repeats; above it a row is called noisy
_DRIFT = 0.10  # by which every later repeat is slower than every earlier one
_STOLEN = 0.02  # of the processor's time
_QUOTA = 0.02


@dataclass(frozen=True)
class Snapshot:
    """What the kernel counts, at one moment; see `edgelora.machine`."""

    ticks: int
    stolen: int
    heat: int
    waited_s: float


def snapshot() -> Snapshot:
    return Snapshot(*machine.cpu_ticks(), machine.heat_events(), machine.quota_waits_s())


def from_outside(
    before: Snapshot, after: Snapshot, wall_s: float, others: Sequence[int], hot: Sequence[bool], threads: int, cores: int
) -> list[str]:
    """Reasons why something other than the file decided the figures, empty when nothing did.

    `others` are threads beside ours that wanted a core, `hot` whether the kernel was holding the clock down, both looked at
    before every repeat: they count when they hold in the middle of the repeats.
    """
    why = []
    typical = statistics.median(others) if others else 0
    if typical + threads > cores:
        why.append(f"other programs ran beside our {threads} thread{'' if threads == 1 else 's'} on {cores} cores ({typical:g} at a time)")
    stolen = (after.stolen - before.stolen) / max(1, after.ticks - before.ticks)
    if stolen > _STOLEN:
        why.append(f"the hypervisor took {stolen:.0%} of the processor's time")
    waited = after.waited_s - before.waited_s
    if wall_s > 0 and waited / wall_s > _QUOTA:
        why.append(f"a quota stopped us for {waited:.1f} of {wall_s:.0f} s")
    if after.heat > before.heat:
        why.append(f"the processor throttled itself {after.heat - before.heat} times because of heat")
    elif hot and sum(hot) * 2 >= len(hot):
        why.append("the kernel held the clock down because of heat")
    return why


def in_samples(medians: Sequence[float], settled: bool) -> list[str]:
    """Reasons that the decode medians of the repeats, in their order, give to doubt the figures."""
    why = []
    spread = (max(medians) - min(medians)) / min(medians)
    half = len(medians) // 2
    early, late = medians[:half], medians[-half:]
    if half >= 2 and min(late) > (1 + _DRIFT) * max(early):
        share = statistics.median(late) / statistics.median(early) - 1
        why.append(f"later repeats were {share:.0%} slower than the first: heat, or other programs")
    elif spread > _SPREAD:
        why.append(f"the repeats' decode medians are {spread:.0%} apart")
    if not settled:
        why.append("the speed did not settle while warming up")
    return why
