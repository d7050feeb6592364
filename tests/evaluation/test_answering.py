"""Answers to requests: the same from a model in this process and from any pool, and never asked for twice."""

import os
import signal
from copy import copy
from dataclasses import replace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

import dllm_ray
from dllm_ray.cluster import Shares
from dllm_ray.config import to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.answering import LocalAnswers, PooledAnswers, _Slices, _Unit
from dllm_ray.evaluation.cache import AnswerCache
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.models.config import ModelConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.workers import ModelPool

SAMPLER = SamplerConfig(max_new_tokens=8, block_size=4, steps=4, temperature=1.0)
LIKELIHOOD = LikelihoodConfig(mc_num=6, batch_size=4)
PROMPTS = [list(range(20, 22 + number % 5)) for number in range(11)]
SEEDS = [1000 + number for number in range(11)]
PAIRS = [(prompt, list(range(40, 41 + number % 6))) for number, prompt in enumerate(PROMPTS)]
GROUPS = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10]]
SIZES = [float(len(target)) for _, target in PAIRS]


class LoopPool:
    """A pool in this process, whose calls finish in reverse order; it counts them, and may break off."""

    def __init__(self, lm, breaks_after=None):
        self.lm, self.workers, self.calls, self.breaks_after = lm, 2, 0, breaks_after

    def run(self, function, work):
        for index in reversed(range(len(work))):
            if self.calls == self.breaks_after:
                raise KeyboardInterrupt
            self.calls += 1
            yield index, function(self.lm, *work[index]), 3.0


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm()


def expected(lm, likelihood=LIKELIHOOD):
    local = LocalAnswers(lm, SAMPLER, likelihood, 3)
    return local.generate(PROMPTS, SEEDS), local.score(PAIRS, SEEDS, GROUPS, SIZES)


def test_written_answers_do_not_depend_on_their_slices(lm):
    one_by_one = LocalAnswers(lm, SAMPLER, LIKELIHOOD, 1).generate(PROMPTS, SEEDS)
    together = LocalAnswers(lm, SAMPLER, LIKELIHOOD, 64).generate(PROMPTS, SEEDS)
    assert one_by_one == together == expected(lm)[0]
    alone = LocalAnswers(lm, SAMPLER, LIKELIHOOD, 64).generate(PROMPTS[4:5], SEEDS[4:5])
    assert alone == together[4:5]


def test_likelihoods_do_not_depend_on_their_slices(lm):
    found = LocalAnswers(lm, SAMPLER, LIKELIHOOD, 64).score(PAIRS, SEEDS, GROUPS, SIZES)
    for ours, theirs in zip(found, expected(lm)[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_a_pool_answers_like_this_process_whatever_its_workers_and_when_one_is_lost(lm, tmp_path):
    lm.save(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    answers, likelihoods = expected(lm)
    ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with ModelPool(model, Shares(3, cpus=0.5, gpus=0, data_cpus=1), threads=1) as pool:
            pool.wait()
            for workers in (1, 2, 3):
                pooled = PooledAnswers(_first(pool, workers), SAMPLER, LIKELIHOOD, 3, None)
                assert pooled.generate(PROMPTS, SEEDS) == answers
                assert pooled.score(PAIRS, SEEDS, GROUPS, SIZES) == likelihoods
            _answers_while_a_worker_dies(pool, answers, likelihoods)
    finally:
        ray.shutdown()


def _first(pool, workers):
    """A smaller pool of some of the same workers, which take seconds to start."""
    smaller = copy(pool)
    smaller.workers, smaller._actors = workers, pool._actors[:workers]
    return smaller


def _answers_while_a_worker_dies(pool, answers, likelihoods):
    killed = []

    def kill_one(progress):
        if 0 < progress.done < progress.requests and not killed:
            actor = pool._actors[-1]
            killed.append(actor)
            os.kill(ray.get(actor.__ray_call__.remote(lambda _self: os.getpid())), signal.SIGKILL)

    pooled = PooledAnswers(pool, SAMPLER, LIKELIHOOD, 1, None, kill_one)
    assert pooled.generate(PROMPTS, SEEDS) == answers
    for ours, theirs in zip(pooled.score(PAIRS, SEEDS, GROUPS, SIZES), likelihoods, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert killed and killed[0] is not pool._actors[-1]


def test_equal_requests_are_asked_once(lm):
    pool = LoopPool(lm)
    pooled = PooledAnswers(pool, SAMPLER, LIKELIHOOD, 64, None)
    answers = pooled.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], [7, 7, 7, 8])
    assert answers[0] == answers[2]
    assert (pooled.figures.documents, pooled.figures.asked) == (4, 3)


def test_figures_sum_up_what_it_took(lm):
    progress = []
    pooled = PooledAnswers(
        LoopPool(lm), SAMPLER, LIKELIHOOD, 4, None, lambda now: progress.append((now.done, now.requests))
    )
    answers = pooled.generate(PROMPTS, SEEDS)
    figures = pooled.figures
    assert figures.tokens == sum(len(answer.tokens) for answer in answers)
    assert figures.nfe == sum(answer.nfe for answer in answers)
    assert figures.seconds == pytest.approx(3 * 3.0 / 2)  # three slices, two workers
    assert figures.tokens_per_s == pytest.approx(figures.tokens / 4.5)
    assert progress == [(0, 11), (3, 11), (7, 11), (11, 11)]
    likelihoods = pooled.score(PAIRS, SEEDS, GROUPS, SIZES)
    assert figures.forwards == sum(likelihood.copies for likelihood in likelihoods)
    assert (figures.documents, figures.asked, figures.from_disk) == (22, 22, 0)
    assert figures.scoring_seconds > 0 and figures.tokens_per_s == pytest.approx(figures.tokens / 4.5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_killed_run_loses_only_the_slices_under_way(lm, tmp_path, adaptive):
    likelihood = replace(LIKELIHOOD, adaptive=adaptive, mc_num=24)
    answers, likelihoods = expected(lm, likelihood)
    cache = AnswerCache(str(tmp_path), {"model": 1})

    def pooled(breaks_after=None, **changes):
        pool = LoopPool(lm, breaks_after)
        return PooledAnswers(pool, replace(SAMPLER, **changes), likelihood, 3, cache), pool

    broken, _ = pooled(breaks_after=2)
    with pytest.raises(KeyboardInterrupt):
        broken.generate(PROMPTS, SEEDS)
    rest, pool = pooled()
    assert rest.generate(PROMPTS, SEEDS) == answers
    assert (pool.calls, rest.figures.from_disk, rest.figures.asked) == (2, 5, 6)
    assert rest.figures.seconds == pytest.approx(4 * 3.0 / 2)  # what was answered before counts as it took then

    broken, _ = pooled(breaks_after=1)
    with pytest.raises(KeyboardInterrupt):
        broken.score(PAIRS, SEEDS, GROUPS, SIZES)
    rest, pool = pooled()
    assert rest.score(PAIRS, SEEDS, GROUPS, SIZES) == likelihoods
    assert rest.figures.from_disk > 0 and rest.figures.from_disk + rest.figures.asked == len(PAIRS)

    again, pool = pooled(seed=5)  # each request has its own
    assert (again.generate(PROMPTS, SEEDS), again.score(PAIRS, SEEDS, GROUPS, SIZES)) == (answers, likelihoods)
    assert pool.calls == 0 and again.figures.asked == 0 and again.figures.from_disk == 22
    assert again.figures.sampling_seconds == pytest.approx(6.0)

    more, pool = pooled()
    more.generate([*PROMPTS, [9]], [*SEEDS, 9])
    assert (pool.calls, more.figures.asked) == (1, 1)
    for changed in ({"steps": 2}, {"temperature": 0.0}):
        other, pool = pooled(**changed)
        other.generate(PROMPTS[:3], SEEDS[:3])
        assert (pool.calls, other.figures.asked) == (1, 3)


def test_a_few_likelihoods_are_work_for_several_workers(lm):
    pool = LoopPool(lm)
    PooledAnswers(pool, SAMPLER, LikelihoodConfig(mc_num=32, batch_size=2), 64, None).score(PAIRS, SEEDS, GROUPS, SIZES)
    assert pool.calls > 5


def test_answers_on_disk_depend_on_every_setting(lm, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(AnswerCache, "under", lambda cache, more: kept.append(more) or cache)
    pooled = PooledAnswers(LoopPool(lm), SAMPLER, LIKELIHOOD, 3, AnswerCache(str(tmp_path), {"model": "m"}))
    pooled.generate(PROMPTS, SEEDS)
    pooled.score(PAIRS, SEEDS, GROUPS, SIZES)
    sampler, likelihood = kept
    # a seed belongs to its request, and batches change the speed only
    assert sampler["sampler"] == {k: v for k, v in to_dict(SAMPLER).items() if k != "seed"}
    assert likelihood["likelihood"] == {k: v for k, v in to_dict(LIKELIHOOD).items() if k != "batch_size"}
    assert sampler["dllm_ray"] == likelihood["dllm_ray"] == dllm_ray.__version__


def test_sizes_count_where_choices_are_ranked(lm, tmp_path):
    def asked(sizes):
        config = replace(LIKELIHOOD, adaptive=True)
        pooled = PooledAnswers(LoopPool(lm), SAMPLER, config, 3, AnswerCache(str(tmp_path), {"model": "m"}))
        pooled.score(PAIRS, SEEDS, GROUPS, sizes)
        return pooled.figures.asked

    assert asked(SIZES) == len(PAIRS)
    assert asked(SIZES) == 0
    assert asked([size + (index == 0) for index, size in enumerate(SIZES)]) == len(GROUPS[0])


def test_guidance_doubles_the_forwards(lm):
    plain, guided = (LocalAnswers(lm, SAMPLER, replace(LIKELIHOOD, cfg_scale=scale), 3) for scale in (0.0, 1.0))
    for local in (plain, guided):
        local.score(PAIRS[:2], SEEDS[:2], [[0], [1]], SIZES[:2])
    assert guided.figures.forwards == 2 * plain.figures.forwards > 0


def test_an_adaptive_question_is_scored_as_a_whole(lm, tmp_path):
    cache = AnswerCache(str(tmp_path), {})
    config = replace(LIKELIHOOD, adaptive=True, mc_num=24)
    PooledAnswers(LoopPool(lm), SAMPLER, config, 2, cache).score(PAIRS, SEEDS, GROUPS, SIZES)
    other = PooledAnswers(LoopPool(lm), SAMPLER, config, 2, cache)
    other.score(PAIRS[:4], SEEDS[:4], [[0, 1, 2], [3]], SIZES[:4])
    assert (other.figures.from_disk, other.figures.asked) == (3, 1)


def test_the_batches_of_likelihoods_do_not_change_what_is_on_disk(lm, tmp_path):
    cache = AnswerCache(str(tmp_path), {})
    PooledAnswers(LoopPool(lm), SAMPLER, LIKELIHOOD, 2, cache).score(PAIRS, SEEDS, GROUPS, SIZES)
    other = PooledAnswers(LoopPool(lm), SAMPLER, replace(LIKELIHOOD, batch_size=2), 3, cache)
    other.score(PAIRS, SEEDS, GROUPS, SIZES)
    assert other.figures.asked == 0


def test_answers_need_a_length_of_their_own(lm):
    config = replace(SAMPLER, max_new_tokens=None, max_length=32)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        LocalAnswers(lm, config, LIKELIHOOD, 4).generate(PROMPTS, SEEDS)


UNITS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 1000), st.booleans()), max_size=60)


@given(UNITS, st.integers(1, 9), st.booleans())
def test_slices_hold_every_missing_unit_once_costliest_first(sizes, most, even):
    units = [_Unit(str(number), ((),) * (size if even else 1), cost) for number, (size, cost, _) in enumerate(sizes)]
    missing = {str(number) for number, (*_, lacks) in enumerate(sizes) if lacks}
    slices = _Slices(most, 2000, even)
    planned = slices.plan(units, lambda unit: unit.key in missing)
    assert sorted(unit.key for part in planned for unit in part) == sorted(missing)
    costs = [sum(unit.cost for unit in part) for part in planned]
    assert costs == sorted(costs, reverse=True)
    if not even:
        assert all(len(part) <= most for part in planned)
    untouched = [part for part in slices.cut(units) if all(unit.key in missing for unit in part)]
    assert all(part in planned for part in untouched)


@given(UNITS, st.integers(1, 9))
def test_slices_of_likelihoods_cost_about_the_same(sizes, most):
    units = [_Unit(str(number), ((),) * size, cost) for number, (size, cost, _) in enumerate(sizes)]
    parts = _Slices(most, 2000, even=True).cut(units)
    total, largest = sum(unit.cost for unit in units), max((unit.cost for unit in units), default=0)
    for part in parts:
        assert sum(unit.cost for unit in part) <= total / len(parts) + 2 * largest
