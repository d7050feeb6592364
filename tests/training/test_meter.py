"""Tokens per second and data waits, on a clock that the test turns."""

import pytest

from dllm_ray.training import meter as module
from dllm_ray.training.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_tokens_and_waits_are_measured_from_the_first_batch_on(clock):
    def batches():
        clock.now += 50  # a pipeline that starts
        yield "a"
        clock.now += 1
        yield "b"

    meter = Meter(batches())
    stream = iter(meter)
    assert next(stream) == "a"
    clock.now += 2
    meter.count(10)
    assert next(stream) == "b"
    clock.now += 1
    meter.count(30)
    assert meter.read() == pytest.approx({"train/tokens_per_s": 40 / 4, "train/data_wait": 1 / 4})


def test_a_reading_starts_the_next_one(clock):
    meter = Meter(iter("ab"))
    list(meter)
    clock.now += 1
    meter.count(5)
    meter.read()
    clock.now += 2
    meter.count(8)
    assert meter.read()["train/tokens_per_s"] == pytest.approx(4)


def test_pauses_do_not_count(clock):
    meter = Meter(iter("ab"))
    list(meter)
    with meter.paused():
        clock.now += 100
    clock.now += 1
    meter.count(5)
    assert meter.read()["train/tokens_per_s"] == pytest.approx(5)
