"""`modelcall init`: a project with a task that runs for free."""

import os
from pathlib import Path

import click

from modelcall_assets.cli.terminal import echo
from modelcall_assets.storage.files import write_bytes

STARTER = Path(__file__).parent.with_name("starter")
HIDDEN = {"gitignore": ".gitignore"}
"""Git would take notice of it in its place."""


@click.command()
@click.argument("folder", default=".", type=click.Path(file_okay=False, path_type=Path))
def init(folder: Path) -> None:
    """Make a project in FOLDER, by default here: models, prompts, templates, and a task that
    rates ten texts for free.

    Files that are there stay as they are; what is missing is added.

    \b
      modelcall init my_project
    """
    made = 0
    for here, _, names in os.walk(STARTER, followlinks=True):
        for name in sorted(names):
            source = Path(here, name)
            path = folder / source.relative_to(STARTER).with_name(HIDDEN.get(name, name))
            if os.path.lexists(path):
                echo(f"{path} is there already, and stays as it is")
                continue
            write_bytes(path, source.read_bytes())
            made += 1
    echo(f"{made} files made in {folder.resolve()}. Next:")
    if folder.resolve() != Path.cwd():
        echo(f"  cd {folder}")
    echo("  modelcall rehearse -- modelcall run-task rehearsal")
    echo("  modelcall create-task my_task")
    echo("  modelcall ui --rehearse")
