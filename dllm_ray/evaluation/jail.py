"""The inside of the sandbox: a process of its own that gives up what it could do harm with, then runs one program.

Started by `sandbox` as a script, with the program on its standard input. Standard library only: it imports nothing of
the project. To the pipe it was given as standard output it writes `CONFINED` before the program starts, then the
verdict as one JSON object; what stands before that line, the program can't have written.

The process gives up its capabilities, files and system calls, each for good:
- Landlock (Linux 5.13): Python's own folders may be read, the working directory may be written, all else is closed.
- A seccomp filter: no sockets but pairs, no new processes, no signals to others, nothing that changes the system. It
  doesn't rely on what Landlock learned later (signals in Linux 6.12).
- Resource limits: address space, CPU time, size of a file, open files, no core dumps.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types
from pathlib import Path

CONFINED = b"confined\n"

_LIBC = ctypes.CDLL(None, use_errno=True)

# number of each refused system call: (x86_64, aarch64); None: the machine has no such call
_REFUSED = {
    # other machines, other processes
    "socket": (41, 198), "connect": (42, 203), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "prlimit64": (302, 261), "setpriority": (141, 140),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # what Landlock leaves open in the file system
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265), "fallocate": (285, 47),
    # the system
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "acct": (163, 89), "quotactl": (179, 60), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "bpf": (321, 280), "perf_event_open": (298, 241), "fanotify_init": (300, 262),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
_CLONE = (56, 220)  # allowed for threads only
_SOCKETPAIR = (53, 199)  # allowed for streams only, which asyncio needs: from a pair of datagrams any socket is reached
_OWNERS = {  # refused with these commands, by which a file signals another process
    (72, 25): (8, 10, 15),  # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX
    (16, 29): (0x8901, 0x8902),  # ioctl: FIOSETOWN, SIOCSPGRP
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, the kernel's name of it
_NEW = 424  # from here on all machines number alike; the kernel's newer calls are refused unless listed
_NEW_ALLOWED = (436, 437, 439, 441, 449)  # close_range, openat2, faccessat2, epoll_pwait2, futex_waitv
_CLONE_THREAD = 0x10000
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE = 1, 1, 0xF
_EPERM, _ENOSYS = 1, 38

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_NEWEST = 6  # the version whose rights are known here
_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_FILE_RIGHTS = _READ_FILE | _WRITE_FILE | 1 | 1 << 14 | 1 << 15
_SPECIAL = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # devices, sockets and pipes with a name
_IOCTL_DEV = 1 << 15


class Unconfined(Exception):
    """The kernel can't shut the process in."""


def main() -> None:
    """Reads the order from standard input: `program`, `token`, `memory`, `cpu_seconds`, `file_bytes`."""
    order = json.load(sys.stdin)
    pipe = os.dup(1)
    write, leave, dumps = os.write, os._exit, json.dumps  # the program may replace what it finds under these names
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    try:
        confine(order)
    except (Unconfined, OSError, ValueError) as error:
        write(pipe, dumps({"unconfined": f"{error}"}).encode())
        leave(1)
    write(pipe, CONFINED)
    message = _run(order["program"])
    write(pipe, dumps({"token": order["token"]} if message is None else {"message": message}).encode())
    leave(0)


def confine(order) -> None:
    """Gives up, for good, what the program doesn't need.

    Raises:
        Unconfined: the kernel or machine lacks something.
    """
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or struct.calcsize("P") != 8:
        raise Unconfined(f"it is made for Linux on {' and '.join(_MACHINES)}, and this is {platform.machine()}")
    _limit(order)
    _drop_capabilities()
    if _LIBC.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, which the two below need
        raise Unconfined("the process can't give up new privileges")
    _close_files()
    _filter_calls(*machine)


def _run(program: str) -> str | None:
    """Runs the program; None where it came to its end, else why it did not."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickles look their module up
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except SystemExit:
        return "it left by itself before its end"
    except BaseException as error:
        return f"{type(error).__name__}: {_short(error)}".rstrip(": ")
    return None


def _short(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:500]
    except BaseException:  # an exception of the program's own making
        return ""


def _limit(order) -> None:
    for name, value in (
        (resource.RLIMIT_AS, order["memory"]),
        (resource.RLIMIT_CPU, order["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        later = name == resource.RLIMIT_CPU and value != hard  # first a signal that says why, a second later the end
        resource.setrlimit(name, (value, value + later))


def _drop_capabilities() -> None:
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if _LIBC.capset(header, none):
        raise Unconfined("the process can't give up its capabilities")


def _close_files() -> None:
    version = min(_LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1), _LANDLOCK_NEWEST)
    if version < 1:
        raise Unconfined("the kernel has no Landlock (Linux 5.13 or later, switched on)")
    rights = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, 1 << 14), (5, _IOCTL_DEV)):
        rights |= right if version >= since else 0
    fields = [rights] + [0b11] * (version >= 4) + [0b11] * (version >= 6)  # files, TCP, signals and abstract sockets
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        raise Unconfined("the kernel refuses a Landlock rule set")
    library = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64"}
    library |= {"/etc/ld.so.cache", "/etc/localtime"}
    allowed = {Path(path): _READ_FILE | _READ_DIR for path in library - {"/"}}
    allowed |= {Path(os.devnull): _READ_FILE | _WRITE_FILE, Path("/dev/urandom"): _READ_FILE}
    allowed[Path.cwd()] = rights & ~_SPECIAL & ~_IOCTL_DEV
    for path, right in allowed.items():
        if not path.exists():
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        right &= rights if path.is_dir() else rights & _FILE_RIGHTS
        failed = _LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", right, place), 0)
        os.close(place)
        if failed:
            raise Unconfined(f"the kernel refuses a Landlock rule for {path}")
    if _LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0):
        raise Unconfined("the kernel refuses to apply Landlock")
    os.close(ruleset)


def _filter_calls(column: int, architecture: int) -> None:
    """A classic BPF program over (call number, architecture, arguments): the first rule that fits decides."""
    load, equal, at_least, bits, mask, result = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050000, 0x80000000
    first, second = 16, 24  # where the lower halves of two arguments lie
    refuse, permit = (result, 0, 0, fail | _EPERM), (result, 0, 0, allow)
    rules = [(load, 0, 0, 4), (equal, 1, 0, architecture), (result, 0, 0, kill), (load, 0, 0, 0)]
    for number in _NEW_ALLOWED:
        rules += [(equal, 0, 1, number), permit]
    rules += [(at_least, 0, 1, _NEW), (result, 0, 0, fail | _ENOSYS)]  # the C library then takes the older call
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            rules += [(equal, 0, 1, numbers[column]), refuse]
    for numbers, commands in _OWNERS.items():
        rules += [(equal, 0, 2 + 2 * len(commands), numbers[column]), (load, 0, 0, second)]
        for command in commands:
            rules += [(equal, 0, 1, command), refuse]
        rules += [permit]
    rules += [(equal, 0, 8, _SOCKETPAIR[column]), (load, 0, 0, first), (equal, 1, 0, _AF_UNIX), refuse]
    rules += [(load, 0, 0, second), (mask, 0, 0, _SOCK_TYPE), (equal, 1, 0, _SOCK_STREAM), refuse, permit]
    rules += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, first), (bits, 1, 0, _CLONE_THREAD), refuse, permit]
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(buffer))
    if _LIBC.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise Unconfined("the kernel refuses a filter of system calls (seccomp)")


if __name__ == "__main__":
    main()
