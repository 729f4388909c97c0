"""The command that looks into model files: size."""

from __future__ import annotations

from pathlib import Path

import click

from edgelora.cli.output import PATH, Output, command


@click.command()
@click.argument("file", type=PATH)
@click.argument("other", type=PATH, required=False)
@click.option("--by", type=click.Choice(["group", "type", "layer", "name"]), default="group", show_default=True, help="What to add up.")
@click.option("--most", type=click.IntRange(min=1), default=20, show_default=True, help="Lines shown at most; --json gives all.")
@command
def size(echo: Output, file: Path, other: Path | None, by: str, most: int) -> None:
    """Where the bytes of a model file are, or what differs between two: GGUF, ONNX, safetensors, .pte, .litertlm, folders.

    Only headers are read; no weight, no torch.

    \b
    Example:  edgelora size old.gguf new.gguf --by name
    """
    from edgelora import size as sizes

    first = sizes.read(file)
    if other is None:
        totals = first.by(by)
        lines = [f"{first.name}: {_mb(first.size_bytes)} ({first.size_bytes:,} bytes)"]
        lines += [f"{_mb(n):>12}  {n / first.size_bytes:6.1%}  {name}" for name, n in list(totals.items())[:most]]
        lines += [f"{'':>12}  and {len(totals) - most} more"] if len(totals) > most else []
        echo.result({"file": first.name, "size_bytes": first.size_bytes, "by": by, "bytes": totals}, *lines)
        return
    second = sizes.read(other)
    moved = sizes.changes(first.by(by), second.by(by))
    grown = second.size_bytes - first.size_bytes
    lines = [f"{first.name} -> {second.name}: {_mb(first.size_bytes)} -> {_mb(second.size_bytes)} ({grown:+,} bytes)"]
    lines += [f"{b - a:>+14,}  {name}  ({a:,} -> {b:,})" for name, (a, b) in list(moved.items())[:most]]
    lines += [f"{'':>14}  and {len(moved) - most} more"] if len(moved) > most else []
    document = {
        "before": {"file": first.name, "size_bytes": first.size_bytes},
        "after": {"file": second.name, "size_bytes": second.size_bytes},
        "by": by,
        "changes": {name: {"before": a, "after": b} for name, (a, b) in moved.items()},
    }
    echo.result(document, *lines)


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB"
