"""Whose folder it is, and whether a run in it may go on."""

import json

import pytest

from dllm_ray.errors import OutputError
from dllm_ray.training.run_folder import RunFolder

SETTINGS = {"seed": 0, "output_dir": "x", "train": {"workers": 2, "learning_rate": 1e-3, "betas": (0.9, 0.99)}}


def changed(**train):
    return SETTINGS | {"train": SETTINGS["train"] | train}


def leave(tmp_path, settings=SETTINGS, fingerprint="a" * 64, **state) -> None:
    """A run that began, got somewhere, and was killed."""
    folder = RunFolder(tmp_path, settings)
    folder.begin(fingerprint)
    folder.update(**state)
    folder.close()


def test_a_new_folder_begins_a_run_and_the_same_settings_resume_it(tmp_path):
    leave(tmp_path, checkpoint_step=5)
    assert RunFolder(tmp_path, SETTINGS).resumed


def test_a_run_that_never_began_leaves_the_folder_free(tmp_path):
    RunFolder(tmp_path, SETTINGS).close()  # its data were missing, for instance
    folder = RunFolder(tmp_path, changed(learning_rate=0.1))
    assert not folder.resumed


def test_a_run_without_a_checkpoint_gives_way_to_other_settings_and_data(tmp_path):
    leave(tmp_path, mlflow_run="abc")
    folder = RunFolder(tmp_path, changed(learning_rate=0.1))
    assert not folder.resumed
    folder.begin("b" * 64)
    assert "mlflow_run" not in folder.state
    assert folder.state["settings"]["train"]["learning_rate"] == 0.1


def test_other_data_alone_replace_a_run_without_a_checkpoint(tmp_path):
    leave(tmp_path, mlflow_run="abc", fingerprint="a" * 64)
    folder = RunFolder(tmp_path, SETTINGS)
    before = folder.state["name"]
    folder.begin("b" * 64)
    assert "mlflow_run" not in folder.state and folder.state["name"] != before


def test_other_settings_are_refused_by_name_and_nothing_is_lost(tmp_path):
    leave(tmp_path, mlflow_run="abc", checkpoint_step=5)
    with pytest.raises(OutputError, match=r"train\.learning_rate was 0\.001, is now 0\.1.*--fresh"):
        RunFolder(tmp_path, changed(learning_rate=0.1))
    assert json.loads((tmp_path / "run.json").read_text())["mlflow_run"] == "abc"


def test_settings_that_change_nothing_learned_may_change(tmp_path):
    leave(tmp_path, checkpoint_step=5)
    other = changed(workers=1) | {"output_dir": "y", "observe": {"sample_rows": 3}, "sampler": {"steps": 4}}
    assert RunFolder(tmp_path, other).resumed


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    first = RunFolder(tmp_path, SETTINGS)
    with pytest.raises(OutputError, match="another run is using"):
        RunFolder(tmp_path, SETTINGS)
    first.close()
    RunFolder(tmp_path, SETTINGS).close()


def test_fresh_removes_the_run_and_only_the_run(tmp_path):
    leave(tmp_path, finished=True, checkpoint_step=5)
    for name in ("checkpoints", "final", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.txt").touch()
    folder = RunFolder(tmp_path, changed(learning_rate=0.1), fresh=True)
    assert not folder.resumed and not folder.finished
    left = {path.name for path in tmp_path.iterdir()}
    assert "mine.txt" in left and not {"checkpoints", "final", "tokenizer"} & left


def test_every_run_has_a_name_of_its_own_and_keeps_it(tmp_path):
    names = []
    for fresh in (False, False, True):
        folder = RunFolder(tmp_path, SETTINGS, fresh)
        folder.begin("a" * 64)
        names.append(folder.state["name"])
        folder.close()
    assert names[0] == names[1] != names[2]
    assert names[0].startswith(tmp_path.name)


def test_a_run_is_finished_when_its_model_is_there(tmp_path):
    leave(tmp_path, finished=True)
    folder = RunFolder(tmp_path, SETTINGS)
    assert not folder.finished
    (tmp_path / "final").mkdir()
    assert folder.finished


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["final", "checkpoints"])
def test_what_is_someone_elses_is_not_touched(tmp_path, fresh, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match="not from a run of this job"):
        RunFolder(tmp_path, SETTINGS, fresh)
    assert (tmp_path / name).is_dir()


def test_other_data_are_refused(tmp_path):
    leave(tmp_path, fingerprint="a" * 64, checkpoint_step=5)
    folder = RunFolder(tmp_path, SETTINGS)
    folder.begin("a" * 64)
    with pytest.raises(OutputError, match="other data"):
        folder.begin("b" * 64)


def test_a_broken_record_says_what_to_do_and_fresh_does_it(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": ')
    with pytest.raises(OutputError, match=r"run\.json can't be read.*--fresh"):
        RunFolder(tmp_path, SETTINGS)
    folder = RunFolder(tmp_path, SETTINGS, fresh=True)
    folder.begin("a" * 64)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["seed"] == 0


def test_a_folder_in_the_way_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        RunFolder(tmp_path / "file" / "run", SETTINGS)
