"""config/datasets and storage/datasets: which files are which split, and what refuses to be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from config_files import Messages, told

from modelcall_assets.config.datasets import (
    MAPPING_KEYS,
    output_name,
    parse_datasets,
    selected_datasets,
)
from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.storage.datasets import dataset_path, find_split, find_splits
from modelcall_assets.storage.places import Stores
from modelcall_assets.storage.rows import read_rows

PLACES = Stores()
ROWS: list[Row] = [
    {
        "id": n,
        "conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a" * n}],
        "meta": {"tags": ["x", "y"], "score": n / 2},
    }
    for n in range(5)
]


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_ipc_file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_jsonl(path: Path, table: pa.Table) -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in table.to_pylist()))


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


def make(folder: Path, *names: str) -> Path:
    """Files that hold their own name, so that a mix-up shows."""
    writers: dict[str, Callable[[Path, pa.Table], None]] = {
        ".jsonl": write_jsonl,
        ".json": write_jsonl,
        ".parquet": write_parquet,
        ".arrow": write_stream,
    }
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in writers:
            writers[path.suffix](path, pa.table({"file": [name]}))
        else:
            path.write_text("a,b\n")
    return folder


def readme(folder: Path, configs: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    front = yaml.safe_dump({"license": "mit", "configs": configs})
    (folder / "README.md").write_text(f"---\n{front}---\n# A data set\n---\n")
    return folder


def saved(folder: Path, names: Sequence[str], split: str | None = "train") -> Path:
    """One split as `Dataset.save_to_disk` writes it."""
    make(folder, *names, "dataset_info.json")
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_bytes(orjson.dumps(state))
    return folder


def found(folder: Path, *configs: str | None) -> dict[Any, list[str]]:
    """(config, split) → the files, which must hold their own names."""
    splits = find_splits(folder, configs or (None,))
    for split in splits:
        for info in split.files:
            assert [row["file"] for row in map(as_row, read_rows(info.place))] == [
                Path(info.uri).relative_to(folder).as_posix()
            ]
    return {
        (split.config, split.split) if configs else split.split: [
            Path(info.uri).relative_to(folder).as_posix() for info in split.files
        ]
        for split in splits
    }


def as_row(item: Row | BadLine) -> Row:
    assert isinstance(item, dict)
    return item


class TestNames:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (
                ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet",
                 "data/cot.v1-00000-of-00001-3f2a.parquet", "other/test.parquet"],
                {"train": ["data/train-00000-of-00002.parquet",
                           "data/train-00001-of-00002.parquet"],
                 "cot.v1": ["data/cot.v1-00000-of-00001-3f2a.parquet"]},
            ),
            (
                ["test.jsonl", "train.jsonl", "my-dev_2.jsonl", "notes.jsonl"],
                {"train": ["train.jsonl"], "validation": ["my-dev_2.jsonl"],
                 "test": ["test.jsonl"]},
            ),
            (
                ["train/a.parquet", "train/b.parquet", "evaluation/a.parquet"],
                {"train": ["train/a.parquet", "train/b.parquet"],
                 "test": ["evaluation/a.parquet"]},
            ),
            (
                ["a.jsonl", "deep/b.jsonl", "constraint.jsonl", "trainer.jsonl"],
                {"train": ["a.jsonl", "constraint.jsonl", "deep/b.jsonl", "trainer.jsonl"]},
            ),
            (["val.json"], {"validation": ["val.json"]}),
            (["x-train.arrow"], {"train": ["x-train.arrow"]}),
            (
                ["train.parquet", "train.jsonl", "dataset_infos.json", "a.csv"],
                {"train": ["train.parquet"]},
            ),
            (["a.jsonl", "b.jsonl", "c.parquet"], {"train": ["a.jsonl", "b.jsonl"]}),
            (["a.jsonl", ".b.jsonl", ".cache/c.jsonl", "__x__/d.jsonl"], {"train": ["a.jsonl"]}),
        ],
    )  # fmt: skip
    def test_say_the_splits_of_the_files(
        self, tmp_path: Path, names: list[str], expected: dict[str, Any]
    ) -> None:
        splits = found(make(tmp_path, *names))
        assert splits == expected
        assert list(splits) == list(expected)

    def test_of_a_single_file_say_one_split(self, tmp_path: Path) -> None:
        make(tmp_path, "oo1.jsonl")
        (split,) = find_splits(tmp_path / "oo1.jsonl")
        assert (split.config, split.split, len(split.files)) == (None, "train", 1)
        with pytest.raises(InputError, match="a single file has no configuration 'en'"):
            find_splits(tmp_path / "oo1.jsonl", ["en"])

    def test_sub_folders_are_configurations(self, tmp_path: Path) -> None:
        make(tmp_path, "en/train.jsonl", "en/test.jsonl", "zh/data/cot-00000-of-00001.jsonl")
        assert found(tmp_path, "en", "zh") == {
            ("en", "train"): ["en/train.jsonl"],
            ("en", "test"): ["en/test.jsonl"],
            ("zh", "cot"): ["zh/data/cot-00000-of-00001.jsonl"],
        }
        with pytest.raises(InputError, match=r"no configuration 'fr'; there are: en, zh$"):
            find_splits(tmp_path, ["fr"])
        with pytest.raises(InputError, match="configuration 'en' has no split 'dev'; there are: "):
            find_split(tmp_path, "en", "dev")
        assert find_split(tmp_path, "en", "test").split == "test"

    def test_default_is_the_whole_folder(self, tmp_path: Path) -> None:
        make(tmp_path, "a.jsonl")
        assert found(tmp_path, "default") == {("default", "train"): ["a.jsonl"]}
        with pytest.raises(InputError, match="no configuration 'en'; it has none; write null"):
            find_splits(tmp_path, ["en"])

    def test_in_an_object_store_are_read_too(self) -> None:
        store = fsspec.filesystem("memory")
        for name in ("en/train.jsonl", "README.md"):
            store.pipe(f"/sets/org/name/{name}", b'{"file": 1}\n')
        try:
            (split,) = find_splits(PLACES.place("memory://sets/org/name"), ["en"])
            assert [item for info in split.files for item in read_rows(info.place)] == [{"file": 1}]
            with pytest.raises(InputError, match="memory://sets/none: not found"):
                find_splits(PLACES.place("memory://sets/none"))
        finally:
            store.rm("/sets", recursive=True)

    @pytest.mark.parametrize(
        ("input_dir", "key", "path"),
        [
            ("/data", "org/name", "/data/org/name"),
            ("/data/name/", "org/name", "/data/name"),
            ("s3://bucket/in", "oo1.jsonl", "s3://bucket/in/oo1.jsonl"),
        ],
    )
    def test_where_a_data_set_lies(self, input_dir: str, key: str, path: str) -> None:
        assert str(dataset_path(PLACES.place(input_dir), key)) == path


class TestReadme:
    def test_every_form_of_data_files(self, tmp_path: Path) -> None:
        make(tmp_path, "en/a.jsonl", "en/b.jsonl", "zh/x/c.parquet", "zh/x/y/d.parquet", "e.jsonl")
        readme(
            tmp_path,
            [
                {"config_name": "one", "data_files": "e.jsonl"},
                {"config_name": "two", "data_files": ["en/b.jsonl", "./en/*.jsonl"]},
                {"config_name": "named", "data_files": [
                    {"split": "train", "path": "en/[a]*"},
                    {"split": "held.out", "path": ["zh/**/d*", "e.jsonl"]}]},
                {"config_name": "keyed", "data_files": {"train": "zh/**"}},
                {"config_name": "folder", "data_dir": "zh"},
                {"config_name": "both", "data_dir": "zh", "data_files": "*/c.parquet"},
            ],
        )  # fmt: skip
        assert found(tmp_path, "one", "two", "named", "keyed", "folder", "both") == {
            ("one", "train"): ["e.jsonl"],
            ("two", "train"): ["en/b.jsonl", "en/a.jsonl"],
            ("named", "train"): ["en/a.jsonl"],
            ("named", "held.out"): ["zh/x/y/d.parquet", "e.jsonl"],
            ("keyed", "train"): ["zh/x/c.parquet", "zh/x/y/d.parquet"],
            ("folder", "train"): ["zh/x/c.parquet", "zh/x/y/d.parquet"],
            ("both", "train"): ["zh/x/c.parquet"],
        }
        with pytest.raises(InputError, match="no configuration 'en'; there are: one, two, named"):
            find_splits(tmp_path, ["en"])

    @pytest.mark.parametrize(
        ("configs", "expected"),
        [
            ([{"config_name": "only", "data_files": "a.jsonl"}], "a.jsonl"),
            ([{"config_name": "x", "data_files": "a.jsonl"},
              {"config_name": "default", "data_files": "b.jsonl"}], "b.jsonl"),
            ([{"config_name": "x", "data_files": "a.jsonl", "default": True},
              {"config_name": "y", "data_files": "b.jsonl"}], "a.jsonl"),
        ],
    )  # fmt: skip
    def test_says_which_configuration_is_the_default(
        self, tmp_path: Path, configs: Any, expected: str
    ) -> None:
        make(readme(tmp_path, configs), "a.jsonl", "b.jsonl")
        assert found(tmp_path) == {"train": [expected]}

    MISTAKES: Mapping[str, Any] = {
        "no default": [{"config_name": "x", "data_files": "a.jsonl"},
                       {"config_name": "y", "data_files": "a.jsonl"}],
        "no file": [{"config_name": "x", "data_files": "none-*"}],
        "only files of other kinds": [{"config_name": "x", "data_files": "*.csv"}],
        "a number for a path": [{"config_name": "x", "data_files": [{"split": "a", "path": 1}]}],
        "no name of a split": [{"config_name": "x",
                                "data_files": [{"split": "a b", "path": "c"}]}],
        "a split twice": [{"config_name": "x",
                           "data_files": [{"split": "a", "path": "a.jsonl"}] * 2}],
        "paths and splits": [{"config_name": "x", "data_files": ["a.jsonl", {"split": "a"}]}],
        "no name": [{"data_files": "a.jsonl"}],
        "no list": {"x": "a.jsonl"},
    }  # fmt: skip

    def test_what_is_wrong_in_its_configurations(self, tmp_path: Path, messages: Messages) -> None:
        said = {}
        for name, configs in self.MISTAKES.items():
            make(readme(tmp_path, configs), "a.jsonl", "c.csv")
            with pytest.raises(InputError) as caught:
                find_splits(tmp_path)
            said[name] = str(caught.value).replace(str(tmp_path), "…")
        messages(said)

    def test_many_stars_take_no_time(self, tmp_path: Path) -> None:
        deep = "/".join("abcdefghijklmnopqrstuvwxyz")
        make(readme(tmp_path, [{"config_name": "x", "data_files": "**/" * 20 + "no"}]),
             f"{deep}/a.jsonl")  # fmt: skip
        with pytest.raises(InputError, match="fits no file"):
            find_splits(tmp_path)

    def test_front_matter_that_says_nothing(self, tmp_path: Path) -> None:
        make(tmp_path, "test.jsonl")
        for text in ("", "# A data set\n", "---\nlicense: mit\n---\n", "---\n- a\n---\n", "---\n"):
            (tmp_path / "README.md").write_text(text)
            assert found(tmp_path) == {"test": ["test.jsonl"]}
        levels = "".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}\n" for n in range(40))
        for text in (
            "a: [\n",
            "[" * 5000 + "\n",
            "a: !!timestamp x\n",
            f"a: {'9' * 5000}\n",
            f"a0: &a0 {{x: 1}}\n{levels}",
        ):
            (tmp_path / "README.md").write_text(f"---\n{text}---\n")
            with pytest.raises(InputError, match=r"README\.md: the front matter is not YAML"):
                find_splits(tmp_path)


class TestSavedToDisk:
    def test_a_dataset_dict_has_the_splits_that_it_names(self, tmp_path: Path) -> None:
        shards = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        for split in ("train", "my_split"):
            saved(tmp_path / split, shards, split)
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "my_split"]}')
        splits = find_splits(tmp_path)
        assert [(split.split, [info.key_path for info in split.files]) for split in splits] == [
            ("train", [f"train/{name}" for name in shards]),
            ("my_split", [f"my_split/{name}" for name in shards]),
        ]

    @pytest.mark.parametrize(
        ("own", "split"), [("test", "test"), (None, "train"), ("train[:9%]", "train")]
    )
    def test_a_single_dataset_has_the_split_of_its_state(
        self, tmp_path: Path, own: str | None, split: str
    ) -> None:
        saved(tmp_path, ["data-00000-of-00001.arrow"], own)
        assert found(tmp_path) == {split: ["data-00000-of-00001.arrow"]}

    def test_one_that_is_incomplete_says_what_is_missing(self, tmp_path: Path) -> None:
        saved(tmp_path / "train", ["a.arrow", "b.arrow"])
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
        (tmp_path / "train/b.arrow").unlink()
        with pytest.raises(InputError, match=r"train/state\.json: names b\.arrow, which is not"):
            find_splits(tmp_path)
        (tmp_path / "train/state.json").write_text("{")
        with pytest.raises(InputError, match=r"train/state\.json: not JSON"):
            find_splits(tmp_path)
        (tmp_path / "train/state.json").unlink()
        with pytest.raises(InputError, match=r"train/state\.json: not found"):
            find_splits(tmp_path)
        (tmp_path / "dataset_dict.json").write_text("{}")
        with pytest.raises(InputError, match=r"dataset_dict\.json: names no splits"):
            find_splits(tmp_path)


class TestRefusals:
    def test_scripts_are_refused_with_a_reason(self, tmp_path: Path) -> None:
        make(tmp_path, "name.py", "data/raw.csv")
        with pytest.raises(InputError, match=r"only the data set script name\.py, and scripts are"):
            find_splits(tmp_path)

    def test_data_beside_a_script_is_read(self, tmp_path: Path) -> None:
        make(tmp_path, "name.py", "train.jsonl")
        assert found(tmp_path) == {"train": ["train.jsonl"]}

    def test_a_folder_without_data_says_what_is_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no data files; it is empty"):
            find_splits(tmp_path)
        make(tmp_path, "a.csv", "b.txt")
        with pytest.raises(InputError, match=r"no data files; there are: \.csv, \.txt; Parquet"):
            find_splits(tmp_path)
        with pytest.raises(InputError, match="nowhere: not found"):
            find_splits(tmp_path / "nowhere")


class TestReading:
    @pytest.mark.parametrize(
        ("name", "write"),
        [
            ("a.jsonl", write_jsonl),
            ("a.json", write_jsonl),
            ("a.parquet", write_parquet),
            ("a.arrow", write_stream),
            ("b.arrow", write_ipc_file),
        ],
    )
    def test_the_formats_give_the_same_rows(
        self, tmp_path: Path, name: str, write: Callable[[Path, pa.Table], None]
    ) -> None:
        write(tmp_path / name, pa.Table.from_pylist(ROWS))
        assert list(read_rows(tmp_path / name)) == ROWS
        assert list(read_rows(tmp_path / name, rows=2)) == ROWS

    def test_bad_lines_stay_in_their_place(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"a":1}\n\n{bad\n{"a":2}')
        first, bad, last = read_rows(tmp_path / "a.jsonl")
        assert (first, last) == ({"a": 1}, {"a": 2})
        assert isinstance(bad, BadLine)
        assert bad.detail.startswith("line 3, column 2")

    @pytest.mark.parametrize("content", [b"not arrow", b"ARROW1\x00\x00no", b""])
    def test_a_damaged_arrow_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.arrow: not a readable Arrow file"):
            list(read_rows(tmp_path / "a.arrow"))

    def test_an_arrow_stream_that_ends_early(self, tmp_path: Path) -> None:
        path = tmp_path / "a.arrow"
        write_stream(path, pa.Table.from_pylist(ROWS))
        path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(InputError, match=r"a\.arrow: not a readable Arrow file"):
            list(read_rows(path))

    def test_a_json_array_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(b' \n[{"a": 1}]')
        with pytest.raises(InputError, match="one JSON array; write it as one object per line"):
            list(read_rows(tmp_path / "a.json"))


GOOD: dict[str, Any] = {
    "org/name": {
        "configs": ["en", None],
        "format_style": "prompt_response",
        "column_mapping": {"prompt": "question", "response": "answer"},
    },
    "oo1.jsonl": {"format_style": "sharegpt", "column_mapping": {"conversations": "conversations"}},
}


class TestConfig:
    def test_a_file_that_is_right_has_its_defaults(self) -> None:
        datasets, problems = parse_datasets(GOOD, "sets.yaml")
        assert problems == []
        assert datasets is not None
        assert list(datasets) == ["org/name", "oo1.jsonl"]
        assert datasets["org/name"].configs == ["en", None]
        assert datasets["oo1.jsonl"].configs == [None]

    @pytest.mark.parametrize("style", MAPPING_KEYS)
    def test_every_style_takes_its_columns(self, style: str) -> None:
        mapping = {key: f"the_{key}" for key in MAPPING_KEYS[style]}
        datasets, problems = parse_datasets(
            {"a": {"format_style": style, "column_mapping": mapping}}, "sets.yaml"
        )
        assert problems == []
        assert datasets is not None
        assert datasets["a"].column_mapping == mapping

    MISTAKES: Mapping[str, Any] = {
        "style, nearly": {"format_style": "share_gpt"},
        "the key of the style, nearly": {"format_stile": "messages"},
        "no column of the response": {"column_mapping": {"prompt": "q"}},
        "response, nearly": {"column_mapping": {"prompt": "q", "respons": "a"}},
        "another column": {"column_mapping": {"prompt": "q", "response": "a", "zzz": "b"}},
        "a number for a column": {"column_mapping": {"prompt": "q", "response": 5}},
        "no columns": {"column_mapping": None},
        "no configuration": {"configs": []},
        "a configuration twice": {"configs": ["en", "en"]},
        "a text of configurations": {"configs": "en"},
    }

    def test_what_is_wrong(self, messages: Messages) -> None:
        good = {
            "format_style": "prompt_response",
            "column_mapping": {"prompt": "q", "response": "a"},
        }
        files = {name: {"a": {**good, **block}} for name, block in self.MISTAKES.items()}
        files |= {
            "nothing": {},
            "a null": {"a": None},
            "a way up": {"../a": {}},
            "a root": {"/a": {}},
        }
        parsed = {name: parse_datasets(data, "sets.yaml") for name, data in files.items()}
        assert {datasets for datasets, _ in parsed.values()} == {None}
        messages({name: told(problems) for name, (_, problems) in parsed.items()})

    def test_a_selection_names_what_is_unknown(self) -> None:
        datasets, _ = parse_datasets(GOOD, "sets.yaml")
        assert datasets is not None
        where = "task.yaml", "distillation.selected_datasets"
        assert selected_datasets(datasets, [], *where) == (datasets, [])
        kept, problems = selected_datasets(datasets, ["oo1.jsonl", "org/nam"], *where)
        assert list(kept) == ["oo1.jsonl"]
        assert [(str(problem), problem.severity) for problem in problems] == [
            (
                "task.yaml:distillation.selected_datasets[1]: not in the dataset config; "
                "found 'org/nam'; did you mean org/name?",
                "warning",
            )
        ]
        _, problems = selected_datasets(datasets, ["x"], *where)
        assert [problem.severity for problem in problems] == ["error"]

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            (("org/name", None, "train", False), "name/org_name-train.jsonl"),
            (("org/name", "en", "test", True), "name/org_name-en-test-with_system.jsonl"),
            (("org/name", "data/en", "test", False), "name/org_name-data_en-test.jsonl"),
            (("oo1.jsonl", None, "train", False), "oo1/oo1.jsonl-train.jsonl"),
        ],
    )
    def test_the_names_of_outputs_tell_configurations_and_splits(
        self, arguments: Any, name: str
    ) -> None:
        assert output_name(*arguments) == name
