"""`scores`: the model's rating of every record of a file, failures in their place."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from modelcall_assets.config.spec import PREPROCESSED, RESPONSES, TaskSpec
from modelcall_assets.grading.values import Fields
from modelcall_assets.journal.journal import Journal
from modelcall_assets.llm.answer import PARSER_VERSION, AnswerParser, Usage
from modelcall_assets.llm.dialogue import Rules
from modelcall_assets.llm.engine import Engine
from modelcall_assets.llm.request import NOT_IN_KEY, ChatRequest
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.adopt import OldAnswer, kept_of
from modelcall_assets.steps.batch_calls import BatchCaller
from modelcall_assets.steps.budget import Budget
from modelcall_assets.steps.calls import Caller
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.made import ERROR_COLUMN
from modelcall_assets.steps.preprocess import bad_line, failure_before
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.publish_scores import Publisher, Rate
from modelcall_assets.steps.replay import Asked, Standing, said_in
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.reuse import Reuse
from modelcall_assets.steps.score_report import Prices, ScoreReport
from modelcall_assets.steps.score_table import (
    ADOPTED,
    UNKNOWN_OF_ADOPTED,
    ApiRow,
    answered_row,
    unanswered_row,
)
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.files import NewFile
from modelcall_assets.transforms.template import MissingColumn, Template
from modelcall_assets.transforms.where import value_at


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
    prices: Prices
    samples: int = 1
    rates_responses: bool = False
    """Whether the rows are responses of the same task; one that failed is not rated."""

    @classmethod
    def of(cls, spec: TaskSpec) -> ScoreStage:
        prompt, model, task = spec.prompt, spec.model, spec.task
        assert prompt is not None and model is not None
        schema = prompt.answer_schema() if prompt.output_config.require_json else None
        params = model.request_params()
        if schema is not None and model.supports_json_schema:
            json_schema = {"name": "answer", "schema": schema}
            params["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        template = prompt.prompt_template
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
            input_key=spec.rated.input_key,
            prompt_key=spec.rated.prompt_format_key or spec.rated.input_key,
            rules=Rules(parser, task.retry.repair_turns),
            fields=dict(prompt.fields) if schema is not None else {},
            provenance={"api_model": str(params["model"]), "api_prompt": prompt.version},
            prices=model.prices.pair,
            rates_responses=RESPONSES in spec.stages,
        )

    @property
    def columns(self) -> set[str]:
        """Those of a row that it looks at, beside what tells the row's id."""
        asked = {self.input_key, self.input_key.partition(".")[0], ERROR_COLUMN}
        return self.prompt.columns - {self.prompt_key} | asked

    def version(self) -> str:
        """Digest of what shapes the rows: not prices, limits, endpoints or keys."""
        params = {name: value for name, value in self.params.items() if name not in NOT_IN_KEY}
        shape = {
            "parser": PARSER_VERSION,
            "prompt": self.prompt.parts,
            "system": self.system,
            "params": params,
            "revision": self.revision,
            "columns": [self.input_key, self.prompt_key],
            "repairs": self.rules.max_repair_turns,
            "schema": self.rules.parser.schema,
            "keys": list(self.rules.parser.keys),
            "defaults": dict(self.rules.parser.defaults),
            "prompt_version": self.provenance["api_prompt"],
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    def ask(self, row: Row | BadLine) -> Asked:
        """The request of one row, or the Failure that says why it has none."""
        if isinstance(row, BadLine):
            return bad_line(row)
        if self.rates_responses and row.get("api_status") == "error":
            return Failure(Reason(row["api_fail_reason"]), row["api_fail_detail"])
        value = row.get(self.input_key)
        value = value_at(row, self.input_key) if value is None else value
        if value is None or value == "":
            what = "empty" if value == "" else "null" if self.input_key in row else "absent"
            return Failure(Reason.MISSING_INPUT, f"input column '{self.input_key}' is {what}")
        if row.get(self.prompt_key) is not value:
            row = {**row, self.prompt_key: value}
        try:
            messages = [{"role": "user", "content": self.prompt.render(row)}]
        except MissingColumn as error:
            return Failure(Reason.MISSING_INPUT, str(error))
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return ChatRequest(self.params, tuple(messages), self.revision)

    def asks(self, source: Source) -> Iterator[Asked]:
        """One per row of the source, in order."""
        items = source.items()
        if source.stage != PREPROCESSED:
            return map(self.ask, items)
        return (failure_before(item) or self.ask(item) for item in items)

    def old_answer(self, row: Row) -> OldAnswer | None:
        """Of a row that is in a scores file; None when it failed. The columns count only where the
        reply is not there: what the reply does not say, a default has filled."""
        if row.get("api_status") != "success":
            return None
        said, values = row.get("api_return"), {key: row.get(key) for key in self.fields}
        if isinstance(said, str):
            return OldAnswer(said, {"api_return": said}, values)
        return OldAnswer(orjson.dumps(values, default=str).decode(), {}, values) if values else None

    def write(self, source: Source, rate: Rate, out: NewFile, shared: Fields) -> ScoreReport:
        """Every row of the source in its order, beside what it was rated. Keys without a declared
        type have the one that their values share, lists none."""
        scalars = {key: of for key, of in shared.items() if of.get("type") != "array"}
        return Publisher(source, {**self.fields, **scalars}, self.input_key, rate).write(out)


@dataclass
class Scoring:
    """One file on its way to its scores or responses."""

    stage: ScoreStage | ResponseStage
    source: Source
    journal: Journal
    reuse: Reuse
    budget: Budget
    stands: Standing | None = None
    """Failures that are accepted as they are."""

    async def run(self, draft: Draft, engine: Engine, tally: Tally) -> ScoreReport:
        """Call what the journal does not answer, then write all rows in input order.

        Raises RunStopped when the run is over, InputError when the source cannot be read to its
        end and InputChanged when it is no longer what its upstream asset recorded; the journal
        keeps every reply.
        """
        kind = Caller if engine.batches is None else BatchCaller
        given = (
            self.stage.rules,
            engine,
            self.journal,
            tally,
            self.reuse,
            self.budget,
            self.stage.samples,
            self.stands,
        )
        left = BatchCaller(*given)
        if engine.batches is None:
            await left.take_up_left_behind()
        caller = kind(*given, requests=left.requests, warnings=left.warnings)
        self._ledger = await caller.run(self.stage.asks(self.source))
        requests, replayed, warnings = caller.requests, caller.replayed, caller.warnings
        shared = caller.types.fields()
        del caller  # and the memory of its keys
        report = await asyncio.to_thread(
            draft.written, lambda out: self.stage.write(self.source, self._rate, out, shared)
        )
        report.requests, report.replayed, report.warnings = requests, replayed, warnings
        return report

    def _rate(self, index: int, item: Row | BadLine) -> tuple[ApiRow, Usage]:
        """Reads every reply back from the journal and parses it again. The usage is what was paid
        for this record."""
        stage = self.stage
        if (unanswered := self._ledger.unanswered.get(index)) is not None:
            return {**unanswered_row(unanswered), **stage.provenance}, Usage()
        entries = self.journal.chain(self._ledger.positions[index])
        finished = stage.rules.judge(said_in(entries))
        assert finished is not None, "the call phase settled every record"
        row = answered_row(finished, entries, stage.prices)
        if row["api_endpoint"] == ADOPTED:
            kept = kept_of(entries[-1].body)
            return {**row, **UNKNOWN_OF_ADOPTED, **kept, ADOPTED: kept}, Usage()
        paid = finished.usage if row["api_attempts"] else Usage()
        return {**row, **stage.provenance}, paid
