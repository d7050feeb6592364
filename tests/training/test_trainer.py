"""The parts of the Ray Train wrapper that need no Ray; `tests/jobs` runs the whole."""

import dataclasses

import numpy as np
import pytest

from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import ConfigError
from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.trainer import _cause, sample_texts, total_steps, with_sampler


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({"max_steps": 5, "batch_size": 8, "epochs": 9}, 100, (5, 40)),
        ({"epochs": 1, "batch_size": 32}, 100, (4, 100)),
        ({"epochs": 2.5, "batch_size": 50}, 100, (5, 250)),
        ({"epochs": 0.001, "batch_size": 4}, 100, (1, 1)),
    ],
)
def test_epochs_and_max_steps_fix_steps_and_rows(settings, rows, expected):
    assert total_steps(TrainConfig(**settings), rows) == expected


def test_sample_texts_take_the_first_questions_that_leave_room(make_lm, tokenizer):
    lm = make_lm()  # a context of 64
    nine, answer = tokenizer("9")["input_ids"], tokenizer("12")["input_ids"]
    rows = []
    for length in (4, 60, 5, 6):
        question = nine * length
        rows.append((question + answer, [IGNORE_INDEX] * length + answer))
    config = SamplerConfig(max_new_tokens=8, block_size=8, steps=2)
    texts = sample_texts(lm, TokenRows.of(rows), 2, config)
    assert [text["prompt"] for text in texts] == ["9999", "99999"]
    assert [text["expected"] for text in texts] == ["12", "12"]
    with pytest.raises(ConfigError, match="no validation prompt leaves room"):
        sample_texts(lm, TokenRows.of(rows).take(np.array([1])), 2, config)


def test_the_cause_of_a_failure_is_its_last_error_and_ours_before_anybodys():
    plain = """Traceback (most recent call last):
  File "a.py", line 1, in f
ValueError: first
During handling of the above exception, another exception occurred:
RuntimeError: out of memory
"""
    assert _cause(plain) == "RuntimeError: out of memory"
    ours = """dllm_ray.errors.DataError: rows.jsonl, line 61: not valid JSON
The above exception was the direct cause of the following exception:
ray.exceptions.UserCodeException: failed
To change retry attempts, set max_retries.
"""
    assert _cause(ours) == "rows.jsonl, line 61: not valid JSON"
    assert _cause("the process died") == "the process died"


def test_a_trained_model_keeps_the_sampler_settings_it_was_trained_beside(make_lm):
    spec = dataclasses.replace(make_lm().spec, sampler={"block_size": 4, "cache": "block", "policy": "entropy"})
    config = SamplerConfig(max_new_tokens=8, block_size=32, policy="entropy", suppress_tokens=(7,), seed=3)
    kept = with_sampler(spec, config).sampler
    assert kept == {
        "block_size": 32,  # back to its default, which the model's own setting would hide
        "cache": "none",
        "policy": "entropy",
        "max_new_tokens": 8,
        "suppress_tokens": (7,),
    }
    assert SamplerConfig(**kept) == dataclasses.replace(config, seed=None)
