"""`summary`: the totals of a task over the partitions of its last stage, and a line for each."""

import hashlib
from collections import Counter
from typing import Any

import orjson

from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.inputs import digest_of_versions
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import Report, Tally, counted
from modelcall_assets.stages.stage import Stage
from modelcall_assets.storage.jsonl import write_lines
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import InputFingerprint, Manifest

SHOWN = 50
COUNTS = ("rows", "ok", "failed", "dropped")


class Summary(Stage):
    name = "summary"
    suffix = ".jsonl"
    gathers = True

    @property
    def about(self) -> str:
        return f"totals of {self.before.name} over all {self.before.keys.what}"

    @property
    def folder(self) -> Place:
        return self.layout.state_folder / self.name

    def own_shape(self) -> dict[str, Any]:
        return {"summary": COUNTS}

    def make(self, key: str, tally: Tally) -> Report:
        """A line for each partition that has an accepted result. PublishedMeanwhile when another
        run was faster and found something else."""
        report, parts = Report(), self._parts()
        rows = [
            {
                "partition": decode_key(part),
                **{name: getattr(made, name) for name in COUNTS},
                "failures": made.failures,
            }
            for part, made in parts.items()
        ]
        lines = [orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows]
        report.rows_in = report.rows = len(rows)
        report.data_version = hashlib.sha256(b"".join(lines)).hexdigest()[:32]
        report.numbers = {f"total_{name}": sum(row[name] for row in rows) for name in COUNTS}
        reasons = sum((Counter(made.failures) for made in parts.values()), Counter[str]())
        report.tables["total_failures"] = counted("reason", dict(reasons.most_common()))
        worst = sorted(rows, key=lambda row: -row["failed"])
        report.tables["partitions"] = [
            {name: row[name] for name in ("partition", *COUNTS)} for row in worst[:SHOWN]
        ]
        digest = digest_of_versions({part: made.data_version for part, made in parts.items()})
        made_of = InputFingerprint(uri=str(self.before.folder), digest=digest, size=0, version="")
        with Draft(self, key) as draft:
            write_lines(draft.out, lines)
            draft.publish(report, made_of)
        return report

    def _parts(self) -> dict[str, Manifest]:
        """By key, what is accepted of the stage before."""
        found = {key: self.before.accepted(key) for key in sorted(self.before.published_keys())}
        return {key: made for key, made in found.items() if made is not None}
