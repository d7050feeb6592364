"""Results that are complete or not there."""

import socket
import subprocess
import sys

import pytest

from dllm_ray.errors import OutputError
from dllm_ray.output import complete_file, replace_directory, writable_folder


def test_an_output_folder_is_created_with_its_parents_and_left_empty(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_absolute()
    assert list(folder.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match=r"taken can't be written"):
        writable_folder(tmp_path / "taken")


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="can't be written: Not a directory"):
        writable_folder(tmp_path / "taken" / "below")


def test_a_read_only_folder_is_refused():
    with pytest.raises(OutputError, match="can't be written"):
        writable_folder("/sys/kernel/run")  # not even root may make a folder there


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with complete_file(path) as file:
        file.write("new: 日本")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new: 日本"
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_fails_half_way_leaves_the_older_one(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), complete_file(path) as file:
        file.write("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"


_PROCESS_THAT_ENDED = subprocess.Popen([sys.executable, "-c", ""])
_PROCESS_THAT_ENDED.wait()


@pytest.mark.parametrize("leftover", [False, True], ids=["clean", "after a crash"])
@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older one"])
def test_a_finished_directory_takes_the_place_of_the_older_one_whole(tmp_path, older, leftover):
    finished, target = tmp_path / "tmp", tmp_path / "final"
    finished.mkdir()
    (finished / "new").write_text("")
    if older:
        target.mkdir()
        (target / "old").write_text("")
    if leftover:
        crashed = tmp_path / f".final.{socket.gethostname()}.{_PROCESS_THAT_ENDED.pid}.old"
        crashed.mkdir()
        (crashed / "older").write_text("")
    replace_directory(finished, target)
    assert [item.name for item in tmp_path.iterdir()] == ["final"]
    assert [item.name for item in target.iterdir()] == ["new"]
