"""From the text of a reply to values, and the dialogue that mends it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcall_assets.llm.classify import Reply, Said, TryAgain, classify
from modelcall_assets.llm.completion import Answer, Usage
from modelcall_assets.llm.dialogue import (
    AnswerParser,
    ChatRequest,
    Finished,
    Rules,
    correction,
    said_in,
)
from modelcall_assets.llm.json_text import read
from modelcall_assets.records.outcome import Failure, Outcome, Reason, Success

TAGS = {"type": "array", "items": {"type": "string"}}
NUMBER = {"type": "number"}
RATING = {"type": "integer", "minimum": 1, "maximum": 5}


def parser(score: Any = NUMBER, tags: Any = TAGS, required: Sequence[str] = ("score",)) -> Any:
    properties = {"score": score, "tags": tags}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return AnswerParser(["score", "tags"], frozenset(required), schema, {"tags": []})


def completion(content: Any, finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "model": "m",
        "choices": [{"message": {"content": content, **message}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2},
    }


def parse(text: Any, rules: AnswerParser | None = None, finish_reason: Any = "stop") -> Outcome:
    return (rules or parser()).parse(Answer.of(completion(text, finish_reason)))


def failure(outcome: Outcome) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


E3 = [
    ('text {"score": 2} tail', {"score": 2, "tags": []}),
    ('ok ```json\n{"score": "3", "x":1}\n``` and {y}', {"score": 3, "tags": []}),
    ('<think>\nmaybe {x}\n</think>\n\n{"score": 4}', {"score": 4, "tags": []}),
    ('{"score": 1} then {"score": 2}', {"score": 2, "tags": []}),
]


@pytest.mark.parametrize(("reply", "want"), E3)
def test_worked_examples_give_values(reply: str, want: dict[str, Any]) -> None:
    assert parse(reply) == Success(want)


def test_worked_examples_name_what_is_wrong() -> None:
    assert parse('{"tags":["a"]}') == Failure(Reason.MISSING_KEYS, "lacks these keys: score")
    assert failure(parse("")).reason is Reason.EMPTY


def test_required_missing_keys_are_all_named_in_column_order() -> None:
    both = parser(required=("tags", "score"))
    assert parse('{"x": 1}', both) == Failure(Reason.MISSING_KEYS, "lacks these keys: score, tags")


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a</think>b", "b"),
        ("a {1} </think>\n b ", "b"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>cut off", ""),
        ("said <think>cut off", "said"),
        ("<think></think>", ""),
        (" plain ", "plain"),
        ("<THINK>a</Think >b", "b"),
        ("<thinking>a</thinking>b", "b"),
        ("<Thought>a</thought>b<reasoning>c", "b"),
        ("a<think>b</think>c<think>d", "c"),
        ('x ```{"a": "</think>"}```', 'x ```{"a": "</think>"}```'),
    ],
)
def test_thinking_is_stripped(text: str, rest: str) -> None:
    assert read(text)[0] == rest


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
def test_a_tag_that_the_answer_talks_about_is_no_tag(tag: str) -> None:
    reply = json.dumps({"score": 4, "tags": [f"mentions {tag}"]})
    assert parse(f" {reply}\n") == Success({"score": 4.0, "tags": [f"mentions {tag}"]})


def test_only_thinking_is_an_empty_answer() -> None:
    for text in ("<think>hm</think>", "hm</think>\n", "<think>hm", " \n", None, [], 5):
        assert failure(parse(text)).reason is Reason.EMPTY


def test_an_object_in_thinking_is_not_the_answer() -> None:
    outcome = parse('<think>{"score": 1}</think> I cannot say')
    assert failure(outcome).reason is Reason.NOT_AN_OBJECT


@pytest.mark.parametrize(
    ("declared", "value", "want"),
    [
        (NUMBER, "3", 3.0),
        (NUMBER, " -3.5 ", -3.5),
        (NUMBER, 3, 3.0),
        (RATING, "3", 3),
        (RATING, " 3\x1f", 3),
        (NUMBER, "3.5\x1c", 3.5),
        (RATING, "+3", 3),
        (RATING, 3.0, 3),
        ({"type": "string"}, "3", "3"),
        ({"type": "boolean"}, True, True),
        ({"enum": ["a", 1]}, 1, 1),
        ({}, {"any": ["thing"]}, {"any": ["thing"]}),
        (True, 7, 7),
        ({"type": "integer"}, 2**63 - 1, 2**63 - 1),
        ({"type": "integer"}, -(2**63), -(2**63)),
    ],
)
def test_values_that_are_allowed(declared: Any, value: Any, want: Any) -> None:
    assert parse(json.dumps({"score": value}), parser(declared)) == Success(
        {"score": want, "tags": []}
    )


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (NUMBER, "three"),
        (NUMBER, "3e2"),
        (NUMBER, "NaN"),
        (NUMBER, ""),
        (NUMBER, True),
        (NUMBER, [3]),
        (NUMBER, {"wrong": "type"}),
        (NUMBER, None),
        (RATING, 0),
        (RATING, 6),
        (RATING, "6"),
        (RATING, 3.5),
        (RATING, "3.5"),
        (RATING, False),
        ({"type": "string"}, 3),
        ({"enum": ["a", "b"]}, "c"),
        ({"type": ["integer", "null"]}, None),
        ({"type": "integer"}, 2**63),
        ({"type": "integer", "maximum": 2**80}, 2**63),
        ({"type": "integer"}, 1e300),
        ({"type": "integer"}, -1e300),
        ({"type": "integer"}, -(2**63) - 1),
        ({"type": "array", "items": {"type": "integer"}}, [-(2**63) - 9]),
        ({"type": "array", "items": {"type": "integer"}}, [1, 2**63]),
    ],
)
def test_values_that_are_refused(declared: Any, value: Any) -> None:
    wrong = failure(parse(json.dumps({"score": value}), parser(declared)))
    assert wrong.reason is Reason.WRONG_VALUE
    assert wrong.detail.startswith("score")


def test_a_wrong_item_is_named_by_its_place() -> None:
    wrong = failure(parse('{"score": 1, "tags": ["a", 2]}'))
    assert wrong.reason is Reason.WRONG_VALUE
    assert wrong.detail.startswith("tags.1: ")


def test_a_long_wrong_value_makes_no_long_detail() -> None:
    wrong = failure(parse(json.dumps({"score": "x" * 100_000})))
    assert len(wrong.detail) < 2000
    assert len(correction(wrong, ["score"])) < 2000


def test_an_optional_key_may_be_null_and_stays_null() -> None:
    assert parse('{"score": 1, "tags": null}') == Success({"score": 1.0, "tags": None})


def test_defaults_fill_optional_keys_only() -> None:
    schema = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a"]}
    rules = AnswerParser(["a", "b", "c"], frozenset("a"), schema, {"a": 3, "b": 4})
    assert parse("{}", rules) == Failure(Reason.MISSING_KEYS, "lacks these keys: a")
    assert failure(parse('{"a": null}', rules)).reason is Reason.WRONG_VALUE
    assert parse('{"a": 1}', rules) == Success({"a": 1.0, "b": 4, "c": None})


def test_keys_nobody_asked_for_are_dropped_and_not_judged() -> None:
    assert parse('{"score": 1, "tags": [], "why": {"x": 1}}') == Success({"score": 1.0, "tags": []})


@pytest.mark.parametrize("text", ['{"score": 2}', "", "no object"])
def test_truncated_is_seen_before_parsing(text: str) -> None:
    assert failure(parse(text, finish_reason="length")).reason is Reason.TRUNCATED


def test_filtered_is_seen_before_parsing() -> None:
    wrong = failure(parse('{"score": 2}', finish_reason="content_filter"))
    assert wrong.reason is Reason.CONTENT_FILTER


FREE = AnswerParser([], frozenset(), None, may_call=True)
ENDINGS = {
    None: ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls",
           "function_call", "tool_use", "COMPLETE", "end-turn", "FinishReason.STOP", "endTurn",
           None, ""],
    Reason.TRUNCATED: ["length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens",
                       "FINISH_REASON_MAX_TOKENS", "max_new_tokens", "max tokens",
                       "model_context_window_exceeded"],
    Reason.CONTENT_FILTER: ["content_filter", "content-filter", "Content Filter", "SAFETY",
                            "safety", "recitation", "RECITATION",
                            "BLOCKLIST", "prohibited_content", "SPII", "sensitive", "ERROR_TOXIC"],
    Reason.REFUSED: ["refusal"],
    Reason.INTERRUPTED: ["insufficient_system_resource", "abort", "error", "ERROR",
                         "network_error", "cancelled"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("finish_reason", "reason"), [(name, why) for why, names in ENDINGS.items() for name in names]
)
def test_each_finish_reason_has_its_meaning(finish_reason: Any, reason: Reason | None) -> None:
    """For free text and for an object alike."""
    for rules, text in ((FREE, "some text"), (parser(), '{"score": 2}')):
        reply = json.dumps(completion(text, finish_reason)).encode()
        match classify(Reply(200, {}, reply)):
            case Answer() as answer:
                outcome = rules.parse(answer)
            case TryAgain(failed):
                outcome = failed
            case other:
                raise AssertionError(other)
        assert (outcome.reason if isinstance(outcome, Failure) else None) is reason


@pytest.mark.parametrize("finish_reason", ["whatever", "load", 7, ["stop"], {"type": "stop"}])
def test_an_unknown_ending_is_no_success_of_free_text(finish_reason: Any) -> None:
    """An object shows by itself that it is whole."""
    assert isinstance(parse('{"score": 2}', finish_reason=finish_reason), Success)
    assert failure(parse("text", FREE, finish_reason)).reason is Reason.INTERRUPTED


def test_free_text_need_only_be_there() -> None:
    assert parse("anything", FREE) == Success({})
    assert failure(parse("<think>hm</think>", FREE)).reason is Reason.EMPTY


UNSTORABLE = [
    '{"score": NaN}',
    '{"score": Infinity}',
    '{"score": 1e999}',
    r'{"score": "\ud800"}',
    '{"score": "\ud800"}',
    '{"score": ' + "[" * 300 + "]" * 300 + "}",
    '{"score": 1' + "0" * 5000 + "}",
    '{"a":' * 2000,
    "[" * 100_000,
    "{" * 10_000,
    '{"score": 1',
    "{'score': 1}",
]


@pytest.mark.parametrize("around", ["{}", "so: {}", "[{}]"])
@pytest.mark.parametrize("text", UNSTORABLE, ids=range(len(UNSTORABLE)))
def test_what_no_output_can_hold_is_no_success(text: str, around: str) -> None:
    outcome = parse(around.replace("{}", text), parser(score={}))
    assert not isinstance(outcome, Success)


@pytest.mark.parametrize("depth", range(240, 260))
def test_values_as_deep_as_they_are_accepted_can_be_written(depth: int) -> None:
    """The writer hashes the values two levels down; a Success must survive that."""
    outcome = parse('{"score": 1, "tags": ' + "[" * depth + "]" * depth + "}", parser(tags={}))
    if isinstance(outcome, Success):
        orjson.dumps([[], list(outcome.values.values())])
    else:
        assert outcome.reason is Reason.NOT_AN_OBJECT


@pytest.mark.parametrize("around", ["{}", "so: {}", "```json\n{}\n```"])
def test_a_huge_number_means_the_same_alone_and_in_prose(around: str) -> None:
    reply = around.replace("{}", '{"score": 1' + "0" * 30 + "}")
    assert parse(reply) == Success({"score": 1e30, "tags": []})


@pytest.mark.parametrize(
    "value", ["1" + "2" * 22, "[-1" + "2" * 22 + "]", '{"a": 99999999999999999999}']
)
def test_an_integer_that_would_lose_digits_is_refused(value: str) -> None:
    wrong = failure(parse(f'{{"score": 1, "tags": {value}}}', parser(tags={})))
    assert wrong.reason is Reason.WRONG_VALUE
    assert wrong.detail.startswith("tags: ")
    for kept in ("1e22", "18446744073709551615", "1.5e300", '"12345678901234567890123"'):
        assert isinstance(parse(f'{{"score": 1, "tags": {kept}}}', parser(tags={})), Success)


def test_the_choice_of_index_0_is_the_answer_wherever_it_is_listed() -> None:
    told = completion("x")
    first = {**told["choices"][0], "index": 0}
    other = {"index": 1, "message": {"content": "y"}, "finish_reason": "length"}
    for choices in ([other, first], [first, other]):
        verdict = classify(Reply(200, {}, json.dumps({**told, "choices": choices}).encode()))
        assert isinstance(verdict, Answer)
        assert verdict.text == "x"
        assert verdict.finish_reason == "stop"


BROKEN = [
    '{"score": 5, "sub": {"score": 1}',
    '{"score": 5, "l": [{"score": 1}, {"score": 2}]',
    '{"score": 5, "why": "a\nb", "l": [{"score": 1}, {"score": 2}]',
    '{"score": 5 "sub": {"score": 1}}',
    '{"score": 5, "why": "he said "{" so", "sub": {"score": 1}}',
    '{"score": 5, "why": "he said "}" so", "sub": {"score": 1}}',
    '{"score": 5, "why": "ends with "}" so"}',
    '{"score": 5, "size": "5" tall", "sub": {"score": 1}}',
    "{'score': 5, 'sub': {\"score\": 1}}",
    "{'score': 5, 'why': 'a } b', 'sub': {\"score\": 1}}",
    '{score: 5, sub: {"score": 1}}',
    '{"score": 5, // good\n "sub": {"score": 1}}',
    '{ # good\n "score": 5, "sub": {"score": 1}}',
    '{“score”: 5, "sub": {"score": 1}}',
    '"score": 5, "sub": {"score": 1}}',
    '{"score": 5, "why": "of </think> tags", "sub": {"score": 1}',
    '{"score": 5, "why": "of </think> tags", "sub": {"score": 1}, "x" 1}',
    '[{"score": 5}, {"score": 1}]',
    '[{"score": 5}, {"score": 1},]',
    '[{"score": 5}, {"score": 1}',
    '[1, {"score": 5}, {"score": 1}',
    '[[{"score": 5}], [{"score": 1}]]',
    '{{"score": 5}, {"score": 1}}',
    '{"score": 1} and then {"score": 5, "sub',
    '{"score": 1} and then {"score": 5, "a" 1}',
    '{"score": NaN}',
]


@pytest.mark.parametrize("around", ["{}", "so: {}", "```json\n{}\n```", "<think>x</think>{}"])
@pytest.mark.parametrize("text", BROKEN)
def test_what_is_inside_a_broken_object_is_not_the_answer(text: str, around: str) -> None:
    assert failure(parse(around.replace("{}", text, 1))).reason is Reason.NOT_AN_OBJECT


MENDED = [
    ('{"score": 5, "sub": {"score": 1, "x": [1,],},}', 5),
    ('{"score": 5, "tags": ["a,}", "b,]"] , }', 5),
    ('{"score": 5, "why": "a\nb\tc", "sub": {"score": 1}}', 5),
    ('[{"score": 5}]', 5),
    ('[{"score": 5},]', 5),
    ('{{"score": 5}}', 5),
    ('in {curly} words: {"score": 5}', 5),
    ('{not json} {"score": 5}', 5),
    ('{x: int} {"score": 5}', 5),
    ('[x] [1] [[wiki]] [note {"score": 5}', 5),
    ('Like {"score": <int>, "tags": ["..."]}. Here\'s mine: {"score": 5}', 5),
    ('The answer is "{"score": 5}".', 5),
    ('{"score": NaN}, no: {"score": 5}', 5),
    ('{"score": 5}}', 5),
    ('{"score": 1}\n{"score": 5}', 5),
]


@pytest.mark.parametrize("around", ["{}", "so: {}", "```json\n{}\n```"])
@pytest.mark.parametrize(("text", "score"), MENDED)
def test_what_is_clear_is_mended(text: str, score: int, around: str) -> None:
    outcome = parse(around.replace("{}", text, 1))
    assert isinstance(outcome, Success)
    assert outcome.values["score"] == score


FENCED = '```json\n{"score": 4, "tags": ["a"]}\n```'
PROSE = [
    "because `data['key']` is read without checks.",
    "The call `print(f\"{x['a']}\")` is fine.",
    "On the interval [0, 1) the function is continuous.",
    "The proof uses $\\left[0, 1\\right)$ well.",
    "The code does `os.environ['HOME']` and prints \"hi\".",
    'The array ["a", "b", ...] is listed (see "c").',
    "It's got a list ['x', y] and it's 'fine'.",
    """Regex `["']([^"']+)["']` is used""",
    "Regex `['\"]` is used",
    'code: `if (a) { "use strict"; }` "ok"',
    "dims [3 x 4",
    "$$x \\in [0,1)$$",
    "A list: [1, 2, 3)",
    "[0, 1) [0, 1) [0, 1) ['a'] [1",
]
FENCE_ONLY = ["unclosed `x = {a: 1` here", "The keys 'a': {\"a\": 1} are read"]


@pytest.mark.parametrize("prose", PROSE)
def test_an_object_beside_brackets_of_prose_is_found(prose: str) -> None:
    plain = '{"score": 4, "tags": ["a"]}'
    for text in (f"{prose}\n{plain}", f"{plain}\n{prose}", f"<think>{prose}</think>\n{plain}"):
        assert parse(text) == Success({"score": 4.0, "tags": ["a"]}), text


@pytest.mark.parametrize(
    "prose", [*PROSE, *FENCE_ONLY, 'The dict `{"a": 1, "b": ...}` is shown. It says "x".']
)
def test_a_fence_bounds_its_object_whatever_the_prose(prose: str) -> None:
    assert parse(f"{prose}\n\n{FENCED}") == Success({"score": 4.0, "tags": ["a"]})


@pytest.mark.parametrize("prose", [*PROSE, FENCE_ONLY[0]])
def test_prose_after_a_fence_hides_nothing(prose: str) -> None:
    assert parse(f"{FENCED}\n\n{prose}") == Success({"score": 4.0, "tags": ["a"]})


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 5, "why": "says:\n@\nand so"}',
        '{"score": 5, "why": "says:\n@',
        '{score: 5, why: "says:\n@\n"}',
        '```json\n{"score": 5, "why": "says:\n@\n"}\n```',
        '{"score": 5, "why": "a "}" b\n@\n"}',
        '@\nNo:\n```json\n{"score": 5, "a" 1}\n```',
        '@\nNo: {"score": 5, "a',
        'x: {"a": 1}\n@\n</think> none',
        '"x": {"a": 1} <think>\n@\n',
    ],
)
def test_a_fence_in_something_broken_or_before_it_is_not_the_answer(text: str) -> None:
    for fence in (FENCED, FENCED.replace("json", "")):
        assert not isinstance(parse(text.replace("@", fence)), Success)


def test_of_fences_the_last_counts() -> None:
    first = FENCED.replace("4", "1")
    assert parse(f"'a': {{}} {first}\n{FENCED}\n[0, 1)") == Success({"score": 4.0, "tags": ["a"]})


DRAFT = '{"score": 1, "tags": []}'


@pytest.mark.parametrize(
    "thought",
    [
        "[THINK]maybe @[/THINK]",
        "<seed:think>maybe @ hm</seed:think>",
        '<think duration="3">@</think>',
        "◁think▷@◁/think▷",
        "<analysis>@</analysis>",
        "<reflection>@</reflection>",
        "<|START_THINKING|>@ hm<|END_THINKING|>",
        "<|begin_of_thought|>@<|end_of_thought|>",
        "<|channel|>analysis<|message|>so @<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>@<|end|><|start|>assistant<|channel|>commentary<|message|>@"
        "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
    ],
)
def test_a_draft_in_any_marks_of_thinking_is_not_the_answer(thought: str) -> None:
    thought = thought.replace("@", DRAFT)
    assert failure(parse(f"{thought} I cannot rate it")).reason is Reason.NOT_AN_OBJECT
    assert failure(parse(thought)).reason is Reason.EMPTY
    assert parse(f"{thought}{FENCED}") == Success({"score": 4.0, "tags": ["a"]})


def test_a_draft_in_a_channel_without_a_final_one_is_not_the_answer() -> None:
    assert failure(parse(f"<|channel|>analysis<|message|>{DRAFT}")).reason is Reason.EMPTY


def test_mending_changes_no_text() -> None:
    tags = ["a,}", "b, ]", 'c\\",}', ",", "}"]
    broken = json.dumps({"score": 1, "tags": tags})[:-1] + " , }"
    assert parse(broken) == Success({"score": 1.0, "tags": tags})


@given(st.data())
def test_an_inner_object_never_stands_for_a_cut_off_one(data: st.DataObject) -> None:
    inner = {"score": 1.0}
    outer = {"score": 5, "why": data.draw(st.text(max_size=8)), "subs": [inner, {"a": inner}]}
    text = json.dumps(outer)
    cut = text[: data.draw(st.integers(1, len(text) - 1))]
    if data.draw(st.booleans()):
        cut = f"Here: {cut}"
    assert not isinstance(parse(cut), Success)


@pytest.mark.parametrize(
    "unit",
    ["{", "[", '{"a":', '{"', "[1,", '{"a" 1} ', "{a", "{a: ", "[{", "{ ", '["', "{}", '{"a":1,},',
     "<think>", "</think>", '{"a </think>', "{'a'}'", '{"a":1}</think>', ",", "[{]", '"\\"',
     "[1 {x ", "[0, 1) {x} ", "['a']", "```{", "```", '```{"a":1} ',
     "<think a=", "<|channel|>final", "<|channel|>",
     "<a:", "a:", "[THINK]"],
)  # fmt: skip
def test_a_long_answer_of_any_kind_is_read_in_linear_time(unit: str) -> None:
    """One of 200 kB that took quadratic time would take minutes."""
    assert not isinstance(parse(unit * (200_000 // len(unit))), Success)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
objects = st.dictionaries(st.text(), json_values, max_size=4)
prose = st.text(st.characters(exclude_characters="{}[]\"'", codec="utf-8"))


@given(prose, objects, prose)
def test_the_object_is_found_in_any_surroundings(before: str, found: Any, after: str) -> None:
    assert read(f"{before}{json.dumps(found)}{after}")[1] == found


@given(objects, st.sampled_from(["{} {y}", "{x} {}", "[{}]", "[1, {}, 2]", "}}{}{{", '"{}']))
def test_stray_brackets_do_not_hide_the_object(found: Any, around: str) -> None:
    assert read(around.replace("{}", json.dumps(found), 1))[1] == found


@given(st.lists(objects, min_size=1, max_size=4), prose)
def test_the_last_object_wins(several: list[Any], between: str) -> None:
    assert read(between.join(map(json.dumps, several)))[1] == several[-1]


@given(
    st.text() | st.lists(st.sampled_from([*'{}[]":,\\\n', "<think>", "</think>", '"score"', "1",
                                          "null", "NaN", "\ud800"])).map("".join)
)  # fmt: skip
@settings(max_examples=300)
def test_parsing_never_raises(text: str) -> None:
    assert isinstance(parse(text), Success | Failure)


@given(json_values, json_values)
def test_any_value_is_judged_not_raised(score: Any, tags: Any) -> None:
    outcome = parse(json.dumps({"score": score, "tags": tags}))
    if isinstance(outcome, Success):
        assert isinstance(outcome.values["score"], float)
        assert set(outcome.values) == {"score", "tags"}


PARTS = [
    ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab", None),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, "x"], "x", "why"),
    ([{"type": "thinking", "thinking": "why"}, {"type": "output_text", "text": "x"}], "x", "why"),
    ([{"type": "reasoning", "text": "why"}, {"text": "x"}], "x", "why"),
    ({"type": "text", "text": "a"}, "a", None),
    ([{"type": "image_url", "image_url": {}}, None, 3, {"type": "text"}], "", None),
]


@pytest.mark.parametrize(("content", "text", "reasoning"), PARTS)
def test_content_may_come_in_parts(content: Any, text: str, reasoning: str | None) -> None:
    answer = Answer.of(completion(content))
    assert (answer.text, answer.reasoning) == (text, reasoning)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, {"refusal": "I won't"}), ([{"type": "refusal", "refusal": "I won't"}], {})],
)
def test_a_refusal_is_a_reason_of_its_own_and_is_not_mended(content: Any, message: Any) -> None:
    answer = Answer.of(completion(content, **message))
    assert answer.text == "I won't"
    for rules in (parser(), FREE):
        finished = Rules(rules, 3).judge([answer])
        assert finished is not None
        assert finished.outcome == Failure(Reason.REFUSED, "the model refused: I won't")
    assert isinstance(parser().parse(Answer.of(completion('{"score": 1}', refusal=""))), Success)


CALL = {"name": "look", "arguments": "{}"}


@pytest.mark.parametrize(
    "message",
    [{"tool_calls": [{"type": "function", "function": CALL}]}, {"function_call": CALL}],
    ids=["tool_calls", "function_call"],
)
def test_tool_calls_are_an_answer_in_text_and_a_named_failure_for_json(message: Any) -> None:
    answer = Answer.of(completion(None, "tool_calls", **message))
    assert json.loads(answer.tool_calls or "") == [{"type": "function", "function": CALL}]
    assert FREE.parse(answer) == Success({})
    finished = Rules(parser(), 3).judge([answer])
    assert finished is not None
    assert failure(finished.outcome).reason is Reason.TOOL_CALLS
    assert "look" in failure(finished.outcome).detail
    both = Answer.of(completion('{"score": 1}', "tool_calls", **message))
    assert isinstance(parser().parse(both), Success)


def tops(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"token": token, "logprob": logprob} for token, logprob in pairs]


@pytest.mark.parametrize(
    ("told", "logprobs"),
    [
        ({"content": [{"token": "B", "top_logprobs": tops(("B", -0.5), (" B", -2))},
                      {"token": ".", "top_logprobs": tops((".", -0.1))}]}, {"B": -0.5, " B": -2.0}),
        ({"content": [{"top_logprobs": tops(("\ufffd", -1), ("\ufffd", -3))}]}, {"\ufffd": -1.0}),
        ({"content": [{"top_logprobs": tops(("B", None), (3, -1), ("C", -1))}]}, {"C": -1.0}),
        *((nothing, None) for nothing in (
            None, 7, "x", [], {}, {"content": None}, {"content": []}, {"content": [3]},
            {"content": [{}]}, {"content": [{"token": "B", "top_logprobs": []}]},
            {"content": [{"top_logprobs": [None, 3]}]}, {"content": {"top_logprobs": 1}})),
    ],
)  # fmt: skip
def test_logprobs_are_those_of_the_first_token(told: Any, logprobs: dict[str, float]) -> None:
    whole = completion("B.")
    whole["choices"][0]["logprobs"] = told
    assert Answer.of(whole).logprobs == logprobs
    (said,) = said_in([Reply(200, {}, json.dumps(whole).encode())])
    assert isinstance(said, Answer) and said.logprobs == logprobs


def rated(before: Sequence[str], behind: Sequence[str], *likely: tuple[str, float]) -> Answer:
    """An answer of these tokens; between them is a 4, in whose place others were so likely."""
    told = [{"token": text, "top_logprobs": tops((text, -0.1))} for text in (*before, "4", *behind)]
    told[len(before)]["top_logprobs"] = tops(*((text, math.log(p)) for text, p in likely))
    whole = completion("".join(each["token"] for each in told))
    whole["choices"][0]["logprobs"] = {"content": told}
    return Answer.of(whole)


EXPECTING = replace(parser(RATING), digits=(1, 2, 3, 4, 5))
OPENS, CLOSES = ['{"', "score", '":', " "], ["}"]


@pytest.mark.parametrize(
    ("before", "behind", "likely", "mean"),
    [
        (OPENS, CLOSES, [("4", 1.0)], 4),
        (OPENS, CLOSES, [("4", 0.5), ("5", 0.25), ("2", 0.25)], 3.75),
        (OPENS, CLOSES, [("4", 0.3), (" 4", 0.1), ("3", 0.1), ("good", 0.5)], 3.8),
        (OPENS, CLOSES, [("4", 0.2), ("2", 0.2), ("9", 0.3), ("0", 0.2), ("44", 0.1)], 3),
        ([*OPENS[:3], '"'], ['"}'], [("4", 0.5), ("5", 0.5)], 4.5),
        (["<think>", *OPENS, "4", "}", "</think>", *OPENS], CLOSES, [("4", 0.5), ("1", 0.5)], 2.5),
        (OPENS, [', "tags": ["a 4"]', "}"], [("4", 0.5), ("3", 0.5)], 3.5),
        (['{"tags": ["4"], "', "score", '"', ": "], CLOSES, [("4", 0.5), ("3", 0.5)], 3.5),
    ],
)
def test_the_mean_of_a_score_is_that_of_its_digits_by_probability(
    before: list[str], behind: list[str], likely: list[tuple[str, float]], mean: float
) -> None:
    outcome = EXPECTING.parse(rated(before, behind, *likely))
    assert isinstance(outcome, Success)
    assert outcome.values["score"] == 4
    assert outcome.values["expected_score"] == pytest.approx(mean)


def test_a_score_without_logprobs_is_a_failure_and_is_not_mended() -> None:
    answers = [
        Answer.of(completion('{"score": 4}')),
        rated(OPENS, CLOSES),
        rated(OPENS, CLOSES, ("four", 0.9), ("9", 0.1)),
        rated(['{"score" :', ' "+'], ['"}'], ("4", 0.9)),
    ]
    for answer in answers:
        finished = Rules(EXPECTING, 3).judge([answer])
        assert finished is not None
        assert failure(finished.outcome).reason is Reason.BAD_REPLY
        assert "no log-probabilities" in failure(finished.outcome).detail
    optional = replace(parser(RATING, required=()), digits=EXPECTING.digits)
    assert optional.parse(Answer.of(completion("{}"))) == Success({"score": None, "tags": []})


REASONING = [
    ({"reasoning_content": "why"}, "why"),
    ({"reasoning": "why"}, "why"),
    ({"reasoning_content": "one", "reasoning": "two"}, "one"),
    ({"reasoning_content": "", "reasoning": "two"}, "two"),
    ({"reasoning_content": None}, None),
    ({}, None),
]


@pytest.mark.parametrize(("message", "reasoning"), REASONING)
def test_reasoning_has_two_names(message: dict[str, Any], reasoning: str | None) -> None:
    assert Answer.of(completion("x", **message)).reasoning == reasoning


def test_an_answer_without_extras_is_read() -> None:
    answer = Answer.of({"choices": [{"message": {}}]})
    assert answer == Answer("", None, None, Usage(known=False), None, None)


@pytest.mark.parametrize(
    "reported",
    [None, 3, [], {}]
    + [
        {"prompt_tokens": odd, "completion_tokens": 1}
        for odd in ("3", -1, 10_000_001, 2**53 + 1, 2**63, 10**30, 1.5, 3.0, True, None, [3])
    ],
)
def test_usage_that_was_not_reported_is_unknown(reported: Any) -> None:
    assert Usage.of(reported).known is False
    assert Usage.of(reported).cost(1, 1) is None


def test_unknown_cost_is_null_and_known_cost_is_a_sum() -> None:
    usage = Usage(1_000_000, 500_000) + Usage(1_000_000, 0)
    assert usage.cost(0.15, 0.6) == pytest.approx(0.6)
    assert usage.cost(None, 0.6) is usage.cost(0.15, None) is None
    assert (usage + Usage(known=False)).cost(0.15, 0.6) is None
    assert Usage(5, 5).cost(0, 0) == 0
    cached = Usage(1_000_000, 0, cached_tokens=400_000)
    assert (cached + cached).cost(1, 1, 0.25) == pytest.approx(2 * (0.6 + 0.1))
    assert cached.cost(1, 1) == pytest.approx(1)
    assert (Usage(2**53, 1) + Usage(1, 1)).known is False, "a sum too is a number that can be kept"


@pytest.mark.parametrize(
    ("reported", "cached"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 7}}, 7),
        ({"prompt_cache_hit_tokens": 4}, 4),
        ({"prompt_tokens_details": {"cached_tokens": 11}}, 0),
        ({"prompt_tokens_details": {"cached_tokens": "7"}}, 0),
        ({"prompt_tokens_details": None}, 0),
        ({}, 0),
    ],
)
def test_cached_tokens_are_those_that_can_be(reported: dict[str, Any], cached: int) -> None:
    usage = Usage.of({"prompt_tokens": 10, "completion_tokens": 2, **reported})
    assert (usage.prompt_tokens, usage.cached_tokens) == (10, cached)


def test_corrections_differ_by_mistake_and_name_the_keys() -> None:
    mistakes = {
        Reason.MISSING_KEYS: "lacks these keys: score",
        Reason.WRONG_VALUE: "score: 9 is too much",
        Reason.TRUNCATED: "",
        Reason.EMPTY: "",
        Reason.NOT_AN_OBJECT: "",
    }
    texts = [correction(Failure(reason, said), ["score"]) for reason, said in mistakes.items()]
    assert len(set(texts)) == len(texts)
    assert all("score" in text for text in texts)


# Dialogues


def final(status: int, body: bytes) -> Said:
    (turn,) = said_in([Reply(status, {}, body)])
    return turn


def turn(text: str, finish_reason: str = "stop") -> Said:
    return final(200, json.dumps(completion(text, finish_reason)).encode())


REFUSED = final(400, b'{"error": {"code": "context_length_exceeded", "message": "too long"}}')
REQUEST = ChatRequest({"model": "m"}, ({"role": "user", "content": "rate this"},))


def test_a_good_answer_ends_the_dialogue() -> None:
    finished = Rules(parser(), 2).judge([turn('{"score": 1}')])
    assert finished is not None
    assert finished.outcome == Success({"score": 1.0, "tags": []})
    assert finished.usage == Usage(10, 2)


def test_a_mistake_is_mended_until_the_limit() -> None:
    rules = Rules(parser(), 1)
    assert rules.judge([turn("no")]) is None
    finished = rules.judge([turn("no"), turn("no")])
    assert finished is not None
    assert failure(finished.outcome).reason is Reason.NOT_AN_OBJECT
    assert finished.usage == Usage(20, 4)


@pytest.mark.parametrize(
    ("reply", "rules"),
    [
        (turn("no"), Rules(parser(), 0)),
        (turn('{"score": 1}', "content_filter"), Rules(parser(), 3)),
        (turn(""), Rules(AnswerParser([], frozenset(), None), 3)),
        (REFUSED, Rules(parser(), 3)),
    ],
)
def test_what_cannot_be_mended_ends_at_once(reply: Said, rules: Rules) -> None:
    finished = rules.judge([reply])
    assert finished is not None
    assert isinstance(finished.outcome, Failure)


def test_a_refused_repair_keeps_what_was_used() -> None:
    finished = Rules(parser(), 2).judge([turn("no"), REFUSED])
    assert finished == Finished(
        Failure(Reason.CONTEXT_LENGTH, "HTTP 400: too long"), None, Usage(10, 2)
    )


def test_a_repair_request_holds_the_whole_dialogue() -> None:
    request = Rules(parser(), 3).next_request(REQUEST, [turn('{"tags": []}'), turn("")])
    roles = [message["role"] for message in request.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert request.messages[0] == REQUEST.messages[0]
    assert request.messages[1]["content"] == '{"tags": []}'
    assert "score" in request.messages[2]["content"]
    assert request.messages[3]["content"], "servers refuse an empty assistant turn"
    assert request.params == REQUEST.params


def test_a_reply_that_would_be_asked_again_does_not_count() -> None:
    assert said_in([Reply(500, {}, b"")]) == []


replies = st.sampled_from(
    [turn("no"), turn(""), turn('{"tags": []}'), turn('{"score": "x"}'), turn("{", "length"),
     turn('{"score": 2}'), turn('{"score": 2}', "content_filter"), REFUSED]
)  # fmt: skip


def converse(
    rules: Rules, script: Sequence[Said], known: Sequence[Said] = ()
) -> tuple[Finished, list[Said], list[bytes]]:
    """Ends as a live dialogue does; `known` was said before a kill, `script` is what would be."""
    turns, sent = list(known), []
    while (finished := rules.judge(turns)) is None:
        sent.append(rules.next_request(REQUEST, turns).payload)
        turns.append(script[len(turns)])
    return finished, turns, sent


@given(st.lists(replies, min_size=5, max_size=5), st.integers(0, 4), st.data())
def test_a_dialogue_cut_anywhere_ends_as_if_it_had_not_been(
    script: list[Said], repairs: int, data: st.DataObject
) -> None:
    rules = Rules(parser(), repairs)
    finished, turns, sent = converse(rules, script)
    cut = data.draw(st.integers(0, len(turns)))
    again, same_turns, rest = converse(rules, script, turns[:cut])
    assert (again, same_turns, rest) == (finished, turns, sent[cut:])
    assert len(turns) <= repairs + 1


# Requests

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
params = st.dictionaries(names, json_values, max_size=5)
texts = st.text(st.characters(codec="utf-8"))


@given(params, texts, st.randoms())
def test_key_and_body_do_not_depend_on_dict_order(given: Any, text: str, luck: Any) -> None:
    shuffled = list(given.items())
    luck.shuffle(shuffled)
    one = ChatRequest(given, ({"role": "user", "content": text},))
    two = ChatRequest(dict(shuffled), ({"content": text, "role": "user"},))
    assert one.key == two.key
    assert one.payload == two.payload
    assert re.fullmatch("[0-9a-f]{32}", one.key)


@given(params, json_values, json_values, json_values)
def test_key_leaves_out_what_cannot_change_the_answer(
    given: Any, stream: Any, options: Any, user: Any
) -> None:
    plain = {
        name: value
        for name, value in given.items()
        if name not in ("stream", "stream_options", "user")
    }
    more = plain | {"stream": stream, "stream_options": options, "user": user}
    assert ChatRequest(more, REQUEST.messages).key == ChatRequest(plain, REQUEST.messages).key
    assert orjson.loads(ChatRequest(more, REQUEST.messages).payload)["user"] == user


@given(texts, texts, st.floats(0, 2), st.floats(0, 2))
def test_key_depends_on_messages_and_params(one: str, two: str, hot: float, cold: float) -> None:
    def key(text: str, temperature: float) -> str:
        message = {"role": "user", "content": text}
        return ChatRequest({"model": "m", "temperature": temperature}, (message,)).key

    assert (key(one, hot) == key(two, cold)) == ((one, hot) == (two, cold))


def test_key_depends_on_model_revision_and_turn_order() -> None:
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
    keys = {
        ChatRequest({"model": "m"}, (user, system)).key,
        ChatRequest({"model": "m"}, (system, user)).key,
        ChatRequest({"model": "n"}, (user, system)).key,
        ChatRequest({"model": "m"}, (user, system), "r1").key,
        ChatRequest({"model": "m"}, (user, system), "r2").key,
        ChatRequest({"model": "m"}, (user, system)).followed_by("a", "b").key,
    }
    assert len(keys) == 6
