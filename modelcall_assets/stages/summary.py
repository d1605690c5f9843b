"""`summary`: a task as a whole, made from the manifests of all its stages: what is done and what
not, why rows failed, how scores are distributed, what it took.

The file has a line for each manifest; those of manifests that have not changed are taken from the
file before, so that it costs little to keep it current.
"""

from collections.abc import Sequence
from typing import Any

from modelcall_assets.records.data_files import decode_key
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.distribution import Distribution
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import FailedRow, Report, Tally
from modelcall_assets.stages.results import COUNTS, Results, told
from modelcall_assets.stages.stage import Stage
from modelcall_assets.storage.files import write_lines
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import InputFingerprint
from modelcall_assets.storage.values import dumps

SHOWN = 50
TOTALS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "cost_usd")
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


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
        return {"summary": 3}

    def members_changed(self, key: str) -> bool:
        """False too while there is nothing to sum up."""
        made, results = self.accepted(key), Results(self.task)
        if made is None:
            return bool(results.manifests)
        return made.input.digest != results.digest

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
        results = Results(self.task)
        report = Report(data_version=results.digest)
        rows = results.rows
        made_of = InputFingerprint(
            uri=str(self.before.folder), digest=results.digest, size=0, version=""
        )
        last = [row for row in rows.values() if row["stage"] == self.before.name]
        report.numbers |= self._files(results, report)
        report.tables["rejected"] = [
            {"partition": row["partition"], "rows": row["rows"], "failed": told(row["failures"])}
            for row in last
            if not row["accepted"]
        ][:SHOWN]
        add_rows(report, [row for row in last if row["accepted"]])
        self._add_cost(report, [*rows.values()])
        report.tables["commands"] = self._commands()
        return report, made_of, [*rows.values()]

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
        what = self.before.keys.what.replace(" ", "_")
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
