"""Programs of a model: the right ones pass, and the wrong ones do no harm."""

import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from dllm_ray.errors import EvaluationError
from dllm_ray.evaluation import passing, sandbox
from dllm_ray.evaluation.sandbox import Limits, run

FREE = """
import dataclasses, threading, numpy, asyncio, tempfile, fcntl

@dataclasses.dataclass
class Point:
    x: 'int'

asyncio.run(asyncio.sleep(0))
thread = threading.Thread(target=Point, args=(1,))
thread.start(); thread.join()
with open('notes', 'w') as file:
    file.write('mine')
    fcntl.fcntl(file, fcntl.F_SETFD, fcntl.fcntl(file, fcntl.F_GETFD))
assert open('notes').read() == 'mine'
tempfile.TemporaryFile().write(b'x')
assert numpy.zeros(2).sum() == 0
"""


@pytest.fixture(params=[1, None], ids=["oldest Landlock", "this Landlock"])
def landlock(request, monkeypatch, tmp_path):
    """The Landlock of Linux 5.13, which knows no signals, and this kernel's."""
    if request.param:
        alter_jail("_LANDLOCK_NEWEST = 6", f"_LANDLOCK_NEWEST = {request.param}", monkeypatch, tmp_path)


def alter_jail(old, new, monkeypatch, tmp_path):
    text = sandbox._JAIL.read_text()
    assert text.count(old) == 1
    altered = tmp_path / "jail.py"
    altered.write_text(text.replace(old, new))
    monkeypatch.setattr(sandbox, "_JAIL", altered)


def test_what_a_solution_needs_is_allowed(landlock):
    assert run([FREE])[0] == sandbox.Outcome("passed")


HARM = {
    "a process": "import os\nwhile True:\n    os.fork()",
    "a command": "import subprocess; subprocess.run(['ls'])",
    "another interpreter": "import os, sys; os.execv(sys.executable, ['python'])",
    "memory": "held = bytearray(1 << 33)",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', 80))",
    "a socket with a name": "import socket; socket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
    "a socket by its number": "import ctypes; assert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0",
    "an io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 1, 0) >= 0",
    "a file outside": "open('/tmp/dllm_ray_was_here', 'w')",
    "a file above": "open('../dllm_ray_was_here', 'w')",
    "a link out": "import os; os.symlink('/etc', 'etc'); open('etc/passwd')",
    "rights of a file": "import os; os.chmod('/tmp', 0o777)",
    "times of a file": "import os; os.utime('/tmp')",
    "a large file": "open('file', 'wb').write(bytes(2 << 20))",
    "the users": "open('/etc/passwd')",
    "the project": f"import os; os.listdir({str(Path.cwd())!r})",
    "another process's environment": "import os; open(f'/proc/{os.getppid()}/environ')",
    "another process's limits": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    "a mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'.', b'tmpfs', 0, None) == 0",
}

FILES = "import fcntl, os, socket, struct; end, other = socket.socketpair(); parent = os.getppid()\n"
MEMORY = """
import ctypes, os, struct
source, target = ctypes.create_string_buffer(b'own'), ctypes.create_string_buffer(3)
here, there = (struct.pack('PN', ctypes.addressof(buffer), 3) for buffer in (source, target))
libc = ctypes.CDLL(None, use_errno=True)
if libc.{call}(os.getpid(), {order}, 0) < 0: raise OSError(ctypes.get_errno(), '')
"""
REFUSED = {
    "a signal": "import os; os.kill(os.getppid(), 0)",
    "a signal from a file": FILES + "fcntl.fcntl(end, fcntl.F_SETOWN, parent)",
    "a signal from a file, by type": FILES + "fcntl.fcntl(end, 15, struct.pack('ii', 1, parent))",
    "a signal of choice": FILES + "fcntl.fcntl(end, 10, 9)",
    "a signal from a socket": FILES + "fcntl.ioctl(end, 0x8901, struct.pack('i', parent))",
    "a signal from a socket's group": FILES + "fcntl.ioctl(end, 0x8902, struct.pack('i', parent))",
    "a pair of datagrams": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "a pair of another family": "import socket; socket.socketpair(socket.AF_INET, socket.SOCK_STREAM)",
    "reading a process": MEMORY.format(call="process_vm_readv", order="there, 1, here, 1"),
    "writing a process": MEMORY.format(call="process_vm_writev", order="here, 1, there, 1"),
    "hidden disk space": "import os; os.posix_fallocate(os.open('file', os.O_CREAT | os.O_RDWR), 0, 4096)",
}


def test_the_filter_of_calls_holds_without_landlocks_help(landlock):
    outcomes = dict(zip(REFUSED, run(list(REFUSED.values()), Limits(seconds=20)), strict=True))
    for name, outcome in outcomes.items():
        assert outcome.message.startswith("PermissionError: [Errno 1]"), (name, outcome)


def test_a_socket_with_a_name_is_out_of_reach(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "named"))
        listener.setblocking(False)
        send = f"end.sendto(b'out', {str(tmp_path / 'named')!r})"
        ways = ["end = socket.socketpair(type=socket.SOCK_DGRAM)[0]", "end = socket.socketpair()[0]"]
        outcomes = run([f"import socket\n{way}\n{send}" for way in [*ways, f"{ways[0]}; end.detach()"]])
        assert not any(outcome.passed for outcome in outcomes)
        with pytest.raises(BlockingIOError):
            listener.recv(1)


def test_capabilities_and_cpu_time_are_given_up():
    capabilities = """
import ctypes, struct
held = ctypes.create_string_buffer(24)
assert ctypes.CDLL(None).capget(struct.pack('Ii', 0x20080522, 0), held) == 0
assert held.raw == bytes(24), held.raw
"""
    cpu = """
import ctypes, platform, resource, struct
get, change = {'x86_64': (97, 160), 'aarch64': (163, 164)}[platform.machine()]
libc, held = ctypes.CDLL(None), ctypes.create_string_buffer(16)
assert libc.syscall(get, resource.RLIMIT_CPU, held) == 0
assert struct.unpack('QQ', held) == (8, 9), held.raw
assert libc.syscall(change, resource.RLIMIT_CPU, struct.pack('QQ', 60, 60)) == -1
"""
    assert [outcome.message for outcome in run([capabilities, cpu], Limits(seconds=7))] == ["", ""]


def test_files_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    limits = Limits(folder_bytes=1 << 18)
    fine = "for number in range(4): open(f'{number}', 'wb').write(bytes(1 << 15))"
    wait = "import itertools, os, time\nfor number in itertools.count():\n    time.sleep(0.001)\n    "
    programs = [
        "for number in range(64): open(f'{number}', 'wb').write(bytes(1 << 15))",
        wait + "open(f'{number}', 'wb').write(bytes(1 << 15))",
        wait + "open(f'{number}', 'wb')",
        wait + "name = 'x' * 250; os.mkdir(name); os.chdir(name); open('file', 'wb').write(bytes(1 << 10))",
    ]
    (kept,) = run([fine], limits)
    assert kept.passed
    message = "it wrote more than 262144 bytes of files"
    assert [outcome.message for outcome in run(programs, limits)] == [message] * len(programs)
    assert run(["import os\nfor _ in range(1500): os.mkdir('x'); os.chdir('x')"])[0].passed  # too deep for rmtree
    assert list(tmp_path.iterdir()) == []


def test_what_does_harm_is_refused(landlock):
    outcomes = dict(zip(HARM, run(list(HARM.values()), Limits(seconds=20)), strict=True))
    assert {name: outcome.status for name, outcome in outcomes.items()} == dict.fromkeys(HARM, "failed")
    assert "Operation not permitted" in outcomes["a connection"].message
    assert outcomes["memory"].message == "MemoryError"
    assert not Path("/tmp/dllm_ray_was_here").exists()


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, json; os._exit = os.write = json.dumps = None\nassert False",
        "import sys; sys.modules.clear(); assert False",
        "class Quiet(Exception):\n    def __str__(self): raise SystemExit(0)\nraise Quiet",
        "import os\nfor number in range(64):\n    try: os.write(number, b'{}')\n    except OSError: pass\nos._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "def deeper(): deeper()\ndeeper()",
        "this is no program",
        "\ud800",
    ],
    ids=lambda program: program[:30].encode("ascii", "replace").decode(),
)
def test_leaving_early_is_no_pass(program):
    (outcome,) = run([program + "\nassert False"])
    assert outcome.status == "failed"
    assert outcome.message


@pytest.mark.parametrize(
    "said",
    [
        b"[" * 60000,
        b'{"unconfined": "no"}',
        b'confined\n{"unconfined": "no"}',
        b'{"message": %s}' % (b"[" * 900 + b"]" * 900),
        b'{"message": "\\ud800"}',
        b"1" * 5000,
        b"\xff" * 100,
        b"x" * 100000,
    ],
    ids=["deep", "unconfined", "confined and not", "deep message", "surrogate", "number", "bytes", "long"],
)
def test_nothing_a_program_says_ends_the_evaluation(said):
    program = f"import os\nfor number in range(3, 64):\n    try: os.write(number, {said!r})\n    except OSError: pass\n"
    forged, fine = run([program + "os._exit(0)", "pass"])
    assert forged.status == "failed"
    assert forged.message.encode()
    assert fine.passed


def test_closing_the_pipe_is_no_way_out():
    program = "import os, time\nos.closerange(3, 64)\ntime.sleep(60)"
    assert run([program], Limits(seconds=1))[0].status == "timed out"


def test_what_never_ends_is_ended():
    endless = ["while True: pass", "import time; time.sleep(60)", "while True: print('x' * 10**5)"]
    flood = "import os\nfor number in range(3, 64):\n    try:\n        while True: os.write(number, bytes(10**5))\n"
    flood += "    except OSError: pass"
    outcomes = run([*endless, flood], Limits(seconds=1))
    assert [outcome.status for outcome in outcomes[:3]] == ["timed out"] * 3
    assert outcomes[0].message == "it ran for more than 1 s"
    assert outcomes[3] == sandbox.Outcome("failed", "it wrote to the pipe of its verdict")


def test_nothing_is_inherited_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "a key")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "beside").write_text("x")
    with (tmp_path / "beside").open() as held:
        os.set_inheritable(held.fileno(), True)
        programs = [
            "import os; assert 'SECRET' not in os.environ, os.environ",
            "import os; assert os.listdir() == [], os.listdir(); os.mkdir('left'); open('left/file', 'w')",
            "import os\nheld = []\nfor number in range(3, 64):\n    try: os.fstat(number); held.append(number)\n"
            "    except OSError: pass\nassert len(held) == 1, held",  # the pipe of the verdict
        ]
        assert [outcome.message for outcome in run(programs)] == ["", "", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["beside"]


def test_canonical_solutions_pass_and_altered_ones_fail(real_data):
    with gzip.open(real_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(next(file)) for _ in range(32)]
    programs = [
        f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})" for row in rows
    ]
    hollow = [f"{row['prompt']}    pass\n{row['test']}\ncheck({row['entry_point']})" for row in rows]
    outcomes = run([*programs, *hollow])
    assert [outcome.status for outcome in outcomes] == ["passed"] * 32 + ["failed"] * 32


def test_a_machine_that_can_not_shut_programs_in_runs_none(monkeypatch, tmp_path):
    alter_jail("_LANDLOCK_RESTRICT = 444,", "_LANDLOCK_RESTRICT = 9999,", monkeypatch, tmp_path)
    with pytest.raises(EvaluationError, match=r"can't run a model's code in a sandbox: the kernel has no Landlock"):
        sandbox.check()


@pytest.mark.parametrize(
    ("samples", "passed", "k", "chance"), [(1, 0, 1, 0.0), (4, 1, 1, 0.25), (4, 1, 4, 1.0), (4, 2, 2, 5 / 6)]
)
def test_pass_at_k_is_the_chance_that_one_of_k_passes(samples, passed, k, chance):
    assert passing.chance(samples, passed, k) == pytest.approx(chance)


def test_pass_at_k_over_the_samples_of_a_document():
    verdicts = [{"status": "passed"}, {"status": "failed"}, {"status": "timed out"}]
    assert passing.pass_at_k(verdicts) == pytest.approx({"pass@1": 1 / 3, "pass@2": 2 / 3})


def test_lm_evals_own_code_tasks_get_the_sandbox():
    import evaluate

    with passing.sandboxed():
        judge = evaluate.load("code_eval")
    scores, results = judge.compute(
        references=["assert add(2, 3) == 5"] * 2,
        predictions=[["def add(a, b): return a * b", "def add(a, b): return a + b"], ["import os; os._exit(0)"] * 2],
        k=[1, 2, 10],
    )
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert results[1][0][1]["message"] == "it ended before its tests did, with status 0"
