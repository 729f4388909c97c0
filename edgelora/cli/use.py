"""Commands that use an exported file: eval, predict, chat."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.output import PATH, Output, Progress, command
from edgelora.cli.reading import reading
from edgelora.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgelora import recipe as recipes


@click.command(name="eval")
@click.argument("file", type=PATH)
@click.argument("rows", type=PATH)
@click.option("--against", type=PATH, help="A second file to compare with, row by row, for instance the untuned base in the same type.")
@click.option("--most", type=click.IntRange(1), default=200, show_default=True, help="Rows read at most.")
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@reading()
@command
def evaluate(echo: Output, file: Path, rows: Path, against: Path | None, most: int, threads: int | None, reading: recipes.Reading) -> None:
    """Loss of an exported file on rows of questions and answers, with its interval.

    \b
    Example:  edgelora eval bot.gguf held-out.csv --against base.gguf
    """
    from edgelora import evaluate as ev
    from edgelora import talk
    from edgelora.data.read import read

    table = read(rows, reading).rows[:most]
    measured = []
    with echo.progress() as progress:
        for number, path in enumerate([file, *([against] if against else [])]):
            with _session(path, threads) as session:
                encoded = [talk.encode(session, row) for row in table]
                done = partial(_share, progress, "evaluate", rows.name, number, 2 if against else 1)
                measured.append(ev.losses(session, encoded, done))
    found: dict[str, Any] = {"file": file.name, "rows": len(table), "tokens": int(measured[0].tokens.sum()), **ev.summary(measured[0])}
    lines = [f"{file.name}: loss {found['loss']:.4f} [{found['low']:.4f}, {found['high']:.4f}] nats a token, n = {len(table)} rows"]
    if against:
        if (measured[0].tokens != measured[1].tokens).any():
            raise UsageError(f"{file.name} and {against.name} split the answers into different tokens", "compare files of one base model")
        found |= {"against": against.name, "before": ev.summary(measured[1]), **ev.change(measured[1], measured[0])}
        lines.append(f"against {against.name}: {found['change']:+.1%} [{found['change_low']:+.1%}, {found['change_high']:+.1%}]")
    echo.result(found, *lines)


@click.command()
@click.argument("file", type=PATH)
@click.argument("rows", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Where to write: .jsonl, .csv or .tsv.")
@click.option(
    "--labels", help="Comma-separated labels: choose one for each row and give its probability. Default: those it was trained on."
)
@reading("layout", "answer", "group")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@command
def predict(
    echo: Output,
    file: Path,
    rows: Path,
    output: Path,
    labels: str | None,
    reading: recipes.Reading,
    max_new_tokens: int,
    threads: int | None,
) -> None:
    """Answer every row of a file, or give each its label and probability.

    \b
    Example:  edgelora predict bot.gguf questions.csv -o answers.csv
    """
    from edgelora import talk
    from edgelora.data.read import read

    talk.check_suffix(output)  # before an hour of answers, not after
    table = read(rows, reading, answered=False)
    chosen = [label.strip() for label in labels.split(",") if label.strip()] if labels is not None else labels_of(file)
    if labels is not None and len(chosen) < 2:
        raise UsageError(f"--labels {labels!r}: a choice needs at least two labels", "for instance --labels positive,negative")
    if (trained := labels_of(file)) and (strange := [label for label in chosen if label not in trained]):
        raise UsageError(f"--labels: {file.name} was not trained on {', '.join(strange)}", f"its labels: {', '.join(trained)}")
    with echo.progress() as progress, _session(file, threads) as session:
        found = list(talk.predict(session, table.rows, chosen, max_new_tokens, lambda share: progress("predict", share, rows.name)))
    talk.write(found, output)
    left = f", {len(table.dropped)} empty ones left out" if table.dropped else ""
    echo.result({"output": str(output), "rows": len(found), "dropped": len(table.dropped)}, f"wrote {output}: {len(found)} rows{left}")


@click.command()
@click.argument("file", type=PATH)
@click.option("--prompt", help="Answer this one message and end.")
@click.option("--system", help="System message; default what the file was trained with.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=300, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@command
def chat(echo: Output, file: Path, prompt: str | None, system: str | None, max_new_tokens: int, threads: int | None) -> None:
    """Talk to an exported file. An empty line or Ctrl-D ends.

    \b
    Example:  edgelora chat runs/quickstart/gguf-q5_k_m-1a2b3c4d/quickstart-q5_k_m.gguf
    """
    from edgelora import talk

    history: list[talk.Message] = [("system", system)] if system else []
    interactive = sys.stdin.isatty()
    with _session(file, threads) as session:
        while (text := prompt or _ask(interactive)).strip():
            history.append(("user", text.strip()))
            pieces = []
            for piece in talk.stream(session, history, max_new_tokens):
                pieces.append(piece)
                if not echo.as_json:
                    click.echo(piece, nl=False)
            history.append(("assistant", "".join(pieces)))
            if not echo.as_json:
                click.echo()
            if prompt:
                break
    if echo.as_json:
        echo.result([{"role": role, "content": content} for role, content in history])


def _session(path: Path, threads: int | None) -> Any:
    from edgelora import doctor, machine
    from edgelora.runtime import runtime, runtime_of

    module = runtime_of(path)
    opened = runtime(module)
    doctor.require((*opened.REQUIRES, "jinja2"))
    return opened.open(path, threads or machine.cores())


def labels_of(file: Path) -> list[str]:
    """The labels an exported classifier was trained on, from the manifest beside it."""
    from edgelora import artifact

    if not (file.parent / artifact.MANIFEST).exists():
        return []
    return [str(label) for label in artifact.load(file.parent).facts.get("labels", [])]


def _share(progress: Progress, stage: str, text: str, number: int, of: int, share: float) -> None:
    """Progress of the `number`-th of several equal parts."""
    progress(stage, (number + share) / of, text)


def _ask(interactive: bool) -> str:
    if interactive:
        click.echo("> ", nl=False, err=True)
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"the input is not {error.encoding} text", "convert the piped file, or set the locale it was written in") from error
