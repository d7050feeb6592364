"""What a setting gave is read back as it was kept, or not at all."""

import math

import pytest

from dllm_ray.tuning.answered import Answered

ANSWERED = Answered({"t/10": 1.0, "t/9": 0.25}, 2.5, 120.0, 16.0, 3, 0.75, 1)


def test_it_is_read_back_as_it_was_kept(tmp_path):
    ANSWERED.write(tmp_path)
    found = Answered.read(tmp_path)
    assert found == ANSWERED
    assert list(found.scores) == ["t/10", "t/9"]
    Answered({}, 1.0, 1.0, 1.0, 0, 0.0, 0).write(tmp_path)
    assert Answered.read(tmp_path).asked == 0


def test_the_score_is_the_mean_over_documents():
    assert ANSWERED.score == 0.625
    assert math.isnan(Answered({}, 1.0, 1.0, 1.0, 0, 0.0, 0).score)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"scores": {}}', '{"of": "another version"}'])
def test_what_can_not_be_used_is_nothing(tmp_path, text):
    (tmp_path / "answered.json").write_text(text)
    assert Answered.read(tmp_path) is None
    assert Answered.read(tmp_path / "gone") is None
