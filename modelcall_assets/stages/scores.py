"""`scores`: a model's rating of every record of a file, failures in their place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import cached_property
from typing import Any

import orjson

from modelcall_assets.config.distillation import JudgeStep
from modelcall_assets.config.model import ModelConfig
from modelcall_assets.config.prompt import PromptConfig
from modelcall_assets.config.task import Data
from modelcall_assets.llm.dialogue import (
    NOT_IN_KEY,
    PARSER_VERSION,
    AnswerParser,
    ChatRequest,
    Rules,
)
from modelcall_assets.records.outcome import BadLine, Failure, Reason, Row, bad_line
from modelcall_assets.stages.adopt import OldAnswer
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.score_table import Rate, write_scores
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import GIVEN_ID, ID_COLUMNS
from modelcall_assets.transforms.user_code import Fields
from modelcall_assets.transforms.values import MissingColumn, Template, value_at


class Scores(AskingStage):
    name = "scores"
    kinds = ("openai", "parquet")
    done = "scored"
    hint = ("data", "compare data.input_key and the placeholders of the prompt with them")

    @property
    def about(self) -> str:
        return f"ratings by {self.params['model']} with the prompt {self.prompt.version}"

    @property
    def folder(self) -> Place:
        return self.layout.place(self.spec.folder(self.name))

    @property
    def model(self) -> ModelConfig:
        assert self.spec.model is not None
        return self.spec.model

    @property
    def prompt(self) -> PromptConfig:
        assert self.spec.prompt is not None
        return self.spec.prompt

    @property
    def most_in_flight(self) -> int:
        return self.spec.task.concurrency.max_concurrent_requests

    @property
    def rated(self) -> Data | JudgeStep:
        """The column that is rated, and its placeholder in the prompt."""
        return self.spec.task.rated

    @cached_property
    def schema(self) -> dict[str, Any] | None:
        """Of an answer; None where any text is one."""
        is_json = self.prompt.output_config.require_json
        return self.prompt.output_config.answer_schema() if is_json else None

    @cached_property
    def params(self) -> dict[str, Any]:
        params = self.model.request_params()
        if self.schema is not None and self.model.supports_json_schema:
            json_schema = {"name": "answer", "schema": self.schema}
            params["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return params

    @cached_property
    def template(self) -> Template:
        return Template.compile(self.prompt.prompt_template.prompt_text)

    @cached_property
    def fields(self) -> dict[str, dict[str, Any]]:
        """The declared JSON-schema type of each key of an answer."""
        return {} if self.schema is None else dict(self.prompt.output_config.fields)

    @cached_property
    def rules(self) -> Rules:
        parser = AnswerParser(
            keys=[*self.fields],
            required=frozenset((self.schema or {}).get("required", ())),
            schema=self.schema,
            defaults=self.prompt.output_config.optional_defaults,
        )
        return Rules(parser, self.spec.task.retry.repair_turns)

    @cached_property
    def provenance(self) -> dict[str, str]:
        return {"api_model": str(self.params["model"]), "api_prompt": self.prompt.version}

    @cached_property
    def input_key(self) -> str:
        return self.rated.input_key

    @cached_property
    def prompt_key(self) -> str:
        return self.rated.prompt_format_key or self.input_key

    @cached_property
    def system(self) -> str | None:
        return self.prompt.prompt_template.system_text

    @property
    def columns_read(self) -> Collection[str]:
        """Preprocessed rows may have very long texts that it does not look at."""
        assert self.upstream is not None
        own = {self.input_key, self.input_key.partition(".")[0], *ID_COLUMNS, GIVEN_ID}
        own.update(filter(None, [self.upstream.error_column]))
        return self.template.columns - {self.prompt_key} | own

    def version(self) -> str:
        params = {name: value for name, value in self.params.items() if name not in NOT_IN_KEY}
        shape = {
            "parser": PARSER_VERSION,
            "prompt": self.template.parts,
            "system": self.system,
            "params": params,
            "revision": self.model.revision,
            "columns": [self.input_key, self.prompt_key],
            "repairs": self.rules.max_repair_turns,
            "schema": self.schema,
            "keys": [*self.fields],
            "defaults": dict(self.rules.parser.defaults),
            "prompt_version": self.prompt.version,
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    def own_shape(self) -> dict[str, Any]:
        return {"score": self.version()}

    def ask(self, row: Row | BadLine) -> Asked:
        """The request of one row, or the Failure that says why it has none."""
        if isinstance(row, BadLine):
            return bad_line(row)
        value = row.get(self.input_key)
        value = value_at(row, self.input_key) if value is None else value
        if value is None or value == "":
            what = "empty" if value == "" else "null" if self.input_key in row else "absent"
            return Failure(Reason.MISSING_INPUT, f"input column '{self.input_key}' is {what}")
        if row.get(self.prompt_key) is not value:
            row = {**row, self.prompt_key: value}
        try:
            messages = [{"role": "user", "content": self.template.render(row)}]
        except MissingColumn as error:
            return Failure(Reason.MISSING_INPUT, str(error))
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return ChatRequest(self.params, tuple(messages), self.model.revision)

    def old_answer(self, row: Row) -> OldAnswer | None:
        """Of a row that is in a scores file; None when it failed. The columns count only where the
        reply is not there: what the reply does not say, a default has filled."""
        if row.get("api_status") != "success":
            return None
        said, values = row.get("api_return"), {key: row.get(key) for key in self.fields}
        if isinstance(said, str):
            return OldAnswer(said, {"api_return": said}, values)
        return OldAnswer(orjson.dumps(values, default=str).decode(), {}, values) if values else None

    def write(self, source: Source, rate: Rate, out: NewFile, shared: Fields) -> Report:
        """Keys without a declared type have the one that their values share, lists none."""
        scalars = {key: of for key, of in shared.items() if of.get("type") != "array"}
        totals = write_scores(source, {**self.fields, **scalars}, self.input_key, rate, out)
        totals.report.numbers |= totals.numbers()
        return totals.report
