"""What a reply means: by status, code and headers, never by message text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import formatdate
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcall_assets.llm.classify import (
    Refused,
    Reply,
    TryAgain,
    Verdict,
    classify,
    limit_reset,
    retry_after,
)
from modelcall_assets.llm.completion import Answer
from modelcall_assets.llm.transport import HttpTransport
from modelcall_assets.records.outcome import Failure, Reason


def error(status: int, code: Any = None, kind: Any = None, message: str = "no") -> Reply:
    inner = {"message": message, "code": code, "type": kind, "param": None}
    return Reply(status, {}, orjson.dumps({"error": inner}))


def reason(verdict: Verdict) -> Reason:
    assert isinstance(verdict, TryAgain | Failure), verdict
    return (verdict.failure if isinstance(verdict, TryAgain) else verdict).reason


@pytest.mark.parametrize("status", [408, 409, 425, 500, 501, 502, 503, 504, 520, 529, 599])
def test_server_trouble_is_tried_again(status: int) -> None:
    verdict = classify(error(status))
    assert isinstance(verdict, TryAgain)
    assert reason(verdict) is Reason.SERVER_ERROR


def test_busy_is_tried_again() -> None:
    verdict = classify(error(429, "rate_limit_exceeded"))
    assert isinstance(verdict, TryAgain)
    assert reason(verdict) is Reason.RATE_LIMITED


@pytest.mark.parametrize("status", [301, 302, 307, 308, 401, 402, 403, 404, 405])
def test_an_endpoint_that_refuses_all_is_refused(status: int) -> None:
    verdict = classify(error(status, message="said so"))
    assert verdict == Refused(f"HTTP {status}: said so")


@pytest.mark.parametrize(
    "code",
    [
        "insufficient_quota",
        "billing_hard_limit_reached",
        "access_terminated",
        "quota_exceeded",
        "insufficient_user_quota",
        "usage_limit_reached",
    ],
)
@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_no_quota_is_a_refusal_at_any_status(status: int, code: str) -> None:
    assert isinstance(classify(error(status, code)), Refused)
    assert isinstance(classify(error(status, None, code)), Refused)


@pytest.mark.parametrize(
    ("status", "code", "want"),
    [
        (400, None, Reason.BAD_REQUEST),
        (422, "whatever", Reason.BAD_REQUEST),
        (400, 17, Reason.BAD_REQUEST),
        (400, ["odd"], Reason.BAD_REQUEST),
        (400, "context_length_exceeded", Reason.CONTEXT_LENGTH),
        (413, "string_above_max_length", Reason.CONTEXT_LENGTH),
        (400, "content_filter", Reason.CONTENT_FILTER),
        (400, "content_policy_violation", Reason.CONTENT_FILTER),
    ],
)
def test_a_bad_record_is_final(status: int, code: Any, want: Reason) -> None:
    verdict = classify(error(status, code))
    assert isinstance(verdict, Failure)
    assert reason(verdict) is want


def test_message_text_decides_nothing() -> None:
    text = "insufficient_quota context_length_exceeded rate limit 429 timeout invalid api key"
    assert reason(classify(error(400, message=text))) is Reason.BAD_REQUEST
    assert reason(classify(error(500, message=text))) is Reason.SERVER_ERROR


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "m1"}}', "m1"),
        (b'{"error": "m2"}', "m2"),
        (b'{"message": "m3", "type": "x"}', "m3"),
        (b'{"detail": "m4"}', "m4"),
        (b"<h1>m5</h1>", "m5"),
        (b"[1]", "[1]"),
        (b"", "HTTP 400"),
        (b'{"error": {"message": "m6\xff"}}', "m6"),
    ],
)
def test_the_message_is_found_in_every_shape(body: bytes, said: str) -> None:
    verdict = classify(Reply(400, {}, body))
    assert isinstance(verdict, Failure)
    assert said in verdict.detail


def test_a_code_counts_at_the_top_and_beside_bad_utf8() -> None:
    assert isinstance(classify(Reply(429, {}, b'{"code": "insufficient_quota"}')), Refused)
    body = b'{"error": {"code": "insufficient_quota", "message": "\xff"}}'
    assert isinstance(classify(Reply(400, {}, body)), Refused)


def test_a_long_error_page_makes_a_short_detail() -> None:
    for body in (b"x" * 100_000, orjson.dumps({"error": {"message": "x" * 100_000}})):
        verdict = classify(Reply(400, {}, body))
        assert isinstance(verdict, Failure)
        assert len(verdict.detail) < 1100


def test_a_completion_is_an_answer() -> None:
    completion = {"choices": [{"message": {"content": "x"}}, {"odd": 1}], "more": 1}
    assert classify(Reply(200, {}, orjson.dumps(completion))) == Answer.of(completion)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>gateway</html>",
        b'{"choices": [{"message": {"content": "cut o',
        b"null",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": {}}',
        b'{"choices": [null]}',
        b'{"choices": [{"text": "x"}]}',
        b'{"choices": [{"message": "x"}]}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
    ],
)
def test_a_200_that_is_no_completion_is_tried_again(body: bytes) -> None:
    verdict = classify(Reply(200, {}, body))
    assert isinstance(verdict, TryAgain)
    assert reason(verdict) is Reason.BAD_REPLY


@pytest.mark.parametrize(
    "odd",
    [b'"created": NaN', b'"created": 1e400', b'"created": 1' + b"0" * 5000, b'"x": [-Infinity]',
     b'"x": "\\ud83d"'],
)  # fmt: skip
def test_oddities_around_an_answer_cost_nothing(odd: bytes) -> None:
    choice = b'{"index": 0, "%b": {"content": "a\\ud83d \\ud83d\\ude00"}, "finish_reason": "stop"}'
    whole = b'{"choices": [%b], %b}' % (choice % b"message", odd)
    event = b'data: {"choices": [%b], %b}\n\ndata: [DONE]\n\n' % (choice % b"delta", odd)
    for body in (whole, event):
        verdict = classify(replied(body))
        assert isinstance(verdict, Answer)
        assert verdict.text == "a\ufffd \U0001f600"


def test_a_stream_sent_twice_is_one_answer() -> None:
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "x"}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    ]
    body = b"".join(b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks * 2)
    verdict = classify(replied(body))
    assert isinstance(verdict, Answer)
    assert verdict.text == "x"
    assert verdict.usage.prompt_tokens == 1


def in_body(error: Any) -> Any:
    return {"error": error}


def in_choice(error: Any) -> Any:
    return {"choices": [{"message": {"content": "hal"}, "error": error, "finish_reason": "error"}]}


def in_array(error: Any) -> Any:
    return [{"error": error}]


def replied(body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
    """What a transport makes of a body in one piece."""
    return HttpTransport("n", "http://h").in_one_piece(Reply(200, headers or {}, body))


def in_event(error: Any) -> Any:
    half = {"choices": [{"delta": {"content": "hal"}}]}
    return b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in (half, {"error": error}))


SAID = [
    ({"code": 429, "message": "m"}, Reason.RATE_LIMITED, True),
    ({"code": "429", "message": "m"}, Reason.RATE_LIMITED, True),
    ({"type": "rate_limit_error", "message": "m"}, Reason.RATE_LIMITED, True),
    ({"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m"}, Reason.RATE_LIMITED, True),
    ({"type": "overloaded_error", "message": "m"}, Reason.SERVER_ERROR, True),
    ({"code": 503, "message": "m"}, Reason.SERVER_ERROR, True),
    ({"code": 500, "message": "m"}, Reason.SERVER_ERROR, False),
    ({"code": "strange", "message": "m"}, Reason.SERVER_ERROR, False),
    ("m", Reason.SERVER_ERROR, False),
    ({"code": "context_length_exceeded", "message": "m"}, Reason.CONTEXT_LENGTH, None),
    ({"code": 400, "type": "exceed_context_size_error"}, Reason.CONTEXT_LENGTH, None),
    ({"code": "content_filter", "message": "m"}, Reason.CONTENT_FILTER, None),
    ({"code": "DataInspectionFailed", "message": "m"}, Reason.CONTENT_FILTER, None),
    ({"code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}},
     Reason.CONTENT_FILTER, None),
    ({"code": 403, "message": "m", "metadata": {"reasons": ["x"], "flagged_input": "y"}},
     Reason.CONTENT_FILTER, None),
    ({"code": 400, "message": "m"}, Reason.BAD_REQUEST, None),
    ({"code": "insufficient_quota", "message": "m"}, None, None),
    ({"code": 401, "message": "m"}, None, None),
    ({"code": "model_not_found", "message": "m"}, None, None),
]  # fmt: skip


@pytest.mark.parametrize("place", [in_body, in_choice, in_array, in_event])
@pytest.mark.parametrize(("error", "reason", "busy"), SAID)
def test_an_error_means_the_same_wherever_it_stands(
    error: Any, reason: Reason | None, busy: bool | None, place: Any
) -> None:
    told = place(error)
    body = told if isinstance(told, bytes) else orjson.dumps(told)
    verdict = classify(replied(body, {"retry-after": "7"}))
    match verdict:
        case Refused():
            assert reason is None
        case TryAgain(failure, after_s, is_busy):
            assert (failure.reason, after_s, is_busy) == (reason, 7, busy)
        case Failure() as failure:
            assert (failure.reason, busy) == (reason, None)
        case _:
            raise AssertionError(verdict)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"base_resp": {"status_code": 1002, "status_msg": "m"}}, Reason.RATE_LIMITED),
        ({"base_resp": {"status_code": 1000, "status_msg": "m"}}, Reason.SERVER_ERROR),
        ({"base_resp": {"status_code": "1027"}, "output_sensitive": True}, Reason.CONTENT_FILTER),
        ({"base_resp": {"status_code": 1004, "status_msg": "m"}}, None),
        ({"base_resp": {"status_code": 1008, "status_msg": "m"}}, None),
        ({"error_code": 18, "error_msg": "m"}, Reason.RATE_LIMITED),
        ({"error_code": 17, "error_msg": "m"}, None),
        ({"error_code": "110", "error_msg": "m"}, None),
        ({"code": 429, "msg": "m"}, Reason.RATE_LIMITED),
    ],
)
@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}])
def test_numbers_of_providers_who_answer_with_200(
    body: Any, reason: Reason | None, choices: Any
) -> None:
    told = [orjson.dumps(choices | body)]
    told.append(b"data: %b\n\n" % told[0])
    for each in told:
        verdict = classify(replied(each))
        if reason is None:
            assert isinstance(verdict, Refused), each
        else:
            assert isinstance(verdict, TryAgain | Failure), each
            failure = verdict.failure if isinstance(verdict, TryAgain) else verdict
            assert failure.reason is reason, each


@pytest.mark.parametrize(
    "beside",
    [
        {"base_resp": {"status_code": 0, "status_msg": "success"}},
        {"base_resp": {"status_code": "0"}},
        {"base_resp": {"status_code": [1002]}},
        {"base_resp": [1002]},
        {"error_code": 18},
        {"status_code": 1002},
    ],
)
def test_a_number_that_is_no_error_beside_an_answer(beside: Any) -> None:
    completion = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], **beside}
    assert classify(Reply(200, {}, orjson.dumps(completion))) == Answer.of(completion)


@pytest.mark.parametrize("error", [None, "", {}, [], False, 0, {"code": 0, "message": ""}])
def test_an_error_that_says_nothing_is_none(error: Any) -> None:
    completion = {"choices": [{"message": {"content": "x"}, "error": error}], "error": error}
    assert classify(Reply(200, {}, orjson.dumps(completion))) == Answer.of(completion)


@pytest.mark.parametrize(
    "error",
    [{"code": 0, "message": "success"}, "none", {"code": 200, "type": "ok", "message": "m"}],
)
def test_an_error_without_a_code_beside_a_whole_answer_is_none(error: Any) -> None:
    completion = {
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
        "error": error,
    }
    assert classify(Reply(200, {}, orjson.dumps(completion))) == Answer.of(completion)
    coded = {**completion, "error": {"code": "strange", "message": "m"}}
    assert isinstance(classify(Reply(200, {}, orjson.dumps(coded))), TryAgain)
    cut = {**completion, "choices": [{"message": {"content": "hal"}, "finish_reason": None}]}
    assert isinstance(classify(Reply(200, {}, orjson.dumps(cut))), TryAgain)


@pytest.mark.parametrize(
    ("status", "code", "want"),
    [
        (400, "ThrottlingException", Reason.RATE_LIMITED),
        (403, "rate_limit_exceeded", Reason.RATE_LIMITED),
        (498, "capacity_exceeded", Reason.SERVER_ERROR),
        (429, "tokens_limit_reached", Reason.RATE_LIMITED),
        (503, "content_filter_unavailable", Reason.SERVER_ERROR),
        (200, "content_filter_unavailable", Reason.SERVER_ERROR),
        (500, "moderation_error", Reason.SERVER_ERROR),
    ],
)
def test_trouble_is_tried_again_whatever_its_name(status: int, code: str, want: Reason) -> None:
    verdict = classify(error(status, code))
    assert isinstance(verdict, TryAgain)
    assert verdict.failure.reason is want


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
        {"choices": None, "content_filter_results": {"hate": {"filtered": True}}},
        {"prompt_feedback": {"block_reason": "SAFETY"}},
    ],
)
def test_no_choice_but_filter_results_is_filtered(body: Any) -> None:
    for sent in (orjson.dumps(body), b"data: %b\n\ndata: [DONE]\n\n" % orjson.dumps(body)):
        verdict = classify(replied(sent))
        assert isinstance(verdict, Failure)
        assert reason(verdict) is Reason.CONTENT_FILTER


def test_events_under_another_content_type_are_read() -> None:
    delta = {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}
    for start in (b"", b"\xef\xbb\xbf", b"\n: hi\r\n", b"id: 1\nretry: 5\n"):
        body = start + b"data: " + orjson.dumps(delta) + b"\r\n\r\ndata: [DONE]\r\n\r\n"
        verdict = classify(replied(body))
        assert isinstance(verdict, Answer)
        assert verdict.text == "x"
    cut = orjson.dumps({"choices": [{"delta": {"content": "x"}, "finish_reason": ""}]})
    assert reason(classify(replied(b"data: " + cut + b"\n\n"))) is Reason.DROPPED
    assert isinstance(classify(replied(b"data:" * 100_000)), TryAgain)


@pytest.mark.parametrize("status", [302, 404, 405])
def test_a_block_page_may_be_of_one_record(status: int) -> None:
    verdict = classify(Reply(status, {}, b"<html>blocked</html>"))
    assert isinstance(verdict, Refused)
    assert verdict.record is not None
    assert verdict.record.reason is Reason.BAD_REQUEST
    unknown_model = classify(error(status, "model_not_found"))
    assert isinstance(unknown_model, Refused) and unknown_model.record is None


def test_what_was_not_found_may_be_no_model() -> None:
    assert reason(classify(error(200, "image_not_found"))) is Reason.BAD_REQUEST


def test_a_403_may_be_of_one_record() -> None:
    verdict = classify(error(403, "forbidden"))
    assert isinstance(verdict, Refused)
    assert verdict.record is not None
    assert verdict.record.reason is Reason.BAD_REQUEST
    assert reason(classify(error(403, "content_policy_violation"))) is Reason.CONTENT_FILTER
    assert reason(classify(error(403, None, "moderation_error"))) is Reason.CONTENT_FILTER


def test_an_error_that_is_nested_deeply_is_told_as_it_came() -> None:
    deep = b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}"
    for status in (200, 400):
        assert "[[[" in str(classify(Reply(status, {}, deep)))


@pytest.mark.parametrize("fault", [Reason.TIMEOUT, Reason.CONNECT, Reason.DROPPED])
def test_a_transport_fault_is_tried_again(fault: Reason) -> None:
    verdict = classify(Reply(0, {}, b"what happened", fault))
    assert isinstance(verdict, TryAgain)
    assert (verdict.failure.reason, verdict.failure.detail) == (fault, "what happened")
    assert verdict.after_s is None


fields = st.sampled_from(["error", "code", "type", "message", "choices", "content"])
shapes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=4),
)


@given(st.integers(100, 999), st.binary() | shapes.map(lambda shape: json.dumps(shape).encode()))
def test_every_status_and_body_has_a_verdict(status: int, body: bytes) -> None:
    assert isinstance(classify(Reply(status, {}, body)), Answer | TryAgain | Refused | Failure)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "0"}, 0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "junk", "retry-after": "9"}, 9),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
        ({"x-ratelimit-reset-requests": "1s"}, None),
    ],
)
def test_retry_after_in_seconds(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date() -> None:
    seconds = retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert seconds is not None
    assert 90 < seconds <= 100


@given(st.text())
def test_any_header_text_is_read_or_passed_over(text: str) -> None:
    for name in ("retry-after", "retry-after-ms"):
        assert (retry_after({name: text}) or 0) >= 0
    assert (limit_reset({"x-ratelimit-reset-tokens": text}) or 0) >= 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("20ms", 0.02),
        ("6m0s", 360),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400),
        ("2.5", 2.5),
        ("0s", 0),
        ("", None),
        ("soon", None),
        ("1s!", None),
        ("2024-01-01T00:00:00Z", None),
        ("1795918000", None),
        ("1795918000000", None),
    ],
)
def test_the_durations_of_a_limit_reset_are_read(text: str, seconds: float | None) -> None:
    found = limit_reset({"x-ratelimit-reset-requests": text})
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_limit_reset_is_the_latest_of_both() -> None:
    headers = {"x-ratelimit-reset-requests": "20ms", "x-ratelimit-reset-tokens": "6m0s"}
    assert limit_reset(headers) == 360


def after_s(status: int, headers: dict[str, str]) -> float | None:
    verdict = classify(Reply(status, headers, b""))
    assert isinstance(verdict, TryAgain)
    return verdict.after_s


def test_a_busy_reply_says_when_by_either_header() -> None:
    reset = {"x-ratelimit-reset-tokens": "6m0s"}
    assert after_s(429, {"retry-after": "3"}) == 3
    assert after_s(429, reset) == 360
    assert after_s(429, {"retry-after": "0"} | reset) == 0
    assert after_s(429, {}) is None


def test_server_trouble_says_when_by_retry_after_only() -> None:
    """Servers send x-ratelimit-reset-* with every reply; beside a 500 it asks for nothing."""
    assert after_s(503, {"retry-after": "3"}) == 3
    assert after_s(500, {"x-ratelimit-reset-tokens": "6m0s"}) is None
