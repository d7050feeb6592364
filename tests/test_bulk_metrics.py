"""What evaluations, sweeps and bulk sampling tell Prometheus."""

import time
from dataclasses import replace

import pytest
from metrics_testing import record

from dllm_ray import metrics
from dllm_ray.answers import Progress
from dllm_ray.bulk_metrics import BulkMetrics
from dllm_ray.metrics import Board, Labels

LABELS = Labels("evaluate", "run", "model")
DIGITS = {"task": "digits", "setting": "", "kind": "generate"}


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(metrics, "_REPEAT_S", 1000.0)
    return record(monkeypatch)


@pytest.fixture
def bulk(told):
    with BulkMetrics(LABELS) as made:
        yield made


def last(told, name):
    return told[f"dllm_bulk_{name}"][-1]


def sums(told, name):
    found = {}
    for value, tags in told[f"dllm_bulk_{name}"]:
        key = tags.get("source", "")
        found[key] = found.get(key, 0) + value
    return found


def test_a_gauge_is_repeated_until_its_board_is_closed(told, monkeypatch):
    monkeypatch.setattr(metrics, "_REPEAT_S", 0.01)
    with Board(LABELS, "train") as board:
        loss = board.gauge("loss", "Loss.", "source")
        loss.set(2, source="a")
        loss.set(1, source="a")
        loss.set(5, source="b")
        end = time.monotonic() + 10
        while len(told["dllm_train_loss"]) < 9 and time.monotonic() < end:
            time.sleep(0.01)
    there = told["dllm_train_loss"]
    assert there[:3] == [(2.0, {"source": "a"}), (1.0, {"source": "a"}), (5.0, {"source": "b"})]
    assert there[3:7] == [(1.0, {"source": "a"}), (5.0, {"source": "b"})] * 2
    time.sleep(0.05)
    assert len(told["dllm_train_loss"]) == len(there)


def test_answers_from_disk_are_no_work_of_the_workers(bulk, told):
    tell = bulk.answering("digits")
    begin = Progress(10, done=4, from_disk=4, slices=3, tokens=400, nfe=100, seconds=9.0)
    tell(begin)
    tell(replace(begin, done=6, slices_done=1, tokens=412, nfe=106, seconds=11.0))
    tell(replace(begin, done=10, slices_done=3, tokens=436, nfe=118, seconds=15.0))
    assert sums(told, "answers") == {"disk": 4, "workers": 6}
    assert sums(told, "tokens") == {"": 36} and sums(told, "forwards") == {"": 18}
    assert last(told, "tokens_per_forward") == (2.0, DIGITS)
    assert last(told, "tokens_per_second") == (6.0, DIGITS)
    assert last(told, "forwards_per_answer") == (3.0, DIGITS)
    assert [last(told, name)[0] for name in ("requests", "requests_done", "slices", "slices_done")] == [10, 10, 3, 3]


def test_likelihoods_have_no_tokens_per_forward(bulk, told):
    tell = bulk.answering("choice", "fast")
    tell(Progress(8, "score", slices=1))
    tell(Progress(8, "score", done=8, slices=1, slices_done=1, noisy=64, seconds=1.0))
    assert sums(told, "noisy_sequences") == {"": 64}
    assert last(told, "requests_done")[1] == {"task": "choice", "setting": "fast", "kind": "score"}
    assert not told["dllm_bulk_tokens_per_forward"]


def test_requests_handed_in_a_second_time_count_again(bulk, told):
    tell = bulk.answering("digits")
    for _ in range(2):
        tell(Progress(3, slices=1))
        tell(Progress(3, done=3, slices=1, slices_done=1, tokens=6, nfe=3, seconds=1.0))
    assert sums(told, "answers") == {"workers": 6} and sums(told, "tokens") == {"": 12}


def test_workers_are_told_when_they_change(bulk, told):
    for _ in range(3):
        bulk.workers(busy=2, idle=0, loading=1)
    bulk.workers(busy=0, idle=3, loading=0)
    states = [(tags["state"], value) for value, tags in told["dllm_bulk_workers"]]
    assert states == [("busy", 2), ("idle", 0), ("loading", 1), ("busy", 0), ("idle", 3), ("loading", 0)]
    bulk.lost()
    bulk.finished(0.5)
    assert last(told, "lost_workers")[0] == 1 and last(told, "slice_seconds")[0] == 0.5
