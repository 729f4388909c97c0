"""Estimates of `edgelora estimate` as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgelora.report.figures import plainest, seconds, size


def lines(found: dict[str, Any]) -> list[str]:
    """The whole document for people; every line but the first and last is an estimate."""
    said = [
        "Estimates: nothing below was measured" + (" but what says so." if any(row["measured"] for row in found["devices"]) else "."),
        f"base: {found['base']}, {found['total_parameters']:,} parameters, {found['trained_parameters']:,} trained ({found['trained_share']:.2%}); "
        f"known from {found['base_known_from']}",
        f"rows: {found['rows']:,} for training, {found['tokens']:,} tokens an epoch ({found['rows_counted']}), {_epochs(plainest(found['epochs']))}",
        "",
        *_table(
            ["", "needs", "training", "tokens/s", "$", "¥", "all steps", "$", "¥"],
            [_row(row) for row in found["devices"]],
        ),
        *(f"{row['device']}: {row['advice']}" for row in found["devices"] if "advice" in row),
        "",
        *_steps(found["devices"]),
        *(f"file: {row['format']} {row['type']}, {size(row['size_bytes']) or 'size known once it is planned'}" for row in found["files"]),
        f"disk: {size(found['disk_bytes'])} for everything; full fine-tuning would hold {size(found['full_finetune_bytes'])} of memory",
    ]
    if any("dollars" in row for row in found["devices"]):
        said.append(
            f"prices: an hour of the card as the table says (--prices FILE for yours), {plainest(found['yen_a_dollar'])} yen a dollar"
        )
    return said


def article(found: dict[str, Any]) -> list[str]:
    """The introduction's tables with a verdict a claim."""
    said = ["Estimates of this package beside the claims of an introduction to fine-tuning.", "", "LoRA against full fine-tuning (a 7B)"]
    said += [f"  {row['verdict']}: {row['claim']}\n    {row['found']}" for row in found["lora"]]
    for job in found["jobs"]:
        said += ["", f"{job['job']} ({job['gpu']} at ${job['dollars_an_hour']} an hour)"]
        said += [f"  {claim['verdict']}: {claim['claim']}" for claim in job["claims"]]
        cells = [
            [f"{_epochs(c['epochs'])}, {c['row_tokens']} tokens a row", seconds(3600 * c["hours"]), f"${c['dollars']:.2f}"]
            for c in job["cells"]
        ]
        said += [f"    {line}" for line in _table(["", "training", "costs"], cells)]
        most = ", ".join(f"{tokens:,} in {_epochs(epochs)}" for epochs, tokens in job["most_tokens_a_row"].items())
        said.append(f"    its time and price are kept up to so many tokens a row: {most}")
    said += ["", "Sizes in FP16"] + [f"  {row['verdict']}: {row['claim']}; {size(row['bytes'])}" for row in found["sizes"]]
    said += ["", "半日+10ドル (half a day and ten dollars)"]
    return said + [f"  {row['verdict']}: {row['claim']}" for row in found["half_a_day_and_ten_dollars"]]


def _epochs(count: Any) -> str:
    return f"{count} epoch{'' if str(count) == '1' else 's'}"


def _row(row: dict[str, Any]) -> list[str]:
    needs = size(row["needed_bytes"])
    if not row["fits"]:
        return [row["device"], needs, "does not fit", *[""] * 6]
    paid = (
        [f"{row['dollars']:.2f}", f"{row['yen']:,.0f}", f"{row['whole_dollars']:.2f}", f"{row['whole_yen']:,.0f}"]
        if "dollars" in row
        else [""] * 4
    )
    name = row["device"] + (" (20 steps measured)" if row["measured"] else "")
    return [name, needs, seconds(row["seconds"]), f"{row['tok_per_s']:,.0f}", *paid[:2], seconds(row["whole_s"]), *paid[2:]]


def _steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The steps one by one, on the cheapest device that fits."""
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        return []
    row = min(fitting, key=lambda row: (row.get("whole_dollars", 1e9), row["whole_s"]))
    return [
        f"step by step on {row['device']}:",
        *(
            f"  {step['step']}: {seconds(step['seconds'])}, {size(step['peak_bytes'])} of {'RAM' if number else 'memory'}"
            + (f", ${step['dollars']:.2f}" if "dollars" in step else "")
            for number, step in enumerate(row["steps"])
        ),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in [head, *rows]
    ]
