"""Look again at what was published, from the file itself and not from what the step believes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputError
from modelcall_assets.steps.seen import Seen
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.numbers import loads_doubles
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


def audit_scores(
    output: Place, source_rows: int, schema: pa.Schema, *, has_samples: bool
) -> ScoresAudit:
    """Rows by status, repeated record ids and the schema of a published scores file. Several
    responses of one record are told apart by `sample`."""
    statuses, seen, duplicates = Counter[str](), Seen(), 0
    published = read_schema(output)
    names = ["api_status", "api_record_id"]
    names += [name for name in ("sample",) if has_samples and name in published.names]
    for batch in read_columns(output, names):
        statuses.update(batch.column("api_status").to_pylist())
        for _, *identity in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            duplicates += not seen.is_new("#".join(map(str, identity)))
    return ScoresAudit(
        source_rows=source_rows,
        rows=statuses.total(),
        ok=statuses["success"],
        failed=statuses["error"],
        duplicate_ids=duplicates,
        schema_matches=published.equals(schema),
    )


def audit_lines(output: Place, source_rows: int) -> ScoresAudit:
    """The same of a published JSONL file of responses, whose rows have no one schema."""
    statuses, seen, duplicates = Counter[str](), Seen(), 0
    with open_input(output) as file:
        for line in file:
            try:
                row = loads_doubles(line)
            except orjson.JSONDecodeError as error:
                what = f"damaged while it was published: {error}; check the disk and run it again"
                raise InputError(f"{output}: {what}") from error
            statuses[row["api_status"]] += 1
            duplicates += not seen.is_new(f"{row['api_record_id']}#{row.get('sample', 0)}")
    return ScoresAudit(
        source_rows=source_rows,
        rows=statuses.total(),
        ok=statuses["success"],
        failed=statuses["error"],
        duplicate_ids=duplicates,
        schema_matches=True,
    )
