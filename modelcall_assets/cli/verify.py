"""`modelcall verify`: whether what a task has published is as it was written."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from modelcall_assets.cli.display import echo
from modelcall_assets.cli.task_argument import load, task_argument
from modelcall_assets.stages.verify import Verification

SHOWN = 200


@click.command()
@task_argument
def verify(task: Path) -> None:
    """Check all that TASK.yaml has published, on disk or in a store; nothing is changed.

    Outputs are compared with the digests in their manifests, each line of the journals with its
    checksum. What a crash has left, and what belongs to inputs that are gone or were renamed, is
    named too. Each finding says what to do; with any, the exit code is 1. All bytes are read.

    \b
      modelcall verify configs/tasks/my_task.yaml
    """
    loaded = load(task)
    verification = Verification(loaded)
    findings = list(verification.findings())
    table = Table()
    table.add_column("asset")
    for name in ("outputs", "rows", "journal lines", "findings"):
        table.add_column(name, justify="right")
    for stage in loaded.stages:
        name = stage.name
        found = sum(finding.stage == name for finding in findings)
        lines = f"{verification.journal_lines[name]:,}" if stage.answers else ""
        counts = (verification.outputs[name], verification.rows[name])
        table.add_row(name, *(f"{count:,}" for count in counts), lines, f"{found:,}")
    Console().print(table)
    for finding in findings[:SHOWN]:
        stage = f"{finding.stage}: " if finding.stage else ""
        echo(f"{stage}{finding.name}: {finding.wrong}; {finding.fix}")
    if len(findings) > SHOWN:
        echo(f"… {len(findings) - SHOWN:,} more")
    count = f"{len(findings):,} finding{'s' if len(findings) > 1 else ''}"
    echo(f"{loaded.spec.name}: {count}" if findings else "all is sound")
    sys.exit(1 if findings else 0)
