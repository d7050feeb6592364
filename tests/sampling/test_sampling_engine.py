"""The engine: rows of different settings, lengths and progress in one batch, each as if it were alone."""

import dataclasses

import pytest
from sampling_testing import finish

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Engine, SamplerConfig
from dllm_ray.sampling.engine import Row

CONFIGS = [
    SamplerConfig(temperature=1.0),
    SamplerConfig(policy="random", temperature=0.5, schedule="cosine"),
    SamplerConfig(cfg_scale=1.5, cfg_keep_tokens=(41,)),
    SamplerConfig(suppress_tokens=tuple(range(10, 100)), begin_suppress_tokens=(150, 160)),
    SamplerConfig(cfg_scale=0.5, temperature=1.2, eos_early_stop=False),
    SamplerConfig(begin_suppress_tokens=tuple(range(10, 300))),  # nearly every confidence is 0: ties
    SamplerConfig(),
]
KEYS = range(len(CONFIGS))


def a_row(lm: DiffusionLM, key: int) -> Row:
    """Rows of every setting of `CONFIGS`, of growing prompts, answers and blocks."""
    prompt, new = list(range(40, 41 + key)), 8 + 2 * key
    config = CONFIGS[key]
    return Row(
        tokens=prompt + [lm.spec.mask_token_id] * new,
        open=[False] * len(prompt) + [True] * new,
        config=config,
        block_start=len(prompt),
        block_size=3 + key,
        steps_per_block=1 + key % 4,
        seed=1000 + key,
        early_stop=config.eos_early_stop,
        key=key,
    )


def alone(lm: DiffusionLM, key: int) -> list[int]:
    engine = Engine(lm)
    engine.admit(a_row(lm, key))
    return finish(engine)[key]


ARCHITECTURES = pytest.mark.parametrize("architecture", ["bert", "llama"])


@ARCHITECTURES
@pytest.mark.parametrize("max_rows", [None, 1, 2, 4])
def test_a_row_is_the_same_among_rows_of_other_settings(sharp_lm, architecture, max_rows):
    lm = sharp_lm(architecture)
    engine = Engine(lm, max_rows)
    for key in reversed(KEYS):
        engine.admit(a_row(lm, key))
    assert finish(engine) == {key: alone(lm, key) for key in KEYS}


@ARCHITECTURES
def test_a_row_is_the_same_when_others_join_half_way(sharp_lm, architecture):
    lm = sharp_lm(architecture)
    engine = Engine(lm)
    for key in KEYS:  # a longer one each time, so that the batch widens under the rows in it
        engine.admit(a_row(lm, key))
        engine.step()
        engine.step()
    assert finish(engine) == {key: alone(lm, key) for key in KEYS}


@ARCHITECTURES
@pytest.mark.parametrize("guided", [False, True])
def test_the_vocabulary_head_sees_the_open_positions_of_current_blocks_only(sharp_lm, architecture, guided):
    lm = sharp_lm(architecture)
    seen = []
    head = lm.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    engine = Engine(lm)
    config = SamplerConfig(cfg_scale=1.0 if guided else 0.0)
    for key in range(2):  # 8 and 10 masks, in blocks of 4, one a step
        row = dataclasses.replace(a_row(lm, key), config=config, block_size=4, steps_per_block=4, early_stop=False)
        engine.admit(row)
    finish(engine)
    handle.remove()
    expected = [8, 6, 4, 2, 8, 6, 4, 2, 2, 1]  # the second row's last block has two masks
    assert seen == [count * (2 if guided else 1) for count in expected]


def test_max_rows_bounds_the_batch_and_waiting_rows_take_free_places(sharp_lm):
    lm = sharp_lm()
    widths = []
    handle = lm.module.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[0]))
    engine = Engine(lm, max_rows=2)
    for key in range(3):
        row = dataclasses.replace(a_row(lm, key), config=SamplerConfig(), block_size=99, early_stop=False)
        engine.admit(dataclasses.replace(row, steps_per_block=(2, 5, 4)[key]))
    finish(engine)
    handle.remove()
    assert widths == [2, 2, 2, 2, 2, 1]  # row 2 takes row 0's place after two steps and stays a step longer than row 1
    assert engine.forwards == 6


def test_rows_leave_as_they_finish(sharp_lm):
    lm = sharp_lm()
    engine = Engine(lm, events=True)
    for key, steps in ((0, 1), (1, 3)):
        engine.admit(dataclasses.replace(a_row(lm, key), block_size=99, steps_per_block=steps, early_stop=False))
    first = engine.step()
    assert [(event.row, event.done) for event in first] == [(0, True), (1, False)]
    assert [item.row for item in engine.take_finished()] == [0]
    assert engine.take_finished() == []
    assert [event.row for event in engine.step()] == [1]


def test_an_idle_engine_does_nothing(sharp_lm):
    engine = Engine(sharp_lm(), events=True)
    assert not engine.busy
    assert engine.step() == []
    assert engine.forwards == 0


def test_a_row_beyond_the_context_is_refused_at_the_door(sharp_lm):
    lm = sharp_lm()
    engine = Engine(lm)
    long = dataclasses.replace(a_row(lm, 0), tokens=[7] * (lm.max_length + 1), open=[True] * (lm.max_length + 1))
    with pytest.raises(ConfigError, match="shorten the prompt"):
        engine.admit(long)
    assert not engine.busy


@pytest.mark.parametrize("config", [SamplerConfig(), SamplerConfig(suppress_tokens=(10_000,))])
def test_a_token_the_model_does_not_have_is_refused_at_the_door(sharp_lm, config):
    lm = sharp_lm()
    row = dataclasses.replace(a_row(lm, 1), config=config)
    if not config.suppress_tokens:
        row.tokens[0] = 10_000
    with pytest.raises(ConfigError, match="token 10000 is outside the model's vocabulary"):
        Engine(lm).admit(row)


def test_a_row_with_nothing_to_write_is_finished(sharp_lm):
    engine = Engine(sharp_lm(), trace=True)
    row = a_row(engine.lm, 1)
    engine.admit(dataclasses.replace(row, open=[False] * len(row.open)))
    assert not engine.busy
    (done,) = engine.take_finished()
    assert (done.tokens, done.nfe, done.history.tolist()) == (row.tokens, 0, [row.tokens])


@pytest.mark.parametrize("key", [0, 1])
def test_a_model_that_gives_nan_is_an_error(make_lm, key):
    lm = make_lm()
    lm.model.get_input_embeddings().weight.data[lm.spec.mask_token_id] = float("nan")
    engine = Engine(lm)
    engine.admit(a_row(lm, key))
    with pytest.raises(ModelError, match="NaN"):
        engine.step()


def test_a_trace_holds_the_canvas_before_and_after_every_step(sharp_lm):
    lm = sharp_lm()
    engine, row = Engine(lm, trace=True, events=True), dataclasses.replace(a_row(lm, 0), early_stop=False)
    engine.admit(row)
    canvases = [list(row.tokens)]
    while engine.busy:
        [event] = engine.step()
        canvases.append(list(canvases[-1]))
        for place, token in zip(event.positions, event.tokens, strict=True):
            canvases[-1][place] = token
    [done] = engine.take_finished()
    assert done.history.tolist() == canvases
    assert len(canvases) == done.nfe + 1
    assert done.tokens == canvases[-1]
