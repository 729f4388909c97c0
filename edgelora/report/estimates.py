"""Estimates in the report: what other devices should reach. Nothing in it was measured, and the page says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgelora.report import figures as f
from edgelora.report.tables import Column, Row, Table, rows, tabulate, text


def table(doc: Row) -> Table:
    """A device a row, a file (in a runtime) a column."""
    found = rows(doc, "estimates")
    devices: dict[str, dict[str, Any]] = {}
    for row in found:
        device = devices.setdefault(row.get("device") or "", {"device": row.get("device"), "bandwidth": row.get("bandwidth_gb_per_s")})
        device[_way(row)] = row

    def of(way: str, show: Callable[[Row], Any]) -> Callable[[Row], Any]:
        return lambda device: show(device.get(way) or {})

    speeds = [
        Column(f"Estimate, tok/s: {way}", of(way, _estimated), by=of(way, lambda row: row.get("decode_tok_per_s")))
        for way in dict.fromkeys(map(_way, found))
    ]
    bandwidth = Column("Memory bandwidth", lambda device: f.suffixed(f.number(device["bandwidth"]), "GB/s"), by="bandwidth")
    return tabulate(list(devices.values()), [Column("Device", text("device"), numeric=False), *speeds, bandwidth])


def trust(doc: Row) -> list[str]:
    """What the estimates of each file rest on and how far they can be trusted, a line each."""
    said = []
    for row in rows(doc, "estimates"):
        share = f.suffixed(f.percent(row.get("efficiency"), 0), "of the bandwidth")
        read = f.labelled("a token reads ", f.size(row.get("bytes_per_token")))
        if words := "; ".join(filter(None, (f.aside(read, share), row.get("trust")))):
            said.append(f"{_way(row)}: {words}.")
    return list(dict.fromkeys(said))


def _way(row: Row) -> str:
    return " in ".join(filter(None, (row.get("file"), row.get("runtime"))))


def _estimated(row: Row) -> str:
    """'≈ 120 [90, 150]': two digits, as no estimate knows a third."""
    value = f.within(row.get("decode_tok_per_s"), row.get("low"), row.get("high"), lambda v: f.number(float(f"{v:.1e}"), 2))
    return f.labelled("≈ ", value)
