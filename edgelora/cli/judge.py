"""Commands that judge: report, check, baseline, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.artifact import writing
from edgelora.cli.output import PATH, Output, command, load_recipe
from edgelora.errors import CheckFailed, UsageError


@click.command()
@click.argument("runs", type=PATH, nargs=-1)
@click.option("-o", "--output", type=PATH, help="Folder to write into; default that of the one run, ./comparison or ./history.")
@click.option("--history", type=PATH, metavar="BASELINE", help="Plot the versions of a committed baseline over commits.")
@click.option("--schema", is_flag=True, help="Print what report.json may hold, as a JSON Schema, and stop.")
@command
def report(echo: Output, runs: tuple[Path, ...], output: Path | None, history: Path | None, schema: bool) -> None:
    """Write report.html, report.md and report.json of a run again, or compare several runs, or plot a baseline over commits.

    A comparison says what really differs and what is noise: sizes exactly, quality by its intervals, speeds as `check` does.

    \b
    Example:  edgelora report runs/quickstart runs/try -o comparison
    """
    from edgelora import report as reports

    if schema:
        import json

        echo.result(found := reports.json_schema(), json.dumps(found, indent=1))
        return
    if bool(runs) == (history is not None):
        raise UsageError("name one run or several, or --history BASELINE", "for instance edgelora report runs/quickstart")
    documents = [reports.read(run) for run in runs]
    if history is not None:
        from edgelora import baseline as baselines

        document, target = reports.over_commits(baselines.history(history)), output or Path("history")
    elif len(documents) == 1:
        document, target = documents[0], output or (runs[0] if runs[0].is_dir() else runs[0].parent)
    else:
        document, target = reports.compare(documents), output or Path("comparison")
    files = reports.write(document, target)
    said = [f"{word}: {line}" for word, lines in reports.findings(document).items() for line in lines] if len(documents) > 1 else []
    echo.result({name: str(path) for name, path in files.items()}, *said, *(f"wrote {path}" for path in files.values()))


@click.command()
@click.argument("artifacts", type=PATH, nargs=-1, required=True)
@click.option("--recipe", "recipe", type=PATH, help="Take the budgets of this recipe; default those a run was made with.")
@click.option("--budgets", "file", type=PATH, help="Take the budgets of this YAML file.")
@click.option("--budget", "budgets", multiple=True, metavar="NAME=LIMIT", help="A budget, e.g. size=130MB or size=+1%. Repeatable.")
@click.option("--baseline", type=PATH, help="A baseline, or a folder of them; default ./baselines where it exists.")
@click.option("--against", "old", type=PATH, help="The file or run before, as the baseline: the speed of both is measured now, in turns.")
@click.option("--markdown", type=PATH, help="Write the table as Markdown into this file, for a pull request.")
@click.option("--annotate", is_flag=True, help="Write GitHub's annotations for what is broken or could not be judged.")
@command
def check(
    echo: Output,
    artifacts: tuple[Path, ...],
    recipe: Path | None,
    file: Path | None,
    budgets: tuple[str, ...],
    baseline: Path | None,
    old: Path | None,
    markdown: Path | None,
    annotate: bool,
) -> None:
    """Hold runs, reports or model files against budgets; exit code 1 when one is broken.

    A budget is a limit (size=130MB, kl=0.3, decode_tok_per_s=15) or a change against a baseline (size=+1%, decode=-5%).
    What cannot be judged is a warning, never a pass. A speed is told best from a file that is at hand (--against OLD).

    \b
    Example:  edgelora check runs/quickstart --budget size=130MB --budget kl=0.3
    """
    from edgelora import baseline as baselines
    from edgelora import check as checks
    from edgelora.against import against
    from edgelora.measured import measured

    named = _budgets(recipe, file, budgets)
    if baseline is not None and not baseline.exists():
        raise UsageError(f"there is no baseline at {baseline}", "make one: edgelora baseline update RUN")
    if old is not None and (baseline is not None or len(artifacts) > 1):
        raise UsageError(
            "--against holds one artifact against one other", "leave --baseline away, and check each with a command of its own"
        )
    verdicts = []
    known: dict[str, Any] | None
    for path in artifacts:
        document, find = measured(path)
        limits = named or dict((document.get("recipe") or {}).get("budgets") or {})
        if not limits:
            raise UsageError(f"{path} was made without budgets", "name some: --budget size=130MB")
        if old is not None:
            timed = any(budget.metric.section == "bench" for budget in checks.parse(limits))
            with echo.progress() as progress:
                document, known = against(document, find, old, timed, lambda share, text: progress("bench", share, text))
        else:
            known = baselines.read(baseline or baselines.FOLDER, (document.get("machine") or {}).get("class"))
        verdicts += checks.check(document, limits, known, find)
    marks = {True: "ok    ", False: "BROKEN", None: "?     "}
    lines = [f"{marks[v.ok]}  {v.what}: {v.value} (limit {v.limit})" + (f"\n        {v.why}" if v.why else "") for v in verdicts]
    echo.result([verdict.as_row() for verdict in verdicts], *lines)
    if markdown is not None:
        with writing(markdown.parent):
            markdown.write_text(checks.to_markdown(verdicts), encoding="utf-8")
    if annotate:
        click.echo("".join(checks.workflow_commands(verdicts)), err=True, nl=False)
    if warned := checks.unjudged(verdicts):
        click.echo(f"warning: {len(warned)} of {len(verdicts)} budgets could not be judged", err=True)
    if failed := checks.broken(verdicts):
        raise CheckFailed(f"{len(failed)} of {len(verdicts)} budgets broken", "shrink what grew, or raise the limit on purpose")


def _budgets(recipe: Path | None, file: Path | None, named: tuple[str, ...]) -> dict[str, Any]:
    """Those named on the command line, else those of a file; empty when none is given."""
    from edgelora import recipe as recipes

    limits: dict[str, Any] = {}
    for item in named:
        name, sign, limit = item.partition("=")
        if not sign:
            raise UsageError(f"--budget {item!r} is not NAME=LIMIT", "for instance --budget size=130MB")
        limits.setdefault(name, []).append(limit)
    if limits:
        return limits
    if file is not None:
        return recipes.load_budgets(file)
    return dict(load_recipe(recipe, (), None).budgets) if recipe else {}


@click.group()
def baseline() -> None:
    """What later runs are compared with: one small JSON file a machine class, to be committed."""


@baseline.command()
@click.argument("run", type=PATH)
@click.option("-o", "--output", type=PATH, help="Folder of the baselines; default ./baselines.")
@command
def update(echo: Output, run: Path, output: Path | None) -> None:
    """Make a run, a report or a model file the baseline of this machine's class.

    \b
    Example:  edgelora baseline update runs/quickstart
    """
    from edgelora import baseline as baselines
    from edgelora.measured import measured

    document, find = measured(run)
    if "machine" not in document:
        from edgelora import machine

        document = {**document, "machine": machine.describe()}
    path = baselines.write(baselines.make(document, find), output or baselines.FOLDER)
    echo.result({"baseline": str(path)}, f"wrote {path}; commit it, and `edgelora check` compares with it")


@click.command()
@click.option("--install", metavar="NAME", help="Make the environment of that name (doctor lists them) in a folder of its own.")
@command
def doctor(echo: Output, install: str | None) -> None:
    """What this machine has, what is missing and the one command that mends it.

    \b
    Example:  edgelora doctor
    """
    from edgelora import doctor as doctors
    from edgelora import environments

    if install:
        with echo.progress() as progress:
            place = environments.install(install, lambda share, text: progress("install", share, text))
        echo.result({"name": install, "folder": str(place)}, f"{install}: {place}")
        return
    found = doctors.examine()
    marks = {True: "ok  ", False: "MISS", None: "-   "}
    lines = [f"{marks[f.ok]}  {f.name}: {f.detail}" + (f"\n      {f.mend}" if f.mend and not f.ok else "") for f in found]
    echo.result([{"name": f.name, "ok": f.ok, "detail": f.detail, "mend": f.mend} for f in found], *lines)
