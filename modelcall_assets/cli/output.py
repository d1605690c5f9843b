"""Files that commands write where the user says."""

from __future__ import annotations

from collections.abc import Iterable

import click

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.storage.listing import exists
from modelcall_assets.storage.places import Place

force_option = click.option("--force", is_flag=True, help="Replace files that are there.")


def refuse_existing(command: str, places: Iterable[Place]) -> None:
    """SetupError when one of them is there: it may be anybody's."""
    if (taken := next(filter(exists, places), None)) is not None:
        fix = "choose another place, or add --force to replace what is there"
        wrong = f"{taken} is there already"
        raise SetupError([Problem(f"modelcall {command}", "--output", wrong, fix=fix)])
