"""Conversations as trainers read them: a row → a line of JSON, by way of an exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any, cast

import orjson

from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms import json_safe
from modelcall_assets.transforms.chatml import Message, without_nulls
from modelcall_assets.transforms.transcript import messages_in

Line = Row | list[Message]
CHAT_URL = "/v1/chat/completions"
_SYSTEM = ("system", "developer")
_FROM = {"user": "human", "assistant": "gpt", "tool": "observation", "function": "observation"}
_CALLS = frozenset({"tool_calls", "function_call"})
NO_QUESTION, NO_ANSWER = "nothing that is asked", "no answer at the end"
NO_TEXT = "content that is not text"


class LeftOut(Exception):
    """A row that a form has no words for. The text says why, the same for all such rows."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is asked, and the assistant's last turns, which answer it; there may be none."""

    row: Row
    asked: list[Message]
    answer: list[Message]

    @classmethod
    def of(cls, row: Row) -> Exchange:
        """Of `final_messages`, else `messages`, with the `response` as their answer."""
        final = messages_in(row.get("final_messages"))
        messages = final or messages_in(row.get("messages"))
        if not messages:
            raise LeftOut("no messages")
        if not all(isinstance(_fields(turn).get("role"), str) for turn in messages):
            raise LeftOut("messages that are no turns")
        turns = [_plain(turn) for turn in messages]
        if any(turn["role"] not in (*_SYSTEM, *_FROM) for turn in turns):
            raise LeftOut("a turn of another role")
        end, response = len(turns), row.get("response")
        while end and turns[end - 1]["role"] == "assistant":
            end -= 1
        if not final and isinstance(response, str) and response:
            turns[end:] = [{"role": "assistant", "content": response}]
        _check_content(turns[:end])
        return cls(row, turns[:end], turns[end:])

    @classmethod
    def answered(cls, row: Row) -> Exchange:
        """Of a row that has an answer to something."""
        exchange = cls.of(row)
        if not exchange.answer:
            raise LeftOut(NO_ANSWER)
        if not exchange.asked:
            raise LeftOut(NO_QUESTION)
        _check_content(exchange.answer)
        return exchange

    @property
    def turns(self) -> list[Message]:
        return self.asked + self.answer

    @property
    def tools(self) -> Row:
        """As a field; none where there are none."""
        tools = self.row.get("tools")
        listed = messages_in(tools)
        if tools and not listed and tools != "[]":
            raise LeftOut("tools that are no list")
        return {"tools": listed} if listed else {}

    @property
    def tools_text(self) -> str:
        """The functions as JSON; empty where there are none."""
        tools = [_fields(tool).get("function", tool) for tool in self.tools.get("tools", ())]
        return _json(tools) if tools else ""


def customjson(exchange: Exchange) -> list[Message]:
    """An array of turns, the user's and the assistant's by turns; what the system says stands
    before what the user says first."""
    system, texts = _spoken(exchange)
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    roles = cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def openai(exchange: Exchange) -> Row:
    """OpenAI's fine-tuning."""
    return {"messages": [*map(_of_openai, exchange.turns)], **exchange.tools}


def sharegpt(exchange: Exchange) -> Row:
    """LLaMA-Factory's. The user and tools speak in turn with the assistant, who says or calls."""
    return _sharegpt(exchange.turns, exchange)


def alpaca(exchange: Exchange) -> Row:
    """LLaMA-Factory's, for conversations without tools."""
    system, texts = _spoken(exchange)
    *history, (question, answer) = zip(texts[::2], texts[1::2], strict=True)
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "system": system,
        "history": [*map(list, history)],
        "tools": exchange.tools_text,
    }


def trl(exchange: Exchange) -> Row:
    """TRL's prompt and completion, as lists of turns."""
    return {"prompt": exchange.asked, "completion": exchange.answer, **exchange.tools}


def trl_pair(better: Exchange, worse: Exchange) -> Row:
    """TRL's preferences."""
    answers = {"chosen": better.answer, "rejected": worse.answer}
    return {"prompt": better.asked, **answers, **better.tools}


def sharegpt_pair(better: Exchange, worse: Exchange) -> Row:
    """LLaMA-Factory's preferences: of one turn each."""
    if len(better.answer) > 1 or len(worse.answer) > 1:
        raise LeftOut("an answer of several turns")
    answers = {"chosen": _said(better.answer[0]), "rejected": _said(worse.answer[0])}
    return {**_sharegpt(better.asked, better), **answers}


def tuner(exchange: Exchange, name: str, scores: Row, provenance: Row) -> Row:
    """A task of AgentScope Tuner. Where more is asked than one question, `init_messages` are all
    turns that are asked: a trainer begins with them, and with `main_query` only without them. What
    the row has as the metadata and environment of a task stays."""
    row, asked = exchange.row, exchange.asked
    reference, metadata = row.get("reference"), _fields(row.get("metadata"))
    query = next((turn for turn in reversed(asked) if turn["role"] == "user"), None)
    if query is None:
        raise LeftOut("no question of a user")
    if reference is None and exchange.answer:
        reference = exchange.answer[-1].get("content")
    return {
        "main_query": _text(query),
        "init_messages": [] if asked == [query] else asked,
        "task_id": name,
        "env_type": row.get("env_type") or "no_env",
        "metadata": {
            "reference": reference,
            **metadata,
            "scores": scores,
            "provenance": provenance,
        },
    }


def openai_batch(exchange: Exchange, name: str, params: Mapping[str, Any]) -> Row:
    """A request of OpenAI's Batch API, to be answered; `params` are all fields of its body but
    the messages."""
    if not exchange.asked:
        raise LeftOut(NO_QUESTION)
    body = {**params, "messages": [*map(_of_openai, exchange.asked)], **exchange.tools}
    return {"custom_id": name, "method": "POST", "url": CHAT_URL, "body": body}


FORMS: Mapping[str, Callable[[Exchange], Line]] = {
    "customjson": customjson,
    "mixture": customjson,
    "openai": openai,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "trl": trl,
}
"""Of an exchange that has an answer."""
PAIR_FORMS: Mapping[str, Callable[[Exchange, Exchange], Row]] = {
    "trl": trl_pair,
    "sharegpt": sharegpt_pair,
}
"""Of the better and the worse answer to a prompt."""
TASKS, REQUESTS = "tuner", "openai-batch"
COLUMNS = {
    "sharegpt": {"messages": "conversations"},
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "history": "history",
    },
}  # fmt: skip
"""By the names that LLaMA-Factory has for them."""


def dataset_info(form: str, file_name: str, *, is_of_pairs: bool) -> Row:
    """What LLaMA-Factory has to know about a file."""
    columns = {**COLUMNS[form], "system": "system", "tools": "tools"}
    info: Row = {"file_name": file_name, "formatting": form, "columns": columns}
    if is_of_pairs:
        info["ranking"] = True
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    return info


def tuner_config(training: str, validation: str | None = None) -> Row:
    """The task reader's settings by the root keys of both generations, with a file for each."""
    files = {"training": training, "validation": validation}
    paths = {name: {"file_path": path} for name, path in files.items() if path is not None}
    kinds = {"astuner": "dataset_file", "ajet": "jsonl_dataset_file"}
    return {root: {"task_reader": {"type": kind, kind: paths}} for root, kind in kinds.items()}


def _check_content(turns: list[Message]) -> None:
    """LeftOut where a turn says nothing, and calls nobody."""
    for turn in turns:
        content = turn.get("content")
        if not isinstance(content, str | list) and (content is not None or not _calls(turn)):
            raise LeftOut(NO_TEXT)


def _spoken(exchange: Exchange) -> tuple[str, list[str]]:
    """What the system says, and what user and assistant say by turns."""
    system, said = _by_turns(exchange.turns)
    if any(turn["from"] not in ("human", "gpt") for turn in said):
        raise LeftOut("calls of tools")
    return system, [turn["value"] for turn in said]


def _sharegpt(turns: list[Message], exchange: Exchange) -> Row:
    system, said = _by_turns(turns)
    return {"conversations": said, "system": system, "tools": exchange.tools_text}


def _by_turns(turns: list[Message]) -> tuple[str, list[Message]]:
    """What the system says first, and ShareGPT's turns, of which the assistant has every other."""
    system, turns = _system(turns)
    said = [*map(_said, turns)]
    for at, turn in enumerate(said):
        if (turn["from"] in ("gpt", "function_call")) != bool(at % 2):
            raise LeftOut("turns that do not alternate")
    return system, said


def _system(turns: list[Message]) -> tuple[str, list[Message]]:
    """What the system says first, and the other turns, which are not its own."""
    count = next((at for at, turn in enumerate(turns) if turn["role"] not in _SYSTEM), len(turns))
    if any(turn["role"] in _SYSTEM for turn in turns[count:]):
        raise LeftOut("a system's turn that is not the first")
    return "\n\n".join(map(_text, turns[:count])), turns[count:]


def _text(turn: Message) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        parts = [*map(_fields, messages_in(content))]
        if parts and all(part.get("type") == "text" for part in parts):
            content = "".join(str(part.get("text") or "") for part in parts)
    if not isinstance(content, str):
        raise LeftOut(NO_TEXT)
    return content


def _of_openai(turn: Message) -> Message:
    """As it is, but for arguments of calls, which are to be text."""
    parts = messages_in(turn["content"]) if isinstance(turn.get("content"), list) else []
    if any(str(_fields(part).get("type")).startswith("python") for part in parts):
        raise LeftOut(NO_TEXT)
    written = [call | {"function": _written(function)} for call, function in _calls(turn)]
    return {**turn, "tool_calls": written} if "tool_calls" in turn else turn


def _written(function: Row) -> Row:
    arguments = function.get("arguments")
    is_text = arguments is None or isinstance(arguments, str)
    return function if is_text else function | {"arguments": _json(arguments)}


def _said(turn: Message) -> Message:
    calls = [_read_call(function) for _, function in _calls(turn)]
    if not calls:
        return {"from": _FROM[turn["role"]], "value": _text(turn)}
    if turn.get("content"):
        raise LeftOut("text beside calls of tools")
    return {"from": "function_call", "value": _json(calls)}


def _read_call(function: Row) -> Row:
    arguments = function.get("arguments")
    try:
        arguments = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        raise LeftOut("arguments of calls that are no JSON") from None
    return {"name": function["name"], "arguments": arguments}


def _calls(turn: Message) -> list[tuple[Row, Row]]:
    """Each with the function that it names."""
    if _CALLS.isdisjoint(turn):
        return []
    calls = [*map(_fields, messages_in(turn.get("tool_calls")) or [turn.get("function_call")])]
    named = [(call, _fields(call.get("function")) or call) for call in calls]
    if not all(isinstance(function.get("name"), str) for _, function in named):
        raise LeftOut("calls that name no function")
    return named


def _plain(turn: Message) -> Message:
    """Without nulls, and without a list of no calls."""
    fields = without_nulls(turn).items()
    return {name: value for name, value in fields if value or name not in _CALLS}


def _fields(value: Any) -> Row:
    """None of what is no object."""
    return cast("Row", value) if isinstance(value, dict) else {}


def _json(value: Any) -> str:
    return orjson.dumps(json_safe(value)).decode()
