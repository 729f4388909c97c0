"""The command line: parse, one call, echo. Heavy imports live inside the commands, so that `--help` stays instant."""

from __future__ import annotations

import sys

import click

from edgelora import __version__, processes
from edgelora.cli import bench, data, estimate, export, judge, make, size, use
from edgelora.errors import EdgeloraError

_INTERRUPTED = 130  # what a shell expects after Ctrl-C


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgelora")
def cli() -> None:
    """From your own data to a fine-tuned model that runs on a phone, a browser or a small CPU.

    \b
    Start here:
      edgelora run quickstart          the whole line, on an embedded model
      edgelora init faq.csv            a recipe for your own data
    """


for _command in (
    *(data.data, make.init, estimate.estimate, make.run, make.finetune, make.merge, export.export),
    *(use.evaluate, use.predict, use.chat, bench.bench),
    *(size.size, judge.report, judge.check, judge.baseline, judge.doctor),
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; every error leaves through here, with one line, a hint and its exit code."""
    state: dict[str, bool] = {}
    try:
        code = cli.main(standalone_mode=False, obj=state)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        if processes.index() == 0:
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if processes.count() == 1:  # else the launcher says it
            click.echo("interrupted; finished stages are kept, the same command continues", err=True)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone: nothing to say, nobody to say it to
        sys.exit(1)
    except EdgeloraError as error:
        if state.get("debug"):
            raise
        processes.before_complaining(foreseen=True)
        click.echo(f"error: {error.message}" + (f"\n{error.hint}" if error.hint else ""), err=True)
        processes.leave(error.exit_code)
    except Exception as error:
        if state.get("debug"):
            raise
        processes.before_complaining(foreseen=False)
        click.echo(f"error: {type(error).__name__}: {error}\nthis is a fault of edgelora; --debug shows where", err=True)
        processes.leave(EdgeloraError.exit_code)
