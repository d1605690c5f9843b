"""Dagster's SQLite storage with connections that are kept: it makes an engine and a connection for
each event and each question, four fifths of what these cost. `dagster.yaml` names the instance that
has it, so that the webserver and the daemon have it too."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from dagster import (
    AssetKey,
    AssetRecordsFilter,
    DagsterEventType,
    DagsterInstance,
    EventLogEntry,
    EventLogRecord,
    EventRecordsResult,
)
from dagster._check import not_none
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData
from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.pool import QueuePool

from modelcall_assets.storage.files import BUSY_S

KEPT_S = 1.0
MOST_ENGINES = 8


class KeptEventLog(SqliteEventLogStorage):
    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._engines = dict[tuple[str, int], Engine]()
        self._partitions: dict[str, tuple[float, frozenset[str]]] = {}
        self._tables = set[str]()
        self._stored: tuple[float, EventLogRecord | None] = 0.0, None
        super().__init__(base_dir, inst_data)

    @contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            path = Path(self.path_for_shard(shard))
            file = path.stat().st_ino if path.exists() else 0  # another one may come in its place
            engine = self._engine(self.conn_string_for_shard(shard), file)
            if shard not in self._initialized_dbs:
                self._initdb(engine)
                self._initialized_dbs.add(shard)
            with engine.connect() as connection, connection.begin():
                yield connection

    def _initdb(self, engine: Engine, for_index_shard: bool = False) -> None:
        """What has a revision needs nothing, and is not asked which by way of all migrations."""
        with engine.connect() as connection:
            if (
                inspect(connection).has_table("alembic_version")
                and connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
            ):
                return
        super()._initdb(engine, for_index_shard)

    def _engine(self, url: str, file: int) -> Engine:
        """The latest used ones are kept."""
        engine = self._engines.pop((url, file), None)
        if engine is None:
            engine = create_engine(url, poolclass=QueuePool, connect_args={"timeout": BUSY_S})
            event.listen(engine, "connect", _synced_seldom)
        self._engines[url, file] = engine
        if len(self._engines) > MOST_ENGINES:
            self._engines.pop(next(iter(self._engines))).dispose()
        return engine

    def has_table(self, table_name: str) -> bool:
        """Asked for each event."""
        if table_name not in self._tables and super().has_table(table_name):
            self._tables.add(table_name)
        return table_name in self._tables

    def _store_asset_event(self, conn: Connection, event: EventLogEntry, event_id: int) -> None:
        super()._store_asset_event(conn, event, event_id)
        if event.dagster_event_type == DagsterEventType.ASSET_MATERIALIZATION:
            self._stored = time.monotonic(), EventLogRecord(event_id, event)

    def fetch_materializations(
        self,
        records_filter: AssetKey | AssetRecordsFilter,
        limit: int,
        cursor: str | None = None,
        ascending: bool = False,
    ) -> EventRecordsResult:
        """A check asks for the result that was stored right before it."""
        at, stored = self._stored
        is_latest = limit == 1 and cursor is None and not ascending
        if stored is not None and is_latest and time.monotonic() - at < KEPT_S:
            partitions = None if stored.partition_key is None else [stored.partition_key]
            if records_filter == AssetRecordsFilter(not_none(stored.asset_key), partitions):
                return EventRecordsResult([stored], str(stored.storage_id), has_more=True)
        return super().fetch_materializations(records_filter, limit, cursor, ascending)

    def delete_dynamic_partition(self, partitions_def_name: str, partition_key: str) -> None:
        super().delete_dynamic_partition(partitions_def_name, partition_key)
        self._partitions.pop(partitions_def_name, None)

    def has_dynamic_partition(self, partitions_def_name: str, partition_key: str) -> bool:
        """A page of the UI asks it for each of a check's results."""
        name, now = partitions_def_name, time.monotonic()
        asked, keys = self._partitions.get(name, (0.0, frozenset[str]()))
        if partition_key in keys and now - asked < KEPT_S:
            return True
        is_there = super().has_dynamic_partition(name, partition_key)
        if is_there and now - asked < KEPT_S:
            keys = frozenset(self.get_dynamic_partitions(name))
        self._partitions[name] = now, keys
        return is_there


def _synced_seldom(connection: Any, _: Any) -> None:
    """With its write-ahead log SQLite stays whole without a sync for each event. When the machine
    loses its power, what was told last may have to be told again."""
    connection.execute("PRAGMA synchronous=NORMAL")


class KeptSqliteStorage(DagsterSqliteStorage):
    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        self._event_log_storage = KeptEventLog(str(Path(base_dir, "history", "runs")))

    @classmethod
    def from_config_value(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, inst_data: ConfigurableClassData | None, config_value: Any
    ) -> "KeptSqliteStorage":
        return cls.from_local(inst_data=inst_data, **config_value)


class Instance(DagsterInstance):
    """Of a home that names no other storage."""

    @staticmethod
    def config_schema() -> dict[str, Any]:
        return {}

    @staticmethod
    def config_defaults(base_dir: str) -> Mapping[str, ConfigurableClassData | None]:
        storage = KeptSqliteStorage
        own = ConfigurableClassData(
            storage.__module__, storage.__name__, yaml.safe_dump({"base_dir": base_dir})
        )
        return {**InstanceRef.config_defaults(base_dir), "storage": own}
