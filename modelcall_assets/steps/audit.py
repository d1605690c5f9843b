"""Look again at what was published, from the file itself and not from what the step believes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from modelcall_assets.storage.parquet import read_columns, read_schema


@dataclass(frozen=True)
class ScoresAudit:
    """Counts read back from a scores file, beside what they should be."""

    source_rows: int
    rows: int
    ok: int
    failed: int
    duplicate_ids: int
    schema_matches: bool


def audit_scores(output: Path, source_rows: int, schema: pa.Schema) -> ScoresAudit:
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
