"""Evaluation of models with edit heads: they write answers, and have no likelihoods."""

from dataclasses import replace

import pytest

from dllm_ray.data.builtin import lengths
from dllm_ray.errors import ConfigError, EvaluationError, ModelError
from dllm_ray.evaluation.answering import LocalAnswers
from dllm_ray.evaluation.asking import Asker
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig
from dllm_ray.evaluation.likelihood import log_likelihood
from dllm_ray.evaluation.lm import DiffusionHarness
from dllm_ray.evaluation.plan import _probe
from dllm_ray.evaluation.run import check_written, evaluate
from dllm_ray.evaluation.suite import Ask, asks
from dllm_ray.models import edit_heads
from dllm_ray.models.config import ModelConfig
from dllm_ray.sampling.config import SamplerConfig

FEW = SamplerConfig(max_new_tokens=40, steps=4, seed=0)  # fewer steps than a masked model would have blocks of 8


@pytest.fixture(scope="module")
def lm(make_lm):
    return edit_heads.attach(make_lm(), time=False, seed=1)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("edits")
    lm.save(folder)
    return str(folder)


def harness(lm, sampler=FEW) -> DiffusionHarness:
    answers = LocalAnswers(lm, sampler, LikelihoodConfig(), batch_size=4)
    return DiffusionHarness(answers, lm.tokenizer, lm.spec, lm.max_length, sampler.max_new_tokens, "edits", 0)


def ask(tasks=("lengths",), sampler=FEW) -> Ask:
    (found,) = asks(EvaluateConfig(tasks=tasks), sampler, LikelihoodConfig())
    return found


def test_it_answers_through_the_harness(lm):
    asked = harness(lm)
    found = evaluate(asked, EvaluateConfig(tasks=("lengths",), limit=6), 0)
    assert set(lengths.TASKS) <= {name.partition(",")[0] for name in found["results"]["lengths"]}
    figures = asked.answerer.figures
    assert figures.documents == 6 and figures.nfe <= 6 * FEW.steps
    again = evaluate(harness(lm), EvaluateConfig(tasks=("lengths",), limit=6), 0)
    assert [sample["resps"] for sample in again["samples"]["lengths"]] == [
        sample["resps"] for sample in found["samples"]["lengths"]
    ]


def test_likelihoods_are_refused_at_once(lm):
    with pytest.raises(ModelError, match="choose tasks that generate"):
        log_likelihood(lm, [([5], [6])])

    class Nobody:
        def score(self, *_):
            raise AssertionError("a worker was asked")

    asked = harness(lm)
    asked.answerer = Nobody()
    request = type("Request", (), {"args": ("a", " b"), "task_name": "t", "doc_id": 0, "idx": 0})()
    rolling = type("Request", (), {"args": ("a b",), "task_name": "t", "doc_id": 0, "idx": 0})()
    for call in (lambda: asked.loglikelihood([request]), lambda: asked.loglikelihood_rolling([rolling])):
        with pytest.raises(ModelError, match="choose tasks that generate"):
            call()


def test_tasks_of_likelihoods_are_known_by_their_yaml(folder):
    check_written(EvaluateConfig(tasks=("lengths", "digits")))
    asker = Asker(ModelConfig(path=folder), 0)
    asker.check(ask())
    with pytest.raises(EvaluationError, match=r"task bbh_choice_file .* asks for likelihoods"):
        asker.check(ask(("lengths", "bbh_choice_file")))


def test_settings_are_checked_for_the_model_that_is_asked(folder, make_lm, tmp_path):
    asker = Asker(ModelConfig(path=folder), 0)
    with pytest.raises(ConfigError, match=r"^sampler\.policy: short: 'entropy' has no meaning"):
        asker.check(replace(ask(sampler=replace(FEW, policy="entropy")), name="short"))
    make_lm().save(tmp_path)
    masked = Asker(ModelConfig(path=str(tmp_path)), 0)
    with pytest.raises(ConfigError, match=r"^sampler\.steps: short: 4 steps are fewer than the 5 blocks"):
        masked.check(replace(ask(sampler=replace(FEW, block_size=8)), name="short"))
    with pytest.raises(ConfigError, match=r"^sampler\.kappa: 'cubic' is for models with edit heads"):
        masked.check(ask(sampler=replace(FEW, steps=40, kappa="cubic")))


def test_the_settings_of_edits_are_part_of_what_answers_depend_on():
    assert ask(sampler=replace(FEW, kappa="cubic")).settings() != ask().settings()
    assert ask(sampler=replace(FEW, start_tokens=2)).settings() != ask().settings()


def test_the_time_it_will_take_is_estimated(lm):
    assert 0 < _probe(lm, 8, 2, FEW) < 60
