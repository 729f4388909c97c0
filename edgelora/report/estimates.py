"""Estimates in the report: what other devices should reach. Nothing in it was measured, and the page says so."""

from __future__ import annotations

from edgelora.report import figures as f
from edgelora.report.tables import Column, Row, Table, of, rows, tabulate, text


def table(doc: Row) -> Table:
    return tabulate(
        rows(doc, "estimates"),
        [
            Column("Device", text("device"), numeric=False),
            Column("File", text("file"), numeric=False),
            Column("Runtime", text("runtime"), numeric=False),
            Column("Estimated decode, tok/s", _estimated, by="decode_tok_per_s"),
            Column("A token reads", of("bytes_per_token", f.size), by="bytes_per_token"),
            Column("Memory bandwidth", lambda row: f.suffixed(f.number(row.get("bandwidth_gb_per_s")), "GB/s"), by="bandwidth_gb_per_s"),
            Column("Efficiency", of("efficiency", lambda v: f.percent(v, 0)), by="efficiency"),
            Column("Validated", lambda row: "" if row.get("validated") is None else "yes" if row["validated"] else "no", numeric=False),
        ],
    )


def trust(doc: Row) -> list[str]:
    """How far the estimates of each runtime and file can be trusted, a line each."""
    said: dict[str, list[str]] = {}
    for row in rows(doc, "estimates"):
        if row.get("trust"):
            said.setdefault(row["trust"], []).append(" of ".join(filter(None, (row.get("runtime"), row.get("file")))))
    return [f"{', '.join(dict.fromkeys(who))}: {why}." for why, who in said.items()]


def _estimated(row: Row) -> str:
    """'about 120 [90, 150]': two digits, as no estimate knows a third."""
    value = f.within(row.get("decode_tok_per_s"), row.get("low"), row.get("high"), lambda v: f.number(v, 2))
    return f.labelled("≈ ", value)
