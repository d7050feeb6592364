"""Token for token what the reference's sampler writes, step by step, at temperature 0."""

import json

import numpy as np
import pytest
import torch

from dllm_ray.sampling import Sampler, SamplerConfig

CASES = [
    ("modernbert", "full_b32"),
    ("modernbert", "b8_s32"),
    ("modernbert", "b8_s10_ceil"),
    ("modernbert", "b12_lastpartial_s32"),
    ("modernbert", "uneq_b16_s16"),
    ("modernbert", "cfg05_keep_b32_s16"),
    ("modernbert", "maxlen48_uneq"),
    ("modernbert", "infill_bNone_s8"),
    ("modernbert", "infill_b8_s16"),
    ("modernbert", "infill_cfg1_b16_s8"),
    ("a2d_qwen3", "full_b32"),
    ("a2d_qwen3", "uneq_b16_s16"),
    ("a2d_qwen3", "suppress5_b32_s32"),
    ("a2d_qwen3", "maxlen48_uneq"),
    ("a2d_qwen3", "infill_cfg1_b16_s8"),
    ("a2d_qwen2", "cfg05_keep_b32_s16"),
    ("a2d_qwen2", "cosine_b32_s16"),
    ("a2d_qwen2", "infill_b8_s16"),
]


def recorded(golden, model: str, case: str) -> tuple[dict, SamplerConfig, torch.Tensor]:
    [facts] = [item for item in json.loads((golden / model / "samplers_mdlm.json").read_text()) if item["case"] == case]
    names = {"scheduler": "schedule", "right_shift_logits": "shift_logits", "remasking": "policy"}
    fields = {names.get(name, name): value for name, value in facts["config"].items()}
    history = torch.from_numpy(np.load(golden / model / "samplers_mdlm.npz")[case].astype(np.int64))
    return facts, SamplerConfig(**fields, eos_early_stop=False), history


@pytest.mark.parametrize(("model", "case"), CASES)
def test_every_step_writes_the_references_tokens(golden, golden_lm, model, case):
    facts, config, history = recorded(golden, model, case)
    sampler = Sampler(golden_lm(model), config)

    out = (sampler.sample if facts["method"] == "sample" else sampler.infill)(facts["inputs"], trace=True)

    for row, ours in enumerate(out.history):
        theirs = history[:, row, : ours.shape[1]]
        if facts["method"] == "infill":  # a row of theirs waits while another fills a block that is full in this one
            theirs = torch.unique_consecutive(theirs, dim=0)
        assert ours.tolist() == theirs.tolist(), f"row {row}"
        assert out.sequences[row] == theirs[-1].tolist()
    assert out.nfe == max(out.row_nfe)
    if facts["method"] == "sample":
        assert out.nfe == facts["forwards"]
    else:
        assert out.nfe <= facts["forwards"]


@pytest.mark.parametrize("model", ["a2d_qwen3", "a2d_qwen2"])
def test_a_mask_in_the_prompt_stays_where_the_reference_writes_over_it(golden, golden_lm, model):
    facts, config, history = recorded(golden, model, "prompt_contains_mask")
    [prompt], lm = facts["inputs"], golden_lm(model)
    place = prompt.index(lm.spec.mask_token_id)

    out = Sampler(lm, config).sample([prompt], trace=True)

    same = int((history[:, 0, place] == lm.spec.mask_token_id).sum())  # canvases before it is written over
    assert same > 1
    assert out.history[0][:same].tolist() == history[:same, 0].tolist()
    assert out.sequences[0][: len(prompt)] == prompt
    assert lm.spec.mask_token_id not in out.sequences[0][len(prompt) :]
