"""Results that are complete or not there."""

import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_ray.errors import OutputError
from dllm_ray.output import complete_file, printable, replace_directory, writable_folder


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
    assert path.read_text() == "old" and [item.name for item in tmp_path.iterdir()] == ["results.json"]


_PROCESS_THAT_ENDED = subprocess.Popen([sys.executable, "-c", ""])
_PROCESS_THAT_ENDED.wait()


def test_a_disk_that_is_full_is_one_message_and_nothing_is_left_on_it(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "results.json"
    path.write_text("old")
    try:
        with pytest.raises(OutputError, match=r"json can't be written: File too large"), complete_file(path) as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            file.write("x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old" and [item.name for item in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "folder can't be written: Is a directory"),
        ("gone/a", "gone/a can't be written: No such file or directory$"),
        ("x" * 300, "x can't be written: File name too long"),
        ("a\0b", "is no name of a file"),
    ],
)
def test_a_file_that_can_not_be_is_one_message(tmp_path, name, said):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=said), complete_file(tmp_path / name) as file:
        file.write("a")
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


def test_the_working_directory_is_no_file():
    with pytest.raises(OutputError, match=r"'\.' is no name"), complete_file(Path()):
        pass


def test_what_a_killed_process_left_of_a_file_goes_away_and_what_others_write_stays(tmp_path):
    host, path = socket.gethostname(), tmp_path / "a"
    (tmp_path / f".a.{host}.{_PROCESS_THAT_ENDED.pid}.tmp").write_text("half")
    other = tmp_path / f".a.{host}.1.tmp"
    other.write_text("under way")
    with complete_file(path) as file:
        file.write("new")
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_control_and_direction_characters_are_made_harmless():
    assert printable("a\tb\n\x1b[2J\x07\x7f\x9b\u202e\u2066é") == "a\tb\n␛[2J␇␡\ufffd\ufffd\ufffdé"


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
