"""`modelcall`: the entry point."""

import io
import os
import sys

import click

from modelcall_assets.cli.agreement import agreement
from modelcall_assets.cli.check import check, migrate
from modelcall_assets.cli.compare import compare_results
from modelcall_assets.cli.create import create_task, init
from modelcall_assets.cli.export import export
from modelcall_assets.cli.failures import failures
from modelcall_assets.cli.logs import logs
from modelcall_assets.cli.monitor import monitor, tune
from modelcall_assets.cli.one_off import api_call, distillation_generate, pipeline, preprocess
from modelcall_assets.cli.pieces import join, split
from modelcall_assets.cli.plan import plan
from modelcall_assets.cli.publish import publish
from modelcall_assets.cli.rehearse import rehearse, trial
from modelcall_assets.cli.report import report
from modelcall_assets.cli.run import retry, run_task
from modelcall_assets.cli.status import status, stop, tasks
from modelcall_assets.cli.terminal import echo
from modelcall_assets.cli.ui import ui
from modelcall_assets.cli.upkeep import adopt, clean, register, verify
from modelcall_assets.errors import ModelcallError, SetupError


@click.group(
    commands=[
        *(init, create_task, ui),
        *(check, plan, trial, rehearse, run_task),
        *(tasks, status, monitor, tune, stop, logs),
        *(failures, retry, report, compare_results, agreement, export, publish),
        *(register, verify, clean),
        *(split, join, migrate, adopt),
        *(pipeline, preprocess, api_call, distillation_generate),
    ],
    context_settings={
        # Every command and option can be written with underscores too.
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(package_name="modelcall-assets")
def modelcall() -> None:
    """Score data sets with LLM calls, as Dagster graphs.

    \b
    A first task, step by step:
      modelcall init                  a project here, with a task that runs for free
      modelcall create-task NAME      a task for data that is there
      modelcall check                 every mistake in configs/, by file, field and line
      modelcall plan TASK             files, rows, tokens and cost, before paying
      modelcall try TASK              five rows: prompt, raw reply, parsed result
      modelcall rehearse -- COMMAND   run COMMAND against a free local endpoint
      modelcall run-task TASK         make what is missing or failed
      modelcall ui                    the page of all tasks, in a browser

    \b
    While it runs, and then:
      modelcall status [TASK]         how far it is, and why files failed
      modelcall monitor [TASK]        watch it: rows, cost, time left, what holds it up
      modelcall tune TASK             fewer or more requests at a time, or none for a while
      modelcall stop TASK             end what goes on, with every reply kept
      modelcall logs TASK             what its last run has told, and why it failed
      modelcall failures TASK         which rows failed, and why
      modelcall retry TASK            ask again for those
      modelcall report TASK           a page of totals, plots and records
      modelcall compare A B           two results on the same items
      modelcall export TASK           JSONL or Parquet for others
      modelcall publish TASK TO       a data set with a card, in a folder or on the Hub
      modelcall register              input files appear in the Dagster UI, to be picked
      modelcall verify TASK           whether all of it is as it was written

    A TASK is a file or a name: `modelcall tasks` lists them. bash (zsh, fish) completes after
    `eval "$(_MODELCALL_COMPLETE=bash_source modelcall)"`.
    """


def main() -> None:
    """Set-up mistakes are printed without a traceback; so is an interruption."""
    _open_standard_streams()
    try:
        sys.exit(modelcall(prog_name="modelcall", standalone_mode=False))
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)
        echo(told.getvalue().rstrip(), err=True)
        sys.exit(error.exit_code)
    except SetupError as error:
        for problem in error.problems:
            echo(f"{problem.severity}: {problem}", err=True)
        sys.exit(2)
    except ModelcallError as error:
        echo(f"error: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        echo("interrupted: every reply received is kept; run it again to go on", err=True)
        sys.exit(130)


def _open_standard_streams() -> None:
    """Those that were closed by who has started it: no other file may take their place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", errors="replace", closefd=False))
