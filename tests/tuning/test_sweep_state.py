"""What a sweep knows of its folder: going on, beginning anew, and keeping its hands off what isn't its own."""

import json

import pytest

from dllm_ray.errors import OutputError
from dllm_ray.tuning.sweep import State

KEY = {"model.path": "m", "seed": 0}


def test_a_sweep_that_was_broken_off_goes_on_in_its_run(tmp_path):
    with State(tmp_path, KEY, fresh=False) as state:
        assert not state.goes_on and state.run_id is None
        state.note(run_id="abc")
    (tmp_path / "tune").mkdir()
    with State(tmp_path, KEY, fresh=False) as state:
        assert state.goes_on and state.run_id == "abc" and (tmp_path / "tune").is_dir()


def test_what_ran_out_of_budget_is_begun_anew_in_the_same_run(tmp_path):
    with State(tmp_path, KEY, fresh=False) as state:
        state.note(run_id="abc", spent=True)
    (tmp_path / "settings").mkdir()
    with State(tmp_path, KEY, fresh=False) as state:
        assert not state.goes_on and state.run_id == "abc" and not (tmp_path / "settings").exists()
    with State(tmp_path, KEY, fresh=False) as state:  # killed meanwhile
        assert state.goes_on


def test_fresh_begins_anew_and_keeps_answers(tmp_path):
    with State(tmp_path, KEY, fresh=False) as state:
        state.note(run_id="abc")
    (tmp_path / "settings").mkdir()
    (tmp_path / "answers").mkdir()
    with State(tmp_path, KEY | {"seed": 1}, fresh=True) as state:
        assert not state.goes_on and state.run_id is None
    assert not (tmp_path / "settings").exists() and (tmp_path / "answers").is_dir()


def test_other_settings_need_another_folder(tmp_path):
    State(tmp_path, KEY, fresh=False).__exit__()
    with pytest.raises(OutputError, match="seed was 0, is now 1"):
        State(tmp_path, KEY | {"seed": 1}, fresh=False)


def test_two_sweeps_at_a_time_need_two_folders(tmp_path):
    with State(tmp_path, KEY, fresh=False), pytest.raises(OutputError, match="another run is using"):
        State(tmp_path, KEY, fresh=True)
    State(tmp_path, KEY, fresh=False).__exit__()


@pytest.mark.parametrize("fresh", [False, True])
def test_what_no_sweep_has_left_stays(tmp_path, fresh):
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="which no sweep has left"):
        State(tmp_path, KEY, fresh)
    assert (tmp_path / "settings" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ['{"key": {"a"', "[1, 2]", '{"key": 5}', "", "null"])
def test_a_broken_file_is_told_and_nothing_lost(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    (tmp_path / "tune").mkdir()
    with pytest.raises(OutputError, match="--fresh"):
        State(tmp_path, KEY, fresh=False)
    assert (tmp_path / "tune").is_dir() and (tmp_path / "state.json").read_text() == text
    State(tmp_path, KEY, fresh=True).__exit__()
    assert json.loads((tmp_path / "state.json").read_text())["key"] == KEY
