"""Build the demo's input: real Python source from the packages installed beside this interpreter.

`python demo/build_corpus.py data/demo/corpus` writes JSONL and Parquet files, one per package, of
records {id, text, path, package, lines}. The same packages give the same files, and a file that is
already there with the same content is left alone.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = (
    "dagster",
    "dagster_graphql",
    "sqlalchemy",
    "openai",
    "aiohttp",
    "pygments",
    "rich",
    "pip",
)
RECORDS_PER_PACKAGE = 500
LONGEST = 60_000
SHORTEST = 200


def records(package: Path, site: Path) -> Iterator[dict[str, object]]:
    """Source files of one package, in path order, neither tiny nor huge."""
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if SHORTEST <= len(text) <= LONGEST:
            relative = path.relative_to(site).as_posix()
            yield {
                "id": relative,
                "text": text,
                "path": relative,
                "package": package.name,
                "lines": text.count("\n"),
            }


def write(folder: Path, number: int, name: str, rows: list[dict[str, object]]) -> Path:
    """Every second package becomes a Parquet file."""
    suffix = "parquet" if number % 2 else "jsonl"
    target = folder / f"{name}.{suffix}"
    temporary = target.with_suffix(".tmp")
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    else:
        temporary.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    if target.exists() and target.read_bytes() == temporary.read_bytes():
        temporary.unlink()
    else:
        temporary.replace(target)
    return target


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    site = Path(sysconfig.get_paths()["purelib"])
    total = 0
    for number, name in enumerate(PACKAGES):
        rows = list(records(site / name, site))[:RECORDS_PER_PACKAGE]
        if rows:
            write(folder, number, name, rows)
            total += len(rows)
    sys.stdout.write(f"{total:,} records of installed source code in {folder}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
