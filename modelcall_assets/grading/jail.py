"""The program inside the sandbox: for each pair of sockets that it is handed it forks a process,
which gets one of them, limits and a view of processes and files of its own, and nothing else.

The standard library only. Linux, where `bwrap` has taken away everything else.
"""

import ctypes
import errno
import importlib
import json
import math
import os
import platform
import resource
import select
import signal
import socket
import struct
import time
from typing import Any

from modelcall_assets.grading.trial import CHANNEL, judge, play, print_end

SIDES = {"play": play, "judge": judge}
_WARM = (
    "bisect collections copy datetime decimal fractions functools hashlib heapq itertools operator"
)
_WARM += " random re statistics string textwrap typing"
_TAIL_BYTES = 4000
"""Of what a process writes; the rest is read and thrown away."""
_MIB = 1 << 20
_DESCRIPTORS = 64

_NEW_MOUNTS, _NEW_PIDS, _THREAD = 0x20000, 0x20000000, 0x10000
_NO_SUID, _NO_DEVICES = 2, 4
_PARENT_DIES, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38
_CAPABILITIES_VERSION = 0x20080522

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_X32 = 0x40000000
_CLONE, _CLONE3, _PRLIMIT = (56, 220), 435, (302, 261)
_SIGNALLING = ((72, 25), (8, 10, 15)), ((16, 29), (0x8901, 0x8902))
"""`fcntl` and `ioctl`, with the orders that have a file send signals to a process."""
REFUSED = {  # numbers of (x86_64, aarch64)
    # Processes: there are only threads, so that the limit of memory is one for all.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # Namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # Other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    # The kernel's inside
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "personality": (135, 92),
    # The network, and memory that no limit counts
    "socket": (41, 198), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def serve(shut_in_by: str) -> None:
    """Fork for each pair that comes by standard input, until the grader has ended. `shut_in_by` is
    what forks can have a view of their own by: "namespaces", or "landlock", where they cannot."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
    os.closerange(3, _DESCRIPTORS)
    for name in _WARM.split():
        importlib.import_module(name)
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    control.send(b"+")
    while (received := socket.recv_fds(control, 1, 2))[0]:
        pair = received[1]
        if not os.fork():
            keep(*pair, has_view=shut_in_by == "namespaces")
            os._exit(0)
        for descriptor in pair:
            os.close(descriptor)


def keep(line: int, channel: int, has_view: bool) -> None:
    """Start one side of a trial as the order on the `line` says, watch it, and tell of its end:
    `{"timeout", "status", "stdout", "stderr"}`. It is killed when the other end of the line is
    closed or shut down, and all that it has started with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    grader = socket.socket(fileno=line)
    order = json.loads(grader.makefile().readline())
    if has_view:
        _ok(_libc.unshare(_NEW_MOUNTS | _NEW_PIDS))
        options = b"size=16m,nr_inodes=512,mode=1777"
        _ok(_libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _NO_SUID | _NO_DEVICES, options))
        os.chdir("/tmp")
    outputs = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            _enter((outputs[0][1], outputs[1][1], channel), order, has_view)
            SIDES[order["side"]](**order["given"])
            os._exit(0)
        except BaseException as error:  # noqa: BLE001  whatever a program raises
            print_end(error)
        finally:
            os._exit(1)
    os.close(channel)
    for _, write in outputs:
        os.close(write)
    ended = _watch(child, grader, [read for read, _ in outputs], order["seconds"])
    grader.sendall(json.dumps(ended).encode())


def _watch(child: int, grader: socket.socket, outputs: list[int], seconds: float) -> dict[str, Any]:
    tails = dict.fromkeys(outputs, b"")
    process, poll = os.pidfd_open(child), select.poll()
    for each in (process, grader, *outputs):
        poll.register(each, select.POLLIN)
    deadline, over = time.monotonic() + seconds, False
    while not over and (left := deadline - time.monotonic()) > 0:
        for ready, _ in poll.poll(math.ceil(left * 1000)):
            over |= ready in (process, grader.fileno())
            if ready in tails and not _read(ready, tails):
                poll.unregister(ready)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    for output in outputs:
        os.set_blocking(output, False)
        while _read(output, tails):
            pass
    stdout, stderr = (tails[output].decode(errors="replace") for output in outputs)
    code = os.waitstatus_to_exitcode(status)
    return {"timeout": not over, "status": code, "stdout": stdout, "stderr": stderr}


def _read(output: int, tails: dict[int, bytes]) -> bool:
    """Whether there was anything."""
    try:
        data = os.read(output, 1 << 16)
    except BlockingIOError:
        return False
    tails[output] = (tails[output] + data)[-_TAIL_BYTES:]
    return bool(data)


def _enter(descriptors: tuple[int, int, int], order: dict[str, Any], has_view: bool) -> None:
    """Give up everything that a side does not need."""
    for place, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *descriptors)):
        os.dup2(descriptor, place)
    os.closerange(CHANNEL + 1, _DESCRIPTORS)
    os.setsid()  # a signal to its group reaches nobody else
    seconds = math.ceil(order["seconds"]) + 1
    for limit, most in (
        (resource.RLIMIT_AS, order["megabytes"] * _MIB),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 16 * _MIB),
        (resource.RLIMIT_STACK, 8 * _MIB),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    if has_view and not os.getuid():  # root's own limit of processes would not hold
        user = (1 << 30) + int.from_bytes(os.urandom(3))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _ok(_libc.prctl(_PARENT_DIES, signal.SIGKILL, 0, 0, 0))
    _ok(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _ok(_libc.capset(struct.pack("Ii", _CAPABILITIES_VERSION, 0), bytes(24)))
    program = struct.pack("HP", len(_FILTER) // 8, ctypes.addressof(_FILTER))
    _ok(_libc.prctl(_SECCOMP, 2, program, 0, 0))


def _filter() -> bytes:
    """A seccomp program: EPERM for what is refused, for `prlimit` of others, for files that send
    signals and for `clone` unless it makes a thread; ENOSYS for `clone3`, whose flags a filter
    cannot read, so that `clone` is tried."""
    architecture, column = ARCHITECTURES[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x50000 | errno.EPERM
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, _X32), (give, 0, 0, refuse)]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            code += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    for numbers, orders in _SIGNALLING:
        code += [(equal, 0, 2 * len(orders) + 2, numbers[column]), (load, 0, 0, 24)]
        for order in orders:
            code += [(equal, 0, 1, order), (give, 0, 0, refuse)]
        code += [(load, 0, 0, 0)]
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, 0x50000 | errno.ENOSYS)]
    code += [(equal, 0, 3, _PRLIMIT[column]), (load, 0, 0, 16), (equal, 1, 0, 0)]
    code += [(give, 0, 0, refuse), (load, 0, 0, 0)]
    code += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (any_bit, 1, 0, _THREAD)]
    code += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *each) for each in code)


_FILTER = ctypes.create_string_buffer(_filter(), len(_filter()))


def _ok(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
