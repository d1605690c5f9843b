"""sources/: what each conversation is, which ones there are and in which order, and where their
rows come from."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub, serve_hub
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT, write_examples

from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.grading import GRADERS
from modelcall_assets.sources import (
    ARC,
    GSM8K,
    MMLU,
    SOURCES,
    Conversation,
    CustomJSON,
    EnvironmentTasks,
    FewShot,
    HumanEval,
    Mixture,
    SimpleSpelling,
    SmolTalk,
    Source,
    SpellingBee,
    find_source,
    render_mc,
)
from modelcall_assets.sources import Sequence as InTurn
from modelcall_assets.sources.gsm8k import parts_of, text_of
from modelcall_assets.sources.tasks import Tasks
from modelcall_assets.storage.datasets import find_split
from modelcall_assets.storage.places import Stores

SAMPLES = ROOT / "demo/benchmarks"
Row = dict[str, Any]


class Letters(Source):
    """`a0`, `a1`, … of any number."""

    def __init__(self, letter: str, count: int, **slicing: Any) -> None:
        super().__init__(**slicing)
        self.letter, self.count = letter, count

    @property
    def name(self) -> str:
        return self.letter

    def num_examples(self) -> int:
        return self.count

    def get_example(self, index: int) -> Conversation:
        return {"messages": [{"role": "user", "content": f"{self.letter}{index}"}]}


def said(source: Source) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in source]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def one(kind: Callable[..., Source], folder: Path, row: Row, *which: str) -> Source:
    """A source whose data set is one row."""
    dataset, split = SOURCES[getattr(kind, "__name__", "")].hub, which[-1]
    assert dataset is not None
    write_rows(folder / dataset / "/".join([*which[:-1], f"{split}.jsonl"]), [row])
    return kind(*which, folder=str(folder))


class TestSource:
    @given(
        st.integers(0, 30),
        st.integers(0, 40),
        st.none() | st.integers(0, 40),
        st.integers(1, 9),
        st.slices(30),
    )
    def test_is_a_slice_of_all(
        self, count: int, start: int, more: int | None, step: int, part: slice
    ) -> None:
        stop = None if more is None else start + more
        source = Letters("a", count, start=start, stop=stop, step=step)
        want = [f"a{index}" for index in range(count)][start:stop:step]
        assert said(source) == want
        assert len(source) == len(want)
        assert [source[at]["messages"][0]["content"] for at in range(len(want))] == want
        assert said(source[part]) == want[part]
        assert [source.id_of(at) for at in range(-len(want), 0)] == [f"a/{x[1:]}" for x in want]

    @pytest.mark.parametrize("index", [3, -4, numpy.int64(99)])
    def test_bounds(self, index: int) -> None:
        source = Letters("a", 10, start=1, stop=100, step=4)
        assert len(source) == 3
        with pytest.raises(IndexError, match=f"a: no row {index}, there are 3"):
            source[index]

    def test_indices_are_whole_numbers(self) -> None:
        assert said(Letters("a", 5)[numpy.int64(1) :]) == ["a1", "a2", "a3", "a4"]
        with pytest.raises(TypeError):
            Letters("a", 5)[1.0]  # type: ignore[call-overload]

    @pytest.mark.parametrize(
        ("slicing", "told"),
        [
            ({"start": -1}, "start: expected 0 or more; have -1"),
            ({"start": 6, "stop": 5}, "stop: expected 6 or more; have 5"),
            ({"step": 0}, "step: expected 1 or more; have 0"),
            ({"stop": "7"}, "stop: expected a whole number; have '7'"),
            ({"start": None}, "start: expected a whole number; have None"),
            ({"step": 1.5}, "step: expected a whole number; have 1.5"),
            ({"start": True}, "start: expected a whole number; have True"),
        ],
    )
    def test_bad_slices(self, slicing: Row, told: str) -> None:
        with pytest.raises(ValueError, match=told):
            Letters("a", 9, **slicing)

    def test_what_has_no_grader_cannot_be_evaluated(self) -> None:
        with pytest.raises(NotImplementedError, match="a is to train on"):
            Letters("a", 1).evaluate({}, "")

    def test_class_attributes(self) -> None:
        told = {
            name: (getattr(kind, "hub", None), kind.grader, kind.baseline, kind.eval_type)
            for name, kind in SOURCES.items()
            if not issubclass(kind, InTurn | Tasks | EnvironmentTasks)
        }
        assert told == {
            "ARC": ("allenai/ai2_arc", "choice", 0.25, "categorical"),
            "MMLU": ("cais/mmlu", "choice", 0.25, "categorical"),
            "GSM8K": ("openai/gsm8k", "numeric", 0, "generative"),
            "HumanEval": ("openai/openai_humaneval", "code", 0, "generative"),
            "SmolTalk": ("HuggingFaceTB/smol-smoltalk", None, 0, None),
            "CustomJSON": (None, None, 0, None),
            "SpellingBee": (None, "spelling", 0, "generative"),
            "SimpleSpelling": (None, None, 0, "generative"),
        }
        with_reward = [name for name, kind in SOURCES.items() if hasattr(kind, "reward")]
        assert with_reward == ["GSM8K", "SpellingBee"]
        assert ARC.subsets["ARC-Challenge"] == ("train", "validation", "test")
        assert len(MMLU.subsets) == 2 + 57

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (partial(ARC, "ARC", "test"), "ARC: no subset 'ARC'; there are: ARC-Easy, ARC-Chall"),
            (partial(GSM8K, "main", "dev"), "GSM8K: no split 'dev'; there are: train, test"),
            (partial(MMLU, "auxiliary_train", "test"), "no split 'test'; there are: train"),
            (partial(SmolTalk, "validation"), "no split 'validation'; there are: train, test"),
            (partial(SpellingBee, split="dev"), "no split 'dev'; there are: train, test"),
            (partial(SpellingBee, -1), "size: expected a whole number of 0 or more; have -1"),
        ],
    )
    def test_unknown_subsets_and_splits(self, make: Callable[[], Source], told: str) -> None:
        with pytest.raises(ValueError, match=told):
            make()


class TestSeveral:
    def test_the_order_of_a_mixture(self) -> None:
        """As shuffling all pairs gives it."""
        a, b, c = Letters("a", 7), Letters("b", 20, start=3, step=4), Letters("c", 0)
        pairs = [*said(a), *said(b), *said(a)]
        random.Random(42).shuffle(pairs)
        mixture = Mixture([a, b, c, a])
        assert said(mixture) == pairs
        assert said(mixture[2:9]) == pairs[2:9]
        assert said(Mixture([a, b, a], start=1, stop=99, step=5)) == pairs[1::5]
        source, at = mixture.member(-1)
        assert source[at]["messages"][0]["content"] == pairs[-1]
        assert mixture.id_of(0) == f"{pairs[0][0]}/{pairs[0][1:]}"
        with pytest.raises(IndexError):
            mixture[len(pairs)]

    def test_a_sequence(self) -> None:
        both = InTurn([Letters("x", 2), Letters("y", 0), Letters("z", 3, start=1)])
        assert said(both) == ["x0", "x1", "z1", "z2"]
        assert both.name == "Sequence(x, y, z)"
        assert [both.member(at)[1] for at in range(4)] == [0, 1, 0, 1]
        assert said(InTurn([])) == said(Mixture([])) == []

    def test_what_members_share(self) -> None:
        arc, gsm8k = ARC("ARC-Easy", "test", SAMPLES), GSM8K("main", "test", SAMPLES, stop=4)
        assert (Mixture([arc, arc]).grader, Mixture([arc, arc]).baseline) == ("choice", 0.25)
        assert (Mixture([arc, gsm8k]).grader, InTurn([]).baseline) == (None, 0)
        assert Mixture([arc, gsm8k]).baseline == 12 * 0.25 / 16
        assert Mixture([arc, gsm8k]).files() == [*arc.files(), *gsm8k.files()]


class TestMultipleChoice:
    def test_layout(self) -> None:
        assert render_mc("Which one rolls?", ["1", "2", "3"], ["a box", " a ball", ""]) == (
            "Multiple Choice question: Which one rolls?\n"
            "- a box=1\n-  a ball=2\n- =3\n\n"
            "Respond only with the letter of the correct answer."
        )

    def test_arc(self, tmp_path: Path) -> None:
        choices = {"text": ["tin", "wool", "ice"], "label": ["1", "2", "3"]}
        row = {"id": "q", "question": "What is warm?", "choices": choices, "answerKey": "2"}
        source = one(ARC, tmp_path, row, "ARC-Easy", "validation")
        assert source.name == "ARC/ARC-Easy/validation"
        assert source[0] == {
            "messages": [
                {"role": "user", "content": render_mc("What is warm?", "123", choices["text"])},
                {"role": "assistant", "content": "2"},
            ],
            "letters": ["1", "2", "3"],
        }

    @pytest.mark.parametrize("is_nested", [False, True])
    def test_mmlu(self, tmp_path: Path, is_nested: bool) -> None:
        row = {
            "question": "2 + 2?",
            "choices": ["1", "2", "3", "4"],
            "answer": 3,
            "subject": "sums",
        }
        which = ("auxiliary_train", "train") if is_nested else ("virology", "test")
        source = one(MMLU, tmp_path, {"train": row} if is_nested else row, *which)
        assert source[0] == {
            "messages": [
                {"role": "user", "content": render_mc("2 + 2?", "ABCD", row["choices"])},
                {"role": "assistant", "content": "D"},
            ],
            "letters": ["A", "B", "C", "D"],
            "subject": "sums",
        }

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"answerKey": "C"}, "answerKey: expected one of A, B; have 'C'"),
            ({"answerKey": None}, "answerKey: expected str; have NoneType"),
            ({"choices": {"text": ["x"], "label": ["A", "B"]}}, "choices: 1 texts and 2 labels"),
            ({"choices": {"label": ["A"]}}, "choices: expected the lists text and label"),
            ({"choices": ["x", "y"]}, "choices: expected dict; have list"),
        ],
    )
    def test_bad_rows_of_arc(self, tmp_path: Path, change: Row, told: str) -> None:
        choices = {"text": ["x", "y"], "label": ["A", "B"]}
        row = {"question": "?", "choices": choices, "answerKey": "B", **change}
        with pytest.raises(InputError, match=rf"ARC-Easy/test\.jsonl, line 1: {told}"):
            one(ARC, tmp_path, row, "ARC-Easy", "test")[0]

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"choices": ["a", "b", "c"]}, "choices: expected 4; have 3"),
            ({"answer": 4}, "answer: expected 0 to 3; have 4"),
            ({"answer": "A"}, "answer: expected int; have str"),
        ],
    )
    def test_bad_rows_of_mmlu(self, tmp_path: Path, change: Row, told: str) -> None:
        row = {"question": "?", "choices": [*"abcd"], "answer": 0, "subject": "s", **change}
        with pytest.raises(InputError, match=told):
            one(MMLU, tmp_path, row, "anatomy", "test")[0]

    def test_a_column_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="answer: expected str; have question, solution"):
            one(GSM8K, tmp_path, {"question": "?", "solution": "!"}, "main", "test")[0]


class TestGSM8K:
    def test_conversation(self, tmp_path: Path) -> None:
        row = {"question": "How many?", "answer": "<<7-2=5>>Five.\n#### 5"}
        parts = [
            {"type": "text", "text": ""},
            {"type": "python", "text": "7-2"},
            {"type": "python_output", "text": "5"},
            {"type": "text", "text": "Five.\n#### 5"},
        ]
        assert one(GSM8K, tmp_path, row, "socratic", "train")[0] == {
            "messages": [
                {"role": "user", "content": "How many?"},
                {"role": "assistant", "content": parts},
            ]
        }

    @pytest.mark.parametrize(
        ("answer", "parts"),
        [
            ("#### 3", [("text", "#### 3")]),
            ("", [("text", "")]),
            ("<<x==2>>", [("text", ""), ("python", "x="), ("python_output", "2"), ("text", "")]),
            ("<<12>>z", [("text", ""), ("python", "12"), ("python_output", ""), ("text", "z")]),
            ("<<1>2=3>>", [("text", "<<1>2=3>>")]),
            (
                "<<a=1>><<b=2>>",
                [("text", ""), ("python", "a"), ("python_output", "1"), ("text", ""),
                 ("python", "b"), ("python_output", "2"), ("text", "")],
            ),
        ],
    )  # fmt: skip
    def test_parts(self, answer: str, parts: list[tuple[str, str]]) -> None:
        assert parts_of(answer) == [{"type": kind, "text": text} for kind, text in parts]
        assert text_of(parts_of(answer)) == answer

    @given(st.lists(st.sampled_from(["<<", ">>", "4*5", "=20", "so ", "\n", "#### 9"])))
    def test_parts_are_rendered_back(self, pieces: list[str]) -> None:
        answer = "".join(pieces)
        assert text_of(parts_of(answer)) == answer


class TestOtherSets:
    def test_humaneval(self, tmp_path: Path) -> None:
        row = {"task_id": "T/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
        row |= {"entry_point": "f", "test": "def check(candidate): ..."}
        source = one(HumanEval, tmp_path, row, "test")
        assert source.name == "HumanEval/test"
        assert source[0] == {
            "messages": [
                {"role": "user", "content": "def f():\n"},
                {"role": "assistant", "content": "def f():\n\n    return 1\n"},
            ],
            "entry_point": "f",
            "test": "def check(candidate): ...",
        }

    @pytest.mark.parametrize(
        ("roles", "told"),
        [
            ("sua", None),
            ("uau", None),
            ("ua", None),
            ("u", "two turns or more; have 1 turns"),
            ("su", "two turns or more; have 1 turns"),
            ("au", "turn 1: expected the role user; have assistant"),
            ("uas", "turn 3: expected the role user; have system"),
            ("ssua", "turn 1: expected the role user; have system"),
            ("uuaa", "turn 2: expected the role assistant; have user"),
        ],
    )
    def test_smoltalk(self, tmp_path: Path, roles: str, told: str | None) -> None:
        names = {"s": "system", "u": "user", "a": "assistant"}
        messages = [{"role": names[each], "content": f"{each}!"} for each in roles]
        source = one(SmolTalk, tmp_path, {"messages": messages, "source": "x"}, "test")
        assert len(source) == 1
        if told is None:
            assert source[0] == {"messages": messages}
        else:
            with pytest.raises(InputError, match=rf"test\.jsonl, line 1: .*{told}"):
                source[0]

    def test_the_content_of_a_turn_is_text(self, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ["!"]}]
        with pytest.raises(InputError, match="turn 2: its content is no text"):
            one(SmolTalk, tmp_path, {"messages": messages}, "train")[0]


class TestCustomJSON:
    def test_lines(self, tmp_path: Path) -> None:
        talks = [
            [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "ä", "x": 1.5}]
            for n in range(3)
        ]
        lines = [*map(orjson.dumps, talks)]
        path = tmp_path / "mine.jsonl"
        path.write_bytes(b"\n".join([lines[0], b"", b"  ", *lines[1:]]))
        source = CustomJSON(path, start=1)
        assert [*source] == [{"messages": talk} for talk in talks[1:]]
        assert [file.place for file in source.files()] == [path]

    def test_bad_lines_are_named(self, tmp_path: Path) -> None:
        good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        system = {"role": "system", "content": "s"}
        lines = [
            good,
            {"messages": good},
            [system, *good],
            good[:1],
            [good[0], {"role": "assistant"}],
        ]
        path = write_rows(tmp_path / "mine.jsonl", lines)
        path.write_bytes(path.read_bytes() + b"\n[oops\n")
        with pytest.raises(InputError) as caught:
            len(CustomJSON(path))
        where = "line 1 column 2 (char 1)"
        assert str(caught.value).splitlines() == [
            f"{path}, line 2: expected a list of two turns or more; have dict",
            f"{path}, line 3: turn 1: expected the role user; have system",
            f"{path}, line 4: expected a list of two turns or more; have 1 turns",
            f"{path}, line 5: turn 2: its content is no text",
            f"{path}, line 7: unexpected character, expected a JSON value: {where}",
            "correct these lines, or take them out",
        ]

    def test_many_bad_lines(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "mine.jsonl", [[]] * 25)
        with pytest.raises(InputError, match=r"line 20: .*\nand 5 more bad lines\n"):
            CustomJSON(path)[0]

    def test_a_missing_file(self, tmp_path: Path) -> None:
        told = "not found; expected a JSON array .*; correct the path, or put the file there"
        for read in (CustomJSON.files, CustomJSON.fetch, len):
            with pytest.raises(InputError, match=told):
                read(CustomJSON(str(tmp_path / "mine.jsonl")))


@contextmanager
def serving(content: bytes, claimed_length: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """A URL, and what was asked there."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(claimed_length or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/words.txt", asked
        finally:
            server.shutdown()


class TestSpelling:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_what_is_drawn(self, split: str) -> None:
        """In the order of nanochat, from the seed of the row."""
        words = (ROOT / "modelcall_assets/sources/words.txt").read_text().split()
        templates = (ROOT / "modelcall_assets/sources/questions.txt").read_text().splitlines()
        assert len(templates) == len({*templates}) == 51
        for index, conversation in enumerate(SpellingBee(60, split)):
            draw = random.Random(index + 10_000_000 * (split == "test"))
            word = draw.choice(words)
            is_in_word = draw.random() < 0.9
            letter = draw.choice(word if is_in_word else string.ascii_lowercase)
            question = draw.choice(templates)
            question = question.lower() if draw.random() < 0.3 else question
            quotes = [draw.choice(["", "'", '"']) for _ in range(2)]
            named = {"letter": letter, "word": word}
            quoted = zip(named, quotes, strict=True)
            asked = question.format(**{name: f"{q}{named[name]}{q}" for name, q in quoted})
            asked += "?" * (draw.random() < 0.5)
            user, assistant = conversation["messages"]
            assert user == {"role": "user", "content": asked}
            kinds = [part["type"] for part in assistant["content"]]
            assert kinds == ["text", "text", "python", "python_output", "text"]
            by_hand, _, call, output, last = [part["text"] for part in assistant["content"]]
            count = word.count(letter)
            assert (call, output) == (f"'{word}'.count('{letter}')", str(count))
            assert last.endswith(f"#### {count}")
            assert f"{word}:{','.join(word)}\n" in by_hand
            rows = [line for line in by_hand.splitlines() if line[0:1].isdigit()]
            assert [row.split()[0] for row in rows] == [f"{n}:{c}" for n, c in enumerate(word, 1)]
            hits = [row.rsplit(" ", 1)[1] for row in rows if " " in row]
            assert hits == [str(n) for n in range(1, count + 1)]

    def test_simple(self) -> None:
        words = (ROOT / "modelcall_assets/sources/words.txt").read_text().split()
        random.Random(42).shuffle(words)
        for index, conversation in enumerate(SimpleSpelling(20, "test")):
            word = random.Random(10_000_000 + index).choice(words)
            user, assistant = conversation["messages"]
            assert user["content"] == f"Spell the word: {word}"
            assert assistant["content"] == f"{word}:{','.join(word)}"

    def test_an_own_list(self, tmp_path: Path) -> None:
        path = tmp_path / "list"
        path.write_text("\n zebu \n\n", "utf-8")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        source = SimpleSpelling(2, word_list=str(path), sha256=digest.upper())
        assert source[1]["messages"][1]["content"] == "zebu:z,e,b,u"
        with pytest.raises(InputError, match=r"list: sha256:.* and not sha256:00; bring the right"):
            SimpleSpelling(2, word_list=path, sha256="00")[0]
        path.write_text(" \n")
        with pytest.raises(InputError, match="has no words"):
            SimpleSpelling(2, word_list=path)[0]
        path.write_bytes(b"\xff\n")
        with pytest.raises(InputError, match="not UTF-8"):
            SpellingBee(2, word_list=path)[0]
        with pytest.raises(InputError, match="not found; expected a text with a word in each line"):
            SpellingBee(2, word_list=tmp_path / "none").files()

    def test_a_list_by_url(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is fetched once, whoever asks."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        content = b"heron\n" * 5000
        digest = hashlib.sha256(content).hexdigest()
        with serving(content) as (url, asked):
            sources = [SimpleSpelling(1, word_list=url, sha256=digest) for _ in range(8)]
            with pytest.raises(InputError, match="not fetched yet"):
                sources[0].files()
            with ThreadPoolExecutor(8) as threads:
                words = [*threads.map(lambda source: len(source.words), sources)]
            assert words == [5000] * 8
            assert asked == ["/words.txt"]
            (file,) = sources[0].files()
            with pytest.raises(InputError, match="delete it, so that it is fetched again"):
                SimpleSpelling(1, word_list=url, sha256="0" * 64).fetch()
        assert file.place.read_bytes() == content  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("length", "sha256", "told"),
        [(9, None, "4 bytes are missing"), (None, "ab", "has sha256:.* and not sha256:ab")],
    )
    def test_a_bad_list_is_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: Any, sha256: Any, told: str
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with serving(b"heron", length) as (url, _):
            source = SpellingBee(word_list=url, sha256=sha256)
            with pytest.raises(InputError, match=f"cannot be fetched: .*{told}"):
                source.fetch()
            with pytest.raises(InputError, match="not fetched yet"):
                source.files()


def gsm8k_rows(count: int) -> list[Row]:
    return [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(count)]


class TestFolder:
    def as_jsonl(self, folder: Path, rows: list[Row]) -> Path:
        write_rows(folder / "openai/gsm8k/main/test.jsonl", rows)
        return folder

    def as_parquet(self, folder: Path, rows: list[Row]) -> Path:
        """Two shards as the Hub has them, declared beside a split that is not here."""
        inside = folder / "openai/gsm8k"
        (inside / "main").mkdir(parents=True)
        half = len(rows) // 2
        for shard, some in enumerate((rows[:half], rows[half:])):
            path = inside / f"main/test-{shard:05}-of-00002.parquet"
            pq.write_table(pa.Table.from_pylist(some), path, row_group_size=3)
        files = "".join(f"\n  - {{split: {x}, path: main/{x}-*}}" for x in ("train", "test"))
        front = f"configs:\n- config_name: main\n  data_files:{files}\n"
        (inside / "README.md").write_text(f"---\n{front}---\n")
        return folder

    @pytest.mark.parametrize("count", [1, 5, 101])
    def test_order_of_nanochat_from_anywhere(self, tmp_path: Path, count: int) -> None:
        rows = gsm8k_rows(count)
        order = numpy.random.default_rng(42).permutation(count)
        want = [f"q{n}" for n in order]
        self.as_jsonl(tmp_path / "lines", rows)
        self.as_parquet(tmp_path / "columns", rows)
        store = fsspec.filesystem("memory")
        store.put(f"{tmp_path}/columns", f"/{tmp_path.name}", recursive=True)
        places = tmp_path / "lines", str(tmp_path / "columns"), f"memory://{tmp_path.name}"
        for place in places:
            assert said(GSM8K("main", "test", folder=place)) == want
        assert said(GSM8K("main", "test", Stores().place(places[2]), start=1)) == want[1:]

    def test_files(self, tmp_path: Path) -> None:
        source = GSM8K("main", "test", self.as_parquet(tmp_path, gsm8k_rows(4)))
        shards = [f"main/test-0000{n}-of-00002.parquet" for n in range(2)]
        assert [file.key_path for file in source.files()] == shards
        assert source.fetch() == source.files()
        with pytest.raises(InputError, match=r"main/train-.* fits no file"):
            GSM8K("main", "train", tmp_path).files()
        (tmp_path / "openai/gsm8k" / shards[0]).unlink()
        with pytest.raises(InputError, match="1 of 2 files of the split 'test' are there"):
            source.files()

    def test_bad_rows_name_their_place(self, tmp_path: Path) -> None:
        rows = gsm8k_rows(9)
        rows[7]["answer"] = None
        source = GSM8K("main", "test", self.as_parquet(tmp_path, rows))
        at = [*numpy.random.default_rng(42).permutation(9)].index(7)
        with pytest.raises(InputError, match=r"test-00001-of-00002\.parquet, row 4: answer: exp"):
            source[at]
        assert source[at - 1]["messages"]

    def test_lines_that_are_no_objects(self, tmp_path: Path) -> None:
        source = GSM8K("main", "test", self.as_jsonl(tmp_path, [[1]]))  # type: ignore[list-item]
        with pytest.raises(InputError, match=r"test\.jsonl: line 1: not an object but a list"):
            source[0]

    def test_one_split_needs_no_other(self, tmp_path: Path) -> None:
        inside = self.as_parquet(tmp_path, gsm8k_rows(4)) / "openai/gsm8k"
        assert len(find_split(inside, "main", "test").files) == 2
        with pytest.raises(InputError, match="main/train-"):
            find_split(inside, "main", "other")

    def test_without_the_packages(self, tmp_path: Path) -> None:
        """Of the extra; a module that is None cannot be imported."""
        self.as_jsonl(tmp_path, gsm8k_rows(2))
        code = f"""
import sys
sys.modules["numpy"] = sys.modules["huggingface_hub"] = None
from modelcall_assets.errors import SetupError
from modelcall_assets.sources import GSM8K
for source in (GSM8K("main", "test", "{tmp_path}"), GSM8K("main", "test")):
    try:
        source[0]
    except SetupError as error:
        print(error)
"""
        told = ran(code, {}).splitlines()
        for package, line in zip(("numpy", "huggingface_hub"), told, strict=True):
            assert f"the package {package} cannot be imported" in line
            assert line.endswith("pip install 'modelcall-assets[evaluation]'")


def ran(code: str, env: dict[str, str]) -> str:
    """What a process prints: the library of the Hub reads its environment when it is imported."""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


ASK = """
from modelcall_assets.errors import InputError
from modelcall_assets.sources import GSM8K
def tell(work):
    try:
        print(work())
    except InputError as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
class TestHub:
    @pytest.fixture
    def hub(self, tmp_path: Path) -> Iterator[Hub]:
        shutil.copytree(SAMPLES, tmp_path / "hub")
        with serve_hub(tmp_path / "hub") as hub:
            yield hub

    @pytest.fixture
    def env(self, hub: Hub, tmp_path: Path) -> dict[str, str]:
        home = str(tmp_path / "home")
        return {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def test_a_split_is_fetched_once(self, hub: Hub, env: dict[str, str]) -> None:
        """And no more than it. Offline it is there, and what was not fetched is not."""
        shown = 'tell(lambda: [turn["messages"][0]["content"] for turn in source])'
        code = f"{ASK}\nsource = GSM8K('main', 'test')\n{shown}\n"
        local = f"{[*said(GSM8K('main', 'test', SAMPLES))]}\n"
        assert ran(code, env) == local
        assert hub.downloads() == ["README.md", "main/test.jsonl"]
        hub.asked.clear()
        assert ran(code, env) == local
        files = "tell(lambda: [file.key_path for file in source.files()])"
        other = "tell(GSM8K('main', 'train').files)\ntell(GSM8K('main', 'train').fetch)"
        offline = ran(f"{code}{files}\n{other}", {**env, "HF_HUB_OFFLINE": "1"})
        shown, listed, *absent = offline.splitlines()
        assert f"{shown}\n" == local
        assert listed == "['main/test.jsonl']"
        command = (
            "hf download openai/gsm8k --repo-type dataset --include README.md --include 'main/*'"
        )
        told = (
            f"InputError: openai/gsm8k main train: not in the Hub's cache; get it with: {command}"
        )
        assert absent[0] == told
        assert absent[1].startswith(f"{told}. The Hub: ")
        assert "HF_HUB_OFFLINE" in absent[1]
        assert hub.asked == []

    def test_half_a_split_is_none(self, hub: Hub, env: dict[str, str]) -> None:
        inside = hub.root / "openai/gsm8k/main"
        shards = [f"test-0000{n}-of-00002.parquet" for n in range(2)]
        for rows, shard in enumerate(shards, 2):
            pq.write_table(pa.Table.from_pylist(gsm8k_rows(rows)), inside / shard)
        (inside / "test.jsonl").unlink()
        readme = hub.root / "openai/gsm8k/README.md"
        readme.write_text(readme.read_text().replace("main/test.jsonl", "main/test-*"))
        hub.refused.add(shards[1])
        code = f"{ASK}\nsource = GSM8K('main', 'test')\ntell(source.fetch)\ntell(source.files)"
        broken, absent = ran(code, env).splitlines()
        assert "The Hub: " in broken and "403" in broken
        assert "not in the Hub's cache" in absent
        hub.refused.clear()
        hub.asked.clear()
        assert ran(f"{code}\ntell(lambda: len(source))", env).splitlines()[-1] == "5"
        assert hub.downloads() == [f"main/{shards[1]}"]

    def test_a_new_commit_is_seen_when_it_is_fetched(self, hub: Hub, env: dict[str, str]) -> None:
        count = "tell(lambda: len(GSM8K('main', 'test')))"
        assert ran(f"{ASK}\n{count}", env) == "12\n"
        write_rows(hub.root / "openai/gsm8k/main/test.jsonl", gsm8k_rows(2))
        fetch = "GSM8K('main', 'test').fetch()"
        assert ran(f"{ASK}\n{count}\n{fetch}\n{count}", env) == "12\n2\n"

    def test_what_is_in_no_place(self, hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
        """Both places are named, and the way to fill each."""
        shutil.rmtree(hub.root / "openai/gsm8k")
        code = f"{ASK}\ntell(lambda: GSM8K('main', 'test', '{tmp_path}/mine')[0])"
        told = ran(code, env)
        place = f"{tmp_path}/mine/openai/gsm8k"
        assert f"not in {place}, nor in the Hub's cache; get it with: hf download" in told
        assert f"--local-dir {place}. The Hub: " in told
        assert "404" in told or "not found" in told.lower()

    def test_the_folder_comes_first(self, hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
        count = f"{ASK}\ntell(lambda: len(GSM8K('main', 'test', {str(tmp_path / 'mine')!r})))"
        assert ran(count, env) == "12\n"
        hub.asked.clear()
        write_rows(tmp_path / "mine/openai/gsm8k/main/test.jsonl", gsm8k_rows(3))
        assert ran(count, env) == "3\n"
        assert hub.asked == []


class TestFewShot:
    def shots(self, source: Source) -> list[dict[str, str]]:
        return source[0]["messages"][:-2]

    def test_turns_before_the_question(self) -> None:
        asked, examples = GSM8K("main", "test", SAMPLES), GSM8K("main", "train", SAMPLES)
        source = FewShot(asked, examples, ids=[7, 2])
        lines = (SAMPLES / "openai/gsm8k/main/train.jsonl").read_bytes().splitlines()
        answers = {row["question"]: row["answer"] for row in map(orjson.loads, lines)}
        turns = self.shots(source)
        assert [turn["content"] for turn in turns[::2]] == [said(examples)[at] for at in (7, 2)]
        assert [answers[turn["content"]] for turn in turns[::2]] == [
            turn["content"] for turn in turns[1::2]
        ]
        for at, conversation in enumerate(source):
            assert conversation["messages"] == [*turns, *asked[at]["messages"]]
        assert (source.grader, source.name, source.id_of(3)) == (
            *("numeric", "GSM8K/main/test", "GSM8K/main/test/3"),
        )
        assert source.files() == [*asked.files(), *examples.files()]

    def test_extras_stay_and_a_system_turn_is_first(self) -> None:
        mmlu = FewShot(MMLU("all", "test", SAMPLES), MMLU("all", "dev", SAMPLES), n=3)
        assert {*mmlu[0]} == {"messages", "letters", "subject"}
        assert (mmlu.baseline, mmlu.eval_type, len(mmlu[5]["messages"])) == (0.25, "categorical", 8)
        talks = SmolTalk("test", folder=SAMPLES)
        first = next(at for at in range(12) if talks[at]["messages"][0]["role"] == "system")
        turns = FewShot(talks, SmolTalk("train", folder=SAMPLES), n=12)[first]["messages"]
        assert [turn["role"] for turn in turns].index("system") == 0
        assert [turn["role"] for turn in turns].count("system") == 1

    def test_the_seed_decides(self) -> None:
        asked, examples = Letters("a", 3), Letters("b", 40)
        drawn = [FewShot(asked, examples, n=6, seed=seed)[0]["messages"] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert len({turn["content"] for turn in drawn[2]}) == 7
        with pytest.raises(ValueError, match="n: expected 40 examples at most; have 41"):
            FewShot(asked, examples, n=41)[0]
        with pytest.raises(IndexError, match="b: no row 40"):
            FewShot(asked, examples, ids=[40])[0]
        with pytest.raises(ValueError, match="n: expected a whole number of 0 or more; have -1"):
            FewShot(asked, examples, n=-1)

    def test_examples_of_the_same_subject(self) -> None:
        """All that there are of the question's own, and in one order."""
        asked, examples = MMLU("all", "test", SAMPLES), MMLU("all", "dev", SAMPLES)
        subjects = {each["messages"][0]["content"]: each["subject"] for each in examples}
        for each in FewShot(asked, examples, n=5, same="subject"):
            shown = [turn["content"] for turn in each["messages"][:-2:2]]
            assert len({*shown}) == 5 and {subjects[text] for text in shown} == {each["subject"]}
        for each in FewShot(asked, examples, ids=range(len(examples)), same="subject"):
            shown = [turn["content"] for turn in each["messages"][:-2:2]]
            assert shown == [text for text in subjects if subjects[text] == each["subject"]]

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"n": 6}, "n: expected 5 examples at most where subject is '.*'; have 6"),
            ({"ids": [0]}, "ids: no example where subject is '"),
            ({"same": "topic"}, "same: expected one of messages, letters, subject; have 'topic'"),
            ({"same": 5}, "same: expected one of messages, letters, subject; have 5"),
        ],
    )
    def test_too_few_of_the_same(self, options: Row, told: str) -> None:
        asked, examples = MMLU("all", "test", SAMPLES), MMLU("all", "dev", SAMPLES)
        with pytest.raises(ValueError, match=told):
            FewShot(asked, examples, **{"same": "subject", **options})[0]

    def test_never_a_row_under_test(self) -> None:
        asked = Letters("a", 20, start=5, stop=15)
        told = "examples: a/5 is asked too; take another split, or rows that are not asked"
        with pytest.raises(ValueError, match=told):
            FewShot(asked, Letters("a", 20), n=2)
        with pytest.raises(ValueError, match=told):
            FewShot(asked, Letters("a", 20), ids=[1, 5])
        with pytest.raises(ValueError, match=told):
            FewShot(Mixture([asked, Letters("b", 2)]), Letters("a", 6), n=1)[0]
        assert said(FewShot(asked, Letters("a", 20), ids=[4, 15]))[0] == "a4"
        assert len(FewShot(asked, Letters("a", 20, start=15), n=5)[0]["messages"]) == 6


ALL_SAMPLES = [
    *(ARC(subset, split, SAMPLES) for subset in ARC.subsets for split in ("train", "test")),
    *(MMLU("all", split, SAMPLES) for split in MMLU.subsets["all"]),
    MMLU("auxiliary_train", "train", SAMPLES),
    *(GSM8K(subset, split, SAMPLES) for subset in GSM8K.subsets for split in ("train", "test")),
    HumanEval(folder=SAMPLES),
    *(SmolTalk(split, folder=SAMPLES) for split in ("train", "test")),
    SpellingBee(30),
]


@pytest.mark.parametrize("source", ALL_SAMPLES, ids=lambda source: source.name)
class TestSamples:
    def test_each_goes_through_its_source(self, source: Source) -> None:
        conversations = [*source]
        assert len(conversations) >= 12
        assert len({repr(each["messages"]) for each in conversations}) == len(conversations)
        for each in conversations:
            assert orjson.loads(orjson.dumps(each)) == each

    def test_the_reference_is_right(self, source: Source) -> None:
        """And what is no answer is wrong."""
        if source.grader not in GRADERS:
            pytest.skip(f"no grader {source.grader}")
        try:
            source.evaluate(source[0], "")
        except SetupError as error:
            pytest.skip(str(error))
        for each in source:
            reference = text_of(each["messages"][-1]["content"])
            assert source.evaluate(each, reference) is True
            assert source.evaluate(each, "I do not know.") is False
            if isinstance(source, GSM8K | SpellingBee):
                assert source.reward(each, reference) == 1.0


def test_the_samples_have_several_subjects() -> None:
    subjects = {each["subject"] for each in MMLU("all", "test", SAMPLES)}
    assert len(subjects) == 4 and subjects < {*MMLU.subsets}


class TestOfTheUsers:
    def test_the_example_of_the_documentation(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pages = [
            p
            for p in write_examples(ROOT / "docs/evaluation.md", tmp_path)
            if p.name == "capitals.py"
        ]
        assert len(pages) == 1 and len(pages[0].read_text().splitlines()) <= 80
        monkeypatch.setattr(sys, "path", [*sys.path])
        kind = find_source("my_pkg.capitals:Capitals", tmp_path, "t.yaml", "source")
        table = tmp_path / "capitals.csv"
        table.write_text("Peru,Lima\nKenya,Nairobi\nNepal,Kathmandu\n")
        source = kind(str(table), start=1)
        assert len(source) == 2
        assert source[-1]["messages"][1] == {"role": "assistant", "content": "Kathmandu"}
        assert "Nepal" in source[-1]["messages"][0]["content"]
        assert [file.place for file in source.files()] == [table]
        if source.grader in GRADERS:
            assert source.evaluate(source[0], "Nairobi") is True
            assert source.evaluate(source[0], "Lima") is False
        table.write_text("Peru\n")
        with pytest.raises(InputError, match="line 1: expected a country and its capital"):
            kind(str(table))[0]

    def test_the_first_example(self, tmp_path: Path) -> None:
        if not {"numeric", "choice"} <= {*GRADERS}:
            pytest.skip("no graders")
        write_examples(ROOT / "docs/evaluation.md", tmp_path)
        shown = ran((tmp_path / "try_sources.py").read_text(), {})
        assert shown.splitlines()[1:] == ["True 0.0", "10", *["assistant"] * 5]

    def test_names(self, tmp_path: Path) -> None:
        assert find_source("MMLU", tmp_path, "t.yaml", "source") is MMLU
        with pytest.raises(
            SetupError, match=r"t\.yaml:source: no source 'mmlu'; expected one of ARC"
        ):
            find_source("mmlu", tmp_path, "t.yaml", "source")
        with pytest.raises(SetupError, match="graphlib:TopologicalSorter has no method __getitem"):
            find_source("graphlib:TopologicalSorter", tmp_path, "t.yaml", "source")
        told = "no source 'shelve:Shelf'; expected a class derived from .*sources.base:Source"
        with pytest.raises(SetupError, match=told):
            find_source("shelve:Shelf", tmp_path, "t.yaml", "source")


def test_no_dagster_is_imported() -> None:
    code = "import sys, modelcall_assets.sources\nprint('dagster' in sys.modules)"
    assert ran(code, {}) == "False\n"
