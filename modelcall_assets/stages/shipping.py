"""Columns on their way from a process to the one that started it: through a file, in one copy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp

import pyarrow as pa

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.places import explained


@dataclass(frozen=True, slots=True)
class Shipped:
    """A file with each distinct column once, and which of them the columns are, in order."""

    path: Path
    columns: tuple[int, ...]

    @classmethod
    def of(cls, columns: Sequence[pa.Array], folder: Path) -> Shipped:
        """StoreError when the file cannot be written."""
        distinct = {id(column): column for column in columns}
        places = {identity: at for at, identity in enumerate(distinct)}
        names = [str(at) for at in range(len(distinct))]
        batch = pa.RecordBatch.from_arrays([*distinct.values()], names=names)
        with explained(folder, StoreError):
            handle, name = mkstemp(".arrow", dir=folder)
            with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
                stream.write_batch(batch)
        return cls(Path(name), tuple(places[id(column)] for column in columns))

    def received(self) -> list[pa.Array]:
        """The columns; once. The file goes with them."""
        with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            batch = stream.read_next_batch()
        self.path.unlink()
        return [batch.column(at) for at in self.columns]
