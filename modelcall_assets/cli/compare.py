"""`modelcall compare`: two results on the same items, as pairs."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import click

from modelcall_assets.cli.options import (
    NEW_FILE,
    TaskFile,
    chosen_files,
    force_option,
    load,
    refuse_existing,
    stage_of,
    stage_option,
)
from modelcall_assets.cli.page import Record, intervals, page, plots, records_json, table
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.config.catalog import SUFFIXES as TASK_SUFFIXES
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.compare import Changed, Compared, Comparison, compare
from modelcall_assets.stages.ratings import Ratings, copied_ratings, published_ratings
from modelcall_assets.stages.source import SAMPLE
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.rows import GIVEN_ID
from modelcall_assets.transforms.statistics import Estimate, McNemar
from modelcall_assets.transforms.transcript import CONVERSATION_COLUMNS

PAGE_RECORDS = 1000
REPLY_CHARS = 300
SIDES = "A", "B"
RESULT = TaskFile()


@click.command("compare")
@click.argument("first", metavar="A", type=RESULT)
@click.argument("second", metavar="B", type=RESULT)
@stage_option
@click.option("--figure", metavar="COLUMN", help="What is compared; default: the first rating.")
@click.option(
    "--by", metavar="COLUMN", help="Also the figures of the rows with each of its values."
)
@click.option(
    "--cluster",
    metavar="COLUMN|file|item",
    help="What rows that are not independent share; default: as for figures.",
)
@click.option(
    "--show",
    type=click.IntRange(0, PAGE_RECORDS),
    default=0,
    help="So many of the rows that differ, those that differ most.",
)
@json_option
@click.option("--page", "path", metavar="FILE.html", type=NEW_FILE, help="Write a page, too.")
@force_option
def compare_results(
    first: Path,
    second: Path,
    stage: str | None,
    figure: str | None,
    by: str | None,
    cluster: str | None,
    show: int,
    as_json: bool,
    path: Path | None,
    force: bool,
) -> None:
    """Compare two results on the same items: B with A.

    Each is a TASK, or scores files that are there: one, or a folder such as an older copy of a
    task's output. Rows are joined by file, record id and sample. Without independent rows, as of
    several samples of an item or ten subjects, intervals are those of clusters, and there is no
    test of right and wrong.

    \b
      modelcall compare old_prompt.yaml new_prompt.yaml --by subject
      modelcall compare backup/scores my_task.yaml --figure score --show 20
      modelcall compare a.yaml b.yaml --page a_and_b.html
    """
    if path is not None:
        refuse_existing([path], force, "--page")
    found = compare((ratings_at(first, stage), ratings_at(second, stage)), figure, by, cluster)
    figures = [found.total(), *found.groups()]
    changed = found.changed(PAGE_RECORDS if path else show)
    names, shown = [str(first), str(second)], [_told_change(found, each) for each in changed]
    notes = [*_notes(names, found, figures)]
    if as_json:
        missing = {side: each._asdict() for side, each in zip("ab", found.missing, strict=True)}
        told = {"a": names[0], "b": names[1], "figure": found.figure, "cluster": found.cluster}
        told |= {"missing": missing, "figures": [*map(_plain, figures)], "shown": shown[:show]}
        print_rows([told], as_json=True)
    else:
        for note in notes:
            echo(note)
        print_rows(_table(found, figures))
        print_rows([*map(_side_by_side, shown[:show])])
    if path is not None:
        records = [_record(found, *each) for each in zip(changed, shown, strict=True)]
        differ = figures[0].fell + figures[0].rose
        sections = _sections(notes, found, figures)
        text = page(" and ".join(names), sections, records_json(records, differ, None))
        write_bytes(path, text.encode("utf-8", "replace"))
        echo(f"{len(records):,} of {differ:,} rows that differ: {path}", err=as_json)


def ratings_at(path: Path, stage: str | None) -> Ratings:
    """InputError when a result is not as it was published, too."""
    if path.suffix not in TASK_SUFFIXES or path.is_dir():
        return copied_ratings(path)
    files = chosen_files(stage_of(load(path), stage), None, rejected=False)
    found = published_ratings(files)
    for file in files:
        file.check()
    return found


def _plain(figures: Compared) -> Row:
    """With names in place of the fields of its tuples."""
    named = figures._asdict().items()
    return {n: v._asdict() if isinstance(v, (Estimate, McNemar)) else v for n, v in named}


def _told_change(found: Comparison, pair: Changed) -> Row:
    """With the answers that were rated, where they differ, else the ratings as they came."""
    rows = pair.first, pair.second
    answers, ratings = (
        [str(row.get(name) or "") for row in rows] for name in ("response", "api_return")
    )
    return {
        "file": pair.file,
        "row": pair.row,
        "id": pair.first[GIVEN_ID],
        "sample": pair.first.get(SAMPLE),
        **dict(zip("ab", (row[found.figure] for row in rows), strict=True)),
        "replies": dict(zip("ab", answers if answers[0] != answers[1] else ratings, strict=True)),
    }


def _heads(found: Comparison) -> tuple[str, str]:
    """What became of a row that fell, and of one that rose."""
    return ("right → wrong", "wrong → right") if found.is_boolean else ("lower", "higher")


def _notes(names: Sequence[str], found: Comparison, figures: Sequence[Compared]) -> Iterator[str]:
    yield from (f"{side}: {name}" for side, name in zip(SIDES, names, strict=True))
    shared = f" by {found.cluster}" if found.cluster else ""
    yield f"{found.figure} of the rows that both have, with 95 % intervals{shared}"
    for side, missing in zip(SIDES, found.missing, strict=True):
        if missing.rows or missing.unrated:
            yield f"{side} has {missing}"
    if not figures[0].fell + figures[0].rose:
        yield "no pair differs: the interval of B − A has no width, and tells nothing"


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"


def _table(found: Comparison, figures: Sequence[Compared]) -> list[Row]:
    fell, rose = _heads(found)
    rows: list[Row] = []
    for each in figures:
        row = {"of": each.of, "pairs": each.a.n, "A": _told(each.a), "B": _told(each.b)}
        row["B − A"] = _told(each.difference)
        if any(figure.mcnemar for figure in figures):
            row["McNemar's p"] = f"{each.mcnemar.p_value:.2g}" if each.mcnemar else None
        rows.append({**row, fell: each.fell, rose: each.rose})
    return rows


def _side_by_side(told: Row) -> Row:
    sample = {} if told["sample"] is None else {"sample": told["sample"]}
    row: Row = {"id": told["id"], **sample}
    for side, name in zip("ab", SIDES, strict=True):
        row |= {name: told[side], f"{name}'s reply": _cut(told["replies"][side])}
    return row


def _cut(text: str) -> str:
    return text if len(text) <= REPLY_CHARS else f"{text[:REPLY_CHARS]}…"


def _sections(
    notes: Sequence[str], found: Comparison, figures: Sequence[Compared]
) -> Iterator[str]:
    yield f'<p class="note">{"<br>".join(map(escape, notes))}</p>'
    points = [{"of": each.of, **each.difference._asdict()} for each in figures]
    yield plots(intervals(f"{found.figure}, B − A", points))
    yield table("Figures", _table(found, figures))


def _record(found: Comparison, pair: Changed, told: Row) -> Record:
    """The columns and the conversation as A has them, and behind it what both replied."""
    name, said, rated = found.figure, pair.first.get("messages"), (told["a"], told["b"])
    hidden = {*CONVERSATION_COLUMNS, name}
    values = {n: v for n, v in pair.first.items() if n not in hidden and not n.startswith("api_")}
    values |= {f"{name} {side}": value for side, value in zip(SIDES, rated, strict=True)}
    values["messages"] = [
        *(said if isinstance(said, list) else []),
        *(
            {"role": f"{side}: {value}", "content": reply}
            for side, value, reply in zip(SIDES, rated, told["replies"].values(), strict=True)
        ),
    ]
    fell, rose = _heads(found)
    is_better = rated[1] > rated[0]
    outcome = rose if is_better else fell
    return Record(pair.file, pair.row, told["id"], outcome, values, is_good=is_better)
