"""What settings come to on a model, and which of them can't be used with it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling import Engine, Sampler, SamplerConfig
from dllm_ray.sampling.config import DREAM_POLICIES, LLADA2_POLICIES, POLICIES
from dllm_ray.sampling.engine import Row
from dllm_ray.sampling.plan import Plan
from dllm_ray.sampling.proposals import CHOSEN, ENTROPY, MARGIN, PLAIN
from dllm_ray.sampling.unmasking import commit_schedule, dream_block_schedule, even_schedule, stochastic_schedule

FULL = DiffusionSpec("llama", mask_token_id=4, eos_token_id=2, pad_token_id=0)
SHIFTED = replace(FULL, family="dream", shift_logits=True)
CAUSAL = replace(FULL, family="llada2", attention="block_causal", block_size=8)
CACHES = ("none", "prefix", "dual", "block")


def plan(spec=FULL, takes_cache=True, **fields) -> Plan:
    return Plan(SamplerConfig(**fields), spec, takes_cache)


def row(masks: int = 8, size: int = 8, steps: int = 4, seed: int = 3, **fields) -> Row:
    config = SamplerConfig(**fields)
    return Row([9, 9] + [4] * masks, [False] * 2 + [True] * masks, config, 2, size, steps, seed, early_stop=False)


# --- what a model can't do


@pytest.mark.parametrize("cache", ["prefix", "dual", "block"])
@pytest.mark.parametrize("policy", POLICIES)
def test_some_architectures_keep_no_keys_and_values(cache, policy):
    with pytest.raises(ConfigError, match="keeps no keys and values: set cache none") as caught:
        plan(takes_cache=False, cache=cache, policy=policy)
    assert caught.value.field == "cache"
    assert not plan(takes_cache=False, policy=policy).cached


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_for_full_attention_are_refused_where_attention_is_block_causal(cache):
    with pytest.raises(ConfigError, match="block is exact") as caught:
        plan(CAUSAL, cache=cache)
    assert caught.value.field == "cache"
    assert plan(CAUSAL, cache="block").cached


@pytest.mark.parametrize("cache", ["prefix", "dual", "block"])
def test_the_sampler_and_the_engine_refuse_a_cache_that_the_model_cant_keep_at_the_door(make_lm, cache):
    lm, config = make_lm("distilbert"), SamplerConfig(max_new_tokens=8, cache=cache)
    with pytest.raises(ConfigError) as caught:
        Sampler(lm, config).sample([[40]])
    assert caught.value.field == "cache"
    engine = Engine(lm)
    with pytest.raises(ConfigError):
        engine.admit(replace(row(), config=config))
    assert not engine.busy


@pytest.mark.parametrize("method", ["sample", "infill"])
def test_a_block_cache_needs_a_block_size(sharp_lm, method):
    lm = sharp_lm("llama")
    config = SamplerConfig(max_new_tokens=8, steps=8, cache="block", block_size=None)
    with pytest.raises(ConfigError) as caught:
        getattr(Sampler(lm, config), method)([[40, lm.spec.mask_token_id]])
    assert caught.value.field == "block_size"


def test_a_block_cache_without_a_block_size_is_refused_at_the_door(sharp_lm):
    lm = sharp_lm("llama")
    engine = Engine(lm)
    config = SamplerConfig(cache="block", block_size=None)
    with pytest.raises(ConfigError):
        engine.admit(replace(row(), config=config, tokens=[40, 41] + [lm.spec.mask_token_id] * 8))


def test_blocks_that_do_not_divide_the_models_are_refused(golden_lm):
    lm = golden_lm("llada2")
    own = lm.spec.grid
    config = SamplerConfig(max_new_tokens=8, block_size=own - 1, steps=64)
    with pytest.raises(ConfigError, match=f"{own - 1} doesn't divide the {own} positions") as caught:
        Sampler(lm, config).sample([[40]])
    assert caught.value.field == "block_size"
    # LLaDA2's own decoding masks by the block size asked for
    llada2 = replace(config, policy="llada2", eos_early_stop=False)
    assert len(Sampler(lm, llada2).sample([[40]]).completions[0]) <= 8


# --- what the settings come to


def test_what_confidence_means_follows_from_the_policy():
    expected = {"maskgit_plus": CHOSEN, "llada2": CHOSEN, "llada21": CHOSEN, "topk_margin": MARGIN, "entropy": ENTROPY}
    for policy in POLICIES:
        assert plan(policy=policy).confidence == expected.get(policy, PLAIN), policy


def test_logits_are_shifted_as_the_spec_says_unless_told_otherwise():
    for spec, own in ((FULL, False), (SHIFTED, True)):
        assert plan(spec).shift is own
        assert plan(spec, shift_logits=not own).shift is not own


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", [FULL, SHIFTED], ids=["llama", "dream"])
def test_dreams_own_rules_hold_for_its_policies_where_logits_are_shifted(cache, policy, spec):
    made = plan(spec, cache=cache, policy=policy)
    dreams = policy in DREAM_POLICIES and spec.shift_logits
    assert made.has_blocks == (not dreams or cache != "none")
    assert made.first_alone == (dreams and cache in ("prefix", "dual"))
    assert made.reads_before == (spec.shift_logits and not made.first_alone)


def test_a_threshold_only_delays_what_is_due_in_dreams_uncached_decoding():
    settings = {"policy": "maskgit_plus", "threshold": 0.5}
    assert plan(SHIFTED, **settings).threshold_within_quota
    assert not plan(SHIFTED, cache="dual", **settings).threshold_within_quota
    assert not plan(FULL, **settings).threshold_within_quota
    assert not plan(SHIFTED, policy="maskgit_plus").threshold_within_quota


def test_thresholds_have_defaults_for_llada2_alone():
    assert plan().threshold is None
    for policy in LLADA2_POLICIES:
        assert plan(policy=policy).threshold == 0.95
        assert plan(policy=policy, threshold=0.3).threshold == 0.3
    assert plan(policy="llada21").editing_threshold == 0.9
    assert plan(policy="llada21", editing_threshold=0.2).editing_threshold == 0.2


def test_the_schedule_alone_rules_without_threshold_factor_and_certainty():
    assert plan().rules_by_quota
    assert not plan(threshold=0.5).rules_by_quota
    assert not plan(factor=0.5).rules_by_quota
    assert not plan(policy="llada2").rules_by_quota


def test_where_attention_is_cut_into_blocks():
    assert plan().attention_grid(5) == (0, 0)
    assert plan(cache="prefix").attention_grid(5) == (0, 0)
    assert plan(cache="block", block_size=4).attention_grid(5) == (5, 4)  # counted from the answer's beginning
    assert plan(CAUSAL, block_size=4).attention_grid(4) == (0, 8)  # the model's own
    assert plan(CAUSAL, block_size=4, cache="block").attention_grid(4) == (0, 8)
    assert plan(CAUSAL, block_size=4, policy="llada2").attention_grid(4) == (4, 4)


def test_filters_matter_where_something_is_drawn_or_confidence_is_shaped_by_them():
    on = {"top_p": 0.9, "top_k": 5}
    assert plan(**on).filters == (None, None)
    assert plan(policy="llada2", **on).filters == (None, None)
    assert plan(policy="entropy", **on).filters == (0.9, 5)
    for policy in POLICIES:
        assert plan(policy=policy, temperature=0.5, **on).filters == (0.9, 5)
        assert plan(policy=policy).filters == (None, None)


# --- how many tokens the steps of a block commit


def test_counts_are_the_schedules():
    for schedule in ("linear", "cosine", "dream"):
        assert plan(schedule=schedule).counts(7, row(), 0) == commit_schedule(7, 4, schedule)
    for cache in ("prefix", "dual"):
        assert plan(SHIFTED, policy="entropy", cache=cache).counts(7, row(), 0) == dream_block_schedule(7, 4)
    assert plan(policy="llada21", num_to_transfer=3).counts(7, row(), 0) == (3,)


@pytest.mark.parametrize("settings", [{"stochastic": True}, {"policy": "origin"}])
def test_drawn_counts_are_the_rows_own(settings):
    made = plan(**settings)
    assert made.counts(30, row(seed=5), 2) == stochastic_schedule(30, 4, "linear", 5, 2)
    assert made.counts(30, row(seed=5), 2) != made.counts(30, row(seed=6), 2)


def test_llada2_splits_a_whole_block_and_its_steps_are_bounded_by_minimal_topk():
    llada2 = {"policy": "llada2", "max_new_tokens": 8}
    assert plan(**llada2).counts(3, row(), 0) == even_schedule(8, 4) == (2, 2, 2, 2)
    assert plan(**llada2, minimal_topk=4).counts(3, row(), 0) == (4, 4)  # 8 tokens, at least 4 a step
    assert plan(**llada2, minimal_topk=100).counts(3, row(), 0) == (8,)


# --- the order of candidates


def test_a_random_order_is_that_of_the_draws():
    draws = np.array([0.3, 0.9, 0.1], np.float32)
    for policy in ("random", "origin"):
        assert plan(policy=policy).order(np.array([1.0, 0.0, 0.5], np.float32), draws).tolist() == draws.tolist()


def test_the_best_under_alg_temperature_is_a_draw_from_the_softmax_of_confidence():
    confidence, temperature = np.array([0.9, 0.5, 0.1], np.float32), 0.5
    made = plan(alg_temperature=temperature)
    source = np.random.default_rng(0)
    count = 20_000
    firsts = Counter(
        int(made.order(confidence, draws).argmax()) for draws in source.random((count, 3), dtype=np.float32)
    )
    shares = np.exp(confidence / temperature) / np.exp(confidence / temperature).sum()
    for place, share in enumerate(shares):
        assert firsts[place] / count == pytest.approx(share, abs=0.015)  # four standard errors


def test_a_draw_of_0_orders_last_without_breaking():
    order = plan(alg_temperature=0.5).order(np.array([0.9, 0.9], np.float32), np.array([0.0, 0.5], np.float32))
    assert np.isfinite(order).all()
    assert order[0] < order[1]
