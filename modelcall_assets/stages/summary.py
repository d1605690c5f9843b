"""`summary`: a task as a whole, made from the manifests of all its stages: what is done and what
not, why rows failed, how scores are distributed, what it took.

The file has a line for each manifest; those of manifests that have not changed are taken from the
file before, so that it costs little to keep it current. `Results` also says what is out of date.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.records import decode_key, encode_key
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages import Stage
from modelcall_assets.stages.agreement import panel_of, tell_agreement, versions_of
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.figures import ACCURACY, FIGURES, joined
from modelcall_assets.stages.inputs import digest_of_versions
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.raw import WARNINGS
from modelcall_assets.stages.report import DROPPED, Distribution, Example, Report, Tally
from modelcall_assets.stages.source import MEMBERS
from modelcall_assets.storage.files import file_digest, write_lines
from modelcall_assets.storage.listing import FileInfo, list_files
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import InputFingerprint, Manifest, read_manifest
from modelcall_assets.storage.rows import read_rows
from modelcall_assets.storage.values import dumps

if TYPE_CHECKING:
    from modelcall_assets.stages.task import Task

COUNTS = ("rows", "ok", "failed", "dropped")
Result = tuple[str, str, bool]
"""Stage, partition, and whether it is accepted."""
SHOWN = 50
TOTALS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "cost_usd")
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


class Summary(Stage):
    name = "summary"
    about = "the task as a whole: what is done, what failed and why, scores, tokens, cost"
    suffix = ".jsonl"
    gathers = True
    again = ""

    @property
    def folder(self) -> Place:
        return self.layout.state_folder / self.name

    def own_shape(self) -> dict[str, Any]:
        return {"summary": 6}

    def check_ready(self) -> None:
        """SetupError when a rater cannot be had, but for want of results."""
        _, problems = panel_of(self.task)
        if wrong := [problem for problem in problems if problem.severity == "error"]:
            raise SetupError(wrong)

    def members_changed(self, key: str) -> bool:
        """False too while there is nothing to sum up."""
        made, results = self.accepted(key), Results(self.task)
        if made is None:
            return bool(results.manifests)
        return made.input.digest != results.digest

    def make(self, key: str, tally: Tally) -> Report:
        """PublishedMeanwhile when another run was faster and found something else."""
        report, rows = self.summed()
        folder, digest = str(self.before.folder), report.data_version
        made_of = InputFingerprint(uri=folder, digest=digest, size=0, version="")
        with Draft(self, key) as draft:
            write_lines(draft.out, (dumps(row) + b"\n" for row in rows))
            draft.publish(report, made_of)
        return report

    def summed(self) -> tuple[Report, Sequence[Row]]:
        """The totals, and a row for each result of each stage."""
        results = Results(self.task)
        report, rows = Report(data_version=results.digest), [*results.rows.values()]
        last = [row for row in rows if row["stage"] == self.before.name]
        report.numbers |= self._files(results, report)
        report.tables["rejected"] = [
            {"partition": row["partition"], "rows": row["rows"], "failed": told(row["failures"])}
            for row in last
            if not row["accepted"]
        ][:SHOWN]
        accepted = [row for row in last if row["accepted"]]
        add_rows(report, accepted)
        now = {*self.before.keys.now()} if any(row[FIGURES] for row in accepted) else ()
        if figures := joined(row for row in accepted if row["key"] in now):
            figures.tell(report)
        tell_agreement(self.task, report)
        self._add_cost(report, rows)
        report.tables["commands"] = self._commands()
        return report, rows

    # What is shown

    def _files(self, results: Results, report: Report) -> dict[str, Any]:
        """How many files are done, rejected, missing and out of date."""
        last, rows = self.before.name, results.rows
        wanted = self.before.keys.now() if results.inputs or self.before.keys.of_groups else []
        keys = dict.fromkeys([*wanted, *(key for name, key, _ in rows if name == last)])
        done = [key for key in keys if (last, key, True) in rows]
        rejected = [key for key in keys if (last, key, False) in rows]
        old: dict[str, list[str]] = {}
        stages = [stage for stage in self.task.stages if stage.keys == self.before.keys]
        for key in done:
            if why := next(filter(None, (results.changed(stage, key) for stage in stages)), ""):
                old.setdefault(why, []).append(decode_key(key))
        what = f"{self.before.keys.what}s".replace(" ", "_")
        report.tables["out_of_date"] = [
            {what: len(names), "why": why, "first": names[0]} for why, names in old.items()
        ]
        counts = {"done": len(done), "rejected": len(rejected), "out_of_date": 0, "missing": 0}
        counts["out_of_date"] = sum(map(len, old.values()))
        counts["missing"] = len(keys.keys() - {*done, *rejected})
        return {f"{what}_{name}": count for name, count in counts.items()}

    def _add_cost(self, report: Report, rows: Sequence[Row]) -> None:
        """By stage and in all; what is not known of some files is not summed up."""
        table: list[Row] = []
        for stage in self.task.stages:
            own = [row for row in rows if row["stage"] == stage.name and row["accepted"]]
            what = f"{stage.keys.what}s".replace(" ", "_")
            found: Row = {"stage": stage.name, what: len(own)}
            found |= {name: sum(row[name] for row in own) for name in COUNTS}
            for name in TOTALS if stage.asks else ():
                values = [row["numbers"].get(name) for row in own]
                known = [value for value in values if value is not None]
                if known and (len(known) == len(own) or name == "cached_prompt_tokens"):
                    found[name] = sum(known)
                    report.numbers[f"total_{name}"] = (
                        report.numbers.get(f"total_{name}", 0) + found[name]
                    )
            table.append(found)
        names = dict.fromkeys(name for row in table for name in row)
        report.tables["stages"] = [{name: row.get(name) for name in names} for row in table]
        for stage in self.task.stages:
            if isinstance(stage, AskingStage):
                report.numbers |= stage.budget.left()

    def _commands(self) -> list[Row]:
        file = self.spec.file_name
        wanted = {
            f"modelcall run-task {file}": "make what is missing or out of date",
            f"modelcall failures {file}": "which rows failed, and why",
            f"modelcall retry {file}": "ask again for those",
            f"modelcall report {file}": f"plots and records as one page: {self.task.report_place}",
            f"modelcall export {file}": "JSON lines or Parquet for others",
        }
        return [{"command": command, "to": does} for command, does in wanted.items()]


def add_rows(report: Report, rows: Sequence[Row]) -> None:
    """Of results of one stage: their counts, reasons with an example each, scores, worst files."""
    report.rows_in = report.rows = sum(row["rows"] for row in rows)
    for row in rows:
        report.failures.update(row["failures"])
        for reason, (number, where, detail) in row["examples"].items():
            where = ", ".join(filter(None, (row["partition"], where)))
            example = Example(number, where, reason, detail)
            if report.examples.setdefault(reason, example) is example:
                report.failed_rows.append(example)
        for name, found in row["histograms"].items():
            if found["values"]:
                report.histograms.setdefault(name, Distribution()).join(Distribution.of(found))
    report.tables["scores"] = [
        {
            "score": name,
            "rows": each.rows,
            "mean": each.mean,
            **{f"{share:.0%}": each.quantile(share) for share in QUANTILES},
        }
        for name, each in report.histograms.items()
    ]
    for name, each in report.histograms.items():
        report.numbers |= each.numbers(name)
    worst = sorted(rows, key=lambda row: -row["failed"] / (row["rows"] or 1))
    means = [f"{name}_mean" for name in report.histograms]
    means += [name for name in ACCURACY if any(name in row["numbers"] for row in rows)]
    report.tables["partitions"] = [
        {name: row[name] for name in ("partition", *COUNTS)}
        | {name: row["numbers"].get(name) for name in means}
        for row in worst[:SHOWN]
    ]


@dataclass(frozen=True)
class Results:
    """What the stages of a task have left, as it was when it was first looked at, known in bulk:
    from listings, and from the lines of the summary. Only manifests that changed since are read."""

    task: Task
    _looking: Lock = field(default_factory=Lock)
    _outputs: dict[str, Set[str]] = field(default_factory=dict[str, Set[str]])
    """By stage, the places of all files in its folder."""

    @cached_property
    def manifests(self) -> Mapping[Result, FileInfo]:
        return {
            (stage.name, file.key_path.removesuffix(".json"), accepted): file
            for stage in self.task.stages
            for accepted in (True, False)
            for file in list_files(stage.manifest_folder(rejected=not accepted), may_be_absent=True)
            if file.key_path.endswith(".json")
        }

    @cached_property
    def inputs(self) -> Mapping[str, str]:
        """Versions by key; none where they cannot be listed."""
        try:
            files = self.task.inputs.files()
        except InputError:
            return {}
        return {encode_key(file.key_path): file.version for file in files}

    @cached_property
    def rows(self) -> Mapping[Result, Row]:
        """A line for each."""
        known, rows = self._known(), dict[Result, Row]()
        for each, file in self.manifests.items():
            row = known.get(each)
            if row is not None and row["version"] == file.version:
                rows[each] = row
            elif (manifest := read_manifest(file.place)) is not None:
                rows[each] = _row(each, manifest, file.version)
        return rows

    def latest(self, stage: Stage, keys: Sequence[str]) -> dict[str, Row | None]:
        """Accepted or not, of these keys of the first stage, or of all that the stage has where its
        keys are others."""
        has_others, rows = stage.keys is not self.task.stages[0].keys, self.rows
        return {
            key: rows.get((stage.name, key, False)) or rows.get((stage.name, key, True))
            for key in (stage.keys.now() if has_others else keys)
        }

    @cached_property
    def digest(self) -> str:
        """Changes with the manifests, the input files, what shapes rows, and other raters."""
        versions = {repr(each): file.version for each, file in self.manifests.items()}
        versions |= {stage.name: stage.code_version for stage in self.task.stages}
        return digest_of_versions({**versions, **self.inputs, **versions_of(self.task)})

    def look(self, stage: Stage) -> None:
        """What `is_due` needs, but for stages that gather; takes a while."""
        with self._looking:
            is_known = stage.name in self._outputs or stage.gathers
            if stage.upstream is not None and not is_known:
                files = list_files(stage.folder, may_be_absent=True)
                self._outputs[stage.name] = {str(file.place) for file in files}
                self._there(stage.upstream).rows  # noqa: B018
            if stage.upstream is None:
                self.inputs  # noqa: B018
            self.rows  # noqa: B018

    def says_by_what(self, stage: Stage, key: str) -> bool:
        """Whether a result says by what it was made; those of earlier versions do not."""
        row = self.rows.get((stage.name, key, True))
        return row is None or row["code_version"] is not None

    def is_due(self, stage: Stage, key: str, before: str | None = None) -> bool:
        return bool(self.why_due(stage, key, before))

    def why_due(self, stage: Stage, key: str, before: str | None = None) -> str:
        """Why a run would make a partition; empty when it would not."""
        if (stage.name, key, False) in self.rows:
            return "failed before"
        if (row := self.rows.get((stage.name, key, True))) is None:
            return "new" if stage is self.task.stages[0] else "never finished"
        if why := self.changed(stage, key, before):
            return why
        if stage.gathers:
            if stage.members_changed(key):
                return "other files to gather"
            is_gone = bool(stage.outdated([key]))
        elif stage.upstream is None:
            uris = None, str(stage.layout.input_place(key))
            is_gone = row["uri"] not in uris or key not in self.inputs
        else:
            is_gone = row["output"] != str(stage.output(key))
            is_gone = is_gone or row["output"] not in self._outputs[stage.name]
        return "gone, or elsewhere now" * is_gone

    def changed(self, stage: Stage, key: str, before: str | None = None) -> str:
        """Why an accepted result would be made otherwise now; empty when it would not, or is none.
        `before` is the content of its upstream where that is newer than this."""
        if (row := self.rows.get((stage.name, key, True))) is None:
            return ""
        if row["code_version"] not in (None, stage.code_version):
            now, made = stage.provenance, row["made_with"]
            if made == now:
                same = told(now) or "the task"
                return f"{stage.name} made with other settings of {same}"
            old, new = told(made, now.items()), told(now, made.items())
            return f"{stage.name} made with {old or 'others'}, now {new}"
        if stage.upstream is None:
            is_same = self.inputs.get(key, row["input"]) == row["input"]
            return "" if is_same else "the input file has changed"
        if stage.gathers:
            return ""
        now_there = self._there(stage.upstream).rows.get((stage.upstream.name, key, True), {})
        is_same = (before or now_there.get("content")) == row["made_of"]
        return "" if is_same else f"{stage.upstream.name} has changed since {stage.name} was made"

    def _there(self, stage: Stage) -> Results:
        """Those of its task: it may be another one's."""
        return self if stage.task is self.task else self._linked

    @cached_property
    def _linked(self) -> Results:
        assert self.task.linked is not None
        return Results(self.task.linked.task)

    def _known(self) -> Mapping[Result, Row]:
        """The lines of the summary as it is."""
        (summary,) = (each for each in self.task.overviews if isinstance(each, Summary))
        (key,) = summary.keys.now()
        made = summary.accepted(key)
        if made is None or made.detail["code_version"] != summary.code_version:
            return {}
        if summary.outdated([key]) or file_digest(summary.result(made)) != made.output_digest:
            return {}
        lines = read_rows(summary.result(made))
        rows = (row for row in lines if isinstance(row, dict))
        return {(row["stage"], row["key"], row["accepted"]): row for row in rows}


def told(named: Mapping[str, Any], but: Collection[tuple[str, Any]] = ()) -> str:
    found = (each for each in named.items() if each not in but)
    return ", ".join(f"{name.removeprefix('api_')} {value}" for name, value in found)


def _row(each: Result, made: Manifest, version: str) -> Row:
    stage, key, accepted = each
    detail = made.detail
    names = "numbers", "examples", "histograms", "made_with", DROPPED, FIGURES
    return {
        "stage": stage,
        "key": key,
        "partition": decode_key(key),
        "accepted": accepted,
        **{name: getattr(made, name) for name in COUNTS},
        "failures": made.failures,
        **{name: detail.get(name, {}) for name in names},
        "code_version": detail.get("code_version"),
        "content": made.output_digest or detail.get("digest") or made.input.digest,
        "made_of": made.input.digest,
        "says_more": any(detail.get(name) for name in (WARNINGS, "adopted", "set_aside")),
        "input": made.input.version,
        "output": made.output,
        "uri": None if MEMBERS in detail else made.input.uri,
        "version": version,
    }
