"""`[task, summary]`: a task as a whole."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from hypothesis import given
from hypothesis import strategies as st
from project import ALL, FRESH, ONLY_INS, A, B, Project, chat, instruction, some_rows

from modelcall_assets.defs.runs import OVERVIEWS_EVERY_S, housekeeping_sensor, note_overviews
from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer
from modelcall_assets.stages.report import Distribution

PRICES = {"usd_per_million_input_tokens": 10, "usd_per_million_output_tokens": 20}


def shown(project: Project) -> dict[str, Any]:
    """The metadata of the latest, by name."""
    wanted = dg.AssetRecordsFilter(project.asset_key("summary"))
    (record,) = project.instance.fetch_materializations(wanted, limit=1).records
    assert record.asset_materialization is not None
    return {name: each.value for name, each in record.asset_materialization.metadata.items()}


def table(text: str) -> list[dict[str, str]]:
    """A table of Markdown."""
    lines = (re.sub(r"\\(?=\W|_)", "", line) for line in text.splitlines())
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


class TestSummary:
    def test_has_the_totals_of_all_files(self, project: Project) -> None:
        project.write_task({"max_failure_rate": 1})
        project.write_model({"prices": PRICES})
        project.write_input(B, [*some_rows(2), {"id": "no text"}])
        project.materialize([A, B])
        found, rows = shown(project), [row for name in (A, B) for row in project.scores(name)]
        counts = {name: found[name] for name in ("rows_in", "ok", "failed")}
        assert counts == {"rows_in": len(rows), "ok": len(rows) - 1, "failed": 1}
        files = {name: found[f"files_{name}"] for name in ("done", "missing", "rejected")}
        assert files == {"done": 2, "missing": 1, "rejected": 0}
        assert table(found["failures_by_reason"]) == [{"reason": "missing_input", "rows": "1"}]
        (failed,) = table(found["first_failures"])
        assert (failed["row"], failed["where"]) == ("3", f"{B}, record no text")
        scores = [row["score"] for row in rows if row["score"] is not None]
        assert found["score_mean"] == pytest.approx(statistics.mean(scores))
        assert found["score_median"] == statistics.median(scores)
        (spread,) = table(found["scores"])
        assert (float(spread["0%"]), float(spread["100%"])) == (min(scores), max(scores))
        bars = {float(row["score"]): int(row["rows"]) for row in table(found["histogram_score"])}
        assert bars == Counter(scores)
        assert found["total_cost_usd"] == pytest.approx(
            sum(row["api_cost_usd"] or 0 for row in rows)
        )
        assert [row["partition"] for row in table(found["partitions"])] == [B, A], "worst first"
        by_stage = {row["stage"]: row for row in table(found["stages"])}
        assert by_stage["raw"]["rows"] == by_stage["scores"]["rows"] == str(len(rows))

    def test_what_is_not_known_is_absent(self, project: Project) -> None:
        project.materialize([A])
        assert "total_cost_usd" not in shown(project), "there are no prices"

    def test_a_files_own_numbers_tell_what_this_run_paid(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_model({"prices": PRICES})
        server.set_faults(Faults(rate_malformed=1))
        first = project.score(A)
        assert first.numbers["repair_turns"] == first.rows
        assert first.numbers["run_cost_usd"] == pytest.approx(first.numbers["cost_usd"])
        assert (first.numbers["run_cost_usd"] > 0, first.numbers["waits"]) == (True, 0)
        again = project.score(A)
        assert again.numbers["run_cost_usd"] == again.numbers["waits"] == 0
        assert again.numbers["cost_usd"] == first.numbers["cost_usd"]
        assert again.numbers["repair_turns"] == first.rows

        project.write_model({"chat_config": {"temperature": 1}})
        server.set_faults(Faults(rate_429=0.5))
        unpriced = project.score(A).numbers
        assert not {"run_cost_usd", "cost_usd"} & unpriced.keys(), "there are no prices"
        assert unpriced["waits"] == unpriced["requests_sent"] - first.rows > 0

    def test_says_how_many_files_are_out_of_date_and_why(self, project: Project) -> None:
        project.materialize()
        assert shown(project)["files_out_of_date"] == 0
        assert note_overviews(project.instance, project.steps()) == []

        project.write_input(A, some_rows(3, "new"))
        assert note_overviews(project.instance, project.steps()) == ["summary"]
        (row,) = table(shown(project)["out_of_date"])
        assert row == {"why": "the input file has changed", "files": "1", "first": A}

        before = project.scores(B)[0]["api_prompt"]
        project.write_prompt({"prompt_template": {"prompt_text": "Rate it anew: {text}"}})
        assert note_overviews(project.instance, project.steps()) == ["summary"]
        found = shown(project)
        assert found["files_out_of_date"] == found["files_done"] == 3
        whys = {row["why"]: row["files"] for row in table(found["out_of_date"])}
        (why,) = (why for why in whys if before in why)
        assert whys[why] == "2" and ", now " in why
        project.materialize()
        assert shown(project)["files_out_of_date"] == 0

    def test_rejected_files_are_told_apart(self, project: Project, server: RehearsalServer) -> None:
        server.set_faults(Faults(rate_filtered=1))
        project.write_task({"retry": {"max_repair_turns": 0}})
        project.materialize([A])
        found = shown(project)
        assert (found["files_done"], found["files_rejected"], found["files_missing"]) == (0, 1, 2)
        (rejected,) = table(found["rejected"])
        assert rejected == {"partition": A, "rows": "4", "failed": "content_filter 4"}

    def test_is_current_though_files_are_missing(
        self, project: Project, server: RehearsalServer
    ) -> None:
        """For Dagster, which compares it with all partitions of what it sums up."""

        def status() -> StaleStatus:
            graph = project.definitions().resolve_asset_graph()
            context = LoadingContextForTest(project.instance)
            resolver = CachingStaleStatusResolver(project.instance, graph, context)
            return resolver.get_status(project.asset_key("summary"))

        server.set_faults(Faults(rate_filtered=1))
        project.materialize([A])
        assert status() == FRESH, "though nothing was accepted"
        server.set_faults(NO_FAULTS)
        project.materialize([B])
        assert status() == FRESH

    def test_housekeeping_keeps_it_current_once_a_minute(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sensor = housekeeping_sensor([project.steps().spec])

        def look(cursor: str) -> tuple[str, str]:
            context = dg.build_sensor_context(instance=project.instance, cursor=cursor)
            return str(sensor(context)), context.cursor or ""

        told, cursor = look("")
        assert "summary" not in told, "there is nothing to sum up"
        project.score(A)  # by a process that has told no Dagster
        assert "rate: summary" not in look(cursor)[0]
        told, cursor = look(str(float(cursor) - OVERVIEWS_EVERY_S))
        assert "rate: summary" in told
        assert shown(project)["rows_in"] == len(project.scores(A))
        assert "rate: summary" not in look(str(float(cursor) - OVERVIEWS_EVERY_S))[0]

    def test_shows_nothing_of_what_there_is_none(self, distilling: Project) -> None:
        distilling.write_chain(max_failure_rate=1)
        distilling.write_dataset("Chats", [{"conversations": []}])
        distilling.materialize()
        found = shown(distilling)
        assert "scores" not in found and "histogram_messages" not in found

    def test_is_an_asset_like_others(self, project: Project) -> None:
        project.materialize([A])
        key = project.asset_key("summary")
        specs = {spec.key: spec for spec in project.definitions().resolve_all_asset_specs()}
        assert specs[key].partitions_def is None
        for _ in range(2):
            job = project.definitions().resolve_implicit_global_asset_job_def()
            result = job.execute_in_process(instance=project.instance, asset_selection=[key])
            assert result.success
            assert [each.passed for each in result.get_asset_check_evaluations()] == [True]
            assert shown(project)["rows_in"] == len(project.scores(A))

    def test_of_a_chain(self, distilling: Project) -> None:
        distilling.write_chain(max_failure_rate=1)
        distilling.write_dataset("Chats", [chat(number) for number in range(3)])
        distilling.write_dataset("Ins", [instruction(number) for number in range(4)])
        distilling.materialize()
        rows = sum(len(distilling.scores(name)) for name in (ALL, ONLY_INS))
        found = shown(distilling)
        assert found["rows_in"] == rows > 0
        assert found["merge_groups_done"] == 2
        stages = [row["stage"] for row in table(found["stages"])]
        assert stages == [stage.name for stage in distilling.steps().stages]


NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False)
)


class TestDistribution:
    @given(st.lists(NUMBERS, min_size=1, max_size=800), st.integers(0, 800))
    def test_of_parts_is_that_of_all(self, values: list[float], cut: int) -> None:
        found = Distribution()
        for part in (values[:cut], values[cut:]):
            own = Distribution()
            for value in part:
                own.add(value)
            found.join(own)
        assert found.rows == len(values) == sum(rows for _, rows in found.bins())
        assert math.isclose(found.mean, statistics.fmean(values), rel_tol=1e-9, abs_tol=1e-6)
        median, ordered = found.quantile(0.5), sorted(values)
        low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
        slack = 0.06 * max(abs(low), abs(high))
        assert low - slack <= median <= high + slack
        assert len(found.bins()) <= 20

    def test_small_integers_are_exact(self) -> None:
        found = Distribution()
        for value in (1, 5, 5, 999):
            found.add(value)
        assert found.counts == {1: 1, 5: 2, 999: 1}
        assert (found.quantile(0), found.quantile(0.5), found.quantile(1)) == (1, 5, 999)
        assert found.bins() == [("1", 1), ("5", 2), ("999", 1)]
