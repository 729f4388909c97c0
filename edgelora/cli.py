"""Every command: parse, one call, echo. Heavy imports live inside the commands, so that `--help` stays instant."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora import __version__
from edgelora.errors import CheckFailed, DataError, EdgeloraError, UsageError

if TYPE_CHECKING:
    from edgelora import recipe as recipes
    from edgelora.artifact import Artifact

Progress = Callable[[str, float, str], None]
_INTERRUPTED = 130  # what a shell expects after Ctrl-C


class Output:
    """What a command says: one JSON document or lines on stdout, progress on stderr."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet

    def result(self, document: Any, *lines: str) -> None:
        if self.as_json:
            click.echo(json.dumps(document, ensure_ascii=False, indent=1, default=str))
        else:
            for line in lines:
                click.echo(line)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar a stage on a terminal; silent elsewhere and with --quiet."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda stage, share, text: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.fields[stage]:>10}"), BarColumn(24), TextColumn("{task.percentage:>3.0f} %"))
        bars = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
        )
        tasks: dict[str, Any] = {}

        def show(stage: str, share: float, text: str) -> None:
            if stage not in tasks:
                for done in tasks.values():
                    bars.update(done, completed=1.0)
                tasks[stage] = bars.add_task("", total=1.0, stage=stage)
            bars.update(tasks[stage], completed=share, description=text)

        with bars:
            yield show
            for task in tasks.values():
                bars.update(task, completed=1.0)


def _debug(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().ensure_object(dict)["debug"] = True


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The options that every command has; the command gets an Output as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("--quiet", is_flag=True, help="No progress bars.")
    @click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error.")
    def wrapper(as_json: bool, quiet: bool, **arguments: Any) -> None:
        function(Output(as_json=as_json, quiet=quiet), **arguments)

    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    wrapper.__click_params__ = [*getattr(function, "__click_params__", []), *wrapper.__click_params__]  # type: ignore[attr-defined]
    return wrapper


_path = click.Path(path_type=Path)
_recipe_argument = click.argument("recipe", type=_path)
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.lr=2e-4. Repeatable."
)
_out_option = click.option("--out", type=_path, help="Folder of the results; default runs/<name of the recipe>.")
_dry_option = click.option("--dry-run", is_flag=True, help="Print the plan (sizes, memory, time) and stop.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgelora")
def cli() -> None:
    """From your own data to a fine-tuned model that runs on a phone, a browser or a small CPU.

    \b
    Start here:
      edgelora run quickstart          the whole line, on an embedded model
      edgelora init faq.csv            a recipe for your own data
    """


@cli.command()
@click.argument("data", type=_path)
@click.option("-o", "--output", type=_path, help="Where to write the recipe; default <name of the data>.yaml.")
@click.option("--base", help="Base model; default the embedded one.")
@click.option("--question", help="Column of the questions (or texts).")
@click.option("--answer", help="Column of the answers (or labels).")
@click.option("--encoding", default="utf-8", show_default=True, help="Encoding of the file; a byte order mark is honoured.")
@command
def init(echo: Output, data: Path, output: Path | None, base: str | None, question: str | None, answer: str | None, encoding: str) -> None:
    """Look at a data file and write a commented recipe for it.

    \b
    Example:  edgelora init faq.csv -o faq.yaml
    """
    from edgelora.suggest import suggest

    target = output or Path(f"{data.stem}.yaml")
    if target.exists():
        raise UsageError(f"{target} exists", "choose another name with -o; a recipe is never overwritten")
    found = suggest(data, question=question, answer=answer, encoding=encoding, base=base, folder=target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(found.recipe, encoding="utf-8")
    document = {
        "recipe": str(target),
        "rows": found.rows,
        "columns": found.columns,
        "dropped": found.dropped,
        "task": found.task,
        "base": found.base,
    }
    echo.result(
        document,
        f"{data.name}: {found.rows} rows, columns {', '.join(found.columns)}"
        + (f", {found.dropped} without both left out" if found.dropped else ""),
        f"task: {found.task}" + (f", {found.labels} labels" if found.labels else ""),
        f"base: {found.base}" + ("  (an English model; see the note in the recipe)" if found.japanese and not base else ""),
        f"wrote {target}; next: edgelora run {target} --dry-run",
    )


@cli.command()
@_recipe_argument
@_set_option
@_out_option
@_dry_option
@command
def run(echo: Output, recipe: Path, overrides: tuple[str, ...], out: Path | None, dry_run: bool) -> None:
    """Fine-tune, merge, export, verify, evaluate, bench, report and check, as a recipe says.

    Finished stages are kept: the same command continues a run that was interrupted.

    \b
    Example:  edgelora run quickstart
    """
    loaded = _load(recipe, overrides, out)
    if dry_run:
        _plan(echo, loaded)
        return
    from edgelora import pipeline
    from edgelora.check import broken

    _calm_libraries()
    with echo.progress() as progress:
        result = pipeline.run(loaded, progress)
    echo.result(result.document, *_summary(result.document), f"report: {result.report}", *(f"file:   {path}" for path in result.exports))
    if failed := broken(result.verdicts):
        raise CheckFailed(
            f"{len(failed)} of {len(result.verdicts)} budgets broken: "
            + "; ".join(f"{v.what}: {v.as_row()['value']}, limit {v.limit}" for v in failed)
        )


@cli.command()
@_recipe_argument
@_set_option
@_out_option
@_dry_option
@command
def finetune(echo: Output, recipe: Path, overrides: tuple[str, ...], out: Path | None, dry_run: bool) -> None:
    """Train a LoRA adapter on a base held in 4-bit NF4 (QLoRA) or in 16 bits (LoRA).

    \b
    Example:  edgelora finetune quickstart --set train.epochs=1 --out runs/try
    """
    loaded = _load(recipe, overrides, out)
    if dry_run:
        _plan(echo, loaded)
        return
    from edgelora import artifact, doctor, models, preflight
    from edgelora.data import split
    from edgelora.train.finetune import finetune as train

    _calm_libraries()
    doctor.require(preflight.TRAINING)
    with echo.progress() as progress, artifact.locked(loaded.out_dir):
        dataset = split.load(loaded)
        base = models.open_base(loaded.base, loaded.folder, loaded.out_dir)
        made = train(loaded, base, dataset, loaded.out_dir, lambda share, text: progress("fine-tune", share, text))
    facts = made.facts
    echo.result(
        {"adapter": str(made.path), **facts},
        *_training_lines(facts),
        f"adapter: {made.path}",
        f"next: edgelora merge {made.path} --recipe {recipe}",
    )


@cli.command()
@click.argument("adapter", type=_path)
@click.option(
    "--recipe", "recipe", type=_path, required=True, help="The recipe it was trained with: names the base and the rows that choose."
)
@click.option("--base", "into", type=click.Choice(["auto", "nf4", "16bit"]), help="Which base to merge into; default as the recipe says.")
@_set_option
@command
def merge(echo: Output, adapter: Path, recipe: Path, into: str | None, overrides: tuple[str, ...]) -> None:
    """Add an adapter to its base: W' = W + (alpha / r) B A, on the base that serves better.

    \b
    Example:  edgelora merge runs/quickstart/adapter-1a2b3c4d --recipe quickstart
    """
    from edgelora import artifact, doctor, models, preflight
    from edgelora.data import split
    from edgelora.merge import merge as merge_

    _calm_libraries()
    doctor.require(preflight.TRAINING)
    made_adapter = _artifact(adapter, "adapter")
    loaded = _load(recipe, (*overrides, *([f"merge.base={into}"] if into else [])), adapter.parent)
    with echo.progress() as progress, artifact.locked(adapter.parent):
        dataset = split.load(loaded)
        base = models.open_base(loaded.base, loaded.folder, adapter.parent)
        if made_adapter.made_from.get("base") != base.key:
            raise UsageError(f"{adapter.name} was trained on another base than {loaded.base}", "name the recipe it was trained with")
        made = merge_(loaded, base, made_adapter, dataset, adapter.parent, lambda share, text: progress("merge", share, text))
    echo.result({"model": str(made.path), **made.facts}, f"kept the {made.facts['kept']} merge: {made.facts['why']}", f"model: {made.path}")


@cli.command()
@click.argument("model", type=_path)
@click.option("--format", "format_", required=True, help="gguf or onnx.")
@click.option("--type", "type_", help="Type of the weights, e.g. q4_k_m or int4-mixed; default the format's own.")
@click.option("--rows", type=_path, help="Rows (question, answer) on which the file is compared with the model; default texts of our own.")
@click.option("--name", help="Name of the file; default that of the model's folder.")
@click.option("--out", type=_path, help="Folder of the result; default beside the model.")
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@_dry_option
@command
def export(
    echo: Output,
    model: Path,
    format_: str,
    type_: str | None,
    rows: Path | None,
    name: str | None,
    out: Path | None,
    threads: int | None,
    dry_run: bool,
) -> None:
    """Write a merged model (a Hugging Face folder) as GGUF or ONNX, open it in its runtime and compare.

    \b
    Example:  edgelora export runs/quickstart/model-1a2b3c4d --format gguf --type q4_k_m
    """
    from edgelora import artifact, doctor, machine, models
    from edgelora import recipe as recipes
    from edgelora.export import samples
    from edgelora.export import stage as exports
    from edgelora.runtime import runtime

    section = exports.resolve(recipes.Export(format_, type_))
    module = exports.format_module(format_)
    models.config(model)
    if dry_run:
        predicted = module.predict_bytes(model, str(section.type), name or model.absolute().name)
        echo.result({"type": section.type, "predicted_bytes": predicted}, f"{format_} {section.type}: {predicted / 1e6:.1f} MB (predicted)")
        return
    _calm_libraries()
    doctor.require(("torch", "transformers", *module.REQUIRES, *runtime(module.RUNTIME).REQUIRES))
    target = out or model.absolute().parent
    with echo.progress() as progress, artifact.locked(target):
        encoded, rows_from = samples.rows(model, rows)
        made = exports.export(
            model,
            models.open_base(str(model.absolute()), Path(), target).key,
            section,
            name=name or model.absolute().name,
            rows=encoded,
            rows_from=rows_from,
            limits=recipes.Evaluate(),
            threads=threads or machine.cores(),
            out=target,
            progress=lambda share, text: progress("export", share, text),
        )
    facts, path = made.facts, exports.exported_path(made)
    echo.result({"path": str(path), **facts}, _file_line(facts), f"file: {path}")


@cli.command(name="eval")
@click.argument("file", type=_path)
@click.argument("rows", type=_path)
@click.option("--against", type=_path, help="A second file to compare with, row by row, for instance the untuned base in the same type.")
@click.option("--most", type=click.IntRange(1), default=200, show_default=True, help="Rows read at most.")
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@command
def evaluate(echo: Output, file: Path, rows: Path, against: Path | None, most: int, threads: int | None) -> None:
    """Loss of an exported file on rows of questions and answers, with its interval.

    \b
    Example:  edgelora eval bot.gguf held-out.csv --against base.gguf
    """
    from edgelora import evaluate as ev
    from edgelora import talk
    from edgelora.data.read import read

    table = read(rows).rows[:most]
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


@cli.command()
@click.argument("file", type=_path)
@click.argument("rows", type=_path)
@click.option("-o", "--output", type=_path, required=True, help="Where to write: .jsonl, .csv or .tsv.")
@click.option(
    "--labels", help="Comma-separated labels: choose one for each row and give its probability. Default: those it was trained on."
)
@click.option("--question", help="Column of the questions (or texts).")
@click.option("--encoding", default="utf-8", show_default=True, help="Encoding of the rows' file.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@command
def predict(
    echo: Output,
    file: Path,
    rows: Path,
    output: Path,
    labels: str | None,
    question: str | None,
    encoding: str,
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
    table = read(rows, question=question, encoding=encoding, answered=False)
    chosen = [label.strip() for label in labels.split(",") if label.strip()] if labels is not None else _labels(file)
    if labels is not None and len(chosen) < 2:
        raise UsageError(f"--labels {labels!r}: a choice needs at least two labels", "for instance --labels positive,negative")
    with echo.progress() as progress, _session(file, threads) as session:
        found = list(talk.predict(session, table.rows, chosen, max_new_tokens, lambda share: progress("predict", share, rows.name)))
    talk.write(found, output)
    left = f", {len(table.dropped)} empty ones left out" if table.dropped else ""
    echo.result({"output": str(output), "rows": len(found), "dropped": len(table.dropped)}, f"wrote {output}: {len(found)} rows{left}")


@cli.command()
@click.argument("file", type=_path)
@click.option("--prompt", help="Answer this one message and end.")
@click.option("--system", help="System message; default what the file was trained with.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=300, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@command
def chat(echo: Output, file: Path, prompt: str | None, system: str | None, max_new_tokens: int, threads: int | None) -> None:
    """Talk to an exported file. An empty line or Ctrl-D ends.

    \b
    Example:  edgelora chat runs/quickstart/gguf-q4_k_m-1a2b3c4d/quickstart-q4_k_m.gguf
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


@cli.command()
@click.argument("files", type=_path, nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@click.option("--prompt-tokens", default=None, help="Prompt lengths, e.g. 32,128.")
@click.option("--repeats", type=click.IntRange(3), help="Repeats of every measurement.")
@command
def bench(echo: Output, files: tuple[Path, ...], threads: int | None, prompt_tokens: str | None, repeats: int | None) -> None:
    """Load time, time to first token, prefill and decode speed and peak memory of exported files.

    \b
    Example:  edgelora bench a.gguf b.gguf --threads 1
    """
    import dataclasses

    from edgelora import bench as benches
    from edgelora import machine
    from edgelora import recipe as recipes
    from edgelora.runtime import runtime_of

    settings = recipes.Bench()
    if prompt_tokens is not None:
        if not all(n.strip().isdigit() and int(n) > 0 for n in prompt_tokens.split(",")):
            raise UsageError(f"--prompt-tokens {prompt_tokens!r} are not counts above 0", "for instance --prompt-tokens 32,128")
        settings = dataclasses.replace(settings, prompt_tokens=tuple(int(n) for n in prompt_tokens.split(",")))
    if repeats:
        settings = dataclasses.replace(settings, repeats=repeats)
    named = [(path, runtime_of(path)) for path in files]
    with echo.progress() as progress:
        rows = benches.bench_all(named, settings, threads or machine.cores(), lambda share, text: progress("bench", share, text))
    echo.result({"machine": machine.describe(), "bench": rows}, *(_bench_line(row) for row in rows))


@cli.command()
@click.argument("runs", type=_path, nargs=-1, required=True)
@click.option("-o", "--output", type=_path, help="Folder to write into; default that of the one run, or ./comparison.")
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


@cli.command()
@click.argument("run", type=_path)
@click.option("--recipe", "recipe", type=_path, help="Take the budgets of this recipe; default those the run was made with.")
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
        limits = dict(_load(recipe, (), None).budgets if recipe else (document.get("recipe") or {}).get("budgets") or {})
    if not limits:
        raise UsageError(f"{run} was made without budgets", "name some: --budget size=130MB")
    verdicts = checks.check(document, limits)
    rows = [verdict.as_row() for verdict in verdicts]
    echo.result(rows, *(f"{'ok    ' if row['ok'] else 'BROKEN'}  {row['what']}: {row['value']} (limit {row['limit']})" for row in rows))
    if failed := checks.broken(verdicts):
        raise CheckFailed(f"{len(failed)} of {len(verdicts)} budgets broken", "shrink what grew, or raise the limit on purpose")


@cli.command()
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


def main() -> None:
    """Run the command line; every error leaves through here, with one line, a hint and its exit code."""
    state: dict[str, bool] = {}
    try:
        code = cli.main(standalone_mode=False, obj=state)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; finished stages are kept, the same command continues", err=True)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone: nothing to say, nobody to say it to
        sys.exit(1)
    except EdgeloraError as error:
        if state.get("debug"):
            raise
        click.echo(f"error: {error.message}" + (f"\n{error.hint}" if error.hint else ""), err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if state.get("debug"):
            raise
        click.echo(f"error: {type(error).__name__}: {error}\nthis is a fault of edgelora; --debug shows where", err=True)
        sys.exit(EdgeloraError.exit_code)


def _load(recipe: Path, overrides: tuple[str, ...], out_dir: Path | None) -> recipes.Recipe:
    """A recipe file, or one of the package's own by its bare name."""
    import dataclasses

    from edgelora import recipe as recipes

    loaded = recipes.load(recipes.locate(recipe), overrides)
    return dataclasses.replace(loaded, out=str(out_dir)) if out_dir else loaded


def _artifact(path: Path, kind: str) -> Artifact:
    from edgelora import artifact

    found = artifact.load(path)
    if found.kind != kind:
        raise UsageError(f"{path}: expected an artifact of kind {kind}, found {found.kind}", f"name a folder {kind}-...")
    return found


def _session(path: Path, threads: int | None) -> Any:
    from edgelora import doctor, machine
    from edgelora.runtime import runtime, runtime_of

    module = runtime_of(path)
    opened = runtime(module)
    doctor.require((*opened.REQUIRES, "jinja2"))
    return opened.open(path, threads or machine.cores())


def _labels(file: Path) -> list[str]:
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


def _plan(echo: Output, recipe: recipes.Recipe) -> None:
    from edgelora import doctor, plan, preflight

    _calm_libraries()
    doctor.require(preflight.TRAINING)
    found = plan.plan(recipe)
    echo.result(found, *plan.lines(found))


def _calm_libraries() -> None:
    """Third-party progress bars and warnings off: stdout is the result, stderr is ours."""
    import logging
    import warnings

    if click.get_current_context().find_root().ensure_object(dict).get("debug"):
        return
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch|accelerate|huggingface_hub)(\..*)?")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _training_lines(facts: Any) -> list[str]:
    from edgelora.train import estimate

    lines = [
        f"trained {facts['trained_parameters']:,} of {facts['total_parameters']:,} parameters ({facts['trained_share']:.2%}); "
        f"full fine-tuning would hold {facts['full_finetune_bytes'] / 1e9:.1f} GB of weights, gradients and optimizer",
        f"memory: {estimate.peak_bytes(facts['measured']) / 1e9:.1f} GB ({estimate.peak_bytes(facts['predicted']) / 1e9:.1f} predicted)"
        + (
            f"; time: {facts['measured']['seconds']:.0f} s ({facts['predicted']['seconds']:.0f} predicted)"
            if "seconds" in facts["measured"]
            else ""
        ),
    ]
    return lines + [f"note: {note}" for note in facts["notes"]]


def _file_line(facts: Any) -> str:
    return (
        f"{facts['file']}: {facts['size_bytes'] / 1e6:.1f} MB ({facts['predicted_bytes'] / 1e6:.1f} predicted); against the trained model: "
        f"tokens and template equal, KL {facts['kl']:.3g} nats a token, top-1 {facts['top1']:.1%}, n = {facts['tokens']} tokens"
    )


def _bench_line(row: Any) -> str:
    return (
        f"{row['file']}  {row['runtime']}, {row['threads']} threads, prompt {row['prompt_tokens']}: first token {row['ttft_ms']:.0f} ms, "
        f"prefill {row['prefill_tok_per_s']:.0f} tok/s, decode {row['decode_tok_per_s']:.1f} tok/s, peak {row['peak_rss_bytes'] / 1e6:.0f} MB"
    )


def _summary(document: Any) -> list[str]:
    lines = [*_training_lines(document["training"]), f"merge: {document['merge']['why']}"]
    lines += [_file_line(row) for row in document["files"]]
    for row in document.get("losses", []):
        lines.append(
            f"{row['file']} on {row['set']} (n = {row['rows']}): loss {row['before']['loss']:.3f} -> {row['after']['loss']:.3f}, "
            f"{row['change']:+.0%} [{row['change_low']:+.0%}, {row['change_high']:+.0%}]"
        )
    for row in document.get("accuracy", []):
        lines.append(f"{row['file']} on {row['set']} (n = {row['rows']}): accuracy {row['before']:.1%} -> {row['after']:.1%}")
    return lines + [_bench_line(row) for row in document.get("bench", [])]


if __name__ == "__main__":
    main()
