"""A training job whose model learns to edit: its sampler settings, and looks at it."""

import pytest

from dllm_ray.data.config import DataConfig
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.models import edit_heads
from dllm_ray.models.config import ModelConfig
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.training.job import TrainingJob
from dllm_ray.training.observe import Look, look_at

EDITS = ObjectiveConfig(name="edit_flow", kappa="cubic")
BROUGHT = {"policy": "llada21", "editing_threshold": 0.8, "cfg_keep_tokens": [3], "max_new_tokens": 64, "steps": 2}


def job(sampler, objective=EDITS, **more) -> TrainingJob:
    return TrainingJob(data=DataConfig(path="builtin:lengths"), objective=objective, sampler=sampler, **more)


def test_steps_may_be_fewer_than_blocks_and_the_schedule_is_the_objectives():
    assert job(SamplerConfig(max_new_tokens=512, steps=8)).sampler.kappa == "cubic"
    with pytest.raises(ConfigError, match=r"^sampler\.kappa: the model learns rates of objective.kappa cubic"):
        job(SamplerConfig(kappa="cosine"))
    with pytest.raises(ConfigError, match=r"^sampler\.steps: 8 steps are fewer than the 16 blocks"):
        job(SamplerConfig(max_new_tokens=512, steps=8), ObjectiveConfig())


def test_what_a_masked_model_brought_along_goes_and_what_the_user_says_is_refused(monkeypatch):
    monkeypatch.setattr("dllm_ray.models.defaults.sampler_settings", lambda _: BROUGHT)
    found = job(SamplerConfig(**BROUGHT), model=ModelConfig(path="m")).sampler
    assert found == SamplerConfig(max_new_tokens=64, steps=2, kappa="cubic")
    with pytest.raises(ConfigError, match=r"^sampler\.cache: 'dual' has no meaning for a model that edits"):
        job(SamplerConfig(**BROUGHT, cache="dual"), model=ModelConfig(path="m"))


def test_other_objectives_refuse_settings_of_edits():
    with pytest.raises(ConfigError, match=r"^sampler\.start_tokens: 3 is for models with edit heads"):
        job(SamplerConfig(start_tokens=3), ObjectiveConfig())


def test_a_look_samples_and_evaluates_it(make_lm, tokenizer):
    lm, ids = edit_heads.attach(make_lm(), time=False, seed=1), tokenizer("12345678")["input_ids"]
    rows, sampler = TokenRows.of([(ids, ids)]), SamplerConfig(max_new_tokens=40, steps=1)
    asked = EvaluateConfig(tasks=("lengths",), limit=3, chat_template=False)
    seen = look_at(lm, Look(ModelConfig(), sampler, rows, 1, asked, 0))
    assert seen.problems == [] and len(seen.samples) == 1 and "eval/lengths/exact_match" in seen.metrics
