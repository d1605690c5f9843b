"""Conversations as trainers read them: a row and where it came from → a line of JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import orjson

from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms import json_safe, value_at
from modelcall_assets.transforms.chatml import Message, without_nulls
from modelcall_assets.transforms.transcript import messages_in

Line = Row | list[Message]
CHAT_URL = "/v1/chat/completions"
_SYSTEM = ("system", "developer")
_FROM = {"user": "human", "assistant": "gpt", "tool": "observation", "function": "observation"}
_CALLS = ("tool_calls", "function_call")
NO_ANSWER, NO_TEXT = "no answer at the end", "content that is not text"


class LeftOut(Exception):
    """A row that a form has no words for. The text says why, the same for all such rows."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from; `row` counts from 1. `scores` are names of columns."""

    task: str = ""
    file: str = ""
    row: int = 0
    id: str = ""
    sample: int | None = None
    scores: Sequence[str] = ()
    rejected: Origin | None = None
    """Of a pair the other one."""

    @property
    def told(self) -> Row:
        told: Row = {"task": self.task, "file": self.file, "row": self.row, "id": self.id}
        if self.sample is not None:
            told["sample"] = self.sample
        if self.rejected is not None:
            told["rejected"] = self.rejected.told
        return told

    @property
    def unique_id(self) -> str:
        """Of a record's samples each has its own."""
        return self.id if self.sample is None else f"{self.id}#{self.sample}"


class LineForm(Protocol):
    def __call__(self, row: Row, origin: Origin = ..., /) -> Line: ...


PairForm = Callable[[Row, Row], Row]
"""Of the better and the worse answer to a prompt."""


def conversation(row: Row) -> list[Message]:
    """All turns: `final_messages`, else `messages`, with the `response` as their answer."""
    final = messages_in(row.get("final_messages"))
    messages = final or messages_in(row.get("messages"))
    if not messages:
        raise LeftOut("no messages")
    if not all(isinstance(_fields(turn).get("role"), str) for turn in messages):
        raise LeftOut("messages that are no turns")
    turns = [*map(without_nulls, messages)]
    response = row.get("response")
    if not final and isinstance(response, str) and response:
        turns = [*_asked(turns), {"role": "assistant", "content": response}]
    return turns


def customjson(row: Row, origin: Origin = Origin()) -> list[Message]:
    """An array of turns, the user's and the assistant's by turns; what the system says stands
    before what the user says first."""
    system, turns = _spoken(conversation(row))
    if len(turns) < 2:
        raise LeftOut(NO_ANSWER)
    if system:
        turns[0] = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
    return turns


def tuner(row: Row, origin: Origin = Origin()) -> Row:
    """A task of AgentScope Tuner. Where more is asked than one question, `init_messages` are all
    turns that are asked: a trainer begins with them, and with `main_query` only without them."""
    turns = conversation(row)
    asked = _asked(turns)
    query = next((turn for turn in reversed(asked) if turn["role"] == "user"), None)
    if query is None:
        raise LeftOut("no question of a user")
    answer = turns[len(asked) :]
    reference = row.get("reference")
    if reference is None and answer:
        reference = answer[-1].get("content")
    scores = {name: row.get(name) for name in origin.scores}
    return {
        "main_query": _text(query),
        "init_messages": [] if asked == [query] else asked,
        "task_id": origin.unique_id,
        "env_type": "no_env",
        "metadata": {"reference": reference, "scores": scores, "provenance": origin.told},
    }


def openai(row: Row, origin: Origin = Origin()) -> Row:
    """OpenAI's fine-tuning."""
    turns = conversation(row)
    _answer(turns)
    return {"messages": [*map(_of_openai, turns)], **_given_tools(row)}


def sharegpt(row: Row, origin: Origin = Origin()) -> Row:
    """LLaMA-Factory's. The user and tools speak in turn with the assistant, who says or calls."""
    turns = conversation(row)
    _answer(turns)
    return _sharegpt(turns, row)


def alpaca(row: Row, origin: Origin = Origin()) -> Row:
    """LLaMA-Factory's, for conversations without tools."""
    turns = conversation(row)
    _answer(turns)
    system, spoken = _spoken(turns)
    texts = [turn["content"] for turn in spoken]
    *history, (question, answer) = zip(texts[::2], texts[1::2], strict=True)
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "system": system,
        "history": [*map(list, history)],
        "tools": _tools_text(row),
    }


def trl(row: Row, origin: Origin = Origin()) -> Row:
    """TRL's prompt and completion, as lists of turns."""
    turns = conversation(row)
    answer = _answer(turns)
    return {"prompt": _asked(turns), "completion": answer, **_given_tools(row)}


def trl_pair(chosen: Row, rejected: Row) -> Row:
    """TRL's preferences."""
    better, worse = conversation(chosen), conversation(rejected)
    answers = {"chosen": _answer(better), "rejected": _answer(worse)}
    return {"prompt": _asked(better), **answers, **_given_tools(chosen)}


def sharegpt_pair(chosen: Row, rejected: Row) -> Row:
    """LLaMA-Factory's preferences: of one turn each."""
    better, worse = conversation(chosen), conversation(rejected)
    answers = _answer(better), _answer(worse)
    if any(len(answer) > 1 for answer in answers):
        raise LeftOut("an answer of several turns")
    said, unsaid = (_said(*answer) for answer in answers)
    return {**_sharegpt(_asked(better), chosen), "chosen": said, "rejected": unsaid}


def openai_batch(row: Row, origin: Origin, params: Mapping[str, Any]) -> Row:
    """A request of OpenAI's Batch API, to be answered; `params` are all fields of its body but
    the messages."""
    asked = _asked(conversation(row))
    if not asked:
        raise LeftOut("nothing that is asked")
    body = {**params, "messages": [*map(_of_openai, asked)], **_given_tools(row)}
    return {"custom_id": origin.unique_id, "method": "POST", "url": CHAT_URL, "body": body}


FORMS: Mapping[str, LineForm] = {
    "customjson": customjson,
    "mixture": customjson,
    "tuner": tuner,
    "openai": openai,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "trl": trl,
}
PAIR_FORMS: Mapping[str, PairForm] = {"trl": trl_pair, "sharegpt": sharegpt_pair}
REQUESTS = "openai-batch"
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


def tuner_config(training: str, validation: str | None) -> Row:
    """The task reader's settings by the root keys of both generations, with a file for each."""
    files = {"training": training, "validation": validation}
    paths = {name: {"file_path": path} for name, path in files.items() if path is not None}
    kinds = {"astuner": "dataset_file", "ajet": "jsonl_dataset_file"}
    return {root: {"task_reader": {"type": kind, kind: paths}} for root, kind in kinds.items()}


def score_of(row: Row, column: str) -> float | None:
    """True is 1 and false 0; None of what is no finite number."""
    value = value_at(row, column)
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _asked(turns: list[Message]) -> list[Message]:
    """Without the assistant's last turns."""
    end = len(turns)
    while end and turns[end - 1]["role"] == "assistant":
        end -= 1
    return turns[:end]


def _answer(turns: list[Message]) -> list[Message]:
    if not (answer := turns[len(_asked(turns)) :]):
        raise LeftOut(NO_ANSWER)
    return answer


def _spoken(turns: list[Message]) -> tuple[str, list[Message]]:
    """What the system says, and the turns of user and assistant, who must alternate."""
    system, turns = _system(turns)
    spoken = list[Message]()
    for at, turn in enumerate(turns):
        role = turn["role"]
        if role not in ("user", "assistant"):
            raise LeftOut(_strange(role))
        if any(map(turn.get, _CALLS)):
            raise LeftOut("calls of tools")
        if role != ("assistant" if at % 2 else "user"):
            raise LeftOut("turns that do not alternate")
        spoken.append({"role": role, "content": _text(turn)})
    return system, spoken


def _system(turns: list[Message]) -> tuple[str, list[Message]]:
    count = 0
    while count < len(turns) and turns[count]["role"] in _SYSTEM:
        count += 1
    return "\n\n".join(map(_text, turns[:count])), turns[count:]


def _text(turn: Message) -> str:
    content = turn.get("content")
    parts = messages_in(content) if isinstance(content, list) else []
    if parts and all(_fields(part).get("type") == "text" for part in parts):
        content = "".join(str(part.get("text") or "") for part in parts)
    if not isinstance(content, str):
        raise LeftOut(NO_TEXT)
    return content


def _of_openai(turn: Message) -> Message:
    """As it is, but for arguments of calls, which are to be text."""
    parts = messages_in(turn["content"]) if isinstance(turn.get("content"), list) else []
    if any(str(_fields(part).get("type")).startswith("python") for part in parts):
        raise LeftOut(NO_TEXT)
    calls = messages_in(turn.get("tool_calls"))
    return {**turn, "tool_calls": [*map(_written_call, calls)]} if calls else turn


def _written_call(call: Any) -> Any:
    function = _fields(_fields(call).get("function"))
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": _json(arguments)}}


def _sharegpt(turns: list[Message], row: Row) -> Row:
    system, turns = _system(turns)
    said = [*map(_said, turns)]
    for at, turn in enumerate(said):
        if (turn["from"] in ("gpt", "function_call")) != bool(at % 2):
            raise LeftOut("turns that do not alternate")
    return {"conversations": said, "system": system, "tools": _tools_text(row)}


def _said(turn: Message) -> Message:
    role = turn["role"]
    if role not in _FROM:
        raise LeftOut(_strange(role))
    if not any(map(turn.get, _CALLS)):
        return {"from": _FROM[role], "value": _text(turn)}
    if turn.get("content"):
        raise LeftOut("text beside calls of tools")
    calls = messages_in(turn.get("tool_calls")) or [turn.get("function_call")]
    return {"from": "function_call", "value": _json([*map(_read_call, calls)])}


def _read_call(call: Any) -> Row:
    function = _fields(_fields(call).get("function")) or _fields(call)
    arguments = function.get("arguments")
    try:
        arguments = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        raise LeftOut("arguments of calls that are no JSON") from None
    return {"name": function.get("name"), "arguments": arguments}


def _strange(role: str) -> str:
    if role in _SYSTEM:
        return "a system's turn that is not the first"
    return f"a turn of a {role}" if role in _FROM else "a turn of another role"


def _tools(row: Row) -> list[Any]:
    tools = row.get("tools")
    listed = messages_in(tools)
    if tools and not listed and tools != "[]":
        raise LeftOut("tools that are no list")
    return listed


def _given_tools(row: Row) -> Row:
    return {"tools": tools} if (tools := _tools(row)) else {}


def _tools_text(row: Row) -> str:
    """The functions as JSON; empty where there are none."""
    tools = [_fields(tool).get("function", tool) for tool in _tools(row)]
    return _json(tools) if tools else ""


def _fields(value: Any) -> Row:
    """None of what is no object."""
    return cast("Row", value) if isinstance(value, dict) else {}


def _json(value: Any) -> str:
    return orjson.dumps(json_safe(value)).decode()
