"""Finished answers on disk: found again under the same key by any run, whatever became of the one that wrote them."""

import json
import logging

import pytest

from dllm_ray.errors import OutputError
from dllm_ray.evaluation.cache import AnswerCache, digest

KEY = {"model": "a", "stops": (1, 2)}


def files(folder):
    return sorted(folder.rglob("*.jsonl"))


def test_answers_are_found_again_under_the_same_key(tmp_path):
    cache = AnswerCache(str(tmp_path), KEY)
    cache.add({"one": {"tokens": [1, 2]}, "two": [-1.5, float("-inf")]})
    assert cache.get("one") == {"tokens": [1, 2]}
    again = AnswerCache(str(tmp_path), KEY)
    assert (again.get("one"), again.get("two"), again.get("three")) == ({"tokens": [1, 2]}, [-1.5, float("-inf")], None)
    assert AnswerCache(str(tmp_path), {**KEY, "model": "b"}).get("one") is None
    assert cache.under({"steps": 4}).get("one") is None
    assert len(files(tmp_path)) == 1


def test_a_longer_key_is_a_cache_of_its_own_in_the_same_folder(tmp_path):
    AnswerCache(str(tmp_path), KEY).under({"steps": 4}).add({"one": 1})
    assert AnswerCache(str(tmp_path), {**KEY, "steps": 4}).get("one") == 1


def test_two_runs_share_a_folder(tmp_path):
    first, second = AnswerCache(str(tmp_path), KEY), AnswerCache(str(tmp_path), KEY)
    first.add({"one": 1})
    second.add({"one": 1, "two": 2})
    assert first.get("two") is None
    first.refresh()
    assert first.get("two") == 2


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_is_a_path_or_a_uri(tmp_path, scheme):
    AnswerCache(f"{scheme}{tmp_path}/made/here", KEY).add({"one": 1})
    assert AnswerCache(str(tmp_path / "made" / "here"), KEY).get("one") == 1


def test_a_relative_path_counts_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AnswerCache("answers", KEY).add({"one": 1})
    assert files(tmp_path / "answers")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-5],  # cut short inside a line
        lambda content: content[: content.rindex(b"{")],  # and between lines
        lambda content: content.replace(b"first", b"fir5t"),
        lambda content: b"",
        lambda content: b"[1]\n",
        lambda content: b"\xff\x00" + content,
    ],
)
def test_a_damaged_file_is_left_out_with_a_warning(tmp_path, damage, caplog):
    cache = AnswerCache(str(tmp_path), KEY)
    cache.add({"one": "first", "two": "second"})
    (path,) = files(tmp_path)
    cache.add({"three": "third"})
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = AnswerCache(str(tmp_path), KEY)
    assert (again.get("one"), again.get("two"), again.get("three")) == (None, None, "third")
    assert f"{path.name} is damaged" in caplog.text


def test_what_a_kill_left_unfinished_is_no_answer(tmp_path):
    cache = AnswerCache(str(tmp_path), KEY)
    cache.add({"one": 1})
    (path,) = files(tmp_path)
    path.rename(path.with_suffix(".unfinished"))
    assert AnswerCache(str(tmp_path), KEY).get("one") is None


def test_a_file_tells_what_its_answers_depend_on(tmp_path):
    AnswerCache(str(tmp_path), KEY).add({"one": 1})
    head = json.loads(files(tmp_path)[0].read_text().splitlines()[0])
    assert head["key"] == {"model": "a", "stops": [1, 2]}
    assert files(tmp_path)[0].parent.name == digest(head["key"])


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"no folder for answers: .*file/answers"):
        AnswerCache(str(tmp_path / "file" / "answers"), KEY)
    with pytest.raises(OutputError, match="no folder for answers: nothing://here"):
        AnswerCache("nothing://here", KEY)
