"""A conversation in the terminal with a model that edits: what is said is the sampler's, drawn and replayed."""

import io

import pytest
from rich.console import Console
from test_html import data_of

from dllm_ray import chat
from dllm_ray.conversation import LocalPartner
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.infilling import encode_gaps
from dllm_ray.models import edit_heads
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.viz import terminal

CONFIG = SamplerConfig(max_new_tokens=40, steps=3, temperature=1.0, seed=2)  # fewer than its blocks, were there any
MESSAGES = [{"role": "user", "content": "sort 21"}]


@pytest.fixture
def partner(make_lm):
    return LocalPartner(edit_heads.attach(make_lm("llama", max_position_embeddings=96)), "tiny")


def test_an_answer_is_drawn_and_replayed(partner, monkeypatch, tmp_path):
    log = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", log)
    partner.check(CONFIG)
    lm, prompt = partner.lm, chat.encode_prompt(partner.lm.tokenizer, MESSAGES)
    out = Sampler(lm, CONFIG).sample([prompt])
    assert partner.answer(MESSAGES, CONFIG, "step") == chat.decode(lm.tokenizer, out.completions[0], lm.spec.eot_text)
    assert len(log.file.getvalue().splitlines()) == out.nfe + 1
    partner.replay(tmp_path / "page.html")
    [row] = data_of((tmp_path / "page.html").read_text())["rows"]
    assert row["canvas"] == prompt and row["final"] == out.sequences[0]


def test_a_gap_is_filled(partner):
    lm = partner.lm
    row = encode_gaps(lm.tokenizer, lm.spec.mask_token_id, "sort [MASK:4] fox")
    out = Sampler(lm, CONFIG).infill([row])
    assert partner.fill("sort [MASK:4] fox", CONFIG, None) == chat.decode(lm.tokenizer, out.sequences[0])


def test_what_can_not_be_is_told(partner):
    with pytest.raises(ConfigError, match="policy"):
        partner.check(SamplerConfig(policy="random"))
    with pytest.raises(DataError, match="with 90 of an answer it doesn't fit the model's context of 96"):
        partner.answer(MESSAGES, SamplerConfig(max_new_tokens=90), None)
