"""Commands that judge: report, check, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.cli.output import PATH, Output, command, load_recipe
from edgelora.errors import CheckFailed, UsageError


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, help="Folder to write into; default that of the one run, or ./comparison.")
@command
def report(echo: Output, runs: tuple[Path, ...], output: Path | None) -> None:
    """Write report.html, report.md and report.json of a run again, or compare several runs.

    \b
    Example:  edgelora report runs/quickstart runs/try -o comparison
    """
    from edgelora import report as reports

    documents = [reports.read(run) for run in runs]
    if len(documents) == 1:
        document, target = documents[0], output or (runs[0] if runs[0].is_dir() else runs[0].parent)
    else:
        document, target = reports.compare(documents), output or Path("comparison")
    files = reports.write(document, target)
    echo.result({name: str(path) for name, path in files.items()}, *(f"wrote {path}" for path in files.values()))


@click.command()
@click.argument("run", type=PATH)
@click.option("--recipe", "recipe", type=PATH, help="Take the budgets of this recipe; default those the run was made with.")
@click.option("--budget", "budgets", multiple=True, metavar="NAME=LIMIT", help="A budget, e.g. size=130MB. Repeatable.")
@command
def check(echo: Output, run: Path, recipe: Path | None, budgets: tuple[str, ...]) -> None:
    """Hold a run's report against budgets; exit code 1 when one is broken.

    \b
    Example:  edgelora check runs/quickstart --budget size=130MB --budget kl=0.3
    """
    from edgelora import check as checks
    from edgelora import report as reports

    document = reports.read(run)
    limits: dict[str, Any] = {}
    for item in budgets:
        name, sign, limit = item.partition("=")
        if not sign:
            raise UsageError(f"--budget {item!r} is not NAME=LIMIT", "for instance --budget size=130MB")
        limits[name] = limit
    if not limits:
        limits = dict(load_recipe(recipe, (), None).budgets if recipe else (document.get("recipe") or {}).get("budgets") or {})
    if not limits:
        raise UsageError(f"{run} was made without budgets", "name some: --budget size=130MB")
    verdicts = checks.check(document, limits)
    rows = [verdict.as_row() for verdict in verdicts]
    echo.result(rows, *(f"{'ok    ' if row['ok'] else 'BROKEN'}  {row['what']}: {row['value']} (limit {row['limit']})" for row in rows))
    if failed := checks.broken(verdicts):
        raise CheckFailed(f"{len(failed)} of {len(verdicts)} budgets broken", "shrink what grew, or raise the limit on purpose")


@click.command()
@command
def doctor(echo: Output) -> None:
    """What this machine has, what is missing and the one command that mends it.

    \b
    Example:  edgelora doctor
    """
    from edgelora import doctor as doctors

    found = doctors.examine()
    marks = {True: "ok  ", False: "MISS", None: "-   "}
    lines = [f"{marks[f.ok]}  {f.name}: {f.detail}" + (f"\n      {f.mend}" if f.mend and not f.ok else "") for f in found]
    echo.result([{"name": f.name, "ok": f.ok, "detail": f.detail, "mend": f.mend} for f in found], *lines)
