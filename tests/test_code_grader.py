"""The `code` grader: right answers pass, wrong ones fail, and no attack wins or harms, as root and
as another user.

An attack answers rightly if it has succeeded, so that `correct: False` with a failed assertion says
that it ran to its end and got nothing.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcall_assets.grading.code import Code, imports, unwrapped
from modelcall_assets.grading.sandbox import bwrap
from modelcall_assets.grading.trial import packed, unpacked

pytestmark = pytest.mark.slow

SQUARE = "def check(candidate):\n    assert candidate(7) == 49\n    assert candidate(n=-3) == 9\n"
MARK = "reference-7f3a"
"""Stands in every test of an attacked row, and must be found nowhere."""
CODE = Code(timeout_s=60)
QUICK = Code(timeout_s=3)


def row(
    response: Any, test: Any = SQUARE, entry_point: Any = "square", prompt: Any = "def square(n):\n"
) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "import nothing"},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": "reference"},
        ],
        "entry_point": entry_point,
        "test": test,
        "response": response,
    }


def graded(response: str, test: str = SQUARE, **others: Any) -> dict[str, Any]:
    return CODE.score(row(dedent(response), dedent(test), **others))


def going_on() -> set[int]:
    """Processes that an interpreter in one of our sandboxes has forked."""
    parents: dict[int, int] = {}
    interpreters: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
            if (folder / "cmdline").read_bytes().split(b"\0")[1:4] == [b"-s", b"-S", b"-c"]:
                interpreters.add(int(folder.name))
        except OSError:
            continue
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return {pid for pid in interpreters & ours if parents[pid] in interpreters}


def nothing_goes_on() -> None:
    deadline = time.monotonic() + 60
    while going_on():
        assert time.monotonic() < deadline, "something goes on"


# Right and wrong


RIGHT = {
    "plain": "def square(n):\n    return n * n",
    "lambda": "square = lambda n: n ** 2",
    "generator": """
        def odd():
            n = 1
            while True:
                yield n
                n += 2

        def square(n):
            return sum(number for number, _ in zip(odd(), range(abs(n))))
        """,
    "class": """
        from dataclasses import dataclass

        @dataclass
        class Square:
            side: int

            def area(self):
                return self.side ** 2

        def square(n):
            return Square(n).area()
        """,
    "method": """
        class Squares:
            def of(self, n):
                return n * n

        square = Squares().of
        """,
    "recursion": """
        def square(n):
            n = abs(n)
            return 0 if n == 0 else square(n - 1) + 2 * n - 1
        """,
    "cache": """
        from functools import lru_cache

        @lru_cache(maxsize=None)
        def square(n):
            return n * n
        """,
    "modules": """
        import asyncio, collections, ctypes, decimal, enum, heapq, math, random, re, statistics
        import sqlite3, threading

        def square(n):
            return int(math.pow(n, 2))
        """,
    "prints": "def square(n):\n    print('squaring', n)\n    return n * n",
    "main": "def square(n):\n    return n * n\n\nif __name__ == '__main__':\n    print(square(2))",
    "thread": """
        from threading import Thread

        def square(n):
            found = []
            thread = Thread(target=lambda: found.append(n * n))
            thread.start()
            thread.join()
            return found[0]
        """,
    "a temporary file": """
        from pathlib import Path

        def square(n):
            Path("kept.txt").write_text(str(n * n))
            return int(Path("kept.txt").read_text())
        """,
    "subclass of a builtin type": """
        from enum import IntEnum

        class Known(IntEnum):
            A = 49
            B = 9

        def square(n):
            return Known(n * n)
        """,
    "fenced": "Here it is:\n```python\ndef square(n):\n    return n * n\n```\nIt squares.",
    "fenced without a name": "```\ndef square(n):\n    return n * n\n```",
    "after spaces": "   def square(n):\n    return n * n",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_passes(name: str):
    result = graded(RIGHT[name])
    assert result["correct"], result
    assert [result[each] for each in ("why", "timeout", "memory_exceeded")] == ["", False, False]


WRONG = {
    "wrong value": (
        "def square(n):\n    return n + n",
        "AssertionError; at: assert candidate(7) == 49",
    ),
    "one case": (
        "def square(n):\n    return 49",
        "AssertionError; at: assert candidate(n=-3) == 9",
    ),
    "no function": ("def cube(n):\n    return n ** 3", "NameError: the program defines no square"),
    "no Python": ("I cannot do that.", "SyntaxError: invalid syntax"),
    "nothing returned": (
        "def square(n):\n    n * n",
        "AssertionError; at: assert candidate(7) == 49",
    ),
    "raises": (
        "def square(n):\n    return {}[n]",
        "KeyError: '7'; at: assert candidate(7) == 49",
    ),
    "raises its own": (
        "class Mine(LookupError):\n    pass\ndef square(n):\n    raise Mine('gone')",
        "LookupError: gone; at: assert candidate(7) == 49",
    ),
    "not called so": (
        "def square():\n    return 49",
        "TypeError: square() takes 0 positional arguments but 1 was given;"
        " at: assert candidate(7) == 49",
    ),
    "not installed": ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    "asks": ("input()", "EOFError: EOF when reading a line"),
    "a generator": (
        "def square(n):\n    yield n * n",
        "TypeError: a generator is no plain data, and cannot leave its process",
    ),
    "a fence of another name": (
        "```py\ndef square(n):\n    return n * n\n```",
        "SyntaxError: invalid syntax",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_fails_and_says_why(name: str):
    response, why = WRONG[name]
    result = graded(response)
    assert (result["correct"], result["why"]) == (False, why)
    assert not result["timeout"] and not result["memory_exceeded"]


@pytest.mark.parametrize("response", [None, "", " \n", ["def square(n): ..."]])
def test_no_response_is_not_correct(response: Any):
    result = CODE.score({**row(""), "response": response})
    assert (result["correct"], result["why"]) == (False, "there is no response")


@pytest.mark.parametrize(
    "missing",
    [
        {"test": None},
        {"entry_point": 3},
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ],
)
def test_an_item_that_is_no_code_is_told(missing: dict[str, Any]):
    with pytest.raises(ValueError, match="it is no code"):
        CODE.score({**row("def square(n):\n    return n * n"), **missing})


def test_a_result_has_the_declared_fields():
    types = {"boolean": bool, "string": str}
    result = graded("print('seen')\nimport sys\nprint('told', file=sys.stderr)\n1 / 0")
    assert list(result) == list(Code.fields)
    assert all(type(result[name]) is types[Code.fields[name]["type"]] for name in result)
    assert next(iter(Code.fields)) == "correct"
    assert result["stdout"] == "seen"
    assert result["stderr"].startswith("told\nTraceback")
    assert result["stderr"].endswith("ZeroDivisionError: division by zero")
    assert "    1 / 0\n" in result["stderr"] and "modelcall" not in result["stderr"]


def test_a_time_limit_is_told():
    result = Code(timeout_s=0.5).score(row("def square(n):\n    while True:\n        pass"))
    assert (result["correct"], result["timeout"]) == (False, True)
    assert result["why"] == "no verdict within 0.5 s"


def test_a_time_limit_holds_for_a_program_that_only_waits():
    result = Code(timeout_s=0.5).score(row("import time\ntime.sleep(1000)"))
    assert (result["correct"], result["timeout"]) == (False, True)


def test_a_memory_limit_is_told_and_can_be_set():
    hungry = "def square(n):\n    kept = bytearray(200 << 20)\n    return n * n"
    small = Code(timeout_s=60, memory_mb=128).score(row(hungry))
    assert (small["correct"], small["memory_exceeded"], small["timeout"]) == (False, True, False)
    assert small["why"].startswith("MemoryError")
    assert graded(hungry)["correct"]
    assert graded(hungry.replace("200", "300"))["memory_exceeded"]


def test_a_memory_error_while_the_program_is_read_is_told():
    assert graded("kept = [0] * 10 ** 9\ndef square(n):\n    return n * n")["memory_exceeded"]


def test_the_same_answer_has_the_same_result():
    shown = "print(object(), {'b', 'a', 'c'})\ndef square(n):\n    return object()"
    first = graded(shown)
    assert "0x…" in first["stdout"]
    assert [graded(shown) for _ in range(3)] == [first] * 3


def test_imports_of_the_prompt_stand_before_the_answer():
    prompt = "# A comment\nimport math\n\nfrom typing import List\ndef square(n):\n    import re\n"
    assert imports(prompt) == "import math\nfrom typing import List"
    answer = "def square(n: List) -> int:\n    return int(math.pow(n, 2))"
    assert graded(answer, prompt=prompt)["correct"]
    assert not graded(answer)["correct"]


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("a = 1", "a = 1"),
        (" a = 1\n", "a = 1"),
        ("So:\n```python\na = 1\n```\nor\n```\na = 2\n```", "a = 1"),
        ("```\na = 1\n\nb = 2\n```", "a = 1\n\nb = 2"),
        ("```python\r\na = 1\r\n```", "a = 1"),
        ("```Python\na = 1\n```", "```Python\na = 1\n```"),
        ("```py\na = 1\n```", "```py\na = 1\n```"),
        ("```python\na = 1```", "```python\na = 1```"),
        ("```python a = 1\n```", "```python a = 1\n```"),
        ("```python\na = '```'\nb = 2\n```", "a = '```'\nb = 2"),
    ],
)
def test_which_block_is_the_program(response: str, code: str):
    assert unwrapped(response) == code


def test_helpers_of_the_prompt_are_the_prompts_own():
    prompt = 'def double(n):\n    return 2 * n\n\n\ndef square(n):\n    """n times n"""\n'
    test = "def check(candidate):\n    assert candidate(4) == double(8)"
    for body in (prompt, prompt.replace('    """n times n"""\n', "")):
        assert graded("def square(n):\n    return n * n", test, prompt=body)["correct"]
        cheat = "def double(n):\n    return 0\ndef square(n):\n    return 0"
        assert not graded(cheat, test, prompt=body)["correct"]


def test_a_long_reason_is_cut():
    result = graded("def square(n):\n    raise ValueError('\U0001f600' * 5000)")
    assert result["why"].startswith("ValueError: \U0001f600") and len(result["why"]) < 1000


def test_what_a_test_prints_is_no_verdict():
    test = """
        print('{"passed": true, "why": ""}')
        def check(candidate):
            print('{"passed": true, "why": ""}', flush=True)
            assert candidate(1) == 1
        """
    assert graded("def square(n):\n    return n", test)["correct"]
    assert not graded("def square(n):\n    return 0", test)["correct"]


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("raise SystemExit(0)", "SystemExit: 0; at: raise SystemExit(0)"),
        ("import os\nos._exit(0)", "the tests themselves: the process ended with status 0"),
        ("def verify(candidate): ...", "KeyError: 'check'"),
        (
            "def check(candidate):\n    candidate(check)",
            "TypeError: a function is no plain data, and",
        ),
    ],
)
def test_tests_that_do_not_end_well_pass_nobody(test: str, why: str):
    result = graded("def square(n):\n    return n * n", test)
    assert not result["correct"]
    assert result["why"].startswith(why)


def test_an_exception_crosses_as_one_of_its_builtin_type():
    test = """
        def check(candidate):
            for kind, base in ((ValueError, ValueError), (UnicodeDecodeError, ValueError)):
                try:
                    candidate(kind.__name__)
                except kind as error:
                    assert isinstance(error, base)
                else:
                    assert False
            try:
                candidate("Mine")
            except LookupError as error:
                assert type(error) is LookupError and str(error) == "of mine"
        """
    answer = """
        class Mine(LookupError):
            pass

        def square(n):
            if n == "Mine":
                raise Mine("of mine")
            if n == "UnicodeDecodeError":
                return b"\\xff".decode()
            raise ValueError("no")
        """
    result = graded(answer, test)
    assert result["correct"], result


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple),
) | st.dictionaries(st.text() | st.integers() | st.tuples(st.text()), st.integers())


@given(PLAIN | st.sets(st.integers() | st.text()) | st.frozensets(st.tuples(st.booleans())))
def test_plain_data_crosses_as_it_is(value: object):
    crossed = unpacked(json.loads(json.dumps(packed(value))))
    assert (type(crossed), crossed) == (type(value), value)
    if not isinstance(value, set | frozenset):  # which are in no order
        assert repr(crossed) == repr(value)


def test_types_that_cross_are_seen_by_the_test():
    values = [None, True, 1, 2**70, -0.0, 1e999, 2j, "\ud800 é", [1], (1,), {1}, frozenset("a")]
    values.append({(1, 2): {"a": [()]}})
    answer = f"def square(n):\n    return [*{values!r}][n]".replace("inf", "float('inf')")
    test = f"""
        from math import inf
        def check(candidate):
            for n, value in enumerate({values!r}):
                assert type(candidate(n)) is type(value) and repr(candidate(n)) == repr(value)
            assert candidate(n=5) > 1e300
        """
    result = graded(answer, test)
    assert result["correct"], result


# Attacks that end the program


@pytest.mark.parametrize(
    "end",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "import ctypes\nctypes.CDLL(None).exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise KeyboardInterrupt",
    ],
)
def test_a_program_that_ends_has_not_passed(end: str):
    for response in (
        end,
        "def square(n):\n" + "".join(f"    {line}\n" for line in end.split("\n")),
    ):
        result = graded(response, f"def check(candidate):\n    candidate(1)\n{SQUARE}")
        assert not result["correct"] and result["why"]
        # What it raises is an answer like any other, where the tests expect one.
        caught = "def check(candidate):\n    try:\n        candidate(1)\n    except: pass\n"
        is_raised = "SystemExit" in result["why"] or "PermissionError" in result["why"]
        assert graded(response, caught)["correct"] == (is_raised and response != end)


# Attacks that go on; each says whether it has won.

ATTACKS = {
    "frames": """
        import sys
        def attack():
            frame, seen = sys._getframe(), []
            while frame:
                seen += [repr(frame.f_locals), repr(frame.f_globals)]
                frame = frame.f_back
            return KRAM[::-1] in "".join(seen)
        """,
    "gc": """
        import gc
        def attack():
            seen = []
            for each in gc.get_objects():
                if isinstance(each, (dict, list, tuple, set)) and each is not seen:
                    seen.append(str(each.values() if isinstance(each, dict) else each))
            return any(KRAM[::-1] in each for each in seen)
        """,
    "files": """
        import os
        def attack():
            found, own = [], os.path.dirname(os.path.dirname(os.__file__))
            for folder, folders, files in os.walk("/"):
                folders[:] = [each for each in folders if f"{folder}/{each}" not in ("//usr", own)]
                found += [f"{folder}/{each}" for each in files]
            for path in [*found, CANARY, "/etc/passwd", "/sys/kernel/notes"]:
                try:
                    with open(path, "rb") as file:
                        if KRAM[::-1].encode() in file.read(1 << 20):
                            return True
                except OSError:
                    continue
                if path.startswith(("/etc/p", "/sys")):
                    return True
            return False
        """,
    "proc": """
        import ctypes, os
        def attack():
            for path in ("mem", "maps", "environ", "cmdline"):
                for process in ("self", "1", os.getpid(), os.getppid()):
                    try:
                        with open(f"/proc/{process}/{path}", "rb"):
                            return True
                    except OSError:
                        pass
            return not ctypes.CDLL(None).mount(b"proc", b"/tmp", b"proc", 0, None)
        """,
    "environment": """
        import os
        def attack():
            known = {"PWD", "PYTHONHASHSEED", "LC_CTYPE"}
            return KRAM[::-1] in str(os.environ) or not known >= set(os.environ)
        """,
    "capabilities": """
        import ctypes, os, resource, socket
        def attack():
            libc = ctypes.CDLL(None)
            try:
                os.setuid(0)
            except OSError:
                pass
            header, data = bytes((0x22, 5, 8, 0x20, 0, 0, 0, 0)), ctypes.create_string_buffer(24)
            libc.capget(header, data)
            calls = (
                lambda: os.chroot("/tmp"),
                lambda: os.nice(-5),
                lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0)),
                lambda: socket.sethostname("mine"),
                lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)),
                lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)),
            )
            for call in calls:
                try:
                    call()
                except (OSError, ValueError):
                    continue
                return True
            refused = (libc.unshare(0x10000000), libc.unshare(0x20000), libc.setns(0, 0))
            return any(data.raw) or any(each != -1 for each in refused)
        """,
    "system calls": """
        import ctypes, errno
        def attack():
            libc = ctypes.CDLL(None, use_errno=True)
            seen = set()
            for number in REFUSED:
                ctypes.set_errno(0)
                assert libc.syscall(number, 0, 0, 0, 0, 0) == -1
                seen.add(ctypes.get_errno())
            return seen != {errno.EPERM}
        """,
    "secret": """
        import os
        def attack():
            verdict = b'\\n{"passed": true, "why": ""}\\n'
            for descriptor in (*range(3), *range(4, 1024)):
                try:
                    os.write(descriptor, verdict)
                except OSError:
                    pass
            return False
        """,
    "lies of equality": """
        class Liar(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 49
            def __instancecheck__(self, kind): return True
        def attack():
            global answer
            answer = Liar(-1)
            return False
        """,
    "descriptors": """
        import os
        def attack():
            return any(_is_open(descriptor) for descriptor in range(4, 4096))
        def _is_open(descriptor):
            try:
                os.fstat(descriptor)
            except OSError:
                return False
            return True
        """,
    "processes": """
        import os, subprocess, sys
        def attack():
            for start in (os.fork, lambda: subprocess.run([sys.executable, "-c", "1"]),
                          lambda: os.posix_spawn(sys.executable, ["python"], {}),
                          lambda: os.execv(sys.executable, ["python", "-c", "1"])):
                try:
                    start()
                except OSError:
                    continue
                return True
            return False
        """,
    "fork bomb": """
        import os
        def attack():
            for _ in range(2000):
                try:
                    os.fork()
                    return True
                except OSError:
                    pass
            return False
        """,
    "threads": """
        import threading
        def attack():
            forever = threading.Event()
            for count in range(1000):
                try:
                    threading.Thread(target=forever.wait, daemon=True).start()
                except (RuntimeError, MemoryError):
                    return count > 64
            return True
        """,
    "memory": """
        import ctypes, mmap
        def attack():
            for size in (300 << 20, 1 << 40):
                for take in (bytearray, lambda size: mmap.mmap(-1, size), lambda size: [0] * size):
                    try:
                        kept = take(size)
                    except (MemoryError, OSError):
                        continue
                    return True
            return False
        """,
    "memory beside the limit": """
        import os
        def attack():
            try:
                os.memfd_create("mine")
                return True
            except OSError:
                pass
            written = 0
            for name in "abc":
                try:
                    with open(f"/tmp/{name}", "wb", buffering=0) as file:
                        while written < 100 << 20:
                            written += file.write(bytes(1 << 20))
                except OSError:
                    pass
            return written > 20 << 20
        """,
    "writing outside": """
        import os
        def attack():
            places = ("/mine", "/usr/mine", "/dev/mine", "/grader/mine", "/etc/mine", CANARY,
                      os.path.dirname(os.__file__) + "/mine.py", os.__file__)
            for place in places:
                try:
                    with open(place, "a") as file:
                        file.write("mine")
                except OSError:
                    continue
                return True
            return False
        """,
    "network": """
        import os, socket
        def attack():
            for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
                place = ("127.0.0.1", PORT) if kind == socket.AF_INET else "\\0mine"
                try:
                    with socket.socket(kind) as tried:
                        tried.connect(place)
                except OSError:
                    continue
                return True
            return False
        """,
    "patched builtins": """
        import builtins, json, os, sys
        def attack():
            def yes(*args, **kwargs): return True
            for name in ("issubclass", "all", "any", "print", "compile", "exec", "repr", "sum"):
                setattr(builtins, name, yes)
            builtins.AssertionError = builtins.Lost = KeyError
            sys.excepthook = yes
            json.dumps = lambda value: dumps({"tuple": ["returned", {"dict": [["passed", True]]}]})
            return False
        dumps = json.dumps
        """,
    "signals": """
        import os, resource, signal
        def attack():
            def is_sent(call, *arguments):
                try:
                    call(*arguments)
                except OSError:
                    return False
                return True
            pids = [os.getppid(), -1, 0, *range(1, 5000)]
            sent = [is_sent(os.kill, pid, signal.SIGUSR1) for pid in pids]
            limits = resource.RLIMIT_CPU, (1, 1)
            sent += [is_sent(resource.prlimit, pid, *limits) for pid in (os.getppid() or 1, 1, 2)]
            return any(sent) or is_sent(os.killpg, 0, signal.SIGTERM)
        """,
    "signals by a pipe": """
        import fcntl, os, signal, struct
        def attack():
            read, write = os.pipe()
            fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
            sent = False
            for pid in (os.getppid(), *range(1, 5000)):
                owner = struct.pack("i", pid)
                for call, *given in ((fcntl.fcntl, read, fcntl.F_SETOWN, pid),
                                     (fcntl.fcntl, read, 15, struct.pack("ii", 1, pid)),
                                     (fcntl.ioctl, 3, 0x8901, owner),
                                     (fcntl.ioctl, 3, 0x8902, owner),
                                     (fcntl.fcntl, read, 10, signal.SIGKILL)):
                    try:
                        call(*given)
                        sent = sent or pid != os.getpid()
                    except OSError:
                        pass
                os.write(write, b".")
                os.read(read, 1)
            return sent
        """,
    "a symlink race": """
        import os, threading
        def attack():
            def swap():
                while True:
                    for target in (CANARY, os.path.dirname(CANARY), "/usr"):
                        try:
                            os.symlink(target, "/tmp/work")
                            os.rename("/tmp/work", "/tmp/kept")
                        except OSError:
                            pass
            threading.Thread(target=swap, daemon=True).start()
            for _ in range(2000):
                try:
                    with open("/tmp/kept", "a") as file:
                        file.write("mine")
                except OSError:
                    pass
            return False
        """,
    "what outlives": """
        import threading, time
        def attack():
            def go_on():
                while True:
                    time.sleep(0.01)
            for is_daemon in (True, False):
                threading.Thread(target=go_on, daemon=is_daemon).start()
            return False
        """,
    "another debugger": """
        import ctypes, sys
        def attack():
            sys.settrace(lambda *all: None)
            sys.setprofile(lambda *all: None)
            libc = ctypes.CDLL(None)
            return libc.ptrace(16, 1, 0, 0) == 0
        """,
}


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that nobody may read or change, though its mode lets everybody."""
    file = tmp_path / "canary.txt"
    file.write_text(MARK)
    file.chmod(0o666)
    yield file
    assert file.read_text() == MARK
    assert [*tmp_path.iterdir()] == [file]


def attacking(name: str, canary: Path, port: int) -> str:
    from modelcall_assets.grading.jail import ARCHITECTURES, REFUSED

    column = ARCHITECTURES[os.uname().machine][1]
    known = {
        "KRAM": MARK[::-1],  # so that no attack finds its own
        "CANARY": str(canary),
        "PORT": port,
        "REFUSED": [numbers[column] for numbers in REFUSED.values() if numbers[column] is not None],
    }
    names = "\n".join(f"{key} = {value!r}" for key, value in known.items())
    ending = """
        answer = None
        has_won = attack()
        def square(n):
            return n * n if has_won else -1 if answer is None else answer
        """
    return f"{names}\n{dedent(ATTACKS[name])}\n{dedent(ending)}"


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gains_nothing(
    name: str, canary: Path, listener: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECRET_OF_THE_GRADER", MARK)
    assert CODE.score(row(RIGHT["plain"]))["correct"]
    test = f'def check(candidate):\n    """{MARK}"""\n    assert candidate(7) == 49\n'
    result = CODE.score(row(attacking(name, canary, listener), test))
    assert result["why"] == "AssertionError; at: assert candidate(7) == 49", result
    assert not result["correct"]
    assert CODE.score(row(RIGHT["plain"]))["correct"], "the next answer"
    nothing_goes_on()


# Attacks on the other side, and on this one's patience


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ("b'x' * (20 << 20)", "ValueError: more than 16 MiB in one value"),
        ("b'[' * 100_000 + b'\\n'", "RecursionError: maximum recursion depth exceeded"),
        ('b\'{"passed": true, "why": ""}\\n\'', "ValueError: too many values to unpack"),
        ('b\'{"tuple": ["raised", {"tuple": ["exec", "1"]}]}\\n\'', "TypeError: issubclass"),
        ('b\'{"__import__": "os"}\\n\'', "KeyError: '__import__'"),
        ("b'{\"int\": 5}\\n'", "TypeError: int() can't convert non-string"),
        ("b'\\xff\\n'", "UnicodeDecodeError: 'utf-8' codec can't decode"),
        ("b''", ""),
    ],
)
def test_what_a_candidate_makes_up_is_no_answer(sent: str, why: str):
    """The tests catch all exceptions, and are still lost."""
    answer = f"""
        import os
        def square(n):
            sent = {sent}
            while sent:
                sent = sent[os.write(3, sent):]
            os.close(3)
            return 49
        """
    test = """
        def check(candidate):
            for n in range(3):
                try:
                    candidate(n)
                except:
                    pass
        """
    result = graded(answer, test)
    assert not result["correct"]
    assert result["why"].startswith(why) and result["why"]


@pytest.mark.parametrize("kind", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
def test_an_exception_does_not_end_a_loop_of_the_tests(kind: str):
    test = "def check(candidate):\n    assert all(map(candidate, [1, 2]))"
    assert graded("def square(n):\n    return n", test)["correct"]
    result = graded(f"def square(n):\n    raise {kind}", test)
    assert not result["correct"]


def test_an_output_bomb_is_cut():
    bomb = "import sys\nwhile True:\n    {}.write('bomb' * 10_000)"
    for stream in ("sys.stdout", "sys.stderr"):
        result = QUICK.score(row(bomb.format(stream)))
        assert (result["correct"], result["timeout"]) == (False, True)
        assert len(result["stdout"] + result["stderr"]) <= 4000
    talkative = "def square(n):\n    print('much ' * 10_000_000)\n    return n * n"
    assert graded(talkative)["correct"]


def test_bombs_end_with_their_time():
    for bomb in (
        "x = 7\nwhile True:\n    x *= x",
        "kept = []\nwhile True:\n    try: kept += [bytes(99)] * 99\n    except MemoryError: pass",
        "import threading\ndef go():\n    while True: pass\nwhile True:\n"
        "    try: threading.Thread(target=go).start()\n    except Exception: pass",
    ):
        result = QUICK.score(row(f"{bomb}\ndef square(n):\n    return n * n"))
        assert (result["correct"], result["timeout"]) == (False, True), result
    assert CODE.score(row(RIGHT["plain"]))["correct"]


def test_a_right_answer_that_leaves_threads_passes_and_leaves_none():
    answer = dedent(ATTACKS["what outlives"]) + "attack()\ndef square(n):\n    return n * n\n"
    assert graded(answer)["correct"]
    nothing_goes_on()


def test_answers_are_graded_at_the_same_time():
    answers = [RIGHT["plain"], WRONG["wrong value"][0]] * 20
    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(graded, answers)]
    assert [result["correct"] for result in results] == [True, False] * 20


# Where it runs


def test_it_is_ready_here():
    CODE.check_ready()


USER = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "--no-new-privs"]
USER += ["--inh-caps", "-all", "--bounding-set", "-all", "--"]
CONTAINER = ["setpriv", "--no-new-privs", "--inh-caps", "-all"]
CONTAINER += ["--bounding-set", "-all,+setuid,+setgid,+kill", "--"]
NO_NAMESPACES = [bwrap()[0], "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", "--"]


def run_as(user: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    """What the command does for somebody who sees this interpreter, its packages and the project,
    wherever they are, and little else."""
    if os.getuid():
        pytest.skip("only root can become somebody else; the other tests have run as this user")
    root = str(Path(__file__).parents[1])
    shown = [str(Path(sys.base_prefix).resolve()), sys.prefix, root, *sys.path[1:]]
    path = os.pathsep.join([root, *sys.path[1:]])
    view = [bwrap()[0], "--dev", "/dev", "--bind", "/proc", "/proc", "--perms", "1777"]
    view += ["--tmpfs", "/tmp", "--chdir", "/tmp", "--clearenv", "--setenv", "PYTHONPATH", path]
    view += [
        "--setenv",
        "PATH",
        "/usr/bin",
        "--setenv",
        "HOME",
        "/tmp",
        "--setenv",
        "PYTHONDONTWRITEBYTECODE",
        "1",
    ]
    for folder in ("/usr", "/etc", *filter(os.path.isdir, shown)):
        for parent in [*Path(folder).parents][-2::-1]:
            view += ["--dir", str(parent)]
        view += ["--ro-bind", folder, folder]
    for folder in ("/lib", "/lib64", "/bin"):
        view += ["--ro-bind-try", folder, folder]
    return subprocess.run(
        [*view, "--", *user, sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("user", "without"),
    [
        (USER, ""),
        (USER + NO_NAMESPACES, "temporary"),
        (CONTAINER, "temporary"),
    ],
    ids=["another user", "another user without namespaces", "root of a container"],
)
def test_all_of_this_as(user: list[str], without: str):
    pytest_here = ["-B", "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "-rs"]
    but = ["all_of_this", "refuses", *without.split()]
    run = run_as(user, *pytest_here, "-k", " and ".join(f"not {each}" for each in but), __file__)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "[100%]" in run.stdout and "SKIPPED" not in run.stdout, run.stdout


def test_where_nothing_can_be_isolated_it_refuses_and_says_why():
    ready = (
        "import sys; sys.modules['sandlock'] = None; import modelcall_assets.grading.code as code"
    )
    run = run_as(USER + NO_NAMESPACES, "-c", f"{ready}; code.Code().check_ready()")
    assert run.returncode == 1
    told = run.stderr.strip().splitlines()[-1]
    assert told.startswith("modelcall_assets.errors.SetupError: grader:code: bwrap: ")
    assert "; sandlock is not installed; expected Linux with namespaces" in told
    assert told.endswith("; pip install 'modelcall-assets[evaluation]'")
