"""SFT, evaluation and serving over several hosts, one of which is cut off in the middle: each goes on, with the numbers
of one machine."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "jobs"))

from hosts_testing import WORKER_CPUS, WORKERS, open_hosts
from jobs_testing import HANGS_S, ROOT, TINY, command, ended, environment, history, run, train

pytestmark = pytest.mark.slow

STEPS, EVERY, CUT = 160, 40, 80
TRAINING = {"train.max_steps": str(STEPS), "train.checkpoint_every": str(EVERY), "data.valid_rows": "0"}
EVALUATION = {
    "evaluate.tasks": "[digits, text_file]",
    "evaluate.limit": "200",
    "evaluate.batch_size": "2",
    "evaluate.workers": "2",
    "evaluate.threads_per_worker": "1",
    "likelihood.mc_num": "8",
    "sampler.max_new_tokens": "8",
    "sampler.block_size": "8",
    "sampler.steps": "8",
    "sampler.temperature": "1.0",
}
CLIENTS = 8


@pytest.fixture(scope="module")
def hosts():
    with open_hosts(environment() | {"PYTHONPATH": str(ROOT)}) as found:
        yield found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The output folder of the run on one machine."""
    folder = tmp_path_factory.mktemp("alone")
    done = train(folder, **{name.replace(".", "__"): value for name, value in TRAINING.items()})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def healed(hosts):
    """After a test all hosts are there again."""
    yield
    hosts.heal(WORKERS[1])


class Job:
    """A job that runs on the head, and what it has said."""

    def __init__(self, hosts, log: Path, name: str, settings: dict[str, str]):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                hosts.on_head(command(name, settings)),
                cwd=ROOT,
                env=hosts.job_environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                # tests in the background of a shell ignore interrupts, and what they start would inherit that
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_error) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text()

    def until(self, happened) -> float:
        """Waits until `happened()`; returns the seconds it took."""
        began = time.monotonic()
        while not happened():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() - began < HANGS_S, self.said()
            time.sleep(0.02)
        return time.monotonic() - began

    def ended(self) -> int:
        return ended(self.process, self.log)


def test_training_over_two_hosts_goes_on_when_one_is_cut_off(hosts, healed, alone, tmp_path):
    folder = tmp_path / "run"
    elastic = {"train.workers": '{"min": 1, "max": 2}', "train.cpus_per_worker": str(WORKER_CPUS)}
    settings = TINY | TRAINING | elastic | {"output_dir": str(folder)}

    def saved() -> int:
        state = folder / "run.json"
        return json.loads(state.read_text()).get("checkpoint_step", 0) if state.is_file() else 0

    with Job(hosts, tmp_path / "log", "sft", settings) as job:
        job.until(lambda: saved() >= CUT)
        assert hosts.running("RayTrainWorker").keys() == set(WORKERS)
        hosts.cut(WORKERS[1])
        resumed = rf"from step (\d+) of {STEPS} steps with 1 worker on cpu\n"
        took = job.until(lambda: re.search(resumed, job.said()))
        assert job.ended() == 0, job.said()
    print(f"training again after {took:.1f} s")
    assert f"for {STEPS} steps with 2 workers on cpu, on 2 nodes\n" in job.said()
    (step,) = map(int, re.findall(resumed, job.said()))
    assert step >= CUT and step % EVERY == 0
    expected, values = history(alone, "train/loss"), history(folder, "train/loss")
    assert sorted(values) == sorted(expected) == list(range(1, STEPS + 1))
    for number, seen in values.items():
        assert seen == pytest.approx(expected[number] * len(seen), rel=1e-4)
        assert len(seen) == 1 or step < number <= step + EVERY
    assert (folder / "final" / "model.safetensors").is_file()


def test_evaluation_over_two_hosts_ends_with_equal_numbers_when_one_is_cut_off(hosts, healed, alone, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"sort {n}: {n}"}) + "\n" for n in range(20)))
    settings = EVALUATION | {"model.path": str(alone / "final")}
    settings |= {"evaluate.data_files.text_file": str(tmp_path / "texts.jsonl")}
    here, there = tmp_path / "here", tmp_path / "there"
    done = run("evaluate", **settings, output_dir=str(here))
    assert done.returncode == 0, done.stdout + done.stderr

    answers = there / "answers"

    def kept() -> int:
        return sum(1 for file in answers.rglob("*") if file.is_file()) if answers.is_dir() else 0

    settings |= {"evaluate.cpus_per_worker": str(WORKER_CPUS), "output_dir": str(there)}
    with Job(hosts, tmp_path / "log", "evaluate", settings) as job:
        job.until(lambda: kept() > 0)
        assert hosts.running("ray::_Worker").keys() == set(WORKERS)
        hosts.cut(WORKERS[1])
        began = time.monotonic()
        assert not (there / "results.json").exists()
        assert job.ended() == 0, job.said()
    print(f"evaluation ended {time.monotonic() - began:.1f} s after the cut")

    def results(folder: Path) -> tuple[dict, list]:
        scores = json.loads((folder / "results.json").read_text())["results"]
        numbers = {
            f"{task} {name}": value
            for task, values in scores.items()
            for name, value in values.items()
            if isinstance(value, float)
        }
        rows = (folder / "samples_digits.jsonl").read_text().splitlines()
        return numbers, [json.loads(row)["resps"] for row in rows]

    expected, texts = results(here)
    scores, found = results(there)
    assert scores == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert found == texts
    # an untrained model's, but numbers and texts that would differ
    assert len({text for ((text,),) in texts}) > 40
    assert scores["text_file word_perplexity,none"] > 1


ASK = """
import json, sys, threading, time, urllib.error, urllib.request

def ask(client):
    body = {"model": "tiny", "prompt": "sort 21", "seed": 1, "diffusion": {"eos_penalty": 100.0}}  # it has to write
    body = json.dumps(body).encode()
    request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
    while True:
        began = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                outcome = json.load(response)["choices"][0]["text"]
        except OSError:
            outcome = None
            time.sleep(0.5)
        # in one piece, as other threads write too
        print(json.dumps([client, began, time.monotonic(), outcome]) + "\\n", end="", flush=True)

for client in range(int(sys.argv[2])):
    threading.Thread(target=ask, args=[client], daemon=True).start()
sys.stdin.read()
"""


def test_a_server_over_two_hosts_goes_on_answering_when_one_is_cut_off(hosts, alone, tmp_path):
    settings = {
        "model.path": str(alone / "final"),
        "model.name": "tiny",
        "model.replicas": "2",
        "model.cpus_per_replica": str(WORKER_CPUS),
        "model.threads": "1",
        "drain_s": "5",
    }
    with Job(hosts, tmp_path / "log", "serve", settings) as job:
        job.until(lambda: "metrics " in job.said())
        assert "serving   http://127.0.0.1:8000 (tiny)\n" in job.said()
        assert hosts.running("ServeReplica:dllm_ray:model").keys() == set(WORKERS)
        words = [sys.executable, "-c", ASK, "http://127.0.0.1:8000/v1/completions", str(CLIENTS)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        clients = subprocess.Popen(hosts.on_head(words), **pipes)
        try:
            answers = (json.loads(line) for line in clients.stdout)
            before = [next(answers) for _ in range(10 * CLIENTS)]
            (usual,) = {text for *_, text in before}
            assert usual
            hosts.cut(WORKERS[1])
            cut = time.monotonic()
            in_a_row, answered, slowest, refused = 0, set(), 0.0, 0
            while in_a_row < 10 * CLIENTS or len(answered) < CLIENTS:
                client, began, until, text = next(answers)
                assert until - cut < HANGS_S, job.said()
                slowest = max(slowest, until - began)
                if text is None:
                    in_a_row, refused = 0, refused + 1
                    continue
                assert text == usual
                in_a_row += 1
                if began > cut:
                    answered.add(client)
            print(
                f"all clients were answered {until - cut:.1f} s after the cut, the slowest after {slowest:.1f} s, "
                f"{refused} calls failed"
            )
        finally:
            clients.kill()
            clients.communicate()
        job.process.send_signal(signal.SIGINT)
        assert job.ended() == 0, job.said()
