"""Rows that are taken out between steps, and what becomes of the others: nothing."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_testing import finish

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Engine, Sampler, SamplerConfig
from dllm_ray.sampling.engine import Row

GRID = 4


@pytest.fixture(scope="module")
def models(sharp_lm) -> dict[str, DiffusionLM]:
    full = sharp_lm("llama")
    causal = DiffusionLM(full.model, None, dataclasses.replace(full.spec, attention="block_causal", block_size=GRID))
    return {"full": full, "causal": causal, "encoder": sharp_lm("bert")}


@st.composite
def rows(draw, lm: DiffusionLM, key: int, caches: list[str]) -> Row:
    config = SamplerConfig(
        max_new_tokens=draw(st.integers(4, 14)),
        block_size=draw(st.sampled_from([2, 4])),
        steps_per_block=draw(st.integers(1, 4)),
        policy=draw(st.sampled_from(["low_confidence", "random", "maskgit_plus", "llada2", "llada21"])),
        cache=draw(st.sampled_from(caches)),
        cfg_scale=draw(st.sampled_from([0.0, 0.7])),
        temperature=draw(st.sampled_from([0.0, 1.0])),
    )
    prompt = draw(st.lists(st.integers(10, 290), min_size=1, max_size=9))
    [row] = Sampler(lm, config).rows([prompt], [draw(st.integers(0, 2**40))])
    return dataclasses.replace(row, key=key)


@given(data=st.data())
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
def test_others_are_what_they_are_alone_whoever_leaves(models, data):
    name = data.draw(st.sampled_from(["full", "causal", "encoder"]))
    lm = models[name]
    caches = ["none", "block"] if name == "causal" else ["none", "prefix", "dual", "block"]
    engine = Engine(lm, max_rows=data.draw(st.sampled_from([None, 2, 4])), trace=True)
    admitted, gone, done = {}, {}, {}
    for key in range(data.draw(st.integers(2, 6))):
        admitted[key] = data.draw(rows(lm, key, caches))
        engine.admit(admitted[key])
    while engine.busy:
        for _ in range(data.draw(st.integers(0, 3))):
            engine.step()
        done |= {item.row: item for item in engine.take_finished()}
        if data.draw(st.booleans()):
            key = data.draw(st.sampled_from(sorted(admitted)))
            come_to = engine.cancel(key)
            assert (come_to is None) == (key in done or key in gone)
            gone |= {} if come_to is None else {key: come_to}
        if data.draw(st.booleans()) and len(admitted) < 10:
            admitted[len(admitted)] = data.draw(rows(lm, len(admitted), caches))
            engine.admit(admitted[len(admitted) - 1])
    assert gone.keys().isdisjoint(done) and {*gone, *done} == {*admitted}
    for key, row in admitted.items():
        single = Engine(lm, trace=True)
        single.admit(row)
        while single.busy:
            single.step()
        [alone] = single.take_finished()
        if key in done:
            assert done[key].tokens == alone.tokens
            assert done[key].history.tolist() == alone.history.tolist()
            assert done[key].nfe == alone.nfe
        else:  # it had come so far as it would have alone
            steps = len(gone[key].history)
            assert gone[key].history.tolist() == alone.history[:steps].tolist()
            assert gone[key].nfe <= alone.nfe


def test_a_cancelled_row_tells_what_it_had_come_to(sharp_lm):
    lm = sharp_lm()
    config = SamplerConfig(max_new_tokens=8, block_size=8, steps=8, eos_early_stop=False)
    engine = Engine(lm, max_rows=1, events=True)
    for row in Sampler(lm, config).rows([[40, 41], [42]]):
        engine.admit(row)
    [commit] = engine.step()
    eos = lm.spec.eos_token_id
    expected = [40, 41, *[eos] * 8]
    for place, token in zip(commit.positions, commit.tokens, strict=True):
        expected[place] = token
    come_to = engine.cancel(0)
    assert (come_to.row, come_to.tokens, come_to.nfe) == (0, expected, 1)
    waiting = engine.cancel(1)
    assert (waiting.tokens, waiting.nfe) == ([42, *[eos] * 8], 0)
    assert engine.cancel(0) is None and engine.cancel(7) is None
    assert not engine.busy and engine.step() == [] and engine.take_finished() == []


def test_a_waiting_row_takes_the_place_at_the_next_step(sharp_lm):
    lm = sharp_lm()
    config = SamplerConfig(max_new_tokens=8, block_size=8, steps=8, eos_early_stop=False)
    engine = Engine(lm, max_rows=2, events=True)
    for row in Sampler(lm, config).rows([[40], [41], [42]]):
        engine.admit(row)
    engine.step()
    engine.cancel(0)
    assert sorted(commit.row for commit in engine.step()) == [1, 2]
    assert sorted(finish(engine)) == [1, 2]
