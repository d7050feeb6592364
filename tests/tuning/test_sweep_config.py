"""Settings of a sweep: what they are by default, and what is refused."""

from dataclasses import dataclass, field

import pytest

from dllm_ray.config import parse, read, to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.tuning.config import SweepConfig

NAN, INFINITE = float("nan"), float("inf")


@dataclass
class Job:
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """A sweep."""


def test_a_sweep_is_a_grid_of_score_and_tokens_per_forward_unless_told_otherwise():
    config = SweepConfig()
    assert (config.searcher, config.objectives, config.asha, config.space) == ("grid", ["score", "tpf"], False, {})


def test_settings_come_from_the_command_line_and_read_back_to_the_same():
    words = ["--sweep.space.steps", "[8, 16]", "--sweep.space", "{cache: [none, dual], steps: {integer: [4, 8]}}"]
    job = parse(Job, [*words, "--sweep.objectives", "[score]", "--sweep.asha", "--sweep.max-minutes", "5"], "job", "")
    assert job.sweep.space == {"cache": ["none", "dual"], "steps": {"integer": [4, 8]}}
    assert (job.sweep.objectives, job.sweep.asha, job.sweep.max_minutes) == (["score"], True, 5.0)
    assert read(SweepConfig, to_dict(job.sweep), "sweep") == job.sweep


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"searcher": "genetic"}, "searcher: expected one of grid, random, tpe, nsga2, got 'genetic'"),
        *(
            ({name: least - 1}, f"{name}: must be a whole number of at least {least}, got {least - 1}")
            for name, least in {
                "samples": 1,
                "first_documents": 1,
                "reduction": 2,
                "documents": 1,
                "holdout": 0,
                "confirm": 1,
                "concurrent": 1,
                "max_documents": 1,
            }.items()
        ),
        ({"samples": 2.5}, "samples: must be a whole number of at least 1, got 2.5"),
        ({"holdout": True}, "holdout: must be a whole number of at least 0, got True"),
        *(
            ({"confidence": value}, f"confidence: must lie between 0 and 1, got {value}")
            for value in (0.0, 1.0, 95.0, NAN)
        ),
        *(
            ({"max_minutes": value}, f"max_minutes: must be a number above 0, got {value}")
            for value in (0, -1, NAN, INFINITE)
        ),
        ({"objectives": ["score", "speed"]}, "objectives: expected one or two of score, tpf, .*got 'speed'"),
        ({"objectives": []}, "objectives: expected score, alone or with one other"),
        ({"objectives": ["tpf"]}, "objectives: expected score, alone or with one other"),
        ({"objectives": ["score", "score"]}, "objectives: expected score, alone or with one other"),
        ({"objectives": ["score", "tpf", "nfe"]}, "objectives: expected score, alone or with one other"),
        ({"searcher": "nsga2", "objectives": ["score"]}, "objectives: nsga2 weighs two"),
        ({"asha": True}, r"asha: settings are dropped by one number: set objectives to \[score\]"),
        ({"asha": True, "objectives": ["score"], "documents": 32}, "first_documents: .*after 32 documents.*only 32"),
    ],
)
def test_what_can_not_be_is_refused_by_name(settings, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        SweepConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"holdout": 0},
        {"searcher": "nsga2"},
        {"searcher": "nsga2", "objectives": ["nfe", "score"]},
        {"searcher": "tpe", "objectives": ["score", "tokens_per_s"]},
        {"asha": True, "objectives": ["score"], "documents": 33},
        {"documents": 8},  # first_documents are asha's
    ],
)
def test_what_can_be_is_taken(settings):
    config = SweepConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_one_objective_may_be_given_by_its_name():
    assert SweepConfig(objectives="score").objectives == ["score"]
