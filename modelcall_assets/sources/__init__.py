"""Sources: benchmarks and training sets as conversations, one file each. Without Dagster:

GSM8K("main", "test", folder="demo/benchmarks")[0]
"""

from pathlib import Path

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.sources.arc import ARC
from modelcall_assets.sources.base import Conversation, Source, render_mc
from modelcall_assets.sources.customjson import CustomJSON
from modelcall_assets.sources.environment import EnvironmentTasks
from modelcall_assets.sources.few_shot import FewShot
from modelcall_assets.sources.gsm8k import GSM8K
from modelcall_assets.sources.humaneval import HumanEval
from modelcall_assets.sources.mixture import Mixture, Sequence
from modelcall_assets.sources.mmlu import MMLU
from modelcall_assets.sources.smoltalk import SmolTalk
from modelcall_assets.sources.spelling import SimpleSpelling, SpellingBee
from modelcall_assets.sources.tasks import Dummies, Task, TaskDataset, TaskFile
from modelcall_assets.transforms.user_code import load_object

__all__ = [
    "ARC",
    "GSM8K",
    "MMLU",
    "SOURCES",
    "Conversation",
    "CustomJSON",
    "Dummies",
    "EnvironmentTasks",
    "FewShot",
    "HumanEval",
    "Mixture",
    "Sequence",
    "SimpleSpelling",
    "SmolTalk",
    "Source",
    "SpellingBee",
    "Task",
    "TaskDataset",
    "TaskFile",
    "find_source",
    "render_mc",
]

SOURCES: dict[str, type[Source]] = {
    "ARC": ARC,
    "MMLU": MMLU,
    "GSM8K": GSM8K,
    "HumanEval": HumanEval,
    "SmolTalk": SmolTalk,
    "CustomJSON": CustomJSON,
    "SpellingBee": SpellingBee,
    "SimpleSpelling": SimpleSpelling,
    "TaskFile": TaskFile,
    "TaskDataset": TaskDataset,
    "Dummies": Dummies,
    "EnvironmentTasks": EnvironmentTasks,
    "Mixture": Mixture,
    "Sequence": Sequence,
}
"""By their names in a task file."""


def find_source(name: str, root: Path, file: str, field: str) -> type[Source]:
    """The class: one of ours by its name, else the user's at `module:name`. SetupError names the
    `file` and its `field`."""
    if name in SOURCES:
        return SOURCES[name]
    expected = f"one of {', '.join(SOURCES)}, or module:name"
    if ":" in name:
        found = load_object(name, root, "__getitem__(index) -> conversation", file, field)
        if isinstance(found, type) and issubclass(found, Source):
            return found
        expected = f"a class derived from {Source.__module__}:{Source.__name__}"
    raise SetupError([Problem(file, field, f"no source {name!r}", expected)])
