"""The card of a data set: what the Hub and `datasets` read, and what people do."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from modelcall_assets.records.outcome import Row
from modelcall_assets.records.secrets import Remover, is_unusual, names_secret
from modelcall_assets.stages import Stage
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.dataset import MARK, Dataset, Shards
from modelcall_assets.stages.inputs import digest_of_versions
from modelcall_assets.stages.report import counted
from modelcall_assets.stages.score_table import API_ABOUT
from modelcall_assets.stages.summary import Summary, told
from modelcall_assets.storage.values import readable_schema
from modelcall_assets.transforms.transcript import markdown, markdown_table

SHOWN_INPUTS = 50
_ANSWERS = {
    "messages": "the conversation as it came",
    "final_messages": "what was asked, and the answer",
    "response": "the answer",
    "reasoning": "what the model thought before it",
    "sample": "which of several answers to the same",
    "finish_reason": "why the model stopped",
    "usage": "tokens, as the endpoint counted",
}
"""What columns of answers are."""
_POWERS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


@dataclass(frozen=True)
class Told:
    """What the user says of a data set: its `name` for who loads it, its license, and the options
    of the command that makes it."""

    name: str
    license: str | None
    command: Sequence[str]


def card(dataset: Dataset, made: Shards, said: Told) -> str:
    """Without keys and without paths of this machine."""
    stage = dataset.files[0].stage
    spec = stage.spec
    front = yaml.safe_dump(
        _front_matter(made, spec.name, said), sort_keys=False, allow_unicode=True
    )
    text = "\n\n".join((f"---\n{front}---\n{MARK}", *_sections(dataset, made, said))) + "\n"
    named = (value for name, value in spec.env.items() if names_secret(name, of_anyone=True))
    return Remover(filter(is_unusual, named)).text(text)


def size_category(rows: int) -> str:
    """As the Hub has them: `n<1K`, `1K<n<10K` and so on."""
    at = len(str(rows)) - 4
    if at < 0:
        return "n<1K"
    return f"{_POWERS[at]}<n<{_POWERS[at + 1]}" if at + 1 < len(_POWERS) else "n>1T"


def _front_matter(made: Shards, name: str, said: Told) -> dict[str, Any]:
    """`datasets` compares the rows of each split with what it says."""
    splits = [
        {
            "name": split,
            "num_bytes": sum(shard.size for shard in shards),
            "num_examples": sum(shard.rows for shard in shards),
        }
        for split, shards in made.splits.items()
    ]
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in made.splits]
    return {
        **({"license": said.license} if said.license else {}),
        "pretty_name": name,
        "size_categories": [size_category(made.rows)],
        "tags": ["modelcall"],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"splits": splits},
    }


def _sections(dataset: Dataset, made: Shards, said: Told) -> Iterator[str]:
    stage = dataset.files[0].stage
    yield f"# {stage.spec.name}"
    if about := stage.spec.task.description.strip():
        yield about
    yield f"{made.rows:,} rows of the asset `{stage.name}`: {stage.about}."
    code = f'from datasets import load_dataset\n\ndata = load_dataset("{said.name}")'
    yield f"```python\n{code}\n```"
    yield f"License: {said.license or 'not stated'}."
    yield "## Rows"
    yield markdown_table(
        [
            {"split": split, "rows": sum(shard.rows for shard in shards), "files": len(shards)}
            for split, shards in made.splits.items()
        ]
    )
    if left := _left_out(dataset, made):
        yield "Left out:"
        yield markdown_table(counted("why", left))
    for name, spread in made.scores.items():
        if spread.rows:
            yield f"## `{name}`"
            yield markdown_table(spread.bars(name))
    yield "## Columns"
    yield markdown_table(
        [
            {"column": name, "type": kind, "what it is": _about(name, made.schema)}
            for name, kind in readable_schema(made.schema)
        ]
    )
    yield from _origin(stage)
    yield f"## Made by\n\n```console\n{shlex.join(said.command)}\n```"


def _about(name: str, schema: pa.Schema) -> str:
    """Of a column of ours, also one of an earlier stage."""
    known = API_ABOUT | (_ANSWERS if "final_messages" in schema.names else {})
    return known.get(name.removeprefix("input_"), "")


def _left_out(dataset: Dataset, made: Shards) -> Mapping[str, int]:
    """Rows by why they are not in it."""
    left, manifests = Counter[str](), [file.manifest for file in dataset.files]
    for manifest in manifests:
        left.update({f"failed: {reason}": rows for reason, rows in manifest.failures.items()})
    left["dropped before"] = sum(manifest.dropped for manifest in manifests)
    left["not selected"] = sum(manifest.ok for manifest in manifests) - made.rows
    return {why: rows for why, rows in left.items() if rows}


def _origin(stage: Stage) -> Iterator[str]:
    """What the rows were made from and by, and what that took."""
    overview = next(each for each in stage.task.overviews if isinstance(each, Summary))
    summed, results = overview.summed()
    yield "## How it was made"
    yield markdown_table(summed.tables["stages"])
    for each in stage.task.stages:
        if by := told(each.provenance):
            yield f"`{each.name}`: {by}"
        if isinstance(each, AskingStage):
            for name, given in each.definition.items():
                if name != "limits":
                    yield f"### {each.name}: {name}"
                    yield markdown({key: of for key, of in given.items() if key != "file"})
    yield "## Where it is from"
    yield from _inputs([row for row in results if row["stage"] == stage.task.stages[0].name])


def _inputs(results: Sequence[Row]) -> Iterator[str]:
    inputs = {row["partition"]: row["made_of"] for row in results if row["accepted"]}
    rows = [{"input": name, "content": digest} for name, digest in sorted(inputs.items())]
    yield f"{len(rows):,} inputs, together `{digest_of_versions(inputs)}`."
    if rows:
        yield markdown_table(rows[:SHOWN_INPUTS])
    if len(rows) > SHOWN_INPUTS:
        yield f"… {len(rows) - SHOWN_INPUTS:,} more"
