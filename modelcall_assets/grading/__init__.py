"""What rates an answer without a model: one file per grader."""

from modelcall_assets.grading.code import Code

GRADERS: dict[str, type] = {"code": Code}
"""By their names in a task file."""
