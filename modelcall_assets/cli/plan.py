"""`modelcall plan`: what a task would ask and what that would cost, from some rows of its files."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.options import task_argument
from modelcall_assets.cli.terminal import cell, echo, echo_first, table_of
from modelcall_assets.errors import InputError
from modelcall_assets.journal.lines import Address
from modelcall_assets.llm.dialogue import ChatRequest
from modelcall_assets.records import decode_key, encode_key, is_data_file
from modelcall_assets.records.outcome import NEVER_ASKED, BadLine, Dropped, Failure, Row, bad_line
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.inputs import GroupedInputs
from modelcall_assets.stages.publication import CHANGED, NOT_OURS, others
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.report import by_count
from modelcall_assets.stages.source import Part, batches_of
from modelcall_assets.stages.standing import Retry
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.publishing import read_manifest
from modelcall_assets.storage.rows import count_rows, record_id
from modelcall_assets.transforms.texts import count_tokens

SHOWN_FILES = 40
MILLION = 1_000_000
SAMPLE_ROWS = 50
SAMPLE_BYTES = 64 << 20
"""Of a file: how far the rows of a sample lie apart."""
MESSAGE_TOKENS = 4
"""What the chat format adds to each message; an estimate."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """An input file before it is scored. All but `journalled` are estimates from some rows:
    `rows` are left after preprocessing, `failed` of them cannot be asked, `dropped` are by rule."""

    key_path: str
    rows: int
    prompt_tokens: int
    journalled: int
    failed: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])


@click.command("plan")
@task_argument
@click.option(
    "--answer-tokens",
    type=click.IntRange(1),
    help="Tokens of one answer; default: the model file's max_tokens.",
)
def plan(task: Task, answer_tokens: int | None) -> None:
    """Show the files of TASK, their rows, estimated tokens and cost. Sends nothing.

    Prompt tokens are extrapolated from fifty rows of each file with the o200k vocabulary;
    the journal column counts records that have a reply already. Files that others have left where
    the outputs belong are named, and whether the next run adopts them or refuses.

    \b
      modelcall plan configs/tasks/my_task.yaml --answer-tokens 150
    """
    plans, unreadable, in_the_way = list[FilePlan](), list[InputError](), list[str]()
    for file in task.inputs.files():
        try:
            plans.append(_plan_file(task, file))
        except InputError as error:
            unreadable.append(error)
    _show(task, plans, answer_tokens)
    try:
        in_the_way = [*_in_the_way(task)]
    except InputError as error:
        unreadable.append(error)
    echo_first(SHOWN_FILES, in_the_way)
    if in_the_way:
        echo("the numbers above count the rows of these files as if there were nothing")
    for error in unreadable:
        echo(f"error: {error}", err=True)
    sys.exit(1 if unreadable else 0)


def _in_the_way(task: Task) -> Iterator[str]:
    """What others have left where the outputs belong, and what the next run does about it."""
    for stage in (each for each in task.stages if each.suffix):
        for key in stage.keys.now():
            if (found := others(stage, key)) is None:
                continue
            does, ways = "adopted", ""
            if not found.adopts:
                does, ways = "refused", f"; see `modelcall adopt {task.spec.file_name}`"
            when, whose = ("", NOT_OURS) if found.is_new else (" when it is made anew", CHANGED)
            files = ", ".join(map(str, dict.fromkeys((*found.places, *found.answers))))
            yield f"{does}{when}: {stage.name} of {decode_key(key)}: {files} {whose}{ways}"


def _show(task: Task, plans: list[FilePlan], answer_tokens: int | None) -> None:
    """The table has numbers that only a task with a model has, and looks into the journal where
    its partitions are the files."""
    numbers, asking = {"rows": "rows"}, task.first_answering
    if isinstance(asking, AskingStage):
        numbers["prompt_tokens"] = "prompt tokens"
        if _looks_up(task, asking):
            numbers["journalled"] = "in journal"
    rows = [(each.key_path, *(f"{getattr(each, n):,}" for n in numbers)) for each in plans]
    sums = (f"{sum(getattr(each, name) for each in plans):,}" for name in numbers)
    columns = {"file": "fold", **dict.fromkeys(numbers.values(), "right")}
    console = Console()
    console.print(table_of(columns, rows, SHOWN_FILES, (f"{len(plans)} files", *sums)))
    for line in _outlook(task, plans, answer_tokens):
        console.print(cell(line))


def _outlook(task: Task, plans: list[FilePlan], answer_tokens: int | None) -> Iterator[str]:
    """What some rows of each file tell of the others, and what it would cost."""
    rules, failed = Counter[str](), sum(each.failed for each in plans)
    for each in plans:
        rules.update(each.dropped)
    if rules:
        yield f"dropped: about {rules.total():,} rows before that: {by_count(rules)}"
    if failed:
        yield f"failed: about {failed:,} rows cannot be asked; `modelcall try` shows why"
    asking = task.first_answering
    if asking is None:
        yield "to send: nothing; no step of the task asks a model"
    elif not isinstance(asking, AskingStage):
        yield f"to send: nothing; {asking.about}"
    else:
        yield from _estimate(asking, plans, answer_tokens)
        if (retry := Retry.killed(task)) is not None:
            yield f"and what a retry of {len(retry.files):,} files that was interrupted has left"
        if not _looks_up(task, asking):
            is_merged = asking.keys is not task.stages[0].keys
            yield "before merging, and " * is_merged + "without what the journal answers"
        for stage in (each for each in task.stages if each.asks and each is not asking):
            yield f"the requests of {stage.name} are not counted"


def _estimate(
    asking: AskingStage, plans: list[FilePlan], answer_tokens: int | None
) -> Iterator[str]:
    """Cost of what the journal does not hold; the answers' length is the user's guess or a cap."""
    to_send = sum(max(0, each.rows - each.failed - each.journalled) for each in plans)
    askable = sum(each.rows - each.failed for each in plans)
    share = to_send / askable if askable > 0 else 0.0
    prompt = round(sum(each.prompt_tokens for each in plans) * share)
    params, prices = asking.params, asking.model.token_prices
    answer = answer_tokens or params.get("max_tokens") or params.get("max_completion_tokens")
    yield f"to send: about {to_send:,} requests, {prompt:,} prompt tokens"
    if None in prices[:2]:
        yield "cost: unknown; give `prices` in the model file"
    elif answer is None:
        yield "cost: unknown; give --answer-tokens, or max_tokens in the model file"
    else:
        usd = prompt * (prices[0] or 0) / MILLION + to_send * answer * (prices[1] or 0) / MILLION
        word = "about" if answer_tokens else "about, or less,"
        yield f"cost: {word} {usd:,.4f} USD with {answer:,} tokens per answer"


def _plan_file(task: Task, file: FileInfo) -> FilePlan:
    """Rows are counted (from the `raw` manifest when it is current), tokens extrapolated from some
    rows; with a journal, every row's request is looked up in it."""
    task.layout.check_name(encode_key(file.key_path))
    in_rows = _row_count(task, file)
    reach = ceil(in_rows * min(1.0, SAMPLE_BYTES / max(1, file.size)))
    sample = list(prepared_rows(task, file, reach, max(1, ceil(reach / SAMPLE_ROWS))))
    kept = [row for row in sample if not isinstance(row, Dropped)]
    scale = in_rows / len(sample) if sample else 0.0
    rules = Counter(row.rule for row in sample if isinstance(row, Dropped))
    dropped = {rule: round(count * scale) for rule, count in rules.items()}
    rows = round(len(kept) * scale)
    asking = task.first_answering
    if not isinstance(asking, AskingStage):
        return FilePlan(file.key_path, rows, 0, 0, dropped=dropped)
    asks = [row if isinstance(row, Failure) else asking.ask(row) for row in kept]
    tokens = ceil(sum(map(_tokens, asks)) * rows / len(kept)) if kept else 0
    failed = round(sum(isinstance(asked, Failure) for asked in asks) * scale)
    n = asking.samples
    journalled = _journalled(task, asking, file, in_rows) if _looks_up(task, asking) else 0
    return FilePlan(file.key_path, rows * n, tokens * n, journalled, failed * n, dropped)


def _looks_up(task: Task, asking: AskingStage) -> bool:
    """Whether the journal can be asked: it has the input's partitions, and a request to a row."""
    return asking.keys is task.stages[0].keys and asking.samples == 1


def _tokens(asked: Asked) -> int:
    contents = () if isinstance(asked, Failure) else (m.get("content") for m in asked.messages)
    texts = (each if isinstance(each, str) else orjson.dumps(each).decode() for each in contents)
    return sum(count_tokens(text) + MESSAGE_TOKENS for text in texts)


def _row_count(task: Task, file: FileInfo) -> int:
    """Of a partition's files together; what is no data file is one row."""
    first, key = task.stages[0], encode_key(file.key_path)
    manifest = None if first.suffix else read_manifest(first.manifest_path(key))
    if manifest is not None and manifest.input.version == file.version:
        return manifest.rows
    if (made := task.inputs.made(key)) is not None:
        return min(len(made), task.row_limit or len(made))
    places = [each.place for each in task.inputs.members(key)]
    rows = sum(count_rows(p, first.reading) if is_data_file(p.name) else 1 for p in places)
    return rows if task.row_limit is None else min(rows, task.row_limit)


def _journalled(task: Task, asking: AskingStage, file: FileInfo, rows: int) -> int:
    """Rows whose request has a reply, or the final refusal of one, in the journal. Those that
    failed in a rejected result are asked again."""
    key, again = encode_key(file.key_path), 0
    made, accepted = asking.latest(key), asking.spec.task.max_failure_rate
    if made is not None and not made.accepted and made.failed > made.rows * accepted:
        again = sum(n for reason, n in made.failures.items() if reason not in NEVER_ASKED)
    folder = asking.journal_folder(key)
    with task.layout.read_journal(str(folder)) as journal:
        if not len(journal):
            return 0
        found = (row for row in prepared_rows(task, file, rows) if isinstance(row, dict))
        keys = Counter(each.key for each in map(asking.ask, found) if isinstance(each, ChatRequest))
        addresses = (Address(key, number) for key in keys for number in range(keys[key]))
        return max(0, sum(address in journal for address in addresses) - again)


def prepared_rows(
    task: Task, file: FileInfo, rows: int, every: int = 1
) -> Iterator[Row | Failure | Dropped]:
    """Of the first `rows` rows one in `every`, as the first stage that asks or rates gets them."""
    is_group, key = isinstance(task.inputs, GroupedInputs), encode_key(file.key_path)
    if (made := task.inputs.made(key)) is not None:
        yield from made[:rows:every]
        return
    parts = map(Part.of, task.inputs.members(key) if is_group else [file])
    items = (
        (record_id(item, index, name), item)
        for name, batch in batches_of(parts, task.stages[0].reading, rows, rows)
        for index, item in enumerate(batch.items, batch.start)
    )
    for identity, item in islice(items, 0, None, every):
        yield bad_line(item) if isinstance(item, BadLine) else _prepared(task, item, file, identity)


def _prepared(task: Task, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
    for stage in task.stages:
        if stage.answers:
            break
        made = stage.preview(row, file, identity)
        if not isinstance(made, dict):
            return made
        row = made
    return row
