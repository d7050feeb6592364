"""Keys and values that are kept: what is stored where, what a forward computes, and that the text stays what it is."""

import dataclasses
from functools import cache

import pytest
import torch
from sampling_testing import finish, sharpen

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Engine, Sampler, SamplerConfig
from dllm_ray.sampling.engine import Row
from dllm_ray.sampling.kv_cache import CanvasCache, keeps
from dllm_ray.sampling.unmasking import commit_schedule

PROMPTS = [[40, 41, 42, 43, 44], [50, 51], [60, 61, 62, 63, 64, 65, 66, 67]]
SIZE = 4

# --- the store


def written(store: CanvasCache, slots, positions, keys, filler=None, everything=False, first=False, base=0):
    """Writes numbers that name their place (10 * slot + position + base) and returns the keys that are seen."""
    positions = torch.tensor(positions)
    filler = torch.zeros_like(positions, dtype=torch.bool) if filler is None else torch.tensor(filler)
    store.window(torch.tensor(slots), positions, filler, keys, everything, first)
    names = torch.tensor(slots)[:, None] * 10 + positions + base
    states = names[:, None, :, None].float().expand(-1, 2, -1, 3)  # two heads of three numbers
    seen, values = store.layers[0].update(states, -states)
    assert torch.equal(seen, -values)
    assert seen.shape[1:] == (2, keys, 3)
    return seen[:, 0, :, 0].tolist()


@pytest.fixture
def store() -> CanvasCache:
    made = CanvasCache(layers=1)
    made.reserve(slots=3, width=5)
    return made


WHOLE = [[0, 1, 2, 3, 4]] * 3


def test_a_window_replaces_its_own_positions_and_sees_the_others_as_they_were(store):
    written(store, [0, 1, 2], WHOLE, keys=5, everything=True, first=True)
    seen = written(store, [0, 1, 2], [[2, 3]] * 3, keys=5, first=True, base=100)
    assert seen == [[0, 1, 102, 103, 4], [10, 11, 112, 113, 14], [20, 21, 122, 123, 24]]


def test_a_window_sees_no_more_keys_than_asked_for(store):
    written(store, [0, 1, 2], WHOLE, keys=5, everything=True, first=True)
    assert written(store, [0, 1, 2], [[1]] * 3, keys=3, first=True, base=100)[1] == [10, 111, 12]


def test_rows_may_take_any_slots_and_leave_the_others_alone(store):
    written(store, [0, 1, 2], WHOLE, keys=5, everything=True, first=True)
    seen = written(store, [2, 0], [[0], [4]], keys=5, base=100)
    assert seen == [[120, 21, 22, 23, 24], [0, 1, 2, 3, 104]]
    assert written(store, [1], [[0]], keys=5)[0] == [10, 11, 12, 13, 14]


def test_filler_is_never_seen(store):
    written(store, [0, 1, 2], WHOLE, keys=5, everything=True, first=True)
    seen = written(store, [0, 1], [[3, 4], [4, 4]], keys=5, filler=[[False, False], [False, True]], base=100)
    assert seen == [[0, 1, 2, 103, 104], [10, 11, 12, 13, 114]]
    seen = written(store, [0, 1], [[0, 1], [0, 1]], keys=5, filler=[[False] * 2, [True] * 2], base=200)
    assert seen[1] == [10, 11, 12, 13, 114]


def test_rows_that_move_take_what_is_stored_with_them(store):
    written(store, [0, 1, 2], WHOLE, keys=5, everything=True, first=True)
    store.move(torch.tensor([2]), torch.tensor([0]))
    assert written(store, [0], [[0]], keys=5, base=20)[0] == [20, 21, 22, 23, 24]
    store.move(torch.tensor([0, 1]), torch.tensor([1, 2]))  # all at once, not one after the other
    assert written(store, [2], [[0]], keys=5, base=-10)[0] == [10, 11, 12, 13, 14]


def test_room_grows_around_what_is_stored_and_never_shrinks(store):
    written(store, [0, 1, 2], WHOLE, keys=5, everything=True, first=True)
    store.reserve(slots=4, width=7)
    store.reserve(slots=1, width=2)
    assert store.slots == 4
    seen = written(store, [1, 3], [[5, 6], [0, 1]], keys=7)
    assert seen == [[10, 11, 12, 13, 14, 15, 16], [30, 31, 0, 0, 0, 0, 0]]


def test_nothing_moves_before_the_first_forward():
    empty = CanvasCache(layers=2)
    empty.reserve(2, 4)
    empty.move(torch.tensor([0]), torch.tensor([1]))
    assert not any(layer.is_initialized for layer in empty.layers)


# --- the block cache is exact


def slow(lm: DiffusionLM, prompt: list[int], config: SamplerConfig) -> list[list[int]]:
    """Every canvas of one row: block-causal attention by an explicit mask over the whole canvas, nothing kept."""
    mask, total = lm.spec.mask_token_id, len(prompt) + config.max_new_tokens
    size, steps = config.blocks()
    block_T = torch.arange(total).sub(len(prompt)).div(size, rounding_mode="floor")
    visible = (block_T[None, :] <= block_T[:, None])[None, None]
    canvas = prompt + [mask] * config.max_new_tokens
    history = [list(canvas)]
    for start in range(len(prompt), total, size):
        stop = min(start + size, total)
        for quota in commit_schedule(stop - start, steps, config.schedule):
            logits = block_causal_logits(lm, canvas, visible, config)
            if config.cfg_scale:
                hidden = [mask] * len(prompt) + canvas[len(prompt) :]
                unguided = block_causal_logits(lm, hidden, visible, config)
                logits = unguided + (config.cfg_scale + 1) * (logits - unguided)
            offers = []
            for place in (place for place in range(start, stop) if canvas[place] == mask):
                shares = logits[place].double().softmax(0)
                textual = shares.clone()
                textual[mask] = -1
                offers.append((-textual.max().item(), place, int(textual.argmax())))
            for _, place, token in sorted(offers)[:quota]:
                canvas[place] = token
            history.append(list(canvas))
    return history


@torch.no_grad()
def block_causal_logits(lm: DiffusionLM, canvas: list[int], visible: torch.Tensor, config: SamplerConfig):
    return lm.logits(torch.tensor([canvas]), visible, shift=bool(config.shift_logits))[0]


BLOCK = SamplerConfig(max_new_tokens=14, block_size=SIZE, steps=12, cache="block", eos_early_stop=False)
ARCHITECTURES = pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama", "qwen3"])
CHANGES = pytest.mark.parametrize(
    "change",
    [
        {},
        {"shift_logits": True},
        {"cfg_scale": 0.8},
        {"cfg_scale": 0.8, "shift_logits": True},
        {"steps_per_block": 4, "schedule": "cosine"},
        {"block_size": 5, "steps": 6},
    ],
    ids=str,
)


@ARCHITECTURES
@CHANGES
def test_a_block_cache_writes_what_block_causal_attention_writes_without_one(sharp_lm, architecture, change):
    lm, config = sharp_lm(architecture), dataclasses.replace(BLOCK, **change)
    out = Sampler(lm, config).sample(PROMPTS, trace=True)
    for prompt, ours in zip(PROMPTS, out.history, strict=True):
        assert ours.tolist() == slow(lm, prompt, config)


def block_causal(lm: DiffusionLM, size: int = SIZE) -> DiffusionLM:
    """The same weights, as a model whose attention is block-causal."""
    return DiffusionLM(lm.model, None, dataclasses.replace(lm.spec, attention="block_causal", block_size=size))


@ARCHITECTURES
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shift_logits": True, "cfg_scale": 0.5},
        {"block_size": 2},  # blocks of the sampler within those of the attention
        {"threshold": 0.3},
        {"temperature": 1.0, "policy": "random"},
        {"policy": "llada2", "threshold": 0.3},
        {"policy": "llada21", "threshold": 0.3, "editing_threshold": 0.2},
    ],
    ids=str,
)
def test_a_block_cache_changes_nothing_on_a_block_causal_model(sharp_lm, architecture, change):
    lm = block_causal(sharp_lm(architecture))
    config = dataclasses.replace(BLOCK, seed=1, **change)
    cached = Sampler(lm, config).sample(PROMPTS, trace=True)
    plain = Sampler(lm, dataclasses.replace(config, cache="none")).sample(PROMPTS, trace=True)
    assert [item.tolist() for item in cached.history] == [item.tolist() for item in plain.history]
    assert cached.row_nfe == plain.row_nfe


@pytest.mark.parametrize("model", ["llada2", "llada21"])
@pytest.mark.parametrize("policy", ["own", "low_confidence"])
def test_a_block_cache_changes_nothing_on_published_block_causal_models(golden_lm, model, policy):
    lm = golden_lm(model)
    config = SamplerConfig(
        max_new_tokens=20,
        block_size=lm.spec.grid if policy != "own" else 8,
        steps=40,
        policy=model if policy == "own" else policy,
        eos_early_stop=False,
    )
    prompts = [[40, 41, 42, 43, 44], [50, 51], list(range(60, 73))]
    cached = Sampler(lm, dataclasses.replace(config, cache="block")).sample(prompts, trace=True)
    plain = Sampler(lm, config).sample(prompts, trace=True)
    assert [item.tolist() for item in cached.history] == [item.tolist() for item in plain.history]


def rows_of(lm: DiffusionLM, config: SamplerConfig, news: list[int]) -> list[Row]:
    """Rows of other prompts and answers of other lengths, in the order of `news`."""
    rows = []
    for key, new in enumerate(news):
        sampler = Sampler(lm, dataclasses.replace(config, max_new_tokens=new))
        prompt = PROMPTS[key % 3][: 2 + key]
        [row] = sampler._continuations([prompt], [key])
        rows.append(dataclasses.replace(row, key=key))
    return rows


def alone(lm: DiffusionLM, row: Row) -> list[int]:
    engine = Engine(lm)
    engine.admit(row)
    return finish(engine)[row.key]


CACHED = pytest.mark.parametrize("cache", ["prefix", "dual", "block"])
GUIDED = pytest.mark.parametrize("cfg_scale", [0.0, 0.7], ids=["plain", "guided"])


@CACHED
@GUIDED
@pytest.mark.parametrize("max_rows", [None, 2])
def test_a_cached_row_is_the_same_when_others_join_late_and_leave_early(sharp_lm, cache, cfg_scale, max_rows):
    lm = sharp_lm("llama")
    config = SamplerConfig(block_size=SIZE, steps_per_block=3, cache=cache, cfg_scale=cfg_scale, eos_early_stop=False)
    rows = rows_of(lm, config, [4, 16, 6, 12, 3, 9])  # the first leaves first: the last takes its slot
    engine = Engine(lm, max_rows)
    texts = {}
    for row in rows:
        engine.admit(row)
        engine.step()
        engine.step()
        texts |= {item.row: item.tokens for item in engine.take_finished()}
    assert texts | finish(engine) == {row.key: alone(lm, row) for row in rows}


@CACHED
@GUIDED
def test_rows_whose_neighbours_retire_keep_their_keys_and_values(sharp_lm, monkeypatch, cache, cfg_scale):
    lm = sharp_lm("qwen3")
    config = SamplerConfig(block_size=SIZE, steps_per_block=3, cache=cache, cfg_scale=cfg_scale, eos_early_stop=False)
    rows = rows_of(lm, config, [3, 4, 16, 7, 13])
    moves = []
    move = CanvasCache.move
    monkeypatch.setattr(
        CanvasCache, "move", lambda self, *places: (moves.append([p.tolist() for p in places]), move(self, *places))
    )
    engine = Engine(lm)
    for row in rows:
        engine.admit(row)
    together = finish(engine)
    assert moves  # rows from the end filled the places of those that left
    assert together == {row.key: alone(lm, row) for row in rows}


def test_caches_of_every_kind_share_a_batch(sharp_lm):
    lm = sharp_lm("llama")
    kinds = ["none", "prefix", "dual", "block"] * 2
    rows = []
    for key, (kind, new) in enumerate(zip(kinds, [5, 9, 14, 11, 3, 12, 6, 8], strict=True)):
        guided = 0.5 if key % 3 == 0 else 0.0
        config = SamplerConfig(
            max_new_tokens=new, block_size=3 + key % 2, steps_per_block=3, cache=kind, cfg_scale=guided
        )
        [row] = Sampler(lm, config)._continuations([PROMPTS[key % 3]], [key])
        rows.append(dataclasses.replace(row, key=key))
    engine = Engine(lm)
    for row in rows:
        engine.admit(row)
        engine.step()
    texts = {item.row: item.tokens for item in engine.take_finished()}
    assert texts | finish(engine) == {row.key: alone(lm, row) for row in rows}


def test_rows_without_a_cache_may_follow_those_with_one(sharp_lm):
    lm = sharp_lm("llama")
    config = SamplerConfig(block_size=SIZE, steps_per_block=SIZE, eos_early_stop=False)
    cached, *plain = rows_of(lm, config, [4, 4, 8, 8])
    engine = Engine(lm)
    engine.admit(dataclasses.replace(cached, config=dataclasses.replace(config, cache="prefix")))
    finish(engine)
    for row in plain:  # the first of them leaves before the others
        engine.admit(row)
    assert finish(engine) == {row.key: alone(lm, row) for row in plain}


# --- prefix and dual caches are exact where nothing is stale


REFRESHING = pytest.mark.parametrize("cache", ["prefix", "dual"])


@ARCHITECTURES
@REFRESHING
@pytest.mark.parametrize("change", [{}, {"shift_logits": True}, {"cfg_scale": 0.8}], ids=str)
def test_with_one_step_for_each_block_every_forward_is_a_whole_one(sharp_lm, architecture, cache, change):
    lm = sharp_lm(architecture)
    config = SamplerConfig(max_new_tokens=14, block_size=SIZE, steps=4, eos_early_stop=False, **change)
    plain = Sampler(lm, config).sample(PROMPTS, trace=True)
    cached = Sampler(lm, dataclasses.replace(config, cache=cache)).sample(PROMPTS, trace=True)
    assert [item.tolist() for item in cached.history] == [item.tolist() for item in plain.history]


@pytest.fixture(scope="module")
def shallow_lm(make_lm):
    """A sharp model of one layer: the keys and values of a position follow from its token alone."""

    @cache
    def make(architecture: str, seed: int) -> DiffusionLM:
        lm = make_lm(architecture, seed=seed, num_hidden_layers=1, extra=LOCAL if architecture == "modernbert" else {})
        return sharpen(lm, seed)

    return make


LOCAL = {"local_attention": 8, "layer_types": ["sliding_attention"]}  # sees four positions to each side
STEPS = SamplerConfig(max_new_tokens=14, block_size=SIZE, steps=14, eos_early_stop=False)


@REFRESHING
@pytest.mark.parametrize("change", [{}, {"block_size": None}, {"shift_logits": True}, {"cfg_scale": 0.8}], ids=str)
@pytest.mark.parametrize("seed", range(3))
@ARCHITECTURES
def test_nothing_is_stale_in_a_model_of_one_layer(shallow_lm, architecture, cache, change, seed):
    lm, config = shallow_lm(architecture, seed), dataclasses.replace(STEPS, **change)
    plain = Sampler(lm, config).sample(PROMPTS, trace=True)
    cached = Sampler(lm, dataclasses.replace(config, cache=cache)).sample(PROMPTS, trace=True)
    assert [item.tolist() for item in cached.history] == [item.tolist() for item in plain.history]


def test_an_encoder_that_has_kept_keys_computes_what_it_did_before(make_lm):
    lm, ids = make_lm("modernbert", extra={"local_attention": 8}), torch.arange(40, 60).repeat(2, 1)
    padded = torch.ones_like(ids)
    padded[1, 12:] = 0
    before = lm.logits(ids, padded)
    Sampler(lm, dataclasses.replace(STEPS, cache="dual")).sample(PROMPTS)
    assert torch.equal(lm.logits(ids, padded), before)


@REFRESHING
def test_deeper_models_are_approximated(sharp_lm, cache):
    lm = sharp_lm("llama")
    plain = Sampler(lm, STEPS).sample(PROMPTS).sequences
    assert Sampler(lm, dataclasses.replace(STEPS, cache=cache)).sample(PROMPTS).sequences != plain


# --- what is computed, and where it is kept


def widths(lm: DiffusionLM, config: SamplerConfig, prompt: list[int]) -> list[int]:
    """Positions of the row that each forward computes."""
    seen = []
    handle = lm.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    Sampler(lm, config).sample([prompt])
    handle.remove()
    return seen


PROMPT, NEW = PROMPTS[0], 12  # five and twelve positions, in blocks of four, with three steps each


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ("none", [17, 17, 17] * 3),
        ("prefix", [17, 12, 12, 17, 8, 8, 17, 4, 4]),  # the block and what follows
        ("dual", [17, 4, 4] * 3),  # the block
        ("block", [9, 4, 4, 8, 4, 4, 8, 4, 4]),  # all before it, then the block; the block before it once more
    ],
)
@pytest.mark.parametrize("shift", [False, True])
def test_a_cached_step_computes_only_what_may_change(sharp_lm, cache, expected, shift):
    config = SamplerConfig(
        max_new_tokens=NEW, block_size=SIZE, steps_per_block=3, cache=cache, shift_logits=shift, eos_early_stop=False
    )
    if shift and cache != "none":  # and the position before the block, which its first logits are read from
        whole = {17, 9, 8} if cache == "block" else {17}
        expected = [width if width in whole else width + 1 for width in expected]
    assert widths(sharp_lm("llama"), config, PROMPT) == expected


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_dreams_blocks_are_computed_alone_after_their_first_position(golden_lm, cache):
    lm = golden_lm("dream")
    config = SamplerConfig(
        max_new_tokens=NEW, block_size=SIZE, steps_per_block=3, cache=cache, policy="entropy", eos_early_stop=False
    )
    expected = {"prefix": [17, 12, 12, 17, 8, 8, 17, 4, 4], "dual": [17, 4, 4] * 3}[cache]
    assert widths(lm, config, PROMPT) == expected


def test_a_guided_row_has_a_twin_with_keys_of_its_own(sharp_lm):
    lm, shapes = sharp_lm("llama"), []
    handle = lm.module.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    config = SamplerConfig(
        max_new_tokens=8, block_size=SIZE, steps_per_block=2, cache="dual", cfg_scale=1.0, eos_early_stop=False
    )
    Sampler(lm, config).sample([PROMPT, PROMPT])
    handle.remove()
    assert shapes == [(4, 13), (4, SIZE), (4, 13), (4, SIZE)]


@CACHED
def test_keys_and_values_are_allocated_once(sharp_lm, cache):
    lm = sharp_lm("llama")
    config = SamplerConfig(block_size=SIZE, steps_per_block=3, cache=cache, eos_early_stop=False)
    engine = Engine(lm, max_rows=2)
    rows = rows_of(lm, config, [12, 4, 6, 8])  # the widest is among the first
    for row in rows[:2]:
        engine.admit(row)
    engine.step()
    first = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in engine._cache.layers]
    assert len(set(first)) == lm.layers
    for row in rows[2:]:
        engine.admit(row)
    while engine.busy:
        engine.step()
        assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in engine._cache.layers] == first


def test_no_cache_is_made_where_no_row_asks_for_one(sharp_lm):
    engine = Engine(sharp_lm("llama"))
    for row in rows_of(engine.lm, SamplerConfig(block_size=SIZE, steps_per_block=3), [4, 6]):
        engine.admit(row)
    finish(engine)
    assert engine._cache is None


# --- architectures


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama", "qwen3", "gpt2", "olmo"])
def test_most_architectures_compute_with_kept_keys_what_they_compute_without(make_lm, architecture):
    assert keeps(make_lm(architecture))


@pytest.mark.parametrize("architecture", ["biogpt", "bloom", "distilbert"])
def test_an_architecture_that_doesnt_is_found_by_measuring(make_lm, architecture):
    """They count positions by themselves, bring a bias of their own width, or don't attend through transformers."""
    lm = make_lm(architecture)
    with pytest.raises(ConfigError, match="set cache none"):
        Sampler(lm, dataclasses.replace(STEPS, cache="dual")).sample(PROMPTS)
    assert Sampler(lm, STEPS).sample(PROMPTS).nfe == 14
