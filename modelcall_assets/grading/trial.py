"""The two sides of a trial, each in a process of its own: the candidate's program, which may do
what it likes, and the tests, which call its function over a socket. Only plain data crosses.

This runs in the sandbox, with the standard library only.
"""

import builtins
import json
import linecache
import os
import sys
from traceback import StackSummary, TracebackException, extract_tb
from types import ModuleType
from typing import Any

CHANNEL = 3
"""File descriptor of the socket to the other side."""
_MOST_BYTES = 16 << 20
"""Of a call or an answer."""
_LONG = 1 << 63
_KINDS = {
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "complex": lambda parts: complex(*parts),
    "int": lambda text: int(text, 16),
}
_RAISED = (Exception, SystemExit)
_MEANT_FOR_LOOPS = (StopIteration, StopAsyncIteration, ExceptionGroup)
"""With the first two a candidate could end `all(map(candidate, cases))` before a case has failed;
the last cannot be made of a text."""
_PROGRAM, _TEST = "program", "test"
"""What their files are called in tracebacks."""
_MOST_TOLD = 300
"""Characters of a reason: so many fit into what is kept of an output, however they are written."""


class Peer:
    """The other side, a line of JSON a message. Only the end of the process closes the socket, so
    that what ended it is told before."""

    def __init__(self) -> None:
        self._in = os.fdopen(CHANNEL, "rb", closefd=False)
        self._out = os.fdopen(CHANNEL, "wb", closefd=False)

    def send(self, value: Any) -> None:
        """TypeError for what is not plain data."""
        self._out.write(json.dumps(packed(value)).encode() + b"\n")
        self._out.flush()

    def receive(self) -> Any:
        """EOFError where the other side has ended; any error of a value that it made up."""
        line = self._in.readline(_MOST_BYTES)
        if not line:
            raise EOFError
        if not line.endswith(b"\n"):
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB in one value")
        return unpacked(json.loads(line))


def packed(value: Any) -> Any:
    """Plain data as JSON has it; of what JSON lacks, an object of one key, the name of the type."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return value if -_LONG < value < _LONG else {"int": hex(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [packed(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [packed(item) for item in value]}
    raise TypeError(f"a {type(value).__name__} is no plain data, and cannot leave its process")


def unpacked(value: Any) -> Any:
    """What `packed` was given, of builtin types; an error for what it never gives."""
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    return _KINDS[kind](unpacked(inner))


def play(program: str, entry_point: str) -> None:
    """Run the candidate's program, then answer calls of its function until there are no more."""
    peer = Peer()
    scope = _main_module()
    _run(program, _PROGRAM, scope)
    if entry_point not in scope:
        raise NameError(f"the program defines no {entry_point}")
    peer.send(("ready", None))
    while True:
        try:
            args, kwargs = peer.receive()
        except EOFError:
            return
        try:
            answer = "returned", scope[entry_point](*args, **kwargs)
        except _RAISED as error:
            answer = "raised", (_builtin_name(error), str(error))
        sys.stdout.flush()
        peer.send(answer)


def judge(prompt: str, test: str, entry_point: str) -> None:
    """Run the tests against the other side, and write `{"passed", "why"}` to standard output.

    What the tests print goes to standard error. `why` is "" where the candidate has ended.
    """
    verdict = os.dup(1)
    os.dup2(2, 1)
    candidate, why = Candidate(), ""
    try:
        candidate.answer()
        scope = _main_module()
        _define(prompt, scope)
        scope[entry_point] = candidate
        _run(test, _TEST, scope)
        scope["check"](candidate)
        passed = not candidate.lost
    except BaseException as error:  # noqa: BLE001  that a test exits is no pass
        passed, why = False, _told(error)
    why = candidate.why if candidate.lost else why
    os.write(verdict, json.dumps({"passed": passed, "why": why[:_MOST_TOLD]}).encode())


class Lost(BaseException):
    """No answer, or none that counts; no test expects it."""


class Candidate:
    """The function under test, as the tests see it."""

    def __init__(self) -> None:
        self._peer = Peer()
        self.lost = False
        self.why = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind, value = self.answer((args, kwargs))
        if kind == "raised":
            raise value
        return value

    def answer(self, *calls: Any) -> tuple[str, Any]:
        """What the other side says, after the call if there is one. Once Lost, always lost."""
        try:
            for call in calls:
                self._peer.send(call)
            kind, value = self._peer.receive()
            return kind, (_exception(*value) if kind == "raised" else value)
        except Exception as error:
            if not self.lost:
                self.lost = True
                self.why = "" if isinstance(error, EOFError | ConnectionError) else _told(error)
            raise Lost from error


def print_end(error: BaseException) -> None:
    """As Python ends, with the program's own frames only."""
    sys.stdout.flush()
    told = TracebackException.from_exception(error)
    told.stack = StackSummary.from_list([each for each in told.stack if each.filename == _PROGRAM])
    print(*told.format(), sep="", end="", file=sys.stderr, flush=True)  # noqa: T201


def _main_module() -> dict[str, Any]:
    """The names of a new `__main__`."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    return main.__dict__


def _run(text: str, name: str, scope: dict[str, Any]) -> None:
    """With its lines in tracebacks."""
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), scope)


def _define(prompt: str, scope: dict[str, Any]) -> None:
    """The helpers that a prompt defines; nothing where it is no Python. Its last function may want
    a body."""
    for text in (prompt, f"{prompt}\n    pass"):
        try:
            code = compile(text, "prompt", "exec")
        except SyntaxError:
            continue
        exec(code, scope)
        return


def _builtin_name(error: BaseException) -> str:
    """Of the error's nearest class that the other side has too."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name)
    if not issubclass(kind, Exception) or issubclass(kind, _MEANT_FOR_LOOPS):
        return RuntimeError(f"{name}: {text}")
    return kind.__new__(kind, text)  # some check what they are initialised with


def _told(error: BaseException) -> str:
    """`ValueError: what is wrong; at: assert candidate(1) == 2`."""
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    lines = [frame.line for frame in extract_tb(error.__traceback__) if frame.filename == _TEST]
    return f"{what}; at: {lines[-1]}" if lines else what
