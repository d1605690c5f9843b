"""`modelcall plan`: what a task would ask and what that would cost, from some rows of its files."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from math import ceil

import click
import orjson

from modelcall_assets.cli.options import task_argument
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.errors import InputError
from modelcall_assets.journal.lines import Addresses
from modelcall_assets.llm.dialogue import ChatRequest
from modelcall_assets.records import decode_key, encode_key, is_data_file
from modelcall_assets.records.outcome import (
    NEVER_ASKED,
    BadLine,
    Dropped,
    Failure,
    Reason,
    Row,
    bad_line,
    count_of,
    short,
)
from modelcall_assets.stages import Stage
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.inputs import GroupedInputs
from modelcall_assets.stages.publication import CHANGED, NOT_OURS, others
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.report import by_count
from modelcall_assets.stages.scores import Scores
from modelcall_assets.stages.source import Part, Source, batches_of
from modelcall_assets.stages.standing import Retry
from modelcall_assets.stages.summary import Results
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo, stat_file
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
_SUMMED = ("rows", "cannot_be_asked", "in_journal", "to_send", "prompt_tokens")


@dataclass(frozen=True, slots=True)
class Planned:
    """What a step does about a file, and why. All but `in_journal` are estimates from some rows:
    `rows` are answers, where there are several to a row; `left_out` says why rows have none."""

    file: str
    step: str
    why: str
    rows: int = 0
    cannot_be_asked: int = 0
    in_journal: int = 0
    to_send: int = 0
    prompt_tokens: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])


@click.command("plan")
@task_argument
@click.option(
    "--answer-tokens",
    type=click.IntRange(1),
    help="Tokens of one answer; default: the model file's max_tokens.",
)
@json_option
def plan(task: Task, answer_tokens: int | None, as_json: bool) -> None:
    """Show what the next run of TASK would send, file by file, and why. Sends nothing.

    A file is new, or its input, prompt or model has changed, or it failed or was not finished.
    Prompt tokens are extrapolated from fifty rows of each file with the o200k vocabulary; what is
    in the journal has a reply already. Files that others have left where the outputs belong are
    named, and whether the next run adopts them or refuses.

    \b
      modelcall plan configs/tasks/my_task.yaml --answer-tokens 150
    """
    planner, plans, unreadable = Planner(task, answer_tokens), list[Planned](), list[str]()
    for file in planner.files:
        try:
            plans += planner.planned(file)
        except InputError as error:
            unreadable.append(str(error))
    _show(plans, as_json)
    lines = [*planner.outlook(plans, len(unreadable))]
    try:
        if in_the_way := [*_in_the_way(task)]:
            lines += [*in_the_way[:SHOWN_FILES], "all rows are counted as if there were nothing"]
    except InputError as error:
        unreadable.append(str(error))
    for line in lines:
        echo(line, err=as_json)
    for error in unreadable:
        echo(f"error: {error}", err=True)
    sys.exit(1 if unreadable else 0)


def _show(plans: Sequence[Planned], as_json: bool) -> None:
    """As a table without columns that say nothing of this task."""
    rows, steps = [asdict(each) for each in plans], {each.step for each in plans}
    files = f"{len({each.file for each in plans}):,} files"
    total = {"file": files} | {n: sum(row[n] for row in rows) for n in _SUMMED}
    if not as_json:
        names = ["file", *["step"] * (len(steps) > 1), "why", *(n for n in _SUMMED if total[n])]
        rows = [{name: row[name] for name in names} for row in rows]
    print_rows(rows, as_json=as_json, most=SHOWN_FILES, total=total)


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


class Planner:
    """Of the partitions of the first step that answers: merged groups, where they are what would be
    made now, else those of the task's input. `files` has them."""

    def __init__(self, task: Task, answer_tokens: int | None) -> None:
        self.task, self.answer_tokens = task, answer_tokens
        self.results, self.files, stages = Results(task), task.inputs.files(), task.stages
        for stage in stages:
            self.results.look(stage)
        self.first = task.first_answering or stages[-1]
        merged = next((each for each in stages if each.gathers and each is not self.first), None)
        self.merged: Stage | None = None
        if merged is None:
            return
        due = [self._due(stages[0], encode_key(file.key_path)) for file in self.files]
        due += [self.results.why_due(merged, key) for key in merged.keys.now()]
        if not any(due):
            made = {key: stat_file(merged.result(merged.need(key))) for key in merged.keys.now()}
            self.files = [replace(file, key_path=decode_key(key)) for key, file in made.items()]
            self.merged = merged

    def planned(self, file: FileInfo) -> Iterator[Planned]:
        """By step; nothing of a file that is up to date. InputError when it cannot be read."""
        key, stages = encode_key(file.key_path), self.task.stages
        self.task.layout.check_name(key)
        due = self._due(self.merged or stages[0], key)
        if due is None and self.merged is None and any(each.gathers for each in stages):
            due = self.first, "not merged yet"
        if due is None:
            return
        step, why = due
        if stages.index(step) > stages.index(self.first):  # its rows are answered
            yield self._step(step, file, why, step.source(key))[0]
            return
        source = None if self.merged is None else self.first.source(key)
        plan, rows = self._step(self.first, file, why, source)
        yield plan
        for judge in stages:
            if isinstance(judge, Scores) and judge is not self.first:
                yield self._rating(judge, plan, rows)

    def _due(self, of: Stage, key: str) -> tuple[Stage, str] | None:
        """The first stage with its keys that a run would make anew, and why."""
        stages = (stage for stage in self.task.stages if stage.keys is of.keys)
        whys = ((stage, self.results.why_due(stage, key)) for stage in stages)
        return next((each for each in whys if each[1]), None)

    def _step(
        self, step: Stage, file: FileInfo, why: str, source: Source | None
    ) -> tuple[Planned, Sequence[Row | Failure]]:
        """Of the source's rows, or the input's; and some that are asked about."""
        rows = _row_count(self.task, file) if source is None else source.rows_read
        reach = ceil(rows * min(1.0, SAMPLE_BYTES / max(1, file.size)))
        every = max(1, ceil(reach / SAMPLE_ROWS))
        sample = [*prepared_rows(self.task, file, reach, every, source)]
        scale = rows / max(1, len(sample))
        kept = [row for row in sample if not isinstance(row, Dropped)]
        out = Counter(f"are dropped by {row.rule}" for row in sample if isinstance(row, Dropped))
        asks = list[tuple[Row | Failure, Asked]]()
        if isinstance(step, AskingStage):
            asks += ((row, row if isinstance(row, Failure) else step.ask(row)) for row in kept)
        out.update(_told(each) for _, each in asks if isinstance(each, Failure))
        asked = [each for each in asks if isinstance(each[1], ChatRequest)]
        n = step.samples if isinstance(step, AskingStage) else 1
        plan = Planned(
            file.key_path,
            step.name,
            why,
            rows=round(len(kept) * scale) * n,
            cannot_be_asked=round((len(asks) - len(asked)) * scale) * n,
            in_journal=_in_journal(step, file, rows, source),
            left_out={told: round(count * scale) for told, count in out.items()},
        )
        return _sent(step, plan, [each for _, each in asked]), [row for row, _ in asked]

    def _rating(self, judge: Scores, plan: Planned, rows: Sequence[Row | Failure]) -> Planned:
        """Of answers that are not there yet, each as long as it may be."""
        asks = [judge.ask({**row, judge.input_key: "…"}) for row in rows if isinstance(row, dict)]
        answers, own = plan.rows - plan.cannot_be_asked, self._answer(self.first) or 0
        rated = Planned(plan.file, judge.name, "one for each answer, at most", answers)
        return _sent(judge, rated, asks, own)

    def _answer(self, step: Stage) -> int | None:
        """Tokens of one answer: the user's guess, or a cap."""
        params = step.params if isinstance(step, AskingStage) else {}
        most = params.get("max_tokens") or params.get("max_completion_tokens")
        return self.answer_tokens or most

    def outlook(self, plans: Sequence[Planned], unreadable: int) -> Iterator[str]:
        """What the next run does, in all."""
        whys = Counter({each.file: each.why for each in reversed(plans)}.values())
        up_to_date = Counter({"up to date": len(self.files) - whys.total() - unreadable})
        yield f"files: {by_count(whys + up_to_date)}"
        left_out = sum((Counter(each.left_out) for each in plans), Counter[str]())
        for told, rows in left_out.most_common(SHOWN_FILES):
            first, *more = dict.fromkeys(each.file for each in plans if told in each.left_out)
            of = f"{first} and {len(more):,} more" if more else first
            yield f"about {count_of(rows, 'row')} of {of} {told}"
        if (retry := Retry.killed(self.task)) is not None:
            yield f"first: what a retry of {len(retry.files):,} files that was interrupted has left"
        for step in self.task.stages:
            if isinstance(step, AskingStage):
                yield from self._cost(step, [each for each in plans if each.step == step.name])
        if not isinstance(self.first, AskingStage):
            about = self.first.about if self.first.answers else "no step of the task asks a model"
            yield f"to send: nothing; {about}"

    def _cost(self, step: AskingStage, plans: Sequence[Planned]) -> Iterator[str]:
        requests, tokens = (sum(getattr(each, name) for each in plans) for name in _SUMMED[-2:])
        yield f"to send: about {requests:,} requests, {tokens:,} prompt tokens ({step.name})"
        told = "unknown; give `prices` in the model file, and max_tokens there or --answer-tokens"
        (asked, answered), answer = step.model.token_prices[:2], self._answer(step)
        if asked is not None and answered is not None and answer is not None:
            usd = (tokens * asked + requests * answer * answered) / MILLION
            word = "about" if self.answer_tokens else "about, or less,"
            told = f"{word} {usd:,.4f} USD with {answer:,} tokens per answer"
        yield from [f"cost: {told} ({step.name})"] * bool(requests)


def _sent(step: Stage, plan: Planned, asks: Sequence[Asked], more_tokens: int = 0) -> Planned:
    """With what it sends, of so many tokens as these requests have."""
    left = plan.rows - plan.cannot_be_asked - plan.in_journal if step.asks else 0
    tokens = sum(map(_tokens, asks)) / max(1, len(asks)) + more_tokens
    return replace(plan, to_send=max(0, left), prompt_tokens=ceil(max(0, left) * tokens))


def _told(failure: Failure) -> str:
    """The same of all rows that fail for one cause."""
    detail = "" if failure.reason == Reason.BAD_LINE else f": {short(failure.detail)}"
    return f"cannot be asked: {failure.reason}{detail}"


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


def _in_journal(step: Stage, file: FileInfo, rows: int, source: Source | None) -> int:
    """Rows whose request has a reply, or the final refusal of one, in the journal. Those that
    failed in a rejected result are asked again."""
    if not isinstance(step, AskingStage):
        return 0
    key, again = encode_key(file.key_path), 0
    made, accepted = step.latest(key), step.spec.task.max_failure_rate
    if made is not None and not made.accepted and made.failed > made.rows * accepted:
        again = sum(n for reason, n in made.failures.items() if reason not in NEVER_ASKED)
    with step.layout.read_journal(str(step.journal_folder(key))) as journal:
        if not len(journal):
            return 0
        found, addresses = 0, Addresses(step.samples)
        for row in prepared_rows(step.task, file, rows, source=source):
            if isinstance(row, dict) and isinstance(asked := step.ask(row), ChatRequest):
                found += sum(addresses.next(asked.key) in journal for _ in range(step.samples))
        return max(0, found - again)


def prepared_rows(
    task: Task, file: FileInfo, rows: int, every: int = 1, source: Source | None = None
) -> Iterator[Row | Failure | Dropped]:
    """Of the first `rows` rows one in `every`, as the first stage that asks or rates gets them; or
    those of a source, as the stage that reads it does."""
    is_group, key = isinstance(task.inputs, GroupedInputs), encode_key(file.key_path)
    if source is not None:
        parts, reading = source.parts, source.reading
    elif (made := task.inputs.made(key)) is not None:
        yield from made[:rows:every]
        return
    else:
        members = task.inputs.members(key) if is_group else [file]
        parts, reading = tuple(map(Part.of, members)), task.stages[0].reading
    items = (
        (record_id(item, index, name), item)
        for name, batch in batches_of(parts, reading, rows, rows)
        for index, item in enumerate(batch.items, batch.start)
    )
    for identity, item in islice(items, 0, None, every):
        if isinstance(item, BadLine):
            yield bad_line(item)
        elif source is not None:
            yield (source.maker and source.maker.failure_of(item)) or item
        else:
            yield _prepared(task, item, file, identity)


def _prepared(task: Task, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
    for stage in task.stages:
        if stage.answers:
            break
        made = stage.preview(row, file, identity)
        if not isinstance(made, dict):
            return made
        row = made
    return row
