"""The document -> the few words and figures that stand above its tables: what ships, how good, how fast, what the checks said."""

from __future__ import annotations

from typing import Any

from edgelora.report import figures as f
from edgelora.report.tables import FAIL, PASS, UNJUDGED, Row, disturbed, rows, section


def shipped(doc: Row) -> tuple[Row, Row, Row]:
    """The file that ships (the first), its first loss row and its first bench row, at the fastest number of threads; each may be empty."""
    file = next(iter(rows(doc, "files")), {})

    def first(name: str, figure: str) -> Row:
        mine = (row for row in rows(doc, name) if row.get("file") == file.get("file") and f.known(row.get(figure)))
        return next(mine, {}) if file.get("file") else {}

    bench = first("bench", "decode_tok_per_s")
    same = [row for row in rows(doc, "bench") if bench and _way(row) == _way(bench) and f.known(row.get("decode_tok_per_s"))]
    return file, first("losses", "change"), max(same, key=lambda row: float(row["decode_tok_per_s"]), default={})


def _way(row: Row) -> tuple[Any, ...]:
    """All that tells two bench rows apart but their threads."""
    return tuple(row.get(key) for key in ("file", "device", "runtime", "prompt_tokens"))


def trained(doc: Row) -> bool:
    """Whether the report is of a run that trained a model, or just of files that were measured."""
    return bool(section(doc, "training") or section(doc, "recipe"))


def reference(doc: Row) -> str:
    """What a KL is measured from."""
    return "the trained model" if trained(doc) else "the reference"


def headline(doc: Row) -> str:
    """'The file that ships: 105.5 MB, 41 % lower loss than the untuned base on paraphrase, 65.2 tok/s on this machine.'

    A change whose interval holds zero is not called lower or higher. Empty when nothing was exported.
    """
    file, loss, bench_row = shipped(doc)
    speed = f.number(bench_row.get("decode_tok_per_s"))
    where = f"tok/s on {bench_row.get('device') or 'this machine'}" + (" (disturbed, see below)" if disturbed(bench_row) else "")
    parts = [f.size(file.get("size_bytes")), _loss_words(loss), f.suffixed(speed, where)]
    said = ", ".join(part for part in parts if part)
    who = "The file that ships" if trained(doc) or not file.get("file") else file["file"]
    return f"{who}: {said}." if said else ""


def _loss_words(row: Row) -> str:
    change, low, high = row.get("change"), row.get("change_low"), row.get("change_high")
    if not f.known(change):
        return ""
    where = f" on {row.get('set') or 'held-out rows'}"
    if f.known(low) and f.known(high) and low <= 0 <= high:
        return f"no loss change that can be told from the untuned base{where}"
    return f"{f.percent(abs(change), 0)} {'lower' if change < 0 else 'higher'} loss than the untuned base{where}"


def sixteen_bit_bytes(doc: Row) -> Any:
    """Size of the 16-bit model: as said by training, or of an exported 16-bit file; None when neither is there."""
    known = section(doc, "training").get("model_16bit_bytes")
    wide = [row.get("size_bytes") for row in rows(doc, "files") if row.get("type") in ("f16", "bf16", "fp16")]
    return known or next(iter(wide), None)


def tally(doc: Row) -> tuple[int, int, int]:
    """How many checks passed, failed, and could not be judged (a missing baseline is never a pass)."""
    results = [row.get("ok") for row in rows(doc, "checks")]
    return results.count(True), results.count(False), results.count(None)


def tally_words(doc: Row) -> str:
    """'✗ 1 of 3 checks failed', '✓ 3 of 3 checks passed' or '! 1 of 3 checks could not be judged'; empty without checks."""
    passed, failed, unjudged = tally(doc)
    count = passed + failed + unjudged
    if not count:
        return ""
    of = f"of {count} check{'' if count == 1 else 's'}"
    if failed:
        return f"{FAIL}{failed} {of} failed"
    return f"{UNJUDGED}{unjudged} {of} could not be judged" if unjudged else f"{PASS}{passed} {of} passed"
