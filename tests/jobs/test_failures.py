"""Killed workers and killed drivers: a run goes on from its last checkpoint and ends as if nothing had happened."""

import os
import re
import signal
import time

import psutil
import pytest
from jobs_testing import history, runs, start_training, train, train_workers

pytestmark = pytest.mark.slow

STEPS, EVERY = 240, 40
SETTINGS = {"train__max_steps": str(STEPS), "train__checkpoint_every": str(EVERY), "data__valid_rows": "0"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[float]:
    """The loss curve of the run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(folder, **SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return [values[0] for _, values in sorted(history(folder, "train/loss").items())]


def begin(tmp_path):
    """A run whose first checkpoint Ray Train has on record, and that is some steps further."""
    driver = start_training(tmp_path / "run", tmp_path / "log", **SETTINGS)
    record = tmp_path / "run" / "checkpoints" / "checkpoint_manager_snapshot.json"
    while not (record.exists() and "checkpoint_2" in record.read_text()):
        assert driver.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    return driver


def check_curve(folder, undisturbed):
    """Every step was done, those since a checkpoint at most twice, and each with the loss of the undisturbed run."""
    values = history(folder, "train/loss")
    assert sorted(values) == list(range(1, STEPS + 1))
    repeated = [step for step, seen in values.items() if len(seen) > 1]
    assert len(repeated) <= EVERY
    for step, seen in values.items():
        assert seen == pytest.approx([undisturbed[step - 1]] * len(seen), rel=1e-4)


def test_a_killed_worker_is_replaced_and_the_run_ends_well(tmp_path, undisturbed):
    driver = begin(tmp_path)
    os.kill(train_workers(driver)[1].pid, signal.SIGKILL)
    assert driver.wait() == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    again = re.search(r"from step (\d+) of 240 steps with 2 workers", log)
    assert again and int(again[1]) >= EVERY and int(again[1]) % EVERY == 0
    check_curve(tmp_path / "run", undisturbed)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_killed_driver_takes_its_workers_along_and_the_same_command_resumes(tmp_path, undisturbed):
    driver = begin(tmp_path)
    workers = train_workers(driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(workers) == 2
    psutil.wait_procs(workers)

    done = train(tmp_path / "run", **SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    began = re.search(r"from step (\d+) of 240 steps", done.stdout)
    assert began and int(began[1]) >= EVERY and int(began[1]) % EVERY == 0
    check_curve(tmp_path / "run", undisturbed)
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "FINISHED"


def test_an_interrupt_ends_the_run_as_killed_with_status_130(tmp_path):
    driver = begin(tmp_path)
    driver.send_signal(signal.SIGINT)
    assert driver.wait() == 130, (tmp_path / "log").read_text()
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "KILLED"


def test_workers_that_fail_for_good_fail_the_run_with_their_reason(tmp_path):
    (tmp_path / "full").write_text("")  # checkpoints can't be written below a file
    done = train(tmp_path / "run", train__storage_path=str(tmp_path / "full"), train__max_failures="0")
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert str(tmp_path / "full") in done.stderr and "Traceback" not in done.stderr
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "FAILED"
    assert str(tmp_path / "full") in record.data.tags["dllm_ray.failure"]
