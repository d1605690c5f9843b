"""`scores`: the model's rating of every record of a file, failures in their place."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from modelcall_assets.config.catalog import TaskSpec
from modelcall_assets.journal.journal import Journal
from modelcall_assets.llm.answer import PARSER_VERSION, AnswerParser
from modelcall_assets.llm.dialogue import Rules, Turn
from modelcall_assets.llm.engine import Engine
from modelcall_assets.llm.request import ChatRequest
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.calls import Asked, Caller, Ledger
from modelcall_assets.steps.preprocess import ERROR_COLUMN
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.score_table import (
    VOLATILE_COLUMNS,
    ApiRow,
    ScoreTable,
    answered_row,
    unanswered_row,
)
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.rows import read_chunks, record_id, sample_row
from modelcall_assets.transforms.template import MissingColumn, Template

SAMPLE_ROWS = 5


@dataclass(frozen=True)
class ScoreStage:
    """Everything of a task that shapes its scores."""

    prompt: Template
    system: str | None
    params: dict[str, Any]
    revision: str | None
    input_key: str
    prompt_key: str
    rules: Rules
    fields: dict[str, dict[str, Any]]
    provenance: dict[str, str]
    prices: tuple[float | None, float | None]

    @classmethod
    def of(cls, spec: TaskSpec) -> ScoreStage:
        prompt, model, task = spec.prompt, spec.model, spec.task
        schema = prompt.answer_schema() if prompt.output_config.require_json else None
        params = model.request_params()
        if schema is not None and model.supports_json_schema:
            json_schema = {"name": "answer", "schema": schema}
            params["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        template = prompt.prompt_template
        repairs = task.retry.max_repair_turns if task.retry.enable_format_validation_retry else 0
        parser = AnswerParser(
            keys=list(prompt.fields) if schema is not None else [],
            required=frozenset(schema.get("required", ())) if schema is not None else frozenset(),
            schema=schema,
            defaults=prompt.optional_defaults,
        )
        return cls(
            prompt=Template.compile(template.prompt_text),
            system=template.system_text,
            params=params,
            revision=model.revision,
            input_key=task.data.input_key,
            prompt_key=task.data.prompt_format_key or task.data.input_key,
            rules=Rules(parser, repairs),
            fields=dict(prompt.fields) if schema is not None else {},
            provenance={"api_model": str(params["model"]), "api_prompt": prompt.version},
            prices=(
                model.prices.usd_per_million_input_tokens,
                model.prices.usd_per_million_output_tokens,
            ),
        )

    def version(self) -> str:
        """Digest of what shapes the rows: not prices, limits, endpoints or keys."""
        shape = {
            "parser": PARSER_VERSION,
            "prompt": self.prompt.parts,
            "system": self.system,
            "params": self.params,
            "revision": self.revision,
            "columns": [self.input_key, self.prompt_key],
            "repairs": self.rules.max_repair_turns,
            "schema": self.rules.parser.schema,
            "keys": list(self.rules.parser.keys),
            "defaults": dict(self.rules.parser.defaults),
            "prompt_version": self.provenance["api_prompt"],
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    def ask(self, row: Row) -> Asked:
        """The request of one row, or the Failure that says why it has none."""
        if error := row.get(ERROR_COLUMN):
            carried = json.loads(error)
            return Failure(Reason(carried["reason"]), carried["detail"])
        value = row.get(self.input_key)
        if value is None or value == "":
            what = "empty" if value == "" else "null" if self.input_key in row else "absent"
            return Failure(Reason.MISSING_INPUT, f"input column '{self.input_key}' is {what}")
        values = {**row, self.prompt_key: value}
        try:
            messages = [{"role": "user", "content": self.prompt.render(values)}]
        except MissingColumn as error:
            return Failure(Reason.MISSING_INPUT, str(error))
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return ChatRequest(self.params, tuple(messages), self.revision)

    def table(self, source: Source) -> ScoreTable:
        return ScoreTable(source.schema, self.fields, internal=(ERROR_COLUMN,))

    def asks(self, source: Source) -> Iterator[Asked]:
        """One per row of the source, in order."""
        for chunk in read_chunks(source.uri, source.schema, source.limit):
            for item in chunk.items:
                yield bad_line(item) if isinstance(item, BadLine) else self.ask(item)


async def score_file(
    stage: ScoreStage, source: Source, output: Path, journal: Journal, engine: Engine, tally: Tally
) -> ScoreReport:
    """Call what the journal does not answer, then publish all rows in input order.

    Raises RunStopped when the run is over, InputError when the source cannot be read to its end and
    InputChanged when it is no longer what its upstream asset recorded; nothing is published then
    and the journal keeps every reply.
    """
    caller = Caller(stage.rules, engine, journal, tally, stage.prices)
    ledger = await caller.run(stage.asks(source))
    report = await asyncio.to_thread(Publisher(stage, source, journal, ledger).publish, output)
    report.requests, report.replayed = caller.requests, caller.replayed
    return report


def bad_line(line: BadLine) -> Failure:
    """What becomes of a line that is no row; its text is kept."""
    return Failure(Reason.BAD_LINE, f"{line.detail}; the line reads: {line.raw}")


class Publisher:
    """Writes the output of one file from what is in the journal; parses every reply again."""

    def __init__(self, stage: ScoreStage, source: Source, journal: Journal, ledger: Ledger) -> None:
        self._stage = stage
        self._source = source
        self._journal = journal
        self._ledger = ledger
        self._report = ScoreReport()
        self._digest = hashlib.sha256()

    def publish(self, output: Path) -> ScoreReport:
        source = self._source
        source.verify()
        table = self._stage.table(source)
        metadata = {"modelcall.volatile_columns": ",".join(VOLATILE_COLUMNS)}
        with ParquetSink(str(output), table.schema, metadata) as sink:
            for chunk in read_chunks(source.uri, source.schema, source.limit):
                rows = [
                    self._row(chunk.start + offset, item) for offset, item in enumerate(chunk.items)
                ]
                sink.write(table.batch(chunk.to_arrow(), rows))
        self._report.data_version = self._digest.hexdigest()[:32]
        return self._report

    def _row(self, index: int, item: Row | BadLine) -> ApiRow:
        unanswered = self._ledger.unanswered.get(index)
        row = self._answered(index) if unanswered is None else unanswered_row(unanswered)
        row |= self._stage.provenance
        row["api_record_id"] = record_id(item, index, self._source.name)
        self._report.count(row, self._stage.fields)
        if len(self._report.sample) < SAMPLE_ROWS:
            self._report.sample.append(self._shown(item, row))
        content = [row["api_record_id"], row["api_status"], row.get("api_fail_reason")]
        values = [row.get(key) for key in self._stage.fields] or [row.get("api_return")]
        self._digest.update(orjson.dumps([content, values], option=orjson.OPT_SORT_KEYS))
        return row

    def _shown(self, item: Row | BadLine, row: ApiRow) -> Row:
        """The part of an output row that people look at."""
        stage = self._stage
        scored = None if isinstance(item, BadLine) else item.get(stage.input_key)
        names = [*stage.fields, "api_status", "api_fail_reason", "api_return"]
        shown = {name: row.get(name) for name in names}
        return sample_row({"id": row["api_record_id"], stage.input_key: scored, **shown})

    def _answered(self, index: int) -> ApiRow:
        entries = self._journal.chain(self._ledger.positions[index])
        finished = self._stage.rules.judge([Turn(entry.status, entry.body) for entry in entries])
        assert finished is not None, "the call phase settled every record"
        self._report.add_usage(finished.usage, self._stage.prices)
        return answered_row(finished, entries, self._stage.prices)
