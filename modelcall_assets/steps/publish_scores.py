"""Write a scores file: every row of the source in its order, beside what it was rated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from modelcall_assets.config.spec import PREPROCESSED, SCORES
from modelcall_assets.llm.answer import Usage
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.made import ERROR_COLUMN
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.score_table import VOLATILE_COLUMNS, ApiRow, ScoreTable
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.parquet import ParquetSink, as_stored
from modelcall_assets.storage.rows import sample_row
from modelcall_assets.transforms.where import value_at

SAMPLE_ROWS = 5

Rate = Callable[[int, "Row | BadLine"], tuple[ApiRow, Usage]]
"""Status, values and provenance of the row at an index, and what was used for it."""


class Publisher:
    """One file's publication. `input_key` is the column that people want to see in a sample."""

    def __init__(
        self,
        source: Source,
        fields: Mapping[str, Mapping[str, Any]],
        input_key: str,
        rate: Rate,
    ) -> None:
        self._source = source
        self._fields = fields
        self._input_key = input_key
        self._rate = rate
        self._report = ScoreReport()
        self._digest = hashlib.sha256()

    def write(self, out: NewFile) -> ScoreReport:
        """InputChanged when the source is no longer what its upstream asset recorded."""
        source = self._source
        source.verify()
        internal = (ERROR_COLUMN,) if source.stage == PREPROCESSED else ()
        table = ScoreTable(source.schema, self._fields, internal)
        self._report.moved = table.moved
        metadata = {"modelcall.volatile_columns": ",".join(VOLATILE_COLUMNS)}
        with ParquetSink(out, SCORES, table.schema, metadata) as sink:
            for chunk in source.chunks():
                rows = [
                    self._row(chunk.start + offset, item) for offset, item in enumerate(chunk.items)
                ]
                sink.write(table.batch(chunk.to_arrow(), rows))
        self._report.schema = as_stored(table.schema)
        self._report.data_version = self._digest.hexdigest()[:32]
        return self._report

    def _row(self, index: int, item: Row | BadLine) -> ApiRow:
        row, usage = self._rate(index, item)
        row["api_record_id"] = self._source.identity(item, index)
        self._report.add_usage(usage, row.get("api_cost_usd", 0.0))
        self._report.count(row, self._fields)
        if len(self._report.sample) < SAMPLE_ROWS:
            self._report.sample.append(self._shown(item, row))
        content = [row["api_record_id"], row["api_status"], row.get("api_fail_reason")]
        values = [row.get(key) for key in self._fields] or [row.get("api_return")]
        self._digest.update(orjson.dumps([content, values], option=orjson.OPT_SORT_KEYS))
        return row

    def _shown(self, item: Row | BadLine, row: ApiRow) -> Row:
        """The part of an output row that people look at."""
        scored = None if isinstance(item, BadLine) else value_at(item, self._input_key)
        names = [*self._fields, "api_status", "api_fail_reason", "api_return"]
        shown = {name: row.get(name) for name in names}
        return sample_row({"id": row["api_record_id"], self._input_key: scored, **shown})
