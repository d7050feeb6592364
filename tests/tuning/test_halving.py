"""Settings are dropped after a few documents, and a sweep that is broken off drops the same ones when it goes on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from dllm_ray.tuning.halving import DocumentHalving, rungs

GOES_ON, DROPPED = TrialScheduler.CONTINUE, TrialScheduler.STOP
FIRST, REDUCTION, DOCUMENTS = 2, 2, 16
STEPS = rungs(FIRST, REDUCTION, DOCUMENTS)


class Tune:
    """Ray Tune, as far as a scheduler sees it. It may be killed; trials that were under way then begin again."""

    def __init__(self, file, scores):
        self._file, self._scores = file, scores
        self.reached = dict.fromkeys(scores, 0)  # steps that each trial has reported
        self.over = {}  # trial -> documents after which it ended
        self.begin()

    def begin(self, forgotten=()):
        """As after a kill: trials under way, and those whose end had not been written down, report all again."""
        for trial in forgotten:
            self.over.pop(trial, None)
        self.scheduler = DocumentHalving(str(self._file), FIRST, REDUCTION, DOCUMENTS)
        for trial in self._scores:
            self.scheduler.on_trial_add(None, SimpleNamespace(trial_id=trial))
        for trial in self._scores:
            if trial not in self.over:
                again, self.reached[trial] = self.reached[trial], 0
                for _ in range(again):
                    self.step(trial)

    def step(self, trial):
        """The trial's next result."""
        documents = STEPS[self.reached[trial]]
        result = {"score": self._scores[trial][self.reached[trial]], "documents": documents}
        self.reached[trial] += 1
        fake = SimpleNamespace(trial_id=trial)
        if documents == DOCUMENTS or self.scheduler.on_trial_result(None, fake, result) == DROPPED:
            self.scheduler.on_trial_complete(None, fake, result | {"done": True})
            self.over[trial] = documents

    def run(self, order):
        for trial in order:
            if trial not in self.over:
                self.step(trial)


def drops(file, scores, reports):
    """Decisions on results that come in this order: (trial, documents)."""
    scheduler = DocumentHalving(str(file), 10, 2, 100)
    found = []
    for trial, documents in reports:
        fake = SimpleNamespace(trial_id=trial)
        if trial not in scheduler._trial_info:
            scheduler.on_trial_add(None, fake)
        found.append(scheduler.on_trial_result(None, fake, {"score": scores[trial], "documents": documents}))
    return found


def test_a_setting_below_the_best_of_those_before_it_is_dropped(tmp_path):
    scores = {"a": 0.5, "b": 0.6, "c": 0.1, "d": 0.9}
    found = drops(tmp_path / "rungs", scores, [(name, 10) for name in "abcd"])
    assert found == [GOES_ON, GOES_ON, DROPPED, GOES_ON]


def test_settings_are_compared_with_those_that_have_answered_as_many(tmp_path):
    scores = {"a": 0.5, "b": 0.6, "c": 0.55}
    found = drops(tmp_path / "rungs", scores, [("a", 10), ("a", 20), ("b", 10), ("c", 10), ("b", 20)])
    assert found == [GOES_ON, GOES_ON, GOES_ON, GOES_ON, GOES_ON]
    assert drops(tmp_path / "more", scores, [("b", 10), ("b", 20), ("b", 40), ("a", 10)])[-1] == DROPPED


def test_the_file_is_complete_after_every_result(tmp_path):
    drops(tmp_path / "rungs.json", {"a": 1 / 3}, [("a", 10)])
    assert "0.333" in (tmp_path / "rungs.json").read_text() and json.loads((tmp_path / "rungs.json").read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["rungs.json"]


@pytest.mark.parametrize(
    ("first", "reduction", "documents", "expected"),
    [
        (32, 4, 200, [32, 128, 200]),
        (32, 4, 128, [32, 128]),
        (32, 4, 33, [32, 33]),
        (1, 2, 8, [1, 2, 4, 8]),
        (5, 3, 5, [5]),
    ],
)
def test_rungs_end_with_all_documents(first, reduction, documents, expected):
    assert rungs(first, reduction, documents) == expected


@given(st.integers(1, 200), st.integers(2, 10), st.integers(2, 20_000))
def test_settings_are_looked_at_on_every_rung_but_the_last(first, reduction, documents):
    if documents <= first:
        documents = first + 1
    scheduler = DocumentHalving("unused", first, reduction, documents)
    looked_at = sorted(milestone for milestone, _ in scheduler._rungs)
    assert [one for one in looked_at if one < documents] == rungs(first, reduction, documents)[:-1]


@given(st.data())
@settings(max_examples=60)
def test_a_sweep_that_was_killed_drops_what_one_that_was_not_does(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("halving")
    count = data.draw(st.integers(2, 7))
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    scores = {f"t{index}": random.integers(0, 5, len(STEPS)) / 4 for index in range(count)}
    order = [f"t{index}" for index in random.permutation(np.repeat(np.arange(count), len(STEPS)))]
    kills = data.draw(st.lists(st.integers(0, len(order)), max_size=3))

    whole = Tune(folder / "whole", scores)
    whole.run(order)
    killed, done = Tune(folder / "killed", scores), 0
    for kill in sorted(kills):
        killed.run(order[done:kill])
        done = kill
        forgotten = data.draw(st.sets(st.sampled_from(sorted(killed.over)))) if killed.over else ()
        killed.begin(forgotten)
    killed.run(order[done:])
    assert killed.over == whole.over


def test_a_setting_whose_drop_was_not_written_down_before_a_kill_stays_dropped(tmp_path):
    scores = {"a": [0.9] * 4, "b": [0.1] * 4}
    tune = Tune(tmp_path / "rungs", scores)
    tune.run(["a", "b"])
    assert tune.over == {"b": 2}
    tune.begin(forgotten=["b"])
    tune.run(["b"] * 4)
    assert tune.over == {"b": 2}


def test_a_setting_that_ray_had_not_written_down_before_a_kill_is_forgotten(tmp_path):
    file = tmp_path / "rungs"
    assert drops(file, {"a": 0.5, "lost": 0.9}, [("a", 10), ("lost", 10)]) == [GOES_ON, GOES_ON]
    scheduler = DocumentHalving(str(file), 10, 2, 100)
    for name in ("a", "c"):
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=name))
    result = {"score": 0.6, "documents": 10}
    assert scheduler.on_trial_result(None, SimpleNamespace(trial_id="c"), result) == GOES_ON
    known = json.loads(file.read_text())
    assert known["decided"].keys() == {"a", "c"} and known["rungs"][-1].keys() == {"a", "c"}


def test_a_failed_setting_that_is_tried_again_counts_once(tmp_path):
    scores = {"a": 0.5, "b": 0.9, "again": 0.5, "c": 0.5}
    scheduler = DocumentHalving(str(tmp_path / "rungs"), 10, 2, 100)

    def report(name):
        fake = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, fake)
        return scheduler.on_trial_result(None, fake, {"score": scores[name], "documents": 10})

    assert report("b") == GOES_ON
    scheduler.on_trial_error(None, SimpleNamespace(trial_id="b"))
    assert report("a") == GOES_ON  # nobody is left to be compared with
    assert report("c") == GOES_ON
    kept = json.loads((tmp_path / "rungs").read_text())
    assert "b" not in json.dumps(kept)
