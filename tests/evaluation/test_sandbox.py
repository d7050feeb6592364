"""Programs of a model: the right ones pass, and the wrong ones do no harm."""

import gzip
import json
import os
from pathlib import Path

import pytest

from dllm_ray.errors import EvaluationError
from dllm_ray.evaluation import passing, sandbox
from dllm_ray.evaluation.sandbox import Limits, run

FREE = """
import dataclasses, threading, numpy, asyncio, tempfile

@dataclasses.dataclass
class Point:
    x: 'int'

asyncio.run(asyncio.sleep(0))
thread = threading.Thread(target=Point, args=(1,))
thread.start(); thread.join()
with open('notes', 'w') as file:
    file.write('mine')
assert open('notes').read() == 'mine'
tempfile.TemporaryFile().write(b'x')
assert numpy.zeros(2).sum() == 0
"""


def test_what_a_solution_needs_is_allowed():
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
    "another process": "import os; os.kill(os.getppid(), 9)",
    "another process's environment": "import os; open(f'/proc/{os.getppid()}/environ')",
    "another process's limits": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    "a mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'.', b'tmpfs', 0, None) == 0",
}


def test_what_does_harm_is_refused():
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


def test_what_never_ends_is_ended():
    endless = ["while True: pass", "import time; time.sleep(60)", "while True: print('x' * 10**5)"]
    flood = "import os\nfor number in range(3, 64):\n    try:\n        while True: os.write(number, bytes(10**5))\n"
    flood += "    except OSError: pass"
    outcomes = run([*endless, flood], Limits(seconds=1))
    assert [outcome.status for outcome in outcomes[:3]] == ["timed out"] * 3
    assert outcomes[0].message == "it ran for more than 1 s"
    assert not outcomes[3].passed


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
    broken = tmp_path / "jail.py"
    text = sandbox._JAIL.read_text().replace(
        "_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444,",
        "_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 9999,",
    )
    broken.write_text(text)
    monkeypatch.setattr(sandbox, "_JAIL", broken)
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
