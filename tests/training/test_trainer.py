"""The parts of the Ray Train wrapper that need no Ray; `tests/jobs` runs the whole."""

import dataclasses
import os

import pytest

from dllm_ray.cluster import Shares
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.training.trainer import _cause, _limit_patience, with_sampler


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


@pytest.mark.parametrize(("most", "left"), [(None, 1800.0), (6, 5.0)])
def test_only_a_fixed_number_of_workers_may_take_minutes_to_come(monkeypatch, most, left):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")
    _limit_patience(Shares(workers=1, cpus=1, gpus=0, data_cpus=1, most=most))
    assert float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) == left
