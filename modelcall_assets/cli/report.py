"""`modelcall report`: a task's results, or a data file, as one page for people."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from itertools import islice
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import click

from modelcall_assets.cli.options import (
    TASK,
    chosen_files,
    file_option,
    force_option,
    load,
    misuse,
    parsed_where,
    refuse_existing,
    stage_of,
    stage_option,
    where_option,
)
from modelcall_assets.cli.page import (
    GENERATOR,
    Record,
    cards,
    intervals,
    page,
    plots,
    records_json,
    table,
)
from modelcall_assets.cli.terminal import echo
from modelcall_assets.config.catalog import SUFFIXES as TASK_SUFFIXES
from modelcall_assets.config.places import shown_place
from modelcall_assets.errors import InputError
from modelcall_assets.llm.dialogue import ChatRequest
from modelcall_assets.records import DATA_SUFFIXES, is_data_file
from modelcall_assets.records.outcome import NEVER_ASKED, BadLine, Row
from modelcall_assets.stages.agreement import LEFT_OUT
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.figures import FIGURES, joined
from modelcall_assets.stages.report import Distribution, Report
from modelcall_assets.stages.source import Published
from modelcall_assets.stages.summary import Summary, add_rows
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import read_bytes, write_bytes
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import read_rows, record_id
from modelcall_assets.transforms import Where
from modelcall_assets.transforms.transcript import Turn, turns_of

MOST_POINTS = 200
"""Of a plot."""
Found = tuple[Published | Path, int, Row | BadLine]
"""A row of a result or of a data file, with its index."""
BAR, LINE = {"type": "bar"}, {"type": "line", "point": True}


@click.command()
@click.argument("source", metavar="TASK|FILE", type=TASK)
@stage_option
@file_option
@click.option(
    "--rows",
    type=click.IntRange(1, 20_000),
    default=1000,
    show_default=True,
    help="Records in the page's table.",
)
@click.option(
    "--sample/--first", default=True, help="Records from everywhere (the default), or the first."
)
@click.option("--seed", default=42, show_default=True, help="Another seed is another sample.")
@where_option
@click.option(
    "--output",
    metavar="FILE",
    help="A path or a URI. Default: <output folder of the task>_report.html or <name>.html here, "
    "where an earlier page is replaced.",
)
@force_option
def report(
    source: Path,
    stage: str | None,
    pattern: str | None,
    rows: int,
    sample: bool,
    seed: int,
    condition: str | None,
    output: str | None,
    force: bool,
) -> None:
    """Write an HTML page of what TASK has made, or of the records of a data FILE.

    It shows the latest result of each file, one that was rejected too.

    Totals, the spread of the scores, failures with examples, cost and latency by file and over
    time; and a table of sampled records to be filtered, sorted and opened, with the command that
    asks just the rows seen again. The page needs nothing from elsewhere and can be sent to others.

    \b
      modelcall report my_task.yaml
      modelcall report my_task.yaml --where 'score <= 2' --rows 20000
      modelcall report data/chats.jsonl --output chats.html
    """
    is_task = source.suffix in TASK_SUFFIXES
    if not is_task and not is_data_file(source.name):
        expected = ", ".join((*TASK_SUFFIXES, *DATA_SUFFIXES))
        raise misuse(source.name, "unknown kind of file", expected)
    random = Random(seed) if sample else None
    if is_task:
        task = load(source)
        shown = stage_of(task, stage)
        place = task.layout.place(output) if output else task.report_place
        files = chosen_files(shown, pattern, rejected=True)
        where, spread = parsed_where(condition, files), Spread()
        chosen, seen = _sampled(_rows(files, where, spread), rows, random)
        command = ["modelcall", "retry", task.spec.file_name]
        command += ["--stage", shown.name] if shown is not task.stages[-1] else []
        limits = {"file": pattern or "", "where": condition or ""}
        told = {"command": shlex.join(command), "unique": spread.unique, **limits}
        retry = told if shown.answers else None
        title, sections = task.spec.name, [*_sections(task, files, limits, spread, retry)]
    else:
        place, where = Path(output or f"{source.stem}.html"), parsed_where(condition)
        rows_of = enumerate(read_rows(source))
        found = ((source, *each) for each in rows_of if where is None or where(each[1]))
        chosen, seen = _sampled(found if sample else islice(found, rows), rows, random)
        sections, title, retry = [], source.name, None
    if not seen:
        raise InputError(f"{source}: there is no such row")
    if output or not _is_page(place):
        refuse_existing([place], force)
    records = [_record(*each) for each in chosen]
    text = page(title, sections, records_json(records, seen, retry))
    write_bytes(place, text.encode("utf-8", "replace"))
    echo(f"{len(records):,} of {seen:,} records: {place}")


def _is_page(place: Place) -> bool:
    try:
        return GENERATOR.encode() in read_bytes(place)[:4096]
    except FileNotFoundError:
        return True


def _sampled(found: Iterable[Found], size: int, random: Random | None) -> tuple[list[Found], int]:
    """So many rows in their order, each as likely as any other, or the first ones; and of how many
    they are."""
    kept, seen = list[tuple[int, Found]](), 0
    for each in found:
        at = seen if seen < size or random is None else random.randrange(seen + 1)
        if at < size:
            kept[at : at + 1] = [(seen, each)]
        seen += 1
    return [each for _, each in sorted(kept, key=itemgetter(0))], seen


def _record(file: Published | Path, index: int, item: Row | BadLine) -> Record:
    values, reason, sent = item, None, list[Turn]()
    if isinstance(values, BadLine):
        values = {"api_status": "error", "api_fail_detail": values.detail, "line": values.raw}
        reason = "bad_line"
    if isinstance(file, Path):
        name = record_id(item, index, "")
    else:
        name, sent = file.identity(index, item), _sent(file, values)
        failure = file.failure_of(item)
        reason = None if failure is None else str(failure.reason)
    return Record(file.name, index + 1, name, reason, values, sent)


def _sent(file: Published, row: Row) -> list[Turn]:
    """What was asked about a row; nothing where it would be asked otherwise now."""
    if not isinstance(file.stage, AskingStage) or not row.get("api_request_key"):
        return []
    names = {new: old for old, new in file.manifest.moved.items()}
    asked = file.stage.ask({names.get(name, name): value for name, value in row.items()})
    if not isinstance(asked, ChatRequest) or asked.key != row["api_request_key"]:
        return []
    return turns_of({"messages": [*asked.messages]})


_UNITS = {"second": (19, "Z"), "minute": (16, "Z"), "hour": (13, ":00Z"), "day": (10, "")}
"""So much of a time's text, and what it lacks."""


@dataclass
class Spread:
    """When rows were answered, how long it took, and what it cost: by a unit of time in which these
    are not too many points."""

    rows: Counter[str] = field(default_factory=Counter[str])
    cost: dict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))
    latency: dict[str, Distribution] = field(default_factory=dict[str, Distribution])
    unique: str = "all"
    """Whether ids tell rows apart: `all` of them, those of a `file`, or none."""
    _units: list[str] = field(default_factory=lambda: [*_UNITS])

    def add(self, item: Row | BadLine) -> None:
        if isinstance(item, BadLine) or not isinstance(when := item.get("api_answered_at"), str):
            return
        took = Distribution({ms: 1} if (ms := item.get("api_latency_ms")) is not None else {})
        self._count(when, 1, item.get("api_cost_usd") or 0, took)
        if len(self.rows) > MOST_POINTS and len(self._units) > 1:
            self._units.pop(0)
            before = self.rows, self.cost, self.latency
            self.rows, self.cost, self.latency = Counter(), defaultdict(float), {}
            for when, rows in before[0].items():
                self._count(when, rows, before[1][when], before[2][when])

    def _count(self, when: str, rows: int, cost: float, latency: Distribution) -> None:
        length, rest = _UNITS[self._units[0]]
        when = when[:length] + rest
        self.rows[when] += rows
        self.cost[when] += cost
        self.latency.setdefault(when, Distribution()).join(latency)

    def figures(self) -> Iterator[tuple[str, dict[str, Any]]]:
        by = f"by {self._units[0]} (UTC)"
        took = [
            {"time": when, "ms": each.quantile(share), "of": name}
            for when, each in sorted(self.latency.items())
            if each.rows
            for name, share in (("median", 0.5), ("p95", 0.95))
        ]
        for title, name, values in ("answers", "rows", self.rows), ("cost, USD,", "USD", self.cost):
            points = [{"time": when, name: value} for when, value in sorted(values.items())]
            if any(values.values()):
                yield f"{title} {by}", _plot(BAR, points, "time", name)
        if took:
            yield f"latency, ms, {by}", _plot(LINE, took, "time", "ms")


def _rows(files: Sequence[Published], where: Where | None, spread: Spread) -> Iterator[Found]:
    """Those of which the condition is true; `spread` is told of them, and whether ids tell all
    apart."""
    seen = set[int]()
    for file in files:
        file.check()
        of_file = set[int]()
        for index, item in file.items():
            if file.stage.answers:
                name = hash(file.identity(index, item))
                if name in of_file:
                    spread.unique = ""
                elif name in seen and spread.unique:
                    spread.unique = "file"
                of_file.add(name)
            if where is None or where(item):
                spread.add(item)
                yield file, index, item
        seen |= of_file


def _plot(mark: Any, points: Sequence[Mapping[str, Any]], x: str, y: str) -> dict[str, Any]:
    """Points with `of` are several lines. Texts stand side by side in their order."""
    across: dict[str, Any] = {"field": x, "type": "ordinal", "sort": None}
    if x == "time":
        across |= {"type": "temporal", "scale": {"type": "utc"}, "axis": {"tickCount": 5}}
    elif any(len(point[x]) > 4 for point in points):
        across["axis"] = {"labelAngle": -40}
    sides = {"x": across, "y": {"field": y, "type": "quantitative"}}
    if "of" in points[0]:
        sides["color"] = {"field": "of", "type": "nominal", "title": None}
    return {"data": {"values": [*points]}, "mark": mark, "encoding": sides}


def _sections(
    task: Task,
    files: Sequence[Published],
    limits: Mapping[str, str],
    spread: Spread,
    retry: Mapping[str, str] | None,
) -> Iterator[str]:
    """What the task's summary knows, of the stage and files that are shown."""
    overview = next(each for each in task.overviews if isinstance(each, Summary))
    shown, (summed, every) = files[0].stage, overview.summed()
    of = {(shown.name, file.key, file.manifest.accepted) for file in files}
    rows = [row for row in every if (row["stage"], row["key"], row["accepted"]) in of]
    own = Report()
    add_rows(own, rows)
    if graded := joined(rows):
        graded.tell(own)
    by_group, name = own.tables.get(FIGURES, ()), graded.figure if graded else ""
    points = [{**row, "of": row["group"], "value": row[name]} for row in by_group]
    place = shown_place(str(shown.folder), task.spec.root)
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, from {place}"
    yield f'<p class="note">{escape(f"{shown.name}: {shown.about}")}<br>{escape(made)}</p>'
    if told := ", ".join(f"{name} {value}" for name, value in limits.items() if value):
        about = "plots over time and records are of these alone"
        all_of = "totals are of whole files; files and stages below are all of the task"
        yield f'<p class="note">only {escape(told)}: {about}; {all_of}.</p>'
    is_all = shown is overview.before and not limits["file"]
    of_task = summed if is_all else Report()
    numbers = {n.replace("_", " "): value for n, value in (of_task.numbers | own.numbers).items()}
    yield cards({"rows": own.rows, "ok": own.ok, "failed": own.failed, **numbers})
    plotted = dict(_figures(own.histograms, rows)) | dict(spread.figures())
    yield plots(intervals(f"{name} by group", points) | plotted)
    yield table("Figures", by_group)
    yield table("Agreement", of_task.tables.get("agreement", ()))
    yield table("Left out of the agreement", of_task.tables.get(LEFT_OUT, ()))
    yield table("Rejected", summed.tables["rejected"])
    yield table("Out of date", summed.tables["out_of_date"])
    failed = list[Row]()
    for reason, count in own.failures.most_common():
        if (each := own.examples.get(reason)) is not None:
            failed.append({"reason": reason, "rows": count, "for example": each.where})
            failed[-1] |= {"row": each.row, "what was wrong": each.detail}
            if retry is not None:
                file = f"--file {shlex.quote(limits['file'])} " if limits["file"] else ""
                again = f"{retry['command']} {file}--reason {reason}"
                failed[-1]["ask again"] = "" if reason in NEVER_ASKED else again
    yield table("Failures", failed, ["ask again"])
    yield table("Scores", own.tables["scores"])
    yield table("Stages", summed.tables["stages"])
    yield table("Files, the worst first", own.tables["partitions"])


def _figures(
    histograms: Mapping[str, Distribution], rows: Sequence[Row]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, each in histograms.items():
        points = [{name: value, "rows": count} for value, count in each.bins()]
        yield f"rows by {name}", _plot(BAR, points, name, "rows")
    rows = sorted(rows, key=lambda row: row["partition"])
    numbers = [row["numbers"] for row in rows]
    for title, names in {
        "cost by file, USD": {"cost_usd": "cost"},
        "latency by file, ms": {"latency_ms_median": "median", "latency_ms_p95": "p95"},
    }.items():
        step = -(-len(numbers) // MOST_POINTS)
        points = [
            {"file": rows[at]["partition"], "value": max(values), "of": of}
            for name, of in names.items()
            for at in range(0, len(numbers), step or 1)
            if (values := [n[name] for n in numbers[at : at + step] if n.get(name) is not None])
        ]
        if len(numbers) > 1 and any(point["value"] for point in points):
            most = f", the highest of {step} neighbours" if step > 1 else ""
            yield title + most, _plot(LINE, points, "file", "value")
