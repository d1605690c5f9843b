"""Look again at what was published, from the file itself and not from what the step believes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import orjson
import pyarrow as pa

from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.parquet import read_columns, read_schema
from modelcall_assets.storage.places import Place


@dataclass(frozen=True)
class ScoresAudit:
    """Counts read back from a scores file, beside what they should be."""

    source_rows: int
    rows: int
    ok: int
    failed: int
    duplicate_ids: int
    schema_matches: bool


def audit_scores(output: Place, source_rows: int, schema: pa.Schema) -> ScoresAudit:
    """Rows by status, repeated record ids and the schema of a published scores file."""
    table = read_columns(output, ["api_status", "api_record_id"])
    statuses = Counter(table.column("api_status").to_pylist())
    ids = table.column("api_record_id").to_pylist()
    return ScoresAudit(
        source_rows=source_rows,
        rows=table.num_rows,
        ok=statuses["success"],
        failed=statuses["error"],
        duplicate_ids=len(ids) - len(set(ids)),
        schema_matches=read_schema(output).equals(schema),
    )


def audit_lines(output: Place, source_rows: int) -> ScoresAudit:
    """The same of a published JSONL file of responses, whose rows have no one schema."""
    statuses, ids = Counter[str](), Counter[tuple[str, int]]()
    with open_input(output) as file:
        for line in file:
            row = orjson.loads(line)
            statuses[row["api_status"]] += 1
            ids[row["api_record_id"], row.get("sample", 0)] += 1
    return ScoresAudit(
        source_rows=source_rows,
        rows=statuses.total(),
        ok=statuses["success"],
        failed=statuses["error"],
        duplicate_ids=statuses.total() - len(ids),
        schema_matches=True,
    )
