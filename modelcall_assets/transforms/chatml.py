"""A row as ChatML, `{messages, format[, tools][, raw_data]}`; or a drop, or a failure."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import orjson

from modelcall_assets.records.outcome import Dropped, Failure, Number, Reason, Row, short

Message = dict[str, Any]

SPEAKERS: Mapping[str, str] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bot", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **dict.fromkeys(("tool_response", "function_response"), "tool"),
}
"""ShareGPT's `from`, in lower case, → role."""

_MAY_FOLLOW: Mapping[str, frozenset[str | None]] = {
    "system": frozenset({None}),
    "developer": frozenset({None}),
    "user": frozenset({None, "system", "developer", "assistant"}),
    "assistant": frozenset({"user", "tool", "function"}),
    "tool": frozenset({"assistant", "tool"}),
    "function": frozenset({"assistant", "function"}),
}
"""Strict validation: role → the roles that may stand before it; None is the beginning."""
_CALLS = ("tool_calls", "function_call")
_OF_TOOLS = (*_CALLS, "tool_call_id")
_LONG_NUMBER = re.compile("[0-9.]{16}")
_WITH_SYSTEM, _WITH_TOOLS = ("sharegpt", "instruction_input"), ("sharegpt", "messages")
"""Styles whose rows may have a column `system`, a text, or `tools`, which is kept as it is."""


@dataclass(frozen=True, slots=True)
class ChatmlOptions:
    """`column_mapping` names a column for every key that `format_style` needs. `system_prompt` is
    put first unless the row has a system message. `other_roles` are all but user and assistant."""

    format_style: str
    column_mapping: Mapping[str, str]
    keep_raw_data: bool = True
    system_prompt: str | None = None
    other_roles: Literal["keep", "drop"] = "keep"
    validation: Literal["strict", "lenient"] = "lenient"

    def __post_init__(self) -> None:
        if self.format_style not in _STYLES:
            raise ValueError(f"format_style: expected one of {list(_STYLES)}")


def to_chatml(
    row: Row, options: ChatmlOptions, text: bytes | None = None
) -> Row | Dropped | Failure:
    """The ChatML row. Dropped when what it needs is empty or null (`missing_<mapping key>`), or
    when no turn is left; a Failure names the column and the place that are wrong. The JSON `text`
    of the row, if there is one, is kept as it is, numbers of any size too."""
    try:
        messages = _STYLES[options.format_style](row, options)
        if "system" in row and options.format_style in _WITH_SYSTEM:
            messages = [*_system(row, options), *messages]
        if options.other_roles == "drop":
            messages = [turn for turn in messages if turn["role"] in ("user", "assistant")]
        if not messages:
            return Dropped("no_turn_left")
        if options.validation == "strict":
            _check_order(messages, ends_with_user=options.format_style == "prompt_text_only")
    except _Missing as missing:
        return Dropped(f"missing_{missing}")
    except _Malformed as error:
        return Failure(Reason.CHATML_ERROR, str(error))
    if options.system_prompt is not None and not any(
        turn["role"] in ("system", "developer") for turn in messages
    ):
        messages.insert(0, _turn("system", options.system_prompt))
    result: Row = {"messages": messages, "format": "chatml"}
    if "tools" in row and options.format_style in _WITH_TOOLS and (tools := _tools(row)):
        result["tools"] = tools
    if options.keep_raw_data:
        result["raw_data"] = _raw(row, text)
    return result


def failed_row(failure: Failure, raw_data: Row | None = None, text: bytes | None = None) -> Row:
    error = {"reason": failure.reason, "detail": failure.detail}
    result: Row = {"messages": [], "format": "chatml", "error": error}
    return result if raw_data is None else {**result, "raw_data": _raw(raw_data, text)}


def _raw(row: Row, text: bytes | None) -> Row | orjson.Fragment:
    return row if text is None else orjson.Fragment(text.strip())


class _Missing(Exception):
    """A mapping key whose column has no value."""


class _Malformed(Exception):
    """What is wrong, and where."""


def _instruction_input(row: Row, options: ChatmlOptions) -> list[Message]:
    """Of instruction and input one is enough; turns of a `history` stand before them."""
    instruction, more = (row.get(options.column_mapping[key]) for key in ("prompt", "input"))
    prompt = _value(row, options, "prompt" if instruction or not more else "input", str)
    if instruction and more:
        prompt = f"{prompt}\n\n{_value(row, options, 'input', str)}".strip()
    response = _value(row, options, "response", str)
    return [*_history(row, options), _turn("user", prompt), _turn("assistant", response)]


def _history(row: Row, options: ChatmlOptions) -> Iterator[Message]:
    pairs = None if "history" in options.column_mapping.values() else row.get("history")
    turns: list[Any] = _of_kind(pairs, list, "history") if pairs else []
    for at, pair in enumerate(turns):
        match pair:
            case [str(question), str(answer)]:
                exchange = _turn("user", question), _turn("assistant", answer)
                yield from (turn for turn in exchange if turn["content"])
            case _:
                have = _kind(pair)
                raise _Malformed(
                    f"history[{at}]: expected a list of question and answer, have {have}"
                )


def _system(row: Row, options: ChatmlOptions) -> Iterator[Message]:
    text = row["system"]
    if text and "system" not in options.column_mapping.values():
        yield _turn("system", _of_kind(text, str, "system"))


def _tools(row: Row) -> Any:
    """Parsed where the column is the text of a list or object, whose numbers keep their digits."""
    tools = row.get("tools")
    if not isinstance(tools, str) or not tools.strip():
        return tools
    try:
        parsed = orjson.loads(tools)
        if _LONG_NUMBER.search(tools):
            return json.loads(tools, parse_int=_exact, parse_float=_exact)
        return parsed
    except (ValueError, RecursionError):
        return tools


def _exact(text: str) -> float | Number:
    value = orjson.loads(text)
    return value if str(value) == text else Number(text)


def _sharegpt(row: Row, options: ChatmlOptions) -> list[Message]:
    """Turns without a value are left out, unless they call tools."""
    messages: list[Message] = []
    for at, turn in enumerate(_value(row, options, "conversations", list)):
        try:
            value, role = turn["value"], SPEAKERS[turn["from"]]  # as nearly all are, in lower case
        except (TypeError, KeyError):
            value = role = None
        if type(value) is str and len(turn) == 2:
            if value:
                messages.append({"role": role, "content": value})
            continue
        if role is None or (type(value) is not str and value is not None):
            where = f"{options.column_mapping['conversations']}[{at}]"
            role, value = _unusual_turn(turn, where, options)
        more = {name: turn[name] for name in _OF_TOOLS if turn.get(name)}
        if value or more:
            messages.append({"role": role, "content": value, **more})
    return messages


def _unusual_turn(
    turn: Any, where: str, options: ChatmlOptions
) -> tuple[str, str | list[Message] | None]:
    """Role and content of one that has a role of its own, or content in parts."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        have = _kind(turn)
        if isinstance(turn, dict):
            names = [*cast("Row", turn)][:5]
            have = short(", ".join(map(repr, names))) or "no keys"
        raise _Malformed(f"{where}: expected an object with `from` and `value`, have {have}")
    speaker, value = cast("tuple[Any, Any]", (turn["from"], turn["value"]))
    role = _role(_of_kind(speaker, str, f"{where}.from"), f"{where}.from", options)
    is_text = value is None or isinstance(value, str)
    return role, value if is_text else _parts(value, f"{where}.value")


def _role(speaker: str, where: str, options: ChatmlOptions) -> str:
    """Whatever its case, and with spaces or hyphens. Where other roles are dropped any will do."""
    name = speaker.strip().lower().replace("-", "_").replace(" ", "_")
    if name not in SPEAKERS and options.other_roles == "keep":
        wrong = f"{short(speaker)!r} is not a known role; expected {', '.join(_MAY_FOLLOW)}"
        raise _Malformed(f"{where}: {wrong}")
    return SPEAKERS.get(name, speaker)


_STYLES: Mapping[str, Callable[[Row, ChatmlOptions], list[Message]]] = {
    "prompt_response": lambda row, options: [
        _turn("user", _value(row, options, "prompt", str)),
        _turn("assistant", _value(row, options, "response", str)),
    ],
    "instruction_input": _instruction_input,
    "sharegpt": _sharegpt,
    "messages": lambda row, options: _checked(row, options, "messages"),
    "input_output_messages": lambda row, options: [
        *_checked(row, options, "input"),
        _turn("assistant", _value(row, options, "output", str)),
    ],
    "prompt_text_only": lambda row, options: [
        _turn("user", _value(row, options, "prompt_text", str))
    ],
}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _value(row: Row, options: ChatmlOptions, key: str, kind: type) -> Any:
    column = options.column_mapping[key]
    if value := row.get(column):
        return _of_kind(value, kind, column)
    raise _Missing(key)


def _of_kind(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise _Malformed(f"{where}: expected {_KINDS[kind]}, have {_kind(value)}")
    return value


def _checked(row: Row, options: ChatmlOptions, key: str) -> list[Message]:
    """The messages as they are, without the null fields that a columnar file gives them."""
    column, messages = options.column_mapping[key], list[Message]()
    for at, message in enumerate(_value(row, options, key, list)):
        where = f"{column}[{at}]"
        message = cast("Message", _of_kind(message, dict, where))
        role = message.get("role")
        if not isinstance(role, str) or not role:
            have = _kind(role) if "role" in message else "nothing"
            raise _Malformed(f"{where}.role: expected text, have {have}")
        if role not in _MAY_FOLLOW:
            message = {**message, "role": _role(role, f"{where}.role", options)}
        message = _without_nulls(message, but="content")
        content = message.get("content")
        only_calls = content is None and any(map(message.get, _CALLS))
        if not isinstance(content, str) and not only_calls:
            message = {**message, "content": _parts(content, f"{where}.content")}
        messages.append(message)
    return messages


def without_nulls(message: Message) -> Message:
    """A turn without the null fields that a columnar file gives it and the parts of its content."""
    message = _without_nulls(message, but="content")
    if isinstance(content := message.get("content"), list):
        message = {**message, "content": [*map(_without_nulls, cast("list[Any]", content))]}
    return message


def _without_nulls(value: Any, but: str | None = None) -> Any:
    if not isinstance(value, dict):
        return value
    fields = cast("Message", value)
    if None not in fields.values():
        return fields
    return {name: each for name, each in fields.items() if each is not None or name == but}


def _parts(content: Any, where: str) -> list[Message]:
    """Content in parts, without the null fields that a columnar file gives them."""
    if not isinstance(content, list):
        raise _Malformed(f"{where}: expected text or a list of parts, have {_kind(content)}")
    parts: list[Message] = []
    for at, part in enumerate(cast("list[Any]", content)):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):  # pyright: ignore
            raise _Malformed(f"{where}[{at}]: expected a part, an object with a `type`")
        parts.append(_without_nulls(part))
    return parts


def _check_order(messages: list[Message], ends_with_user: bool) -> None:
    before: str | None = None
    for at, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if before not in _MAY_FOLLOW[role]:
            previous = f"after {before}" if before else "at the beginning"
            raise _Malformed(f"messages[{at}].role: {role} {previous}")
        empty = not content.strip() if isinstance(content, str) else not content
        if empty and not any(message.get(name) for name in _CALLS):
            raise _Malformed(f"messages[{at}].content: empty")
        before = role
    if before != "assistant" and not ends_with_user:
        raise _Malformed(f"messages[{len(messages) - 1}].role: the last is {before}, not assistant")


def _kind(value: Any) -> str:
    kind = cast("type[Any]", type(value))
    return _KINDS.get(kind, kind.__name__)


_KINDS: dict[type[Any], str] = {
    **{str: "text", int: "a number", float: "a number", bool: "a boolean"},
    **{dict: "an object", list: "a list", type(None): "null"},
}
