"""Preprocessors in whole runs: ours on what they are for, the user's own, processes, clean data."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import checkout, rendergit_cxml, repomix_xml, tracked_texts
from pages import ROOT, write_examples
from preprocessing import preprocessed, published
from project import TASK, Project, read_rows, some_rows, until, write_rows
from s3_server import S3Server

from modelcall_assets.config.preprocess import ENCODINGS
from modelcall_assets.defs.instance import register
from modelcall_assets.errors import InputError, SetupError, WorkerDied
from modelcall_assets.stages.pieces import ERROR_COLUMN
from modelcall_assets.stages.report import Tally, counted
from modelcall_assets.transforms import texts
from modelcall_assets.transforms.preprocessor import FACTS, GithubRawCode, TripletFilter
from modelcall_assets.transforms.texts import count_tokens

CODE = "def f(x):\n    return x\n"


@pytest.fixture
def project(bare: Project) -> Project:
    return bare


def own(folder: Path, source: str, module: str) -> str:
    """A module of the user's in the project root; module names are used once."""
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    return module


def task(
    project: Project, script: str, data: Mapping[str, Any] | None = None, **preprocess: Any
) -> None:
    """Rates the truncated column; the prompt knows it as `text`."""
    tokens = preprocess.get("max_tokens", 8192)
    block = {"enabled": True, "script_type": script, "max_tokens": tokens, **preprocess}
    block.setdefault("output_folder", "data/{task_name}/preprocessed")
    column = f"content_truncate_{tokens // 1024}k"
    data = {"input_key": column, "prompt_format_key": "text", **(data or {})}
    project.write_task({"data": data, "preprocess": block, "max_failure_rate": 1})


def error_of(row: Mapping[str, Any]) -> dict[str, str]:
    return orjson.loads(row[ERROR_COLUMN])


class TestLaws:
    OWN = """
        class Own:
            def process_item(self, item):
                if item["n"] == 1:
                    return None
                return {"id": item["id"], "text": item["text"], "n": 10 // item["n"]}
    """
    lines = st.lists(
        st.fixed_dictionaries(
            {"n": st.integers(0, 3)},
            optional={"text": st.none() | st.integers(0, 9) | st.text(max_size=30)},
        )
        | st.sampled_from([b"{", b"[1]", b"  "]),
        max_size=12,
    )

    @pytest.mark.parametrize("script", ["universal", "github_raw_code", "triplet_filter", "own"])
    @settings(max_examples=60)
    @given(lines=lines)
    def test_conservation_order_and_budget(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        script: str,
        lines: Sequence[dict[str, Any] | bytes],
    ) -> None:
        folder = tmp_path_factory.mktemp("in")
        path = write_rows(
            folder / "in.jsonl",
            [
                line if isinstance(line, bytes) else {"text": "x", **line, "id": str(at)}
                for at, line in enumerate(lines)
            ],
        )
        if script == "own":
            script = f"{own(folder, self.OWN, 'laws_own')}:Own"
        report = preprocessed(path, script_type=script, max_tokens=4)
        rows = published(path)
        assert report.rows_in == sum(line != b"  " for line in lines)
        assert report.rows_in == report.rows + report.dropped.total()
        assert (len(rows), sum(row[ERROR_COLUMN] is not None for row in rows)) == (
            report.rows,
            report.failed,
        )
        order = [int(row["id"]) for row in rows if len(row["id"]) < 32]
        assert order == sorted(order)
        for row in rows:
            cut = row["content_truncate_0k"]
            assert count_tokens(cut or "") <= 4
            assert (row.get("text") or "").startswith(cut or "")
        assert preprocessed(path, script_type=script, max_tokens=4) == report


class TestGithubRawCode:
    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_both_kinds_of_files(self, tmp_path: Path, suffix: str) -> None:
        rows = [
            {"id": "a", "code": CODE, "path": "src/main.rs", "source": "mine"},
            {"id": None, "code": CODE * 400, "path": "Makefile", "source": None},
        ]
        path = tmp_path / f"in.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            write_rows(tmp_path / "in.jsonl", rows)
        report = preprocessed(path, script_type="github_raw_code", max_tokens=1024)
        first, second = published(path)
        assert first == {
            **rows[0],
            "text": CODE,
            "language": "Rust",
            "content_truncate_1k": CODE,
            ERROR_COLUMN: None,
        }
        assert (second["language"], second["source"]) == ("Makefile", "github_raw_code")
        assert len(second["id"]) == 32
        assert count_tokens(second["content_truncate_1k"]) in range(1020, 1025)
        assert report.failed == 0

    def test_which_column_is_the_text(self) -> None:
        process = GithubRawCode().process_item
        assert process({"body": "b", "code": "c"})["text"] == "c"
        assert process({"description": "d"})["text"] == "d"
        with pytest.raises(KeyError, match="none of the columns text, content, code"):
            process({"message": "m"})
        with pytest.raises(TypeError, match="not a string but of type int"):
            process({"text": 5})

    @pytest.mark.parametrize(
        ("item", "language"),
        [
            ({"path": "a/b.d.ts"}, "TypeScript"),
            ({"path": "a\\b.PY"}, "Python"),
            ({"file_path": "Dockerfile"}, "Docker"),
            ({"path": None, "filename": "x.cs"}, "C#"),
            ({"name": "q.r"}, "R"),
            ({"name": "a.pl"}, "Perl"),
            ({"name": "notes.txt"}, None),
            ({"name": "nothing"}, None),
            ({"path": 5}, None),
            ({"path": "a.py", "language": "Cython"}, "Cython"),
            ({"path": "a.py", "language": ["C", "D"]}, "['C', 'D']"),
            ({"path": "a.py", "language": ""}, "Python"),
        ],
    )
    def test_the_language_comes_from_the_name(
        self, item: dict[str, Any], language: str | None
    ) -> None:
        assert GithubRawCode().process_item({"text": CODE, **item})["language"] == language

    def test_content_tells_where_the_name_does_not(self) -> None:
        pytest.importorskip("magika")
        main = "public static void main(String[] args) { System.out.println(1); }"
        code = f"package a.b;\n\nimport java.util.*;\n\npublic class Main {{\n  {main}\n}}\n" * 3
        process = GithubRawCode(by_content=True).process_item
        assert process({"text": code})["language"] == "Java"
        assert process({"text": code, "path": "a.py"})["language"] == "Python"
        assert process({"text": "  "})["language"] is None


class TestTripletFilter:
    def test_languages_are_told_apart(self) -> None:
        paths = [
            *("pt_data_C_part01.jsonl", "pt_data_C_Sharp_part10.jsonl"),
            *("pt_data_C_Sharp_part2.jsonl", "pt_data_Go.jsonl", "pt_data_Go_part1.parquet"),
            *("deep/pt_data_C_part1.jsonl", "notes.jsonl", "pt_data_.jsonl", "pt_data_X.md"),
        ]
        assert TripletFilter().get_file_list(paths) == {
            "C": ["pt_data_C_part01.jsonl"],
            "C_Sharp": ["pt_data_C_Sharp_part2.jsonl", "pt_data_C_Sharp_part10.jsonl"],
            "Go": ["pt_data_Go.jsonl", "pt_data_Go_part1.parquet"],
            "deep/C": ["deep/pt_data_C_part1.jsonl"],
        }
        assert list(TripletFilter(["C"]).get_file_list(paths)) == ["C", "deep/C"]
        with pytest.raises(InputError, match="no parts of Rust; there are: C, C_Sharp, Go"):
            TripletFilter(["Rust", "C"]).get_file_list(paths)
        with pytest.raises(InputError, match="no file is called pt_data_"):
            TripletFilter().get_file_list(["a.jsonl"])

    def test_facts_are_for_rows_that_have_a_text(self) -> None:
        process = TripletFilter().process_item
        assert process({"text": "x", "lg": "Go"}) == {**FACTS, "text": "x", "lg": "Go",
                                                      "language": "Go"}  # fmt: skip
        assert process({"text": "x"})["language"] == "Unknown"
        assert set(process({"text": ""}).values()) == {None, ""}
        with pytest.raises(TypeError):
            process({"text": ["x"]})

    def test_parts_of_a_language_are_one_partition(self, project: Project) -> None:
        project.write_input("pt_data_C_part2.jsonl", [{"id": "c2", "text": "two", "n": 1}])
        project.write_input("pt_data_C_part10.jsonl", [{"id": "c10", "text": "ten", "n": "x"}])
        rows = [{"id": "s1", "text": "sharp", "when": 5}]
        project.write_input("pt_data_C_Sharp_part01.parquet", rows)
        project.write_input("pt_data_C_Sharp_part02.jsonl", [b"{bad", {"text": "no id", "b": 1.5}])
        task(project, "triplet_filter")
        summary = project.materialize()
        assert (summary.failed, summary.ran["scores"]) == ([], 2)
        assert [(row["id"], row["n"]) for row in project.rows("C", "preprocessed")] == [
            ("c2", "1"),
            ("c10", '"x"'),
        ]
        first, bad, last = project.rows("C_Sharp", "preprocessed")
        assert (first["when"], first["b"], last["when"], last["b"]) == (5, None, None, 1.5)
        assert error_of(bad)["reason"] == "bad_line"
        raw = project.manifest("C_Sharp", "raw")
        names = [(member["name"], member["rows"]) for member in raw.detail["members"]]
        assert names == [("pt_data_C_Sharp_part01.parquet", 1), ("pt_data_C_Sharp_part02.jsonl", 2)]
        assert (raw.rows, raw.failed) == (3, 1)
        scored = project.scores("C_Sharp")
        assert [row["api_status"] for row in scored] == ["success", "error", "success"]

    def test_an_id_does_not_depend_on_the_parts_before(self, project: Project) -> None:
        project.write_input("pt_data_C_part2.jsonl", [{"text": "two"}])
        task(project, "triplet_filter")
        steps = project.steps()
        steps.stage("raw").make("C", Tally())
        steps.stage("preprocessed").make("C", Tally())
        (before,) = project.rows("C", "preprocessed")
        project.write_input("pt_data_C_part1.jsonl", [{"text": "one"}, {"text": "more"}])
        steps.stage("raw").make("C", Tally())
        steps.stage("preprocessed").make("C", Tally())
        assert [row["id"] for row in project.rows("C", "preprocessed")][2] == before["id"]


class TestGroups:
    """Partitions of several files, wherever partitions are looked at."""

    @pytest.fixture
    def packs(self, project: Project) -> Path:
        folder = project.input_folder
        for language in ("Go", "Rust"):
            (folder / language).mkdir()
            pack = repomix_xml({"README.md": "# Read\n", f"a.{language.lower()}": CODE})
            (folder / language / "ann_my_lib_0a1b2c.xml").write_bytes(pack)
        (folder / "Go" / "bob_x_99.cxml").write_bytes(rendergit_cxml({"m.go": CODE}))
        task(project, "repo_xml")
        return folder

    def test_a_new_pack_makes_its_language_due(self, project: Project, packs: Path) -> None:
        launched, cursor = project.launched()
        assert launched == [({"raw"}, ["Go", "Rust"])]
        assert project.materialize().failed == []
        _, cursor = project.look(cursor)
        (packs / "Rust" / "eve_y_77.cxml").write_bytes(rendergit_cxml({"b.rs": "fn main() {}"}))
        launched, _ = project.launched(cursor)
        assert launched == [({"raw"}, ["Rust"])]
        assert project.materialize().failed == []
        assert [row["repo_user"] for row in project.rows("Rust", "preprocessed")] == ["ann", "eve"]

    def test_packs_are_rows(self, project: Project, packs: Path) -> None:
        (packs / "Go" / "zed_broken_1.xml").write_text("no pack at all")
        (packs / "Go" / "zed_cut_2.xml").write_bytes(
            repomix_xml({"a.go": CODE, "b.go": CODE})[:-30]
        )
        assert project.materialize().failed == []
        ann, bob, broken, cut = project.rows("Go", "preprocessed")
        assert (ann["repo_full_name"], ann["language"], bob["packaging_tool"]) == (
            "ann/my_lib",
            "Go",
            "rendergit",
        )
        assert ann["xml_file_path"] == str(packs / "Go/ann_my_lib_0a1b2c.xml")
        assert ann["content_truncate_8k"] == ann["text"]
        assert error_of(broken)["reason"] == "preprocess_error"
        assert cut["pack_problem"] and not ann["pack_problem"]
        assert len({row["id"] for row in (ann, bob, broken, cut)}) == 4
        raw = project.manifest("Go", "raw")
        assert [member["whole"] for member in raw.detail["members"]] == [True] * 4
        statuses = [row["api_status"] for row in project.scores("Go")]
        assert statuses == ["success", "success", "error", "success"]
        event = project.instance.get_latest_materialization_event(
            dg.AssetKey(["rate", "preprocessed"])
        )
        assert event and event.asset_materialization
        project.instance.get_latest_data_version_record(
            dg.AssetKey(["rate", "raw"]), partition_key="Go"
        )

    def test_commands_know_them(self, project: Project, packs: Path) -> None:
        (packs / "Go/notes.txt").write_text("not a pack")
        assert project.run("check", "--strict", TASK).code == 0
        assert re.search(r"Go\s+│ new │\s+2 ", project.run("plan", TASK).out)
        assert "merged representation" in project.run("try", TASK, "--rows", "1").out
        first = project.run("run-task", TASK)
        assert "2 of 2 files scored: 3 rows, 3 succeeded" in first.out
        assert "nothing to do" in project.run("run-task", TASK).out
        shutil.rmtree(packs / "Go")
        assert "input is gone" in project.run("clean", TASK, "--deleted-inputs", "--yes").out
        assert not project.output("Go", "preprocessed").exists()
        assert project.output("Rust", "preprocessed").exists()

    def test_caps_are_shared_by_the_groups(self, project: Project, packs: Path) -> None:
        for at in range(5):
            (packs / "Go" / f"more_{at}_{at}.xml").write_bytes(repomix_xml({"a": "b"}))
        task(project, "repo_xml", num_files=4)
        steps = project.steps()
        assert [len(steps.inputs.members(key)) for key in ("Go", "Rust")] == [2, 1]
        task(project, "repo_xml", num_files=1)
        assert [len(project.steps().inputs.members(key)) for key in ("Go", "Rust")] == [1, 1]
        task(project, "repo_xml", languages=["Rust"])
        assert [file.key_path for file in project.steps().inputs.files()] == ["Rust"]

    def test_a_pack_in_no_folder_is_told(self, project: Project, packs: Path) -> None:
        (packs / "stray_a_1.xml").write_bytes(repomix_xml({"a": "b"}))
        with pytest.raises(InputError, match=r"stray_a_1\.xml: in no folder"):
            project.steps().inputs.files()

    def test_old_stat_files_where_asked(self, project: Project, packs: Path) -> None:
        task(project, "repo_xml", stat_folder="data/stats")
        steps = project.steps()
        steps.stage("raw").make("Go", Tally())
        steps.stage("preprocessed").make("Go", Tally())
        stat = orjson.loads((project.root / "data/stats/preprocess/Go_combined.json").read_bytes())
        assert (stat["language"], stat["num_xml_files"], stat["n_sample"]) == ("Go", 2, 2)
        assert stat["formatted_file_path"] == str(steps.stage("preprocessed").output("Go"))
        assert stat["taged_file_paths"] == [] and stat["processing_complete"]

    def test_texts_that_the_prompt_does_not_ask_for_are_not_decoded(
        self, project: Project, packs: Path
    ) -> None:
        size = 40 << 20
        long = repomix_xml({"a.go": "// nothing new under the sun\n" * (size // 29)})
        (packs / "Go" / "eve_long_1.xml").write_bytes(long)
        task(project, "repo_xml", max_tokens=1024)
        steps = project.steps()
        steps.stage("raw").make("Go", Tally())
        steps.stage("preprocessed").make("Go", Tally())

        tracemalloc.start()
        report = project.score("Go")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (report.rows, report.ok) == (3, 3)
        assert peak < size / 4
        assert max(row["content_length"] for row in project.scores("Go")) > size

    def test_in_a_store_and_in_processes(
        self, project: Project, packs: Path, s3_server: S3Server, bucket: str
    ) -> None:
        """Each process opens the store itself."""
        client = s3_server.client()
        for path in sorted(packs.rglob("*.*xml")):
            key = f"packs/{path.relative_to(packs)}"
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
        client.close()
        (project.root / ".env").write_text(f"K={s3_server.key}\nS={s3_server.secret}\n")
        lab = {
            "prefix": "s3://",
            "endpoint": s3_server.endpoint,
            "region": s3_server.region,
            "access_key": "${K}",
            "secret_key": "${S}",
        }
        project.write_yaml("storage", {"stores": {"lab": lab}})
        where = f"s3://{bucket}"
        data = {"input_folder": f"{where}/packs", "output_folder": f"{where}/scores"}
        task(project, "repo_xml", data=data, num_proc=2, output_folder=f"{where}/pre")
        steps = project.steps()
        assert [file.key_path for file in steps.inputs.files()] == ["Go", "Rust"]
        steps.stage("raw").make("Go", Tally())
        report = steps.stage("preprocessed").make("Go", Tally())
        assert (report.rows, report.failed) == (2, 0)
        assert report.sample[0]["xml_file_path"] == f"{where}/packs/Go/ann_my_lib_0a1b2c.xml"


class TestOwn:
    def test_the_example_of_the_page_runs(self, project: Project) -> None:
        for path in write_examples(ROOT / "docs/preprocessing.md", project.root):
            if path.suffix == ".yaml":
                path.write_text(path.read_text() + "max_failure_rate: 1\n")
        shutil.copytree(ROOT / "configs/prompts", project.root / "configs/prompts",
                        dirs_exist_ok=True)  # fmt: skip
        project.task, project.inputs = "forum", "data/forum"
        rows = [{"question": f"q{n}", "answer": "a", "votes": n} for n in range(4)]
        project.write_input("a.jsonl", [*rows, {"question": "q", "votes": 5}])
        assert project.run("run-task", project.task_file).code == 0
        texts = [row["text"] for row in project.rows("a.jsonl", "preprocessed")]
        assert texts == ["q2\n\na", "q3\n\na", None]
        made = project.manifest("a.jsonl", "preprocessed")
        assert (made.rows, made.dropped, made.failed) == (3, 2, 1)
        project.task, project.inputs = "clean_web", "data/web"
        mails = {"text": "Please write to ann@example.com about the new house. " * 3}
        french = {"text": "Bonjour tout le monde, je suis très content d'être ici ce soir. " * 3}
        project.write_input("b.jsonl", [mails, french, mails])
        assert project.run("run-task", project.task_file).code == 0
        (row,) = project.rows("b.jsonl", "preprocessed")
        assert ("@" not in row["text"], row["text_language"]) == (True, "en")

    def test_an_error_is_the_rows_own(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            class Strict:
                def process_item(self, item):
                    match item["do"]:
                        case "raise": raise RuntimeError("no good")
                        case "exit": raise SystemExit(3)
                        case "list": return [item]
                        case "keys": return {1: 2}
                    return item
            """,
            "own_strict",
        )
        todo = ("raise", "exit", "fine", "list", "keys")
        path = write_rows(tmp_path / "in.jsonl", [{"id": do, "do": do} for do in todo])
        report = preprocessed(path, script_type=f"{module}:Strict")
        rows = published(path)
        assert [row["id"] for row in rows] == [*todo]
        assert (report.failed, report.rows) == (4, 5)
        error = error_of(rows[0])
        assert error["reason"] == "preprocess_error"
        assert 'own_strict.py", line 5' in error["detail"]
        assert error["detail"].endswith("RuntimeError: no good")
        assert error["raw"] == '{"id":"raise","do":"raise"}'
        assert "returned list; expected a dict" in error_of(rows[3])["detail"]

    def test_its_errors_are_the_same_wherever_we_are_installed(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            import json
            from modelcall_assets.transforms.preprocessor import GithubRawCode

            class Strict(GithubRawCode):
                def process_item(self, item):
                    try:
                        return json.loads(item["text"])
                    except ValueError:
                        return super().process_item({**item, "text": 1})
            """,
            "own_frames",
        )
        path = write_rows(tmp_path / "in.jsonl", [{"text": "{"}])
        preprocessed(path, script_type=f"{module}:Strict")
        detail = error_of(published(path)[0])["detail"]
        files = re.findall('File "(.*)", line', detail)
        assert files == [str(tmp_path / "own_frames.py")] * 2
        assert "json.decoder.JSONDecodeError: Expecting property name" in detail
        assert detail.startswith("Traceback (most recent call last):\n")

    def test_reasons_to_leave_out_are_counted(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            from modelcall_assets.records.outcome import Dropped
            class Choosy:
                def process_item(self, item):
                    return None if item["n"] == 0 else Dropped("odd") if item["n"] % 2 else item
            """,
            "own_choosy",
        )
        path = write_rows(tmp_path / "in.jsonl", [{"n": n} for n in range(6)])
        report = preprocessed(path, script_type=f"{module}:Choosy")
        assert report.dropped == {"process_item": 1, "odd": 3}
        assert [row["n"] for row in published(path)] == [2, 4]

    def test_types_are_found_out_from_all_rows(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            class Typed:
                def process_item(self, item):
                    n = item["n"]
                    late = {"late": [n]} if n > 1500 else {}
                    return {"n": n, "half": n / 2, "mixed": n if n % 2 else str(n), **late}
            """,
            "own_typed",
        )
        path = write_rows(tmp_path / "in.jsonl", [{"n": n} for n in range(2000)])
        report = preprocessed(path, script_type=f"{module}:Typed")
        types = {field.name: str(field.type) for field in report.schema}
        assert (types["n"], types["half"], types["late"]) == (
            "int64",
            "double",
            "list<item: int64>",
        )
        rows = published(path)
        assert (rows[1999]["late"], rows[0]["late"], rows[1]["mixed"]) == ([1999], None, 1)
        assert rows[2]["mixed"] == "2"

    def test_declared_columns_are_kept_to(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            from modelcall_assets.transforms.preprocessor import Copied
            class Declared:
                def columns(self, names):
                    return {"when": Copied("at"), "text": "string", "n": "int"}
                def process_item(self, item):
                    return {"text": item["t"], "n": len(item["t"]), "other": 1}
            """,
            "own_declared",
        )
        moments = pa.array([1, None, 3], pa.timestamp("ns"))
        table = pa.table({"at": moments, "t": ["a", "bb", "ccc"]})
        pq.write_table(table, tmp_path / "in.parquet")
        preprocessed(tmp_path / "in.parquet", script_type=f"{module}:Declared")
        made = pq.read_table(tmp_path / "out/result.parquet")
        names = ["when", "text", "n", "id", "content_truncate_32k", ERROR_COLUMN]
        assert made.column_names == names
        assert made.column("when").type == moments.type
        assert made.column("n").to_pylist() == [1, 2, 3]

    def test_a_value_of_another_type_than_declared_fails_its_row(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            from modelcall_assets.transforms.preprocessor import Copied
            class Loose:
                values = [1, "x", 2**70, True, None, 5]
                def columns(self, names):
                    return {"text": Copied("text"), "clean": "string", "n": "int"}
                def process_item(self, item):
                    n = self.values[item["n"]]
                    item["text"] = "\\ud800" if n == 5 else "changed " + item["text"]
                    return {**item, "clean": item["text"], "n": n}
            """,
            "own_loose",
        )
        path = write_rows(tmp_path / "in.jsonl", [{"text": f"t{n}", "n": n} for n in range(6)])
        report = preprocessed(path, script_type=f"{module}:Loose")
        rows = published(path)
        assert [row["n"] for row in rows] == [1, 1, 2, 3, None, 5], "failed rows have the input's"
        assert [row["clean"] for row in rows[::4]] == ["changed t0", "changed t4"]
        assert rows[0]["text"] == "t0", "what is declared as copied is the input's"
        details = [error_of(rows[at])["detail"] for at in (1, 2, 3, 5)]
        assert "n: declared as int, but it is str" in details[0]
        assert "does not fit into 64 bits" in details[1]
        assert "n: declared as int, but it is bool" in details[2]
        assert "UnicodeEncodeError" in details[3] or "surrogate" in details[3]
        assert report.failed == 4

    def test_it_may_choose_the_files(self, project: Project) -> None:
        module = own(
            project.root,
            """
            class Notes:
                def get_file_list(self, paths):
                    notes = [path for path in paths if path.endswith(".txt")]
                    return {"all,notes": notes, "rows": ["r.jsonl"]}
                def process_item(self, item):
                    return {"text": item["text"], "path": item.get("path")}
            """,
            "own_notes",
        )
        folder = project.input_folder
        (folder / "deep").mkdir()
        (folder / "b.txt").write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn \xff")
        (folder / "deep/a.txt").write_text("one")
        (folder / "x.bin").write_bytes(b"\0")
        project.write_input("r.jsonl", [{"text": "row"}])
        task(project, f"{module}:Notes")
        summary = project.materialize()
        assert (summary.failed, summary.ran["scores"]) == ([], 2)
        texts = [(row["path"], row["text"]) for row in project.rows("all,notes", "preprocessed")]
        assert texts == [("b.txt", "grün \ufffd"), ("deep/a.txt", "one")]
        assert [row["text"] for row in project.rows("rows", "preprocessed")] == ["row"]

    def test_a_mistake_in_how_it_chooses_files_is_told_with_its_line(
        self, project: Project
    ) -> None:
        module = own(
            project.root,
            """
            class Wrong:
                def get_file_list(self, paths):
                    return {}["nope"]
                def process_item(self, item):
                    return item
            """,
            "own_wrong",
        )
        project.write_input("r.jsonl", [{"text": "row"}])
        task(project, f"{module}:Wrong")
        told = "get_file_list of the preprocessor failed: KeyError: 'nope' (own_wrong.py, line "
        for command in ("run-task", "check", "register"):
            ended = project.run(command, TASK)
            assert told in ended.told, ended
            assert "Traceback" not in ended.told

    def test_a_partition_of_nothing_is_told(self, project: Project) -> None:
        module = own(
            project.root,
            """
            class Empty:
                def get_file_list(self, paths):
                    return {"g": None}
                def process_item(self, item):
                    return item
            """,
            "own_empty",
        )
        project.write_input("r.jsonl", [{"text": "row"}])
        task(project, f"{module}:Empty")
        ended = project.run("register", TASK)
        assert "get_file_list: partition 'g' has no name or no files" in ended.told, ended

    def test_an_exception_names_the_file_and_the_line(self, project: Project) -> None:
        module = own(
            project.root,
            """
            class Wrong:
                def columns(self, given):
                    return {}["nope"]
                def process_item(self, item):
                    return item
            """,
            "own_columns",
        )
        for name in ("r.jsonl", "s.jsonl"):
            project.write_input(name, [{"text": "row"}])
        task(project, f"{module}:Wrong")
        ended = project.run("run-task", TASK, "--file", "r.jsonl")
        assert "r.jsonl: KeyError: 'nope' (own_columns.py, line " in ended.told, ended
        assert "Traceback" not in ended.told

    def test_files_may_be_partitions_by_themselves(self, project: Project) -> None:
        module = own(
            project.root,
            """
            class Each:
                def get_file_list(self, paths):
                    return [path for path in paths if path.endswith(".txt")]
                def process_item(self, item):
                    return item
            class Absent(Each):
                def get_file_list(self, paths):
                    return {"a": ["gone.txt"]}
            """,
            "own_each",
        )
        (project.input_folder / "b.txt").write_text("one")
        task(project, f"{module}:Each")
        steps = project.steps()
        assert [file.key_path for file in steps.inputs.files()] == ["b.txt"]
        steps.stage("raw").make("b.txt", Tally())
        assert steps.stage("preprocessed").make("b.txt", Tally()).rows == 1
        task(project, f"{module}:Absent")
        with pytest.raises(InputError, match=r"'a' has 'gone\.txt', which is not there"):
            project.steps().inputs.files()

    @pytest.mark.parametrize(
        ("name", "options", "told"),
        [
            ("own_gone:X", {}, "import own_gone raised ModuleNotFoundError"),
            ("own_wrong:Gone", {}, "own_wrong has nothing called Gone"),
            ("own_wrong:Bare", {}, "own_wrong:Bare has no method process_item(item) -> dict"),
            ("own_wrong:Picky", {"b": 1, "a": 0}, "options.b: unknown; leave it out"),
            ("own_wrong:Picky", {"aa": 1}, "options.aa: unknown; expected one of a; did you"),
            ("own_wrong:Picky", {}, "options.a: missing"),
            ("own_wrong:Picky", {"a": -1}, "options: a: expected 0 or more"),
            ("own_wrong:Picky", {"a": "1"}, "own_wrong:Picky() raised TypeError: "),
            ("own_wrong:made", {"b": 1}, "own_wrong:made takes no options"),
        ],
    )
    def test_what_cannot_be_had_is_told_before_anything_runs(
        self, project: Project, name: str, options: dict[str, Any], told: str
    ) -> None:
        own(
            project.root,
            """
            class Bare: pass
            class Picky:
                def __init__(self, a):
                    if a < 0:
                        raise ValueError("a: expected 0 or more")
                def process_item(self, item): return item
            made = Picky(1)
            """,
            "own_wrong",
        )
        task(project, name, options=options)
        told = told if told.startswith("options") else f"script_type: {told}"
        field = f"{TASK}:preprocess.{told}"
        assert field in project.run("check", TASK).out
        ended = project.run("run-task", TASK)
        assert (ended.code, field in ended.err) == (2, True), ended
        project.definitions()

    def test_edited_code_makes_its_rows_out_of_date(self, project: Project) -> None:
        source = "class Own:\n    def process_item(self, item): return item\n"
        versions = []
        for number in range(2):
            module = own(project.root, source + f"# {number}\n", f"own_edited_{number}")
            task(project, f"{module}:Own")
            shape = project.steps().stage("preprocessed").shape()
            versions.append(shape["code"].popitem()[1])
        assert versions[0] != versions[1]


@pytest.mark.slow
class TestProcesses:
    def rows(self, folder: Path) -> Path:
        texts = (CODE * (200 + n % 50) + f"# {n}\n" for n in range(3000))
        rows = [{"id": str(n), "code": text, "n": n} for n, text in enumerate(texts)]
        rows[1500]["code"] = 5
        return write_rows(folder / "in.jsonl", [*rows, b"{bad"])

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_the_result_is_the_same(self, tmp_path: Path, suffix: str) -> None:
        path = self.rows(tmp_path)
        if suffix == "parquet":
            lines = [orjson.loads(line) for line in path.read_bytes().splitlines()[:-1]]
            table = pa.Table.from_pylist([{**line, "code": str(line["code"])} for line in lines])
            path = tmp_path / "in.parquet"
            pq.write_table(table, path, row_group_size=700)
        fields = {"script_type": "github_raw_code", "max_tokens": 1024, "dedup": {"exact": True}}
        alone = preprocessed(path, **fields)
        one = pq.read_table(tmp_path / "out/result.parquet")
        shared = preprocessed(path, processes=3, **fields)
        assert shared == alone
        assert pq.read_table(tmp_path / "out/result.parquet").equals(one)
        rows = published(path)[:3000]
        assert [row["n"] for row in rows] == [*range(3000)]
        failed = [row["n"] for row in rows if row[ERROR_COLUMN]]
        assert failed == ([1500] if suffix == "jsonl" else [])

    def test_the_users_own_too(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            class Shared:
                def process_item(self, item):
                    return {"text": item["code"], "n": 1 / (item["n"] % 100)}
            """,
            "own_shared",
        )
        path = self.rows(tmp_path)
        alone = preprocessed(path, script_type=f"{module}:Shared")
        assert preprocessed(path, script_type=f"{module}:Shared", processes=2) == alone
        assert alone.failed == 30 + 1
        assert "ZeroDivisionError" in error_of(published(path)[2900])["detail"]

    def test_a_bad_line_ends_it_where_the_task_wants_that(self, project: Project) -> None:
        path = self.rows(project.input_folder)
        task(project, "github_raw_code", {"on_bad_line": "keep"}, num_proc=2)
        project.steps().stage("raw").make(path.name, Tally())
        task(project, "github_raw_code", {"on_bad_line": "fail"}, num_proc=2)
        with pytest.raises(InputError, match="line 3001"):
            project.steps().stage("preprocessed").make(path.name, Tally())
        assert not project.output(path.name, "preprocessed").exists()

    def test_a_process_that_is_killed_is_told(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            import multiprocessing, os, signal
            class Deadly:
                def process_item(self, item):
                    if multiprocessing.parent_process() and item["n"] == 2500:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return {"n": item["n"]}
            """,
            "own_deadly",
        )
        path = self.rows(tmp_path)
        with pytest.raises(WorkerDied, match="one of 2 processes of"):
            preprocessed(path, script_type=f"{module}:Deadly", processes=2)
        assert not (tmp_path / "out/result.parquet").exists()

    def test_processes_end_with_a_run_that_is_killed(self, project: Project) -> None:
        module = own(
            project.root,
            """
            import multiprocessing, os, time
            class Slow:
                def process_item(self, item):
                    if multiprocessing.parent_process():
                        open(f"pids/{os.getpid()}", "w").close()
                        time.sleep(600)
                    return item
            """,
            "own_slow",
        )
        self.rows(project.input_folder)
        pids = project.root / "pids"
        pids.mkdir()
        task(project, f"{module}:Slow", num_proc=2)
        project.signalled(lambda: any(pids.iterdir()), "run-task", TASK)
        started = [int(path.name) for path in pids.iterdir()]
        until(lambda: not any(map(is_running, started)))

    def test_an_interrupted_run_ends_soon_and_publishes_nothing(self, project: Project) -> None:
        module = own(
            project.root,
            """
            import time
            class Slowly:
                def process_item(self, item):
                    open("began", "w").close()
                    time.sleep(0.002)
                    return {"text": "x"}
            """,
            "own_slowly",
        )
        path = project.write_input("a.jsonl", [{"n": n} for n in range(30_000)])
        task(project, f"{module}:Slowly")
        began = (project.root / "began").exists
        ended = project.signalled(began, "run-task", TASK, number=signal.SIGINT)
        assert ended.code != 0 and "Traceback" not in ended.told, ended
        assert "preprocessed: " in ended.err and " of 30,000 rows" in ended.err
        assert not project.output(path.name, "preprocessed").exists()


def test_what_nobody_has_declared_loses_nothing(tmp_path: Path) -> None:
    module = own(
        tmp_path,
        """
        from collections import OrderedDict
        class Rules:
            def process_item(self, item):
                of = {"name": b"gr\\xc3\\xbcn", "of": OrderedDict(a=1)}
                return {**item, "blob": b"\\xff\\x00", **of}
        """,
        "own_values",
    )
    path = write_rows(tmp_path / "in.jsonl", [{"text": "x"}])
    preprocessed(path, script_type=f"{module}:Rules")
    (row,) = published(path)
    assert (row["blob"], row["name"], row["of"]) == ("/wA=", "grün", {"a": 1})


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class TestCleanData:
    def test_what_is_scrubbed_is_counted_and_gone_everywhere(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            import re
            class Keys:
                def scrub(self, text):
                    if "boom" in text: raise ValueError("no")
                    clean, count = re.subn(r"sk-\\w+", "<key>", text)
                    return clean, {"key": count} if count else {}
            class Digits:
                def scrub(self, text):
                    clean, count = re.subn(r"\\d{4,}", "#", text)
                    return clean, {"digits": count}
            """,
            "own_scrub",
        )
        texts = ["a sk-1 b sk-2", "phone 12345", "clean", "boom"]
        path = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in texts])
        report = preprocessed(path, scrub=[f"{module}:Keys", f"{module}:Digits"], max_tokens=1024)
        rows = published(path)
        assert [row["text"] for row in rows[:3]] == ["a <key> b <key>", "phone #", "clean"]
        assert [row["content_truncate_1k"] for row in rows[:3]] == [row["text"] for row in rows[:3]]
        assert report.tables["removed_by_kind"] == counted("kind", {"key": 2, "digits": 1})
        assert "ValueError: no" in error_of(rows[3])["detail"]

    def test_what_is_scrubbed_and_not_counted_is_gone_too(self, tmp_path: Path) -> None:
        module = own(
            tmp_path,
            """
            class Silent:
                def scrub(self, text):
                    return text.replace("secret", "***"), {}
            """,
            "own_silent_scrub",
        )
        path = write_rows(tmp_path / "in.jsonl", [{"text": "a secret"}, {"text": "none"}])
        preprocessed(path, scrub=[f"{module}:Silent"], max_tokens=1024)
        rows = published(path)
        assert [row["text"] for row in rows] == ["a ***", "none"]
        assert [row["content_truncate_1k"] for row in rows] == ["a ***", "none"]

    def test_languages_are_told_and_chosen(self, tmp_path: Path) -> None:
        pytest.importorskip("py3langid")
        english = "The quick brown fox jumps over the lazy dog and runs into the forest."
        chinese = "人工智能是计算机科学的一个分支，它企图了解智能的实质。"
        path = write_rows(
            tmp_path / "in.jsonl",
            [{"text": text} for text in (english, chinese, "123 456", english)],
        )
        report = preprocessed(path, language_id={"enabled": True})
        assert [row["text_language"] for row in published(path)] == ["en", "zh", None, "en"]
        report = preprocessed(path, language_id={"enabled": True, "keep": ["zh"]})
        assert report.dropped == {"language_id: en": 2, "language_id: none": 1}

    def test_duplicates_within_a_task(self, project: Project) -> None:
        pytest.importorskip("rensa")
        words = "the house by the river was sold last year to a family from the north with two dogs"
        near = f"{words} and a cat " * 3
        project.write_input("a.jsonl", [{"text": text} for text in ("same", near, "same", "only")])
        project.write_input("b.jsonl", [{"text": text} for text in ("same", near + "too", "new")])
        task(project, "universal", dedup={"exact": True, "near": 0.8})
        for key in ("a.jsonl", "b.jsonl"):
            assert project.materialize([key]).failed == []
        assert [row["text"] for row in project.rows("a.jsonl", "preprocessed")] == [
            "same",
            near,
            "only",
        ]
        assert [row["text"] for row in project.rows("b.jsonl", "preprocessed")] == ["new"]
        made = project.manifest("b.jsonl", "preprocessed")
        assert (made.rows, made.dropped) == (1, 2)
        steps = project.steps()
        again = steps.stage("preprocessed").make("b.jsonl", Tally())
        assert again.dropped == {"dedup: exact": 1, "dedup: near": 1}
        assert again.data_version == made.data_version

    def test_a_plan_says_what_will_be_left_out(self, project: Project) -> None:
        texts = ["long enough"] * 6 + ["no"] * 2
        rows = [{"text": text} for text in texts] + [b"{bad", {"text": 5}]
        project.write_input("a.jsonl", rows * 10)
        task(project, "universal", filters={"min_text_length": 3})
        planned = project.run("plan", TASK)
        assert planned.code == 0, planned
        assert "about 20 rows of a.jsonl are dropped by min_text_length" in planned.out
        assert "about 20 rows of a.jsonl cannot be asked: bad_line" in planned.out
        assert "to send: about 60 requests" in planned.out

    def test_a_package_that_is_missing_stops_the_run_before_it_begins(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from modelcall_assets.stages import recipe

        monkeypatch.setattr(recipe, "find_spec", lambda name: None)
        task(project, "universal", dedup={"near": 0.8}, language_id={"enabled": True})
        checked = project.run("check", TASK)
        assert "pip install 'modelcall-assets[near-dedup]'" in checked.out
        assert "pip install 'modelcall-assets[text-language]'" in checked.out
        project.write_input("a.jsonl", some_rows(4))
        steps = project.steps()
        steps.stage("raw").make("a.jsonl", Tally())
        with pytest.raises(SetupError, match="the package rensa is not installed"):
            steps.stage("preprocessed").make("a.jsonl", Tally())


class TestTokenizers:
    def test_the_names_are_those_that_come_with_the_program(self) -> None:
        assert texts.ENCODINGS == ENCODINGS

    def test_one_of_hugging_face(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        made.train_from_iterator([CODE] * 10, trainer)
        made.save(str(tmp_path / "tokenizer.json"))
        path = write_rows(tmp_path / "in.jsonl", [{"text": CODE * 500}])
        preprocessed(path, tokenizer="tokenizer.json", max_tokens=1024)
        (row,) = published(path)
        ours = made.encode(row["content_truncate_1k"]).ids
        assert len(ours) in range(1020, 1025)

    def test_a_file_that_is_missing_is_told(self, project: Project) -> None:
        task(project, "universal", tokenizer="gone/tokenizer.json")
        told = "preprocess.tokenizer: no such file; found gone/tokenizer.json"
        assert told in project.run("check", TASK).out


class TestShipped:
    """The tasks below configs/tasks/data_scoring on what they are for."""

    @pytest.fixture
    def texts(self, tmp_path: Path) -> dict[str, str]:
        """Of a real checkout."""
        files = {f"src/{row['id']}.py": row["text"] * 40 for row in some_rows(6)}
        return tracked_texts(checkout(tmp_path / "clone", {"README.md": "# Hi\n", **files}))

    @pytest.fixture
    def project(self, bare: Project) -> Project:
        for folder in ("models", "prompts"):
            shutil.copytree(
                ROOT / "configs" / folder, bare.root / "configs" / folder, dirs_exist_ok=True
            )
        return bare

    def finished(self, project: Project, name: str) -> tuple[str, list[Path]]:
        text = (ROOT / f"configs/tasks/data_scoring/{name}.yaml").read_text()
        model = "configs/models/dpsk-v3-0526.yaml"
        assert model in text
        project.task = name
        project.task_file.write_text(text.replace(model, "configs/models/rehearsal.yaml"))
        ended = project.run("run-task", project.task_file)
        assert ended.code == 0, ended
        output = project.root / yaml.safe_load(text)["data"]["output_folder"]
        return ended.told, sorted(output.glob("*.parquet"))

    @pytest.mark.parametrize(
        ("name", "pack", "suffix"),
        [
            ("repomix_quality_rating", repomix_xml, "xml"),
            ("rendergit_quality_rating", rendergit_cxml, "cxml"),
        ],
    )
    def test_packs_of_repositories_are_scored(
        self, project: Project, texts: dict[str, str], name: str, pack: Any, suffix: str
    ) -> None:
        tool = name.partition("_")[0]
        for language in ("Python", "C_Sharp"):
            folder = project.root / f"data/{tool}_packs/{language}"
            folder.mkdir(parents=True)
            for commit in ("0a1b2c3", "99ff"):
                (folder / f"ann_my_lib_{commit}.{suffix}").write_bytes(pack(texts))
        output, files = self.finished(project, name)
        assert "2 of 2 files scored: 4 rows, 4 succeeded, 0 failed" in output
        assert "preprocessed: 4 of 4 rows, 0 failed" in output
        assert [file.name for file in files] == ["C_Sharp.parquet", "Python.parquet"]
        first, second = read_rows(files[1])
        assert [row["commit_hash"] for row in (first, second)] == ["0a1b2c3", "99ff"]
        assert (first["files_with_content"], first["has_readme"]) == (len(texts), True)
        assert (first["packaging_tool"], first["repo_name"]) == (tool, "my_lib")
        assert isinstance(first["overall_score"], int)

    def test_packs_in_rows_are_scored(self, project: Project, texts: dict[str, str]) -> None:
        row = {"text": rendergit_cxml(texts).decode(), "lg": "C#"}
        for part in ("C_part01", "C_Sharp_part01", "C_Sharp_part02"):
            write_rows(project.root / f"data/filter_rendergit/pt_data_{part}.jsonl", [row])
        output, files = self.finished(project, "filter_rendergit_quality_rating")
        assert "2 of 2 files scored: 3 rows, 3 succeeded" in output
        assert [file.name for file in files] == ["C.parquet", "C_Sharp.parquet"]
        assert pq.read_table(files[1]).column("language").to_pylist() == ["C#", "C#"]

    def test_raw_code_is_scored(self, project: Project, texts: dict[str, str]) -> None:
        folder = project.root / "data/github_raw_code"
        rows = [{"path": path, "content": text} for path, text in texts.items()]
        write_rows(folder / "a.parquet", rows)
        write_rows(folder / "b.jsonl", [{"code": row["content"]} for row in rows])
        output, files = self.finished(project, "github_raw_code_with_preprocess")
        assert f"2 of 2 files scored: {2 * len(rows)} rows" in output
        languages = pq.read_table(files[0]).column("language").to_pylist()
        assert languages == ["Markdown"] + ["Python"] * (len(rows) - 1)


def test_a_run_whose_dagster_process_is_not_ours(project: Project) -> None:
    """Processes are started from whatever program runs the asset."""
    project.write_input("big.jsonl", [{"text": CODE * 600, "n": n} for n in range(900)])
    task(project, "universal", num_proc=2, max_tokens=1024)
    register(project.instance, project.steps())
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "asset", "materialize", "-m",
         "modelcall_assets.definitions", "--select", "key:rate/raw,key:rate/preprocessed",
         "--partition", "big.jsonl"],
        cwd=project.root, env=os.environ.copy(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(project.rows("big.jsonl", "preprocessed")) == 900
