"""`scores`: a rating of every record of a file by a model, or by a scorer of the user's own;
failures in their place."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import orjson

from modelcall_assets.config.prompt import PromptConfig
from modelcall_assets.config.steps import JudgeStep
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import RunStopped
from modelcall_assets.llm.completion import Usage
from modelcall_assets.llm.dialogue import AnswerParser, ChatRequest, Rules
from modelcall_assets.records.outcome import (
    BadLine,
    Failure,
    Outcome,
    Reason,
    Row,
    Success,
    bad_line,
)
from modelcall_assets.stages import Stage
from modelcall_assets.stages.adopt import OldAnswer
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.figures import Grades
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.report import Report, Tally
from modelcall_assets.stages.score_table import (
    VOLATILE_COLUMNS,
    AnswerTotals,
    ApiRow,
    Picks,
    Rate,
    ScoreTable,
    outcome_row,
)
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.parquet import ParquetSink, as_stored
from modelcall_assets.storage.rows import GIVEN_ID, ID_COLUMNS
from modelcall_assets.transforms import MissingColumn, Template, value_at
from modelcall_assets.transforms.user_code import (
    Fields,
    Scorer,
    SharedTypes,
    declared_fields,
    grade,
    load_scorer,
    scorer_digest,
)


class Scores(AskingStage):
    name = "scores"
    kinds = ("openai", "parquet")
    done = "scored"
    hint = ("data", "compare data.input_key and the placeholders of the prompt with them")

    @property
    def about(self) -> str:  # type: ignore[override]
        return f"ratings by {self.params['model']} with the prompt {self.prompt.version}"

    @property
    def prompt(self) -> PromptConfig:
        assert self.spec.prompt is not None
        return self.spec.prompt

    @property
    def most_in_flight(self) -> int:
        return self.spec.task.concurrency.max_concurrent_requests

    @property
    def definition(self) -> dict[str, dict[str, Any]]:
        prompt = {"version": self.prompt.version, **self.prompt.prompt_template.model_dump()}
        return {"prompt": prompt, **super().definition}

    @cached_property
    def schema(self) -> dict[str, Any] | None:
        """Of an answer; None where any text is one."""
        is_json = self.prompt.output_config.require_json
        return self.prompt.output_config.answer_schema() if is_json else None

    @cached_property
    def params(self) -> dict[str, Any]:
        params = self.model.request_params()
        if self.digits:
            params |= {"logprobs": True, "top_logprobs": 20}
        if self.schema is not None and self.model.supports_json_schema:
            json_schema = {"name": "answer", "schema": self.schema}
            params["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return params

    @cached_property
    def template(self) -> Template:
        return Template.compile(self.prompt.prompt_template.prompt_text)

    @cached_property
    def digits(self) -> Sequence[int]:
        """What a score may be whose mean by probability is wanted too."""
        rated = self.spec.task.rated
        is_expected = isinstance(rated, JudgeStep) and rated.expected
        return self.prompt.output_config.score_digits if is_expected else ()

    @cached_property
    def fields(self) -> dict[str, dict[str, Any]]:
        """The declared JSON-schema type of each key of an answer, and of what is made of it."""
        fields = {} if self.schema is None else dict(self.prompt.output_config.fields)
        return fields | ({"expected_score": {"type": "number"}} if self.digits else {})

    @cached_property
    def rules(self) -> Rules:
        parser = AnswerParser(
            keys=self.prompt.output_config.keys,
            required=frozenset((self.schema or {}).get("required", ())),
            schema=self.schema,
            defaults=self.prompt.output_config.optional_defaults,
            digits=self.digits,
        )
        return Rules(parser, self.spec.task.retry.repair_turns)

    @property
    def provenance(self) -> dict[str, str]:
        return super().provenance | {"api_prompt": self.prompt.version}

    @cached_property
    def input_key(self) -> str:
        """The column that is rated."""
        return self.spec.task.rated.input_key

    @cached_property
    def prompt_key(self) -> str:
        """Its placeholder in the prompt."""
        return self.spec.task.rated.prompt_format_key or self.input_key

    @cached_property
    def system(self) -> str | None:
        return self.prompt.prompt_template.system_text

    @property
    def columns_read(self) -> Collection[str]:
        """Preprocessed rows may have very long texts that it does not look at."""
        own = {self.input_key, self.input_key.partition(".")[0], *ID_COLUMNS, GIVEN_ID}
        own.update(filter(None, [self.before.error_column]))
        return self.template.columns - {self.prompt_key} | own

    @property
    def shaped_by(self) -> dict[str, Any]:
        return {
            "prompt": self.template.parts,
            "system": self.system,
            "columns": [self.input_key, self.prompt_key],
            "repairs": self.rules.max_repair_turns,
            "schema": self.schema,
            "keys": [*self.fields],
            "defaults": dict(self.rules.parser.defaults),
            "prompt_version": self.prompt.version,
        }

    def own_shape(self) -> dict[str, Any]:
        return {"score": self.version}

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
        """Of a row that is in a scores file; None when it failed, or log-probabilities are wanted.
        The columns count only where the reply is not there: what the reply does not say, a default
        has filled."""
        if row.get("api_status") != "success" or self.digits:
            return None
        said, values = row.get("api_return"), {key: row.get(key) for key in self.fields}
        if isinstance(said, str):
            return OldAnswer(said, {"api_return": said}, values)
        return OldAnswer(orjson.dumps(values, default=str).decode(), {}, values) if values else None

    def write(self, source: Source, rate: Rate, out: NewFile, shared: Fields) -> Report:
        """Keys without a declared type have the one that their values share, lists none."""
        scalars = {key: of for key, of in shared.items() if of.get("type") != "array"}
        fields = {**self.fields, **scalars}
        totals = write_scores(source, fields, self.input_key, rate, out, self.ask)
        totals.report.numbers |= totals.numbers()
        return totals.report


class ScorerScores(Stage):
    name = "scores"
    kinds = ("python", "parquet")
    done = "scored"
    hint = ("data", "compare data.input_key and the placeholders of the prompt with them")
    answers = True
    shows_progress = True
    again = "rate them all again"

    @property
    def about(self) -> str:  # type: ignore[override]
        return f"ratings by {self.path}"

    @property
    def path(self) -> str:
        """The scorer's, as the task file has it."""
        assert isinstance(self.spec.task, ScoringTask) and self.spec.task.scorer is not None
        return self.spec.task.scorer

    @property
    def shown(self) -> str:
        """As its rows name it."""
        return self.path

    @cached_property
    def _version(self) -> str:
        digest = scorer_digest(self.path, self.spec.root, self.spec.file_name)
        return f"{self.shown}@{digest}"

    @property
    def provenance(self) -> dict[str, str]:
        return {"scorer": self._version}

    def own_shape(self) -> dict[str, Any]:
        """Changes with the scorer's name and with its module's source."""
        return {"score": self._version}

    def scorer(self) -> Scorer:
        """A new one where the task names a class. SetupError when it cannot be made."""
        return load_scorer(self.path, self.spec.root, self.spec.file_name)

    @property
    def input_key(self) -> str:
        """The column that people see beside a rating."""
        return self.spec.task.rated.input_key

    def grades(self, scorer: Scorer) -> Grades | None:
        """Of a file, where its ratings are those of answers; None where they are not."""
        return None

    def check_ready(self) -> None:
        self.scorer()

    def make(self, key: str, tally: Tally) -> Report:
        """Rate every row once, so many at a time as the scorer says, then write them.

        Columns have the types that the scorer declares in `fields` (JSON-schema types by key), else
        those of the values it gave for this file. RunStopped when the tally is stopped.
        """
        source, scorer = self.source(key), self.scorer()
        threads: int = getattr(scorer, "concurrency", 1)

        def rated(item: Row | BadLine) -> tuple[Row | BadLine, Outcome]:
            if tally.is_stopped:
                raise RunStopped("interrupted; this file is rated from its first row again")
            assert source.maker is not None
            outcome = source.maker.failure_of(item) or rate(scorer, item)
            if grades is not None and isinstance(outcome, Success):
                outcome = grades.checked(outcome)
            return item, outcome

        with Draft(self, key) as draft, ThreadPoolExecutor(threads) as pool:
            outcomes: list[Outcome] = []
            types, grades = SharedTypes(), self.grades(scorer)
            for batch in source.of_one_file():
                for item, outcome in (pool.map if threads > 1 else map)(rated, batch.items):
                    outcomes.append(outcome)
                    tally.count(outcome)
                    if isinstance(outcome, Success):
                        types.note(outcome.values)
                        if grades is not None:
                            grades.add(item, outcome.values)
            fields = declared_fields(scorer) or types.fields()

            def api_row(index: int, item: Row | BadLine) -> tuple[ApiRow, Usage]:
                outcome = outcomes[index]
                has_values = isinstance(outcome, Success)
                text = orjson.dumps(outcome.values).decode() if has_values else None
                told = {"api_return": text, "api_model": self.shown}
                return {**outcome_row(outcome), **told}, Usage()

            report = draft.written(
                lambda out: write_scores(source, fields, self.input_key, api_row, out).report
            )
            if grades is not None:
                grades.tell(report)
            draft.publish(report, source.fingerprint())
        return report


def write_scores(
    source: Source,
    fields: Mapping[str, Mapping[str, Any]],
    input_key: str,
    rate: Rate,
    out: NewFile,
    sent: Callable[[Row | BadLine], object] | None = None,
) -> AnswerTotals:
    """`input_key` is the column that people want to see in a sample, `sent` gives what was asked
    about a row. InputChanged when the source is no longer what its upstream asset recorded."""
    maker = source.maker
    table = ScoreTable(source.schema, fields, maker.error_column if maker else None)
    totals, picks = AnswerTotals(source, fields), Picks([*fields])
    report = totals.report

    metadata = {"modelcall.volatile_columns": ",".join(VOLATILE_COLUMNS)}
    with ParquetSink(out, "scores", table.schema, metadata) as sink:
        for batch in source.of_one_file():
            rows: list[ApiRow] = []
            for index, item in enumerate(batch.items, batch.start):
                row, usage = rate(index, item)
                sample = item.get("sample") if totals.is_result and isinstance(item, dict) else None
                totals.count(index, item, row, usage, sample)
                picks.look(row, item)
                content = [row["api_record_id"], row["api_status"], row.get("api_fail_reason")]
                values = [row.get(key) for key in fields] or [row.get("api_return")]
                totals.digest.update(orjson.dumps([content, values], option=orjson.OPT_SORT_KEYS))
                rows.append(row)
            sink.write(table.batch(batch.to_arrow(source.schema), rows))
    totals.finish()
    for number, (label, row, item) in enumerate(picks.found()):
        scored = value_at(item, input_key) if isinstance(item, dict) else item.raw
        answer = {name: row.get(name) for name in (*fields, "api_fail_reason", "api_fail_detail")}
        known = {name: value for name, value in answer.items() if value is not None}
        record = {"sample": label, "id": row["api_record_id"], input_key: scored, **known}
        if sent is not None and not number and isinstance(asked := sent(item), ChatRequest):
            record["sent"] = [*asked.messages]
        report.show({**record, "reply": row.get("api_return")})
    report.moved, report.schema = table.moved, as_stored(table.schema)
    return totals


def rate(scorer: Scorer, item: Row | BadLine) -> Outcome:
    """A line that is no row is not shown to the scorer."""
    return bad_line(item) if isinstance(item, BadLine) else grade(scorer, item)
