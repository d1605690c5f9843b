"""chatml: the rows of a split as `{messages, format[, raw_data]}` JSON lines, order kept.

A row that cannot be converted stays in its place, with an `error` and no messages.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any

from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.places import shown_place
from modelcall_assets.config.steps import ChatmlStep
from modelcall_assets.errors import InputError, Problem, did_you_mean
from modelcall_assets.records import encode_key
from modelcall_assets.records.outcome import BadLine, Dropped, Failure, Reason, Row, bad_line
from modelcall_assets.stages import Stage
from modelcall_assets.stages.inputs import SplitInputs, version_of
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import Distribution, Report, Tally
from modelcall_assets.stages.source import changed, column_names, first_rows
from modelcall_assets.storage.datasets import Split, dataset_path, find_splits
from modelcall_assets.storage.files import NewFile, write_lines
from modelcall_assets.storage.formats import OURS, Reading
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.rows import STREAM_BYTES, read_batches
from modelcall_assets.storage.values import loads
from modelcall_assets.transforms import encode
from modelcall_assets.transforms.chatml import ChatmlOptions, failed_row, to_chatml

UNWRITABLE = (TypeError, RecursionError)
"""What `encode` raises for a row that JSON cannot hold."""


class Conversations(Stage):
    name = "chatml"
    suffix = ".jsonl"
    error_column = "error"

    def failure_of(self, row: Row | BadLine) -> Failure | None:
        match None if isinstance(row, BadLine) else row.get("error"):
            case {"reason": str(reason), "detail": str(detail)} if reason in set(Reason):
                return Failure(Reason(reason), detail)
            case _:
                return None


class Chatml(Conversations):
    about = "conversations of a split"
    done = "converted"

    @property
    def step(self) -> ChatmlStep:
        assert isinstance(self.spec.task, DistillationTask)
        assert self.spec.task.chatml_conversion is not None
        return self.spec.task.chatml_conversion

    @cached_property
    def splits(self) -> SplitInputs:
        return SplitInputs(self.task, self.step.add_system_prompt)

    def options(self, dataset: str) -> ChatmlOptions:
        step, config = self.step, self.spec.datasets[dataset]
        return ChatmlOptions(
            format_style=config.format_style,
            column_mapping=config.column_mapping,
            keep_raw_data=step.keep_raw_data,
            system_prompt=step.system_prompt if step.add_system_prompt else None,
            other_roles=step.other_roles,
            validation=step.validation,
        )

    def own_shape(self) -> dict[str, Any]:
        options = {name: asdict(self.options(name)) for name in self.spec.datasets}
        return {"chatml": options, "limit": self.task.row_limit}

    def preview(self, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
        return to_chatml(row, self.options(self.splits.place(encode_key(file.key_path)).dataset))

    def make(self, key: str, tally: Tally) -> Report:
        """InputChanged when the split is not what raw recorded."""
        raw, place, limit = self.before.need(key), self.splits.place(key), self.task.row_limit
        convert = partial(convert_split, self.splits.members(key), self.options(place.dataset))
        with Draft(self, key) as draft:
            report = draft.written(partial(convert, limit=limit, reading=self.before.reading))
            if version_of(self.splits.members(key)) != raw.input.version:
                raise changed(place.path)
            draft.publish(report, raw.input)
        return report

    def lacks(self) -> Iterator[Problem]:
        """Data sets that are not there, or whose first rows are not what the dataset config
        says."""
        found: dict[str, list[Split]] = {}
        for name, dataset in self.spec.datasets.items():
            path = dataset_path(self.layout.input_folder, name)
            try:
                found[name] = find_splits(path, dataset.configs)
                yield from self._unfit(name, found[name])
            except InputError as error:
                yield self.task.warning(f"{name}: {error}")
        if len(found) < len(self.spec.datasets):
            splits = sum(map(len, found.values()))
            wrong = f"{len(found)} of {len(self.spec.datasets)} data sets can be read: "
            fix = "bring the others, or name those that are there in selected_datasets"
            yield self.task.warning(f"{wrong}{splits} splits", fix=fix)

    def _unfit(self, name: str, splits: Sequence[Split]) -> Iterator[Problem]:
        """Of the first split: columns that no row has, else rows of which none can be
        converted."""
        dataset, file = self.spec.datasets[name], splits[0].files[0]
        rows = first_rows(file.place, self.before.reading)
        columns = column_names(rows)
        file_name = self.spec.files["datasets"]
        shown = f"the first {len(rows)} rows of {shown_place(file.uri, self.spec.root)}"
        shown += f" ({len(splits)} splits)" if len(splits) > 1 else ""
        mapping = dataset.column_mapping.items()
        absent = [(key, column) for key, column in mapping if column not in columns]
        for key, column in absent if rows else ():
            wrong, have = f"no column {column} in {shown}", f"the columns {', '.join(columns)}"
            place, fix = f"{name}.column_mapping.{key}", did_you_mean(column, columns)
            yield Problem(file_name, place, wrong, have=have, fix=fix, severity="warning")
        options = ChatmlOptions(dataset.format_style, dataset.column_mapping)
        results = [] if absent else [to_chatml(row, options) for row in rows]
        if results and not any(isinstance(result, dict) for result in results):
            first = results[0]
            why = first.detail if isinstance(first, Failure) else "what it needs is empty"
            wrong = f"none of {shown} is a conversation of this style: {why}"
            yield Problem(file_name, f"{name}.format_style", wrong, severity="warning")


def convert_split(
    files: Sequence[FileInfo],
    options: ChatmlOptions,
    out: NewFile,
    *,
    limit: int | None = None,
    reading: Reading = OURS,
) -> Report:
    """Write the first `limit` rows of `files`, one after another. InputError when a file cannot be
    read, or has a bad line and `reading` refuses those."""
    conversion = _Conversion(options)
    write_lines(out, conversion.lines(files, reading, limit))
    report = conversion.report
    report.rows = report.rows_in - report.dropped.total()
    report.data_version = out.digest
    report.histograms["messages"] = Distribution(conversion.turns)
    if report.rows_in and not report.rows:
        fix = "compare column_mapping with the columns of the file"
        report.emptied = report.all_dropped(fix)
    return report


@dataclass
class _Conversion:
    """Converts rows and counts what became of them."""

    options: ChatmlOptions
    report: Report = field(default_factory=Report)
    turns: Counter[int] = field(default_factory=Counter[int])
    """Messages of a good row → rows."""

    def lines(
        self, files: Sequence[FileInfo], reading: Reading, limit: int | None
    ) -> Iterator[bytes]:
        """The output, a line for each row that is not dropped. Most conversations are texts, and
        the row is copied as it is: so numbers are read as doubles."""
        report = self.report
        for file in files:
            first = report.rows_in
            left = None if limit is None else limit - report.rows_in
            batches = read_batches(file.place, reading, limit=left, size=STREAM_BYTES)
            for item, text in chain.from_iterable(batch.with_lines() for batch in batches):
                report.rows_in += 1
                line = self._line(item, text)
                if isinstance(line, bytes):
                    yield line
                elif isinstance(line, Dropped):
                    report.dropped[line.rule] += 1
                else:
                    report.fail(report.rows_in - first, file.key_path, line.reason, line.detail)
                    yield self._failed(line, item, text)

    def _line(self, item: Row | BadLine, text: bytes | None) -> bytes | Dropped | Failure:
        if isinstance(item, BadLine):
            return bad_line(item)
        row = to_chatml(item, self.options, text)
        if text is not None and isinstance(row, dict) and _may_hold_numbers(row):
            row = to_chatml(loads(text), self.options, text)
        if not isinstance(row, dict):
            return row
        try:
            line = encode(row)
        except UNWRITABLE as error:
            return Failure(Reason.CHATML_ERROR, f"cannot be written as JSON: {error}")
        self.turns[len(row["messages"])] += 1
        if self.report.shows_more:
            self.report.show(loads(line))
        return line

    def _failed(self, failure: Failure, item: Row | BadLine, text: bytes | None) -> bytes:
        if self.options.keep_raw_data and not isinstance(item, BadLine):
            try:
                return encode(failed_row(failure, item, text))
            except UNWRITABLE:
                pass
        return encode(failed_row(failure))


def _may_hold_numbers(row: Row) -> bool:
    """Whether it took more of its input than texts."""
    for turn in row["messages"]:
        if len(turn) > 2 or type(turn.get("content")) is not str:
            return True
    return "tools" in row
