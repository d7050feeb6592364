"""A row leaves once its text is there: the forwards follow the length of the answer, not that of the canvas."""

import pytest
import torch
from torch import nn

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Sampler, SamplerConfig

PROMPT, ANSWER, CANVAS, BLOCK = 10, 32, 256, 32


class Says(nn.Module):
    """Stands in for a network that answers every prompt with `ANSWER` tokens and then ends of text."""

    def __init__(self, vocabulary: int, eos: int):
        super().__init__()
        self.vocabulary, self.eos = vocabulary, eos

    def forward(self, input_ids, attention_mask=None, position_ids=None, positions=None, past_key_values=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        place = position_ids.flatten()[positions] - PROMPT
        token = torch.where(place < ANSWER, 30 + place % 5, self.eos)
        return 9.0 * nn.functional.one_hot(token, self.vocabulary).float()


@pytest.fixture
def terse(make_lm):
    lm = make_lm("llama", max_position_embeddings=512)
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    return DiffusionLM(lm.model, None, lm.spec, Says(vocabulary, lm.spec.eos_token_id))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "block"])
@pytest.mark.parametrize("policy", ["low_confidence", "maskgit_plus", "entropy", "topk_margin", "llada2", "llada21"])
def test_forwards_fall_in_proportion_and_the_text_is_the_same(terse, policy, cache):
    settings = {"policy": policy, "cache": cache, "threshold": 1.0 if policy.startswith("llada2") else None}
    settings |= {"max_new_tokens": CANVAS, "steps": CANVAS, "block_size": BLOCK}
    prompts = [list(range(40, 40 + PROMPT))] * 2

    whole = Sampler(terse, SamplerConfig(**settings, eos_early_stop=False)).sample(prompts)
    early = Sampler(terse, SamplerConfig(**settings)).sample(prompts)

    assert early.completions == whole.completions
    assert len(early.completions[0]) == ANSWER
    blocks, needed = CANVAS // BLOCK, ANSWER // BLOCK + 1  # the block that ends the text is begun, not finished
    revisions = policy == "llada21"  # which is done with a block only when nothing in it changes any more
    assert whole.nfe == CANVAS + revisions * blocks
    assert early.nfe <= (needed * (BLOCK + 1) if revisions else ANSWER + 1)
    assert early.tpf > whole.tpf * (blocks / needed - 0.5)


def test_a_finished_row_leaves_the_batch_to_the_others(terse):
    seen = []
    terse.module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    config = SamplerConfig(max_new_tokens=2 * BLOCK, steps=2 * BLOCK, block_size=BLOCK)
    short, long = list(range(40, 40 + PROMPT + ANSWER - 8)), list(range(40, 40 + PROMPT))  # 8 and 32 tokens to go
    out = Sampler(terse, config).sample([short, long])
    assert [len(answer) for answer in out.completions] == [8, ANSWER]
    assert out.row_nfe == [9, ANSWER + 1]
    assert seen == [2] * 9 + [1] * (ANSWER - 8)
