"""What is right by each grader's rule, and that a response of any kind can be graded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT, write_examples
from project import CONVERSATIONS, Project, asked, read_rows, turn

from modelcall_assets.grading import GRADERS
from modelcall_assets.records.outcome import Failure, Reason, Row, Success
from modelcall_assets.transforms.user_code import grade

LETTERS = ["A", "B", "C", "D"]


def item(response: Any, reference: Any = "", **more: Any) -> Row:
    return {"messages": [turn("user", "?"), turn("assistant", reference)], **more} | {
        "response": response
    }


def graded(name: str, row: Row, **options: Any) -> tuple[bool, str | None]:
    """As a row of a scores file has it."""
    outcome = grade(GRADERS[name](**options), row)
    assert isinstance(outcome, Success), outcome
    assert outcome.values.keys() == {"correct", "answer"}
    return outcome.values["correct"], outcome.values["answer"]


def refused(name: str, row: Row, **options: Any) -> str:
    outcome = grade(GRADERS[name](**options), row)
    assert isinstance(outcome, Failure), outcome
    assert outcome.reason is Reason.SCORER_ERROR
    return outcome.detail


# Any of them


@pytest.mark.parametrize("name", GRADERS)
def test_the_first_field_is_whether_it_is_right(name: str) -> None:
    fields = GRADERS[name].fields  # type: ignore[attr-defined]
    assert next(iter(fields.items())) == ("correct", {"type": "boolean"})


BY_TEXT = sorted(GRADERS.keys() - {"code", "environment", "own"})
"""`code` runs what is graded, a service sees the steps of `environment`, and `own` takes one of the
others."""
OPTIONS = {"regex": {"pattern": r"\w+"}}
REFERENCES = {"choice": "B", "numeric": "It is #### 7", "spelling": "ox:o,x", "exact": "a b"}


@pytest.mark.parametrize("name", BY_TEXT)
@given(
    said=st.none() | st.text() | st.integers() | st.lists(st.text())
    | st.lists(st.sampled_from([*LETTERS, " ", "answer", "#### ", "1", ",", ".", "-", "<think>",
                                "</think>", "{", "[", '"', "9" * 5000])).map("".join),
)  # fmt: skip
def test_any_response_is_graded_and_always_in_the_same_way(name: str, said: Any) -> None:
    row = item(said, REFERENCES.get(name, "x"), letters=LETTERS)
    options = OPTIONS.get(name, {})
    assert graded(name, row, **options) == graded(name, row, **options)


@pytest.mark.parametrize("name", BY_TEXT)
@pytest.mark.parametrize("said", [None, "", " \n", "<think>B #### 7 a b ox:o,x", 7])
def test_no_answer_is_wrong(name: str, said: Any) -> None:
    row = item(said, REFERENCES.get(name, "x"), letters=LETTERS)
    assert graded(name, row, **OPTIONS.get(name, {})) == (False, None)


RIGHT = {
    "choice": ("D", "D"),
    "numeric": ("so #### 12", "#### 12"),
    "spelling": ("ox:o,x", "ox:o,x"),
    "exact": ("not <b>so</b>", "not <b>so</b>"),
    "regex": ("the end", "the"),
}


@pytest.mark.parametrize("name", BY_TEXT)
@pytest.mark.parametrize("thought", ["<think>\nA? #### 3\n</think>\n\n", "A? #### 3</think>", ""])
def test_the_text_after_the_thoughts_counts(name: str, thought: str) -> None:
    said, reference = RIGHT[name]
    row = item(thought + said, reference, letters=LETTERS)
    assert graded(name, row, **OPTIONS.get(name, {}))[0]


@pytest.mark.parametrize("name", BY_TEXT)
def test_the_reference_is_the_last_turn_its_parts_joined(name: str) -> None:
    said, reference = RIGHT[name]
    parts = [{"type": "text", "text": text} for text in (reference[:1], reference[1:], "")]
    example = [turn("user", "?"), turn("assistant", "wrong")]
    row = item(said, parts, letters=LETTERS)
    row["messages"][:0] = example
    assert graded(name, row, **OPTIONS.get(name, {}))[0]
    for messages in (row["messages"][:-1], [], None):
        told = refused(name, {**row, "messages": messages}, **OPTIONS.get(name, {}))
        assert "the item has no reference" in told


BAD_OPTIONS: Sequence[tuple[str, Row, str]] = [
    ("choice", {"by": "logits"}, "by: unknown value; expected text, logprobs; have 'logits'"),
    ("choice", {"in_sentence": "yes"}, "in_sentence: unknown value; expected false, true"),
    ("choice", {"in_sentence": True, "by": "logprobs"}, "in_sentence: has no effect with"),
    ("exact", {"strip": None}, "strip: unknown value; expected false, true; have None"),
    ("exact", {"ignore_case": "no"}, "ignore_case: unknown value"),
    ("exact", {"normalize": "NFC"}, "normalize: unknown value"),
    ("regex", {"pattern": "(a"}, "pattern: no regular expression: missing )"),
    ("regex", {"pattern": 3}, "pattern: no regular expression: "),
    ("regex", {"pattern": "(a)", "group": 2}, "group: not of the pattern; expected 0, 1; have 2"),
    ("regex", {"pattern": "(?P<x>a)", "group": "y"}, "expected 0, 1, x; have 'y'"),
    ("regex", {"pattern": "a", "value": 3}, "value: wrong type; expected text; have 3"),
]


@pytest.mark.parametrize(("name", "options", "wrong"), BAD_OPTIONS)
def test_an_option_that_cannot_be_is_named(name: str, options: Row, wrong: str) -> None:
    with pytest.raises(ValueError) as caught:
        GRADERS[name](**options)
    assert wrong in str(caught.value)


# Multiple choice


@pytest.mark.parametrize(
    ("said", "answer"),
    [("C", "C"), (" C\n", "C"), ("D", "D"), *[(wrong, None) for wrong in (
        "c", "C.", "(C)", "**C**", "C D", "E", "1", "CC", "The answer is C.")]],
)  # fmt: skip
def test_a_choice_is_a_letter_and_nothing_else(said: str, answer: str | None) -> None:
    assert graded("choice", item(said, "C", letters=LETTERS)) == (answer == "C", answer)


def test_the_letters_are_those_of_the_item() -> None:
    assert graded("choice", item("3", "3", letters=["1", "2", "3"])) == (True, "3")
    assert graded("choice", item("C", "3", letters=["1", "2", "3"])) == (False, None)
    assert "has no `letters`" in refused("choice", item("C", "C"))


SENTENCES = [
    ("The answer is (B).", "B"),
    ("**Answer: B**", "B"),
    ("My answer is B, not C.", "B"),
    ("A is wrong, so is C. The correct answer:\nD", "D"),
    ("A first answer was A. My final ANSWER is C", "C"),
    ("(C) is the correct answer.", "C"),
    ("Only D. is right, D it is", "D"),
    ("I think it is $\\boxed{B}$", "B"),
    ("It is A or B", None),
    ("The answer is unknown: A or B", "A"),
    ("The answer is b", None),
    ("The answer is Bach", None),
    ("It is E", None),
    ("see B.1 and B2", None),
    ("", None),
]


@pytest.mark.parametrize(("said", "answer"), SENTENCES)
def test_a_letter_is_found_in_a_sentence_where_that_is_wanted(
    said: str, answer: str | None
) -> None:
    row = item(said, "B", letters=LETTERS)
    assert graded("choice", row, in_sentence=True) == (answer == "B", answer)
    assert graded("choice", row) == (False, None)


def test_numbers_as_letters_are_found_in_a_sentence() -> None:
    row = item("Of 3.5 and 12 the answer is 12. Rather answer 2.", "2", letters=["1", "2", "3"])
    assert graded("choice", row, in_sentence=True) == (True, "2")


@pytest.mark.parametrize(
    ("logprobs", "answer"),
    [
        ({"B": -0.1, "A": -3}, "B"),
        ({"The": -0.1, "a": -0.2, "C": -3, "A": -4}, "C"),
        ({"A": math.log(0.4), "B": math.log(0.3), " B": math.log(0.25)}, "B"),
        ({"D": -2.0, "C": -2.0}, "C"),
        ({"D\n": -30.0}, "D"),
    ],
)
def test_by_logprobs_the_likeliest_letter_is_the_answer(
    logprobs: dict[str, float], answer: str
) -> None:
    for said in ("B", "whatever", None):
        row = item(said, "B", letters=LETTERS, logprobs=logprobs)
        assert graded("choice", row, by="logprobs") == (answer == "B", answer)


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ({}, "the endpoint gave none"),
        ({"logprobs": None}, "the endpoint gave none"),
        ({"logprobs": {"<think>": -0.1, "b": -2.0}}, "logprobs has none of the letters"),
    ],
)
def test_by_logprobs_a_row_without_them_fails(column: Row, wrong: str) -> None:
    told = refused("choice", item("B", "B", letters=LETTERS, **column), by="logprobs")
    assert wrong in told and "generate_response.logprobs" in told


@given(st.dictionaries(st.sampled_from(LETTERS), st.floats(-30, 0), min_size=1))
def test_the_letter_is_that_of_the_largest_logprob(logprobs: dict[str, float]) -> None:
    _, answer = graded("choice", item("", "A", letters=LETTERS, logprobs=logprobs), by="logprobs")
    assert logprobs[answer or ""] == pytest.approx(max(logprobs.values()), abs=1e-9)


# Numbers


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("#### 27", "27"),
        ("#### 2,700,000", "2700000"),
        ("#### 27.", "27"),
        ("#### 27.50", "27.5"),
        ("#### -27", "-27"),
        ("#### 027", "27"),
        ("#### .5", "0.5"),
        ("#### -0.0", "0"),
        ("#### 27 apples", "27"),
        ("so\n#### 27\n#### 28", "27"),
        ("#### none\n#### 28", "28"),
        ("##### 27", "27"),
        ("####27", None),
        ("####  27", None),
        ("#### $27", None),
        ("#### +27", None),
        ("#### ٢٧", None),
        ("#### 1.2.3", None),
        ("#### ,", None),
        ("#### .", None),
        ("27", None),
    ],
)
def test_the_marked_number_is_the_answer(said: str, answer: str | None) -> None:
    assert graded("numeric", item(said, "#### 27")) == (answer == "27", answer)
    assert graded("numeric", item(said, "#### 27.50"))[0] == (answer == "27.5")


def test_no_number_equals_none() -> None:
    assert graded("numeric", item("none", "nor here")) == (False, None)
    assert graded("numeric", item("#### 3", "nor here")) == (False, "3")


@given(st.decimals(-(10**9), 10**9, places=3), st.integers(0, 3))
def test_a_number_is_right_however_it_is_written(number: Decimal, zeros: int) -> None:
    written = f"{number:,f}" + "0" * zeros
    assert graded("numeric", item(f"#### {written}", f"#### {number:f}"))[0]
    assert not graded("numeric", item(f"#### {written}", f"#### {number + 1:f}"))[0]


# Spelling


def test_counts_are_numbers_and_spellings_are_texts() -> None:
    count = [{"type": "text", "text": "egg:e,g,g"}, {"type": "text", "text": "\n\n#### 2"}]
    assert graded("spelling", item("g twice\n#### 2.0", count)) == (True, "2")
    assert graded("spelling", item("egg:e,g,g", count)) == (False, None)
    assert graded("spelling", item(" egg:e,g,g\n", "egg:e,g,g")) == (True, "egg:e,g,g")
    assert graded("spelling", item("egg: e,g,g", "egg:e,g,g")) == (False, "egg: e,g,g")


# Texts


WAYS: Sequence[Row] = (
    {},
    {"strip": False},
    {"ignore_case": True},
    {"normalize": True},
    {"ignore_case": True, "normalize": True},
)


@pytest.mark.parametrize(
    ("said", "reference", "right"),
    [
        ("Rome", "Rome", (True, True, True, True, True)),
        (" Rome\n", "Rome", (True, False, True, True, True)),
        ("Rome", "Rome ", (True, False, True, True, True)),
        ("rome", "ROME", (False, False, True, False, True)),
        ("STRASSE", "Straße", (False, False, True, False, True)),
        ("New \n York", "New York", (False, False, False, True, True)),
        ("ﬁne ①", "fine 1", (False, False, False, True, True)),
        ("cafe\u0301", "café", (False, False, False, True, True)),
        ("new  york", "New York", (False, False, False, False, True)),
        ("Rome.", "Rome", (False, False, False, False, False)),
    ],
)
def test_exact_says_what_does_not_count(said: str, reference: str, right: tuple[bool, ...]) -> None:
    row = item(said, reference)
    assert tuple(graded("exact", row, **way)[0] for way in WAYS) == right


@pytest.mark.parametrize(
    ("said", "reference", "options", "answer", "is_right"),
    [
        ("verdict: yes, yes", "yes", {"pattern": r"verdict: (\w+)", "group": 1}, "yes", True),
        ("verdict: no", "yes", {"pattern": r"verdict: (\w+)", "group": 1}, "no", False),
        ("no verdict", "yes", {"pattern": r"verdict: (\w+)", "group": 1}, None, False),
        ("x=1 x=2", "as x=1 says", {"pattern": r"x=\d"}, "x=1", True),
        ("x=2", " x=1\n", {"pattern": r"x=(?P<n>\d)", "group": "n"}, "2", False),
        ("Paris", " Paris\n", {"pattern": r"^\w+$"}, "Paris", True),
        ("YES!", "no", {"pattern": "(?i)yes", "value": "YES"}, "YES", True),
        ("YES!", "YES!", {"pattern": "(?i)yes", "value": "yes"}, "YES", False),
        ("b", "a", {"pattern": "(a)?b", "group": 1}, None, False),
        ("b", "b", {"pattern": "(a)?b", "group": 1}, None, False),
    ],
)
def test_a_pattern_finds_the_answer(
    said: str, reference: str, options: Row, answer: str | None, is_right: bool
) -> None:
    assert graded("regex", item(said, reference), **options) == (is_right, answer)


# In the graph


@pytest.fixture
def project(distilling: Project) -> Project:
    return distilling


QUESTION = "Multiple Choice question: {}?\n- one=A\n- two=B\n- three=C\n\nRespond only with the "
QUESTION += "letter of the correct answer."


def test_answers_are_graded_by_what_was_written_and_by_logprobs_alike(project: Project) -> None:
    """The rehearsal model writes the letter that is likeliest."""
    rows = [
        asked(QUESTION.format(n), letters=LETTERS[:3], id=f"q{n}")
        for n in range(40)
    ]  # fmt: skip
    for row in rows:
        row["messages"].append(turn("assistant", "B"))
    project.write_input(CONVERSATIONS, rows)
    project.write_generation({"logprobs": 5})
    assert project.materialize().failed == []
    answers = project.responses()
    by_text, by_logprobs = (
        [graded("choice", row, by=by) for row in answers] for by in ("text", "logprobs")
    )
    assert by_text == by_logprobs
    assert by_text == [(row["response"] == "B", row["response"]) for row in answers]
    assert Counter(said for _, said in by_text).keys() == set(LETTERS[:3])


def test_the_grader_of_the_page_runs(project: Project) -> None:
    write_examples(ROOT / "docs/evaluation.md", project.root)
    project.task, project.inputs = "overlap", "data/responses"
    said = ["<think>a dog</think>A cat sat", "the cat", "nothing"]
    path = project.root / "data/responses" / CONVERSATIONS
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\n".join(orjson.dumps(item(text, "the cat sat down")) for text in said))
    assert project.materialize().failed == []
    output = project.root / "data/overlap/talk.parquet"
    assert [row["share"] for row in read_rows(output)] == [0.5, 0.5, 0.0]


def test_own_takes_the_grader_that_the_row_names() -> None:
    assert graded("own", item("#### 7.0", "#### 7", grader="numeric")) == (True, "7")
    assert graded("own", item("7", "#### 7", grader="exact")) == (False, "7")
    assert "expected one of choice, code" in refused("own", item("7", "7", grader="nobody"))
    assert "have None" in refused("own", item("7", "7"))
