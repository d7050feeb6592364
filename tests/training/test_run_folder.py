"""Whose folder it is, and whether a run in it may go on."""

import json

import pytest

from dllm_ray.errors import OutputError
from dllm_ray.training.run_folder import RunFolder

SETTINGS = {"seed": 0, "output_dir": "x", "train": {"workers": 2, "learning_rate": 1e-3, "betas": (0.9, 0.99)}}


def changed(**train):
    return SETTINGS | {"train": SETTINGS["train"] | train}


def reopen(tmp_path, settings=SETTINGS, fresh=False, **state):
    folder = RunFolder(tmp_path, SETTINGS)
    folder.update(**state)
    folder.close()
    return RunFolder(tmp_path, settings, fresh)


def test_a_new_folder_begins_a_run_and_the_same_settings_resume_it(tmp_path):
    first = RunFolder(tmp_path, SETTINGS)
    assert not first.resumed
    first.close()
    assert RunFolder(tmp_path, SETTINGS).resumed


def test_other_settings_are_refused_by_name_and_nothing_is_lost(tmp_path):
    with pytest.raises(OutputError, match=r"train\.learning_rate was 0\.001, is now 0\.1.*--fresh"):
        reopen(tmp_path, changed(learning_rate=0.1), mlflow_run="abc")
    assert json.loads((tmp_path / "run.json").read_text())["mlflow_run"] == "abc"


def test_settings_that_change_nothing_learned_may_change(tmp_path):
    assert reopen(tmp_path, changed(workers=1) | {"output_dir": "y"}).resumed


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    first = RunFolder(tmp_path, SETTINGS)
    with pytest.raises(OutputError, match="another run is using"):
        RunFolder(tmp_path, SETTINGS)
    first.close()
    RunFolder(tmp_path, SETTINGS).close()


def test_fresh_removes_the_run_and_only_the_run(tmp_path):
    RunFolder(tmp_path, SETTINGS).close()
    for name in ("checkpoints", "final", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.txt").touch()
    folder = reopen(tmp_path, changed(learning_rate=0.1), fresh=True, finished=True)
    assert not folder.resumed and not folder.finished
    left = {path.name for path in tmp_path.iterdir()}
    assert "mine.txt" in left and not {"checkpoints", "final", "tokenizer"} & left


def test_a_run_is_finished_when_its_model_is_there(tmp_path):
    folder = reopen(tmp_path, finished=True)
    assert not folder.finished
    (tmp_path / "final").mkdir()
    assert folder.finished


@pytest.mark.parametrize("fresh", [False, True])
def test_someone_elses_model_is_not_touched(tmp_path, fresh):
    (tmp_path / "final").mkdir()
    with pytest.raises(OutputError, match="not from a run of this job"):
        RunFolder(tmp_path, SETTINGS, fresh)
    assert (tmp_path / "final").is_dir()


def test_other_data_are_refused(tmp_path):
    folder = reopen(tmp_path, data_fingerprint="a" * 64)
    folder.require_same_data("a" * 64)
    with pytest.raises(OutputError, match="other data"):
        folder.require_same_data("b" * 64)


def test_a_broken_record_says_what_to_do(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": ')
    with pytest.raises(OutputError, match=r"run\.json can't be read.*--fresh"):
        RunFolder(tmp_path, SETTINGS)


def test_a_broken_record_does_not_stop_fresh(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": ')
    RunFolder(tmp_path, SETTINGS, fresh=True).close()
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["seed"] == 0


def test_a_folder_in_the_way_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        RunFolder(tmp_path / "file" / "run", SETTINGS)
