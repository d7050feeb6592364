"""What a sweep leaves behind can be read by others: settings by jobs, figures by any JSON parser, scores by people."""

import importlib.util
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tuning_testing import tried

from dllm_ray.config import parse
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning import report
from dllm_ray.tuning.config import SweepConfig
from dllm_ray.tuning.report import Subject, front_rows, held_out_rows, rows, sentences
from dllm_ray.tuning.results import confirmed, find
from dllm_ray.viz import front, front_picture

ROOT = Path(__file__).resolve().parents[2]
SUBJECT = Subject("models/digits", "digits", "exact_match", 100, 0.95, None)
GOOD, FAIR, BAD = [1] * 90 + [0] * 10, [1] * 88 + [0] * 12, [0] * 90 + [1] * 10
SETTINGS = [
    tried("official", GOOD, 1.0),
    tried("threshold=0.9", FAIR, 3.0, threshold=0.9),
    tried("steps=1", BAD, 8.0, steps=1),
    tried("temperature=2.0", [0] * 20, 5.0, complete=False, temperature=2.0),
]


def found(*settings, official=None):
    return find(settings, official or settings[0].name, SweepConfig(), None)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are somebody else's affair; what they are made of is kept."""
    made = {}
    monkeypatch.setattr(front, "page", lambda *told: made.update(page=told) or "")
    monkeypatch.setattr(front_picture, "picture", lambda *told: made.update(picture=told))
    return made


@pytest.fixture(scope="module")
def evaluate_job():
    spec = importlib.util.spec_from_file_location("evaluate_of_reports", ROOT / "jobs" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return lambda file: parse(module.EvaluateJob, ["--model.path", "m", "--config", str(file)], "job", "A job.").sampler


def strictly(file):
    """The file as a parser reads it that knows no NaN."""
    return json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_everything_is_written(tmp_path):
    files = report.write(tmp_path, found(*SETTINGS), SUBJECT, {"machine": "mine"})
    assert all(file.stat().st_size for file in files)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "sweep.json",
        "front.png",
        "front.html",
        "configs/sampler.yaml",
        "configs/front-1.yaml",
        "configs/front-2.yaml",
        "configs/front-3.yaml",
    ]
    assert strictly(files[0])["environment"] == {"machine": "mine"}
    assert "digits exact_match, percent" in files[2].read_text()


@pytest.mark.usefixtures("undrawn")
def test_settings_of_an_earlier_sweep_go_away(tmp_path):
    report.write(tmp_path, found(*SETTINGS), SUBJECT, {})
    report.write(tmp_path, found(*SETTINGS[:1]), SUBJECT, {})
    assert sorted(file.name for file in (tmp_path / "configs").iterdir()) == ["front-1.yaml", "sampler.yaml"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_new_tokens": 128, "block_size": 32, "steps": 128},  # as they always are
        {"threshold": 0.9, "cache": "dual", "shift_logits": False, "seed": 7},
        {"threshold": None, "policy": "origin", "temperature": 1e-3, "top_k": 5, "eos_early_stop": False},
        {"block_size": None, "stochastic": True, "suppress_tokens": (3, 4), "begin_suppress_tokens": ()},
        {"policy": "llada21", "editing_threshold": 0.5, "eos_penalty": 1e-7, "max_post_steps": 3, "cfg_scale": 2},
    ],
)
def test_an_evaluation_reads_back_the_very_settings(tmp_path, evaluate_job, changes):
    one = tried("it", GOOD, **changes)
    written, _ = report._write_settings(tmp_path, found(one), SUBJECT)
    expected = SamplerConfig(**one.sampler)
    assert asdict(evaluate_job(written)) == asdict(replace(expected, seed=expected.seed or 0))


def test_settings_say_what_they_gave(tmp_path, evaluate_job):
    written = report._write_settings(tmp_path / "configs", found(*SETTINGS), SUBJECT)
    assert written[0].read_text().splitlines()[:2] == [
        "# threshold=0.9",
        "# digits exact_match 0.8800 (0.8019 to 0.9300) on 100 documents; 3.000 tokens per forward.",
    ]
    read = [evaluate_job(file) for file in written]
    assert [one.threshold for one in read] == [0.9, None, 0.9, None]
    assert [one.steps for one in read] == [8, 8, 8, 1]
    assert "seed" not in written[0].read_text()  # that is the run's


@pytest.mark.usefixtures("undrawn")
def test_what_is_unknown_is_null(tmp_path):
    settings = [tried("a", [2.5], math.nan), tried("b", [7.5], math.inf, math.nan, nfe=math.nan)]
    what = found(*settings)
    held_out = confirmed({one.name: one for one in settings}, "a", 0.95)
    file, *_ = report.write(tmp_path, replace(what, held_out=held_out), SUBJECT, {"x": (math.nan, 1)})
    told = strictly(file)
    assert told["settings"][0]["score"] == {"mean": 2.5, "low": None, "high": None}
    assert told["settings"][1]["tokens_per_s"] is None
    assert told["held_out"][1]["to_official"] == {"mean": 5.0, "low": None, "high": None}
    assert told["environment"] == {"x": [None, 1]}


@pytest.mark.usefixtures("undrawn")
def test_the_whole_sweep_is_in_its_file(tmp_path):
    what = found(*SETTINGS)
    told = strictly(report.write(tmp_path, what, SUBJECT, {})[0])
    assert told["subject"]["metric"] == "exact_match"
    assert (told["official"], told["best"], told["recommended"]) == ("official", "official", "threshold=0.9")
    assert told["tied"] == ["threshold=0.9"] and told["fronts"]["tpf"] == ["official", "steps=1", "threshold=0.9"]
    assert [one["name"] for one in told["settings"]] == [one.name for one in SETTINGS]
    assert told["settings"][3] == {
        "name": "temperature=2.0",
        "changes": {"temperature": 2.0},
        "sampler": SETTINGS[3].sampler | {"suppress_tokens": [], "begin_suppress_tokens": [], "cfg_keep_tokens": []},
        "score": {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.1611, abs=1e-4)},
        "tpf": 5.0,
        "tokens_per_s": 500.0,
        "nfe": 8.0,
        "documents": 20,
        "complete": False,
    }


@pytest.mark.parametrize(
    ("scores", "axis", "expected"),
    [
        ([0, 1, 1, 0.5], "digits exact_match, percent", 62.5),
        ([0, 100, 100, 50], "digits exact_match", 62.5),
        ([0, 0.5, 1.5, 0], "digits exact_match", 0.5),
        ([-1, 0.5, 0.5, 0], "digits exact_match", 0.0),
    ],
)
def test_only_shares_are_told_in_percent(tmp_path, undrawn, scores, axis, expected):
    what = found(tried("a", scores), tried("b", [0, 0, 0, 0]))
    report.write(tmp_path, what, SUBJECT, {})
    points, name = undrawn["page"][1], undrawn["page"][5]
    assert name == undrawn["picture"][4] == axis
    assert points == undrawn["picture"][2]
    assert points[0].score == expected
    scale = 100 if axis.endswith("percent") else 1
    assert (points[0].low, points[0].high) == pytest.approx([scale * bound for bound in what.intervals["a"][1:]])


def test_points_know_what_is_special_about_them(tmp_path, undrawn):
    report.write(tmp_path, found(*SETTINGS), replace(SUBJECT, background="llada/GSM8K-CoT"), {})
    points, curves, said = undrawn["page"][1:4]
    assert [point.marks for point in points] == [{"official", "best"}, {"recommended"}, set(), set()]
    assert [point.front for point in points] == [{"tpf", "tokens_per_s"}] * 3 + [set()]
    assert [point.complete for point in points] == [True, True, True, False]
    assert [point.documents for point in points] == [100, 100, 100, 20]
    assert curves and said[-1].startswith("grey curves, llada/GSM8K-CoT")


def test_rows_begin_with_the_front_by_score():
    told = rows(found(*SETTINGS))
    assert [row["setting"] for row in told] == ["official", "threshold=0.9", "steps=1", "temperature=2.0"]
    assert [row["note"] for row in told] == [
        "best, official, front",
        "recommended, tied, front",
        "front",
        "ended early",
    ]
    assert [row["docs"] for row in told] == [100, 100, 100, 20]


def test_rows_bear_what_is_unknown():
    told = rows(found(tried("a", [2.5], math.nan), tried("b", [7.5], 1.0, math.inf)))
    assert len(told) == 2


def test_the_terminal_shows_the_front_with_its_parameters():
    told = front_rows(found(*SETTINGS, tried("behind", FAIR, 0.5, temperature=0.5)))
    assert [(row["threshold"], row["steps"], row["temperature"]) for row in told] == [
        ("", "", ""),
        ("0.9", "", ""),
        ("", "1", ""),
    ]
    assert [row["score"] for row in told] == [0.9, 0.88, 0.1]


def test_held_out_rows_compare_with_the_official_setting():
    what = found(*SETTINGS)
    what = replace(what, held_out=confirmed({one.name: one for one in SETTINGS[:3]}, "official", 0.95))
    told = held_out_rows(what)
    assert [row["to official"] for row in told] == ["", "-0.0200", "-0.8000"]
    assert [row["verdict"] for row in told] == ["official", "unclear", "worse"]
    said = sentences(what, SUBJECT)
    assert any(
        line.startswith("held-out documents: threshold=0.9 against the official setting -0.0200") for line in said
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([SETTINGS[0], SETTINGS[2]], "it leads all others by more than noise (confidence 0.95"),
        (SETTINGS, "no winner: 1 other setting can't be told apart from it (confidence 0.95"),
        ([*SETTINGS, tried("c", FAIR, 0.5)], "no winner: 2 other settings can't be told apart from it"),
        ([SETTINGS[0], SETTINGS[3]], "no winner: no other setting has answered as many documents"),
        ([SETTINGS[0]], "no winner: no other setting has answered as many documents"),
    ],
)
def test_the_winner_is_told_in_words(settings, sentence):
    assert sentences(found(*settings), SUBJECT)[1].startswith(sentence)


def test_words_for_the_recommended_setting():
    said = sentences(found(*SETTINGS), SUBJECT)
    assert said[0] == "best score: official, 0.9000 on 100 documents"
    assert said[2] == (
        "recommended: threshold=0.9, the fastest of those whose score is nearly as good: 0.8800 at 3.00 tokens per "
        "forward; the best has 1.00"
    )
    assert any(line.startswith("AUP of none cache, low_confidence: ") for line in said)
    assert not any("recommended" in line for line in sentences(found(*SETTINGS[:1]), SUBJECT))
