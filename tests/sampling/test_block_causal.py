"""Models with block-causal attention are denoised on their own grid of blocks, which starts at position 0."""

from dataclasses import replace

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Sampler, SamplerConfig

SIZE = 4


@pytest.fixture(scope="module")
def lm(make_lm):
    model = make_lm("qwen3")
    return DiffusionLM(model.model, model.tokenizer, replace(model.spec, attention="block_causal", block_size=SIZE))


def config(**changes) -> SamplerConfig:
    return SamplerConfig(**({"max_new_tokens": 10, "steps_per_block": 8, "block_size": None} | changes))


def commits(lm, settings, prompts):
    return [(event.row, position) for event in Sampler(lm, settings).stream(prompts) for position in event.positions]


def test_a_block_is_finished_before_the_next_one_begins_and_the_first_shares_the_prompts_last(lm):
    order = [position // SIZE for _, position in commits(lm, config(eos_early_stop=False), [[5, 6, 7, 8, 9, 10]])]
    assert order == sorted(order)
    assert order.count(1) == 2 and order.count(2) == 4 and order.count(3) == 4


def test_a_prefix_is_written_the_same_however_much_follows(lm):
    prompt = [[5, 6, 7, 8, 9]]
    short = Sampler(lm, config(max_new_tokens=7, eos_early_stop=False)).sample(prompt).sequences[0]
    long = Sampler(lm, config(max_new_tokens=19, eos_early_stop=False)).sample(prompt).sequences[0]
    assert long[: len(short)] == short


def test_rows_of_any_length_are_written_as_they_are_alone(lm):
    prompts = [[5, 6, 7], [9] * 8, [11]]
    together = Sampler(lm, config(eos_early_stop=False)).sample(prompts).sequences
    alone = [Sampler(lm, config(eos_early_stop=False)).sample([prompt]).sequences[0] for prompt in prompts]
    assert together == alone


def test_steps_are_shared_by_the_blocks_that_the_answer_touches(lm):
    settings = config(steps_per_block=None, steps=4, eos_early_stop=False)
    aligned, shifted = [5] * SIZE, [5] * (SIZE + 1)
    out = Sampler(lm, replace(settings, max_new_tokens=SIZE * 2)).sample([aligned, shifted])
    assert out.row_nfe[0] == 4
    assert out.row_nfe[1] <= 6  # three blocks, two steps each


def test_blocks_of_the_sampler_divide_those_of_the_model(lm):
    order = [position // 2 for _, position in commits(lm, config(block_size=2, eos_early_stop=False), [[5, 6, 7]])]
    assert order == sorted(order)
    with pytest.raises(ConfigError, match="block_size: 3 doesn't divide the 4 positions of a block"):
        Sampler(lm, config(block_size=3)).sample([[5]])


def test_infilling_goes_block_by_block_too(lm):
    mask = lm.spec.mask_token_id
    row = [5, mask, 6, mask, mask, 7, mask, 8, mask]
    out = Sampler(lm, config(steps=8, steps_per_block=None)).infill([row])
    assert mask not in out.sequences[0]
    assert [token for token, given in zip(out.sequences[0], row, strict=True) if given != mask] == [5, 6, 7, 8]


def test_the_models_own_settings_are_the_default(lm):
    spec = replace(lm.spec, sampler={"max_new_tokens": 6, "steps_per_block": 2, "block_size": SIZE})
    own = DiffusionLM(lm.model, lm.tokenizer, spec)
    assert Sampler(own).config == SamplerConfig(max_new_tokens=6, steps_per_block=2, block_size=SIZE)
    assert len(Sampler(own).sample([[5]]).sequences[0]) == 7
