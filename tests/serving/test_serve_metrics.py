"""What a replica tells Prometheus of its calls and steps."""

from collections import defaultdict
from typing import ClassVar

import pytest

from dllm_ray.serving import metrics
from dllm_ray.serving.calls import Call, Done, Refused, Text


class Recorder:
    """A metric that keeps what it is told."""

    all: ClassVar[dict[str, list]] = {}

    def __init__(self, name, description, *_bounds, tag_keys):
        assert name.startswith("dllm_")
        assert description.endswith(".")
        self.told = self.all[name.removeprefix("dllm_")] = []
        self.tag_keys = tag_keys

    def set_default_tags(self, tags):
        assert tags == {"model": "it"}

    def _tell(self, value=1.0, tags=None):
        assert {"model", *(tags or {})} == set(self.tag_keys)
        self.told.append((value, *(tags or {}).values()))

    inc = set = observe = _tell


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(Recorder, "all", defaultdict(list))
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Recorder)
    return Recorder.all


def done(reason="stop", tokens=6, nfe=4, seconds=0.3):
    return Done(0, "text", reason, 3, tokens, nfe, seconds, 7)


def reasons(told):
    return [reason for _, reason in told["calls"]]


def test_an_answered_call(told):
    answer = metrics.ReplicaMetrics("it").answer(Call("id"))
    answer.saw([Text(0, "te")])
    answer.saw([Text(0, "xt"), done()])
    answer.end(1)
    assert reasons(told) == ["stop"]
    assert told["tokens_per_forward"] == [(1.5,)]
    assert told["token_seconds"] == [(pytest.approx(0.05),)]
    assert len(told["first_text_seconds"]) == len(told["call_seconds"]) == 1


def test_a_refused_call_has_no_text(told):
    answer = metrics.ReplicaMetrics("it").answer(Call("id"))
    answer.saw([Refused("full", "no room")])
    answer.end(1)
    assert reasons(told) == ["full"]
    assert told["first_text_seconds"] == []


@pytest.mark.parametrize("events", [[], [Text(0, "te")], [done()]])
def test_a_call_that_ends_before_its_texts_was_left_by_its_client(told, events):
    answer = metrics.ReplicaMetrics("it").answer(Call("id", n=2))
    answer.saw(events)
    answer.end(2)
    assert reasons(told) == ["cancelled"]


def test_a_text_without_tokens_has_no_time_per_token(told):
    answer = metrics.ReplicaMetrics("it").answer(Call("id"))
    answer.saw([done(tokens=0, nfe=0)])
    answer.end(1)
    assert told["token_seconds"] == told["tokens_per_forward"] == []


def test_steps_are_added_up_and_none_is_lost(told, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    replica = metrics.ReplicaMetrics("it")
    for _ in range(60):
        now[0] += 0.01
        replica.step(rows=4, tokens=3, seconds=0.008)
    now[0] += 1.0
    replica.step(rows=4, tokens=3, seconds=0.008)
    assert 2 <= len(told["steps"]) <= 4
    assert sum(value for (value,) in told["steps"]) == 61
    assert sum(value for (value,) in told["tokens"]) == 183
    assert sum(value for (value,) in told["busy_seconds"]) == pytest.approx(61 * 0.008)
    assert {value for (value,) in told["step_rows"]} == {4.0}
