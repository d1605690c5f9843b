"""`summary`: a task as a whole, made from the manifests of all its stages: what is done and what
not, why rows failed, how scores are distributed, what it took.

The file has a line for each manifest; those of manifests that have not changed are taken from the
file before, so that it costs little to keep it current.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import decode_key, encode_key
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.distribution import Distribution
from modelcall_assets.stages.inputs import digest_of_versions
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import FailedRow, Report, Tally
from modelcall_assets.stages.stage import Stage
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.jsonl import dumps, write_lines
from modelcall_assets.storage.listing import FileInfo, list_files
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import InputFingerprint, Manifest, read_manifest
from modelcall_assets.storage.rows import read_rows

SHOWN = 50
COUNTS = ("rows", "ok", "failed", "dropped")
TOTALS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "cost_usd")
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
_LINE = tuple[str, str, bool]
"""Stage, partition, and whether it is accepted."""


class Summary(Stage):
    name = "summary"
    suffix = ".jsonl"
    gathers = True

    @property
    def about(self) -> str:
        return "the task as a whole: what is done, what failed and why, scores, tokens, cost"

    @property
    def folder(self) -> Place:
        return self.layout.state_folder / self.name

    def own_shape(self) -> dict[str, Any]:
        return {"summary": 2}

    def members_changed(self, key: str) -> bool:
        """False too while there is nothing to sum up."""
        made, manifests = self.accepted(key), self._manifests()
        if made is None:
            return bool(manifests)
        return made.input.digest != self._made_of(manifests, self._inputs()).digest

    def why_rejected(self, report: Report) -> str | None:
        """Its rows are those of the stages before."""
        return None

    def make(self, key: str, tally: Tally) -> Report:
        """PublishedMeanwhile when another run was faster and found something else."""
        report, made_of, rows = self.summed()
        with Draft(self, key) as draft:
            write_lines(draft.out, (dumps(row) + b"\n" for row in rows))
            draft.publish(report, made_of)
        return report

    def summed(self) -> tuple[Report, InputFingerprint, Sequence[Row]]:
        """The totals, what they are made of, and a row for each result of each stage."""
        manifests, inputs = self._manifests(), self._inputs()
        (key,) = self.keys.now()
        rows = {_key_of(row): row for row in self._rows(key, manifests)}
        report, made_of = Report(), self._made_of(manifests, inputs)
        report.data_version = made_of.digest
        last = [row for row in rows.values() if row["stage"] == self.before.name]
        report.numbers |= self._files(rows, inputs, report)
        report.tables["rejected"] = [
            {"partition": row["partition"], "rows": row["rows"], "failed": _told(row["failures"])}
            for row in last
            if not row["accepted"]
        ][:SHOWN]
        add_rows(report, [row for row in last if row["accepted"]])
        self._add_cost(report, [*rows.values()])
        report.tables["commands"] = self._commands()
        return report, made_of, [*rows.values()]

    def _manifests(self) -> dict[_LINE, FileInfo]:
        return {
            (stage.name, file.key_path.removesuffix(".json"), accepted): file
            for stage in self.task.stages
            for accepted in (True, False)
            for file in list_files(stage.manifest_folder(rejected=not accepted), may_be_absent=True)
            if file.key_path.endswith(".json")
        }

    def _made_of(
        self, manifests: Mapping[_LINE, FileInfo], inputs: Mapping[str, str]
    ) -> InputFingerprint:
        """Changes with the manifests, the input files, and what shapes rows."""
        versions = {repr(each): file.version for each, file in manifests.items()}
        versions |= {stage.name: stage.code_version for stage in self.task.stages}
        digest = digest_of_versions({**versions, **inputs})
        return InputFingerprint(uri=str(self.before.folder), digest=digest, size=0, version="")

    def _inputs(self) -> dict[str, str]:
        """Versions by key; none where they cannot be listed."""
        try:
            files = self.task.inputs.files()
        except InputError:
            return {}
        return {encode_key(file.key_path): file.version for file in files}

    def _rows(self, key: str, manifests: Mapping[_LINE, FileInfo]) -> Iterator[Row]:
        known: dict[_LINE, Row] = {}
        made = self.accepted(key)
        if made is not None and not self.outdated([key]):
            is_ours = made.detail["code_version"] == self.code_version
            if is_ours and file_digest(self.result(made)) == made.output_digest:
                lines = read_rows(self.result(made))
                known = {_key_of(row): row for row in lines if isinstance(row, dict)}
        for each, file in manifests.items():
            row = known.get(each)
            if row is not None and row["version"] == file.version:
                yield row
            elif (manifest := read_manifest(file.place)) is not None:
                yield _row(each, manifest, file.version)

    # What is shown

    def _files(
        self, rows: Mapping[_LINE, Row], inputs: Mapping[str, str], report: Report
    ) -> dict[str, Any]:
        """How many files are done, rejected, missing and out of date."""
        last = self.before.name
        wanted = self.before.keys.now() if inputs or self.before.keys.of_groups else []
        keys = dict.fromkeys([*wanted, *(key for name, key, _ in rows if name == last)])
        done = [key for key in keys if (last, key, True) in rows]
        rejected = [key for key in keys if (last, key, False) in rows]
        old: dict[str, list[str]] = {}
        for key in done:
            if why := self._outdated(key, rows, inputs):
                old.setdefault(why, []).append(decode_key(key))
        what = self.before.keys.what.replace(" ", "_")
        report.tables["out_of_date"] = [
            {what: len(names), "why": why, "first": names[0]} for why, names in old.items()
        ]
        counts = {"done": len(done), "rejected": len(rejected), "out_of_date": 0, "missing": 0}
        counts["out_of_date"] = sum(map(len, old.values()))
        counts["missing"] = len(keys.keys() - {*done, *rejected})
        return {f"{what}_{name}": count for name, count in counts.items()}

    def _outdated(self, key: str, rows: Mapping[_LINE, Row], inputs: Mapping[str, str]) -> str:
        """Why a partition of the last stage would be made otherwise now; empty if it would not."""
        stages = [stage for stage in self.task.stages if stage.keys == self.before.keys]
        for stage in stages:
            if (row := rows.get((stage.name, key, True))) is None:
                continue
            if row["code_version"] not in (None, stage.code_version):
                now, made = stage.provenance, row["made_with"]
                if made == now:
                    same = _told(now) or "the task"
                    return f"{stage.name} made with other settings of {same}"
                old, new = _told(made, now.items()), _told(now, made.items())
                return f"{stage.name} made with {old or 'others'}, now {new}"
            if stage.upstream in stages:
                before = rows.get((stage.before.name, key, True), {})
                if before.get("content") != row["made_of"]:
                    return f"{stage.before.name} has changed since {stage.name} was made"
            elif stage.upstream is None and inputs.get(key, row["input"]) != row["input"]:
                return "the input file has changed"
        return ""

    def _add_cost(self, report: Report, rows: Sequence[Row]) -> None:
        """By stage and in all; what is not known of some files is not summed up."""
        table: list[Row] = []
        for stage in self.task.stages:
            own = [row for row in rows if row["stage"] == stage.name and row["accepted"]]
            found: Row = {"stage": stage.name, stage.keys.what.replace(" ", "_"): len(own)}
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


def _key_of(row: Row) -> _LINE:
    return row["stage"], row["key"], row["accepted"]


def _row(each: _LINE, made: Manifest, version: str) -> Row:
    stage, key, accepted = each
    detail = made.detail
    names = "numbers", "examples", "histograms", "made_with"
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
        "input": made.input.version,
        "version": version,
    }


def _told(named: Mapping[str, Any], but: Collection[tuple[str, Any]] = ()) -> str:
    told = (each for each in named.items() if each not in but)
    return ", ".join(f"{name.removeprefix('api_')} {value}" for name, value in told)


def add_rows(report: Report, rows: Sequence[Row]) -> None:
    """Of results of one stage: their counts, reasons with an example each, scores, worst files."""
    report.rows_in = report.rows = sum(row["rows"] for row in rows)
    for row in rows:
        report.failures.update(row["failures"])
        for reason, (number, where, detail) in row["examples"].items():
            where = ", ".join(filter(None, (row["partition"], where)))
            example = FailedRow(number, where, reason, detail)
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
    report.tables["partitions"] = [
        {name: row[name] for name in ("partition", *COUNTS)}
        | {name: row["numbers"].get(name) for name in means}
        for row in worst[:SHOWN]
    ]
