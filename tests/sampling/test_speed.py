"""What `measure` counts as the forwards of a run."""

import pytest

from dllm_ray.models import edit_heads
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling import speed as speed_module
from dllm_ray.sampling.speed import measure

PROMPTS = [list(range(40, 52)), list(range(60, 67))]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "block"])
def test_the_forwards_of_a_run_are_run_again_by_themselves(sharp_lm, monkeypatch, cache):
    lm = sharp_lm("llama")
    module, replayed = lm.module, []
    replay = speed_module._replay
    monkeypatch.setattr(speed_module, "_replay", lambda lm, calls: replayed.append(calls) or replay(lm, calls))
    config = SamplerConfig(max_new_tokens=8, steps=8, block_size=4, cache=cache, eos_early_stop=False, seed=0)

    found = measure(lm, config, PROMPTS, rounds=2)

    assert lm.module is module
    assert [len(calls) for calls in replayed] == [8] * 3
    widths = [calls[0][0].shape[1] for calls in replayed[0]]
    assert (max(widths[1:4]) == 4) == (cache in ("dual", "block"))
    assert (found.nfe, found.tpf) == (8, 1.0)
    assert found.seconds > 0 and found.forward_seconds > 0 and found.ratio > 0
    assert found.tokens_per_s == pytest.approx(16 / found.seconds)


def test_what_a_model_that_edits_was_asked_is_asked_again(make_lm, monkeypatch):
    lm = edit_heads.attach(make_lm("bert"))
    replayed = []
    replay = speed_module._replay_edits
    monkeypatch.setattr(speed_module, "_replay_edits", lambda lm, calls: replayed.append(calls) or replay(lm, calls))
    config = SamplerConfig(max_new_tokens=8, steps=8, seed=0)
    found = measure(lm, config, PROMPTS * 2, rounds=1, max_rows=2)
    alone = Sampler(lm, config, max_rows=2).sample(PROMPTS * 2)
    assert [len(calls) for calls in replayed] == [alone.nfe] * 2 == [found.nfe] * 2
    assert all(len(call.ids) <= 2 for call in replayed[0]) and any(call.asked for call in replayed[0])
    assert "hidden" not in vars(lm.module) and found.ratio > 0
