"""The kill matrix: whatever ends a run, it goes on from its last checkpoint and ends as if nothing had happened.

A lost node is in `tests/cluster/test_several_hosts.py`."""

import json
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from jobs_testing import HANGS_S, ended, history, runs, start_training, train, train_workers

pytestmark = pytest.mark.slow

STEPS, EVERY = 240, 40
SETTINGS = {"train__max_steps": str(STEPS), "train__checkpoint_every": str(EVERY), "data__valid_rows": "0"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, list[float]]:
    """Losses and gradients' norms of the run that nobody kills, of one worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(folder, **SETTINGS, train__workers="1")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("train/loss", "train/grad_norm")
    return {name: [values[0] for _, values in sorted(history(folder, name).items())] for name in names}


def begin(tmp_path, storage=None, **changes):
    """A run whose first checkpoint Ray Train has on record, and that is some steps further."""
    driver = start_training(tmp_path / "run", tmp_path / "log", **SETTINGS | changes)
    storage = storage or tmp_path / "run" / "checkpoints"
    began = time.monotonic()
    while not any("checkpoint_2" in record.read_text() for record in storage.rglob("checkpoint_manager_snapshot.json")):
        if driver.poll() is not None or time.monotonic() - began > HANGS_S:
            ended(driver, tmp_path / "log")
            pytest.fail((tmp_path / "log").read_text())
        time.sleep(0.02)
    return driver


def resumed_at(output: str) -> int:
    """The step from which a run said that it goes on."""
    said = re.findall(r"from step (\d+) of 240 steps", output)
    assert said, output
    return int(said[-1])


def check_curve(folder, undisturbed, repeats=1):
    """Every step was done, those since a checkpoint once more each time, and each with the loss of the undisturbed
    run, whatever the number of workers. AdamW would forgive a gradient of the wrong scale, so its norm is looked at."""
    for name, bound in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
        values = history(folder, name)
        assert sorted(values) == list(range(1, STEPS + 1))
        assert sum(len(seen) - 1 for seen in values.values()) <= repeats * EVERY
        for step, seen in values.items():
            assert seen == pytest.approx([undisturbed[name][step - 1]] * len(seen), rel=bound)


def test_a_killed_worker_is_replaced_and_a_killed_driver_s_run_goes_on(tmp_path, undisturbed):
    log = tmp_path / "log"
    driver = begin(tmp_path)
    os.kill(train_workers(driver)[1].pid, signal.SIGKILL)
    began = time.monotonic()
    while not re.search(r"from step \d+ of 240 steps", log.read_text()):
        assert driver.poll() is None and time.monotonic() - began < HANGS_S, log.read_text()
        time.sleep(0.02)
    step = resumed_at(log.read_text())
    assert step >= EVERY and step % EVERY == 0

    workers = train_workers(driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=HANGS_S)[1], "a killed driver takes its workers along"
    done = train(tmp_path / "run", **SETTINGS, train__workers="3")  # 16 rows don't divide by 3
    assert done.returncode == 0, done.stdout + done.stderr
    again = resumed_at(done.stdout)
    assert again >= step and again % EVERY == 0
    check_curve(tmp_path / "run", undisturbed, repeats=2)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "FINISHED"


@contextmanager
def small_disk(folder: Path):
    """A file system of its own with 4 MiB."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system can't be mounted here: " + mounted.stderr.decode())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_an_interrupt_saves_and_a_full_disk_loses_nothing(tmp_path, undisturbed):
    store = tmp_path / "store"
    with small_disk(store):
        placed = {"train__storage_path": str(store), "train__strategy": "zero2"}
        driver = begin(tmp_path, store, **placed)
        driver.send_signal(signal.SIGINT)
        log = tmp_path / "log"
        assert ended(driver, log) == 130, log.read_text()
        assert "saving a checkpoint" in log.read_text() and "Traceback" not in log.read_text()
        (record,) = runs(tmp_path / "run")
        assert record.info.status == "KILLED"
        saved = json.loads((tmp_path / "run" / "run.json").read_text())["checkpoint_step"]
        assert max(history(tmp_path / "run", "train/loss")) == saved

        filler = store / "filler"
        filler.write_bytes(bytes(os.statvfs(store).f_bavail * os.statvfs(store).f_bsize - 64_000))
        done = train(tmp_path / "run", **SETTINGS, **placed)
        assert done.returncode == 1, done.stdout + done.stderr
        assert resumed_at(done.stdout) == saved
        assert "can't be written" in done.stderr and "make room" in done.stderr and "Traceback" not in done.stderr

        filler.unlink()
        done = train(tmp_path / "run", **SETTINGS, **placed)
        assert done.returncode == 0, done.stdout + done.stderr
        assert resumed_at(done.stdout) == saved
        check_curve(tmp_path / "run", undisturbed)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> dict[str, str]:
    """A model that has no number for one word, and rows of which one holds it."""
    from dllm_ray.models.config import ScratchConfig
    from dllm_ray.models.scratch import build
    from dllm_ray.models.tokenizers import train_bpe

    folder = tmp_path_factory.mktemp("poisoned")
    sizes = ScratchConfig("qwen3", hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    lm = build(sizes, train_bpe(["1 2 3"], 300), seed=0)
    (word,) = lm.tokenizer("~")["input_ids"]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[word] = torch.nan
    lm.save(folder / "model")
    rows = [{"prompt": f"{number}", "response": "1"} for number in range(64)]
    rows[40]["prompt"] = "a ~ b"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model__path": str(folder / "model"),
        "data__path": str(folder / "rows.jsonl"),
        "data__valid_rows": "0",
        "data__valid_path": "null",
        "train__epochs": "1",
        "train__max_steps": "null",
    }


def test_a_poisoned_row_stops_the_run_and_is_named(tmp_path, poisoned):
    done = train(tmp_path / "run", **poisoned)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(
        r"the run diverged at step \d: .* rows whose loss isn't finite: \S*rows\.jsonl, line 41\b", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_poisoned_row_is_left_out_where_the_settings_say_so(tmp_path, poisoned):
    done = train(tmp_path / "run", **poisoned, train__on_nan="skip")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"skipped   step \d: .*rows\.jsonl, line 41\b", done.stdout)
    losses = history(tmp_path / "run", "train/loss")
    assert len(losses) == 3  # of 4 steps
    assert history(tmp_path / "run", "train/skipped_steps")


def test_workers_that_fail_for_good_fail_the_run_with_their_reason(tmp_path):
    (tmp_path / "full").write_text("")  # checkpoints can't be written below a file
    done = train(tmp_path / "run", train__storage_path=str(tmp_path / "full"), train__max_failures="0")
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert str(tmp_path / "full") in done.stderr and "Traceback" not in done.stderr
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "FAILED"
    assert str(tmp_path / "full") in record.data.tags["dllm_ray.failure"]
