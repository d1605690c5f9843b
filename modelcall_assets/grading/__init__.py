"""Graders: scorers that compare a response with the reference of its item, one file each."""

from modelcall_assets.transforms.user_code import Scorer

GRADERS: dict[str, type[Scorer]] = {}
"""By their names in a task file."""
