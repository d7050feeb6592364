"""One prompt that is watched: what is drawn and kept is what the sampler makes."""

import io

import pytest
from rich.console import Console

from dllm_ray.infilling import encode_gaps
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler, row_seeds
from dllm_ray.viz import terminal
from dllm_ray.viz.live import denoise


@pytest.fixture
def log(monkeypatch):
    """What is drawn, a line for each step."""
    log = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", log)
    return log.file


@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("infill", [False, True])
def test_a_watched_prompt_gets_the_samplers_answer(log, make_lm, tokenizer, infill, seed):
    lm = make_lm("bert")
    sampler = Sampler(lm, SamplerConfig(max_new_tokens=12, block_size=4, steps=6, temperature=1.0, seed=1))
    prompt = encode_gaps(tokenizer, lm.spec.mask_token_id, "sort [MASK:4] fox" if infill else "sort 21")
    [canvas] = sampler.canvases([prompt], infill)
    found = denoise(sampler, prompt, canvas, infill, seed)
    seeds = row_seeds(1, [0]) if seed is None else [seed]
    expected = (sampler.infill if infill else sampler.sample)([prompt], trace=True, seeds=seeds)
    assert (found.sequences, found.completions) == (expected.sequences, expected.completions)
    assert (found.row_nfe, found.nfe, found.commits) == (expected.row_nfe, expected.nfe, expected.commits)
    assert found.seconds > 0
    assert len(log.getvalue().splitlines()) == found.nfe + 1


@pytest.mark.parametrize("early_stop", [True, False])
def test_an_answer_that_ends_early_is_the_samplers_too(log, make_lm, early_stop):
    lm = make_lm("bert")
    config = SamplerConfig(
        max_new_tokens=16, block_size=16, steps=16, seed=1, eos_penalty=-50.0, eos_early_stop=early_stop
    )
    sampler = Sampler(lm, config)
    [canvas] = sampler.canvases([[20, 21]])
    found, expected = denoise(sampler, [20, 21], canvas, colour=None), sampler.sample([[20, 21]])
    assert (found.sequences, found.completions) == (expected.sequences, expected.completions)
    assert found.row_nfe == expected.row_nfe
    assert log.getvalue() == ""


def test_the_blocks_of_a_model_of_its_own_are_cut_like_the_samplers(log, golden_lm):
    config = SamplerConfig(policy="llada21", max_new_tokens=10, threshold=0.01, editing_threshold=0.001, seed=1)
    sampler = Sampler(golden_lm("llada21"), config)
    prompt = list(range(20, 40))
    [canvas] = sampler.canvases([prompt])
    found, expected = denoise(sampler, prompt, canvas, colour=None), sampler.sample([prompt])
    assert (found.sequences, found.completions) == (expected.sequences, expected.completions)
