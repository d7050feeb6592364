"""What holds for every policy, cache and schedule: small random rows, of settings that no one would choose."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Engine, Sampler, SamplerConfig
from dllm_ray.sampling.config import CACHES, LLADA2_POLICIES, POLICIES, SCHEDULES
from dllm_ray.sampling.engine import Commit, Finished, Row
from dllm_ray.sampling.plan import Plan

GRID = 4
FEW = {"suppress_health_check": list(HealthCheck)}
EVERY = pytest.mark.parametrize(
    ("policy", "cache"), [(policy, cache) for policy in POLICIES for cache in CACHES], ids=lambda value: value
)


@pytest.fixture(scope="session")
def models(sharp_lm) -> dict[str, DiffusionLM]:
    """full: bidirectional; causal: the same weights under block-causal attention."""
    full = sharp_lm("llama")
    causal = DiffusionLM(full.model, None, dataclasses.replace(full.spec, attention="block_causal", block_size=GRID))
    return {"full": full, "causal": causal, "encoder": sharp_lm("bert")}


REFRESHED = ("full", "encoder")
FITTING = {
    "none": ("full", "causal", "encoder"),
    "prefix": REFRESHED,
    "dual": REFRESHED,
    "block": ("full", "causal", "encoder"),
}
"""Models that can use a cache."""
EVERYWHERE = pytest.mark.parametrize(
    ("policy", "cache", "model"),
    [(policy, cache, model) for policy in POLICIES for cache in CACHES for model in FITTING[cache]],
    ids=lambda value: value,
)


@st.composite
def configs(draw, policy: str | None = None, cache: str | None = None, filtered: bool = False) -> SamplerConfig:
    """Settings in any combination that is allowed."""
    policy = policy or draw(st.sampled_from(POLICIES))
    fields = {
        "policy": policy,
        "cache": cache or draw(st.sampled_from(CACHES)),
        "schedule": draw(st.sampled_from(SCHEDULES)),
        "stochastic": draw(st.booleans()),
        "max_new_tokens": draw(st.integers(1, 13)),
        "block_size": draw(st.sampled_from([1, 2, 4])),  # those that divide the grid
        "temperature": draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        "shift_logits": draw(st.booleans()),
        "cfg_scale": draw(st.sampled_from([0.0, 0.0, 0.6])),
        "eos_penalty": draw(st.sampled_from([0.0, 3.0])),
        "suppress_tokens": draw(st.sampled_from([(), tuple(range(10, 60))])),
        "eos_early_stop": False,
    }
    if draw(st.booleans()):
        fields["steps_per_block"] = draw(st.integers(1, 5))
    else:
        fields["steps"] = draw(st.integers(16, 20))
    if filtered:
        fields |= {"top_p": draw(st.sampled_from([0.5, 0.9])), "top_k": draw(st.sampled_from([5, 50]))}
    rules = [{}]
    if policy in LLADA2_POLICIES:
        rules += [{"threshold": 0.3}, {"num_to_transfer": 2, "minimal_topk": 3}]
    elif policy not in ("random", "origin"):
        rules += [{"alg_temperature": 0.3}]
        if policy in ("low_confidence", "maskgit_plus"):
            rules += [{"threshold": 0.3}, {"threshold": 0.9}, {"factor": 1.0}, {"factor": 0.3}]
    if policy == "llada21":
        rules += [{"threshold": 0.2, "editing_threshold": 0.2, "max_post_steps": 3}]
    if policy in ("low_confidence", "random"):
        rules += [{"begin_suppress_tokens": tuple(range(100, 200))}]
    return SamplerConfig(**fields | draw(st.sampled_from(rules)))


@st.composite
def texts(draw) -> list[int]:
    return draw(st.lists(st.integers(10, 290), min_size=1, max_size=9))


@st.composite
def gaps(draw, mask: int) -> list[int]:
    """A row with some masks in it, one at least. The first token is given: where a model sees nothing but masks, and
    tells positions apart by their distances, all of them are equally likely places, up to rounding."""
    row = draw(st.lists(st.integers(10, 290) | st.just(mask), min_size=1, max_size=13))
    row[draw(st.integers(0, len(row) - 1))] = mask
    return [draw(st.integers(10, 290)), *row]


def rows_of(
    lm: DiffusionLM, config: SamplerConfig, texts: list[list[int]], seeds: list[int], infill: bool
) -> list[Row]:
    return Sampler(lm, config).rows(texts, seeds, infill)


def finish(engine: Engine) -> tuple[dict[int, Finished], list[Commit]]:
    done, commits = {}, []
    while engine.busy:
        commits += engine.step()
        done |= {item.row: item for item in engine.take_finished()}
    return done, commits


def alone(lm: DiffusionLM, row: Row) -> Finished:
    engine = Engine(lm, trace=True)
    engine.admit(row)
    return finish(engine)[0][row.key]


def block_of(row: Row, position: int) -> int:
    return (position - row.block_start) // row.block_size


def check(lm: DiffusionLM, row: Row, done: Finished, commits: list[Commit]) -> None:
    """What every finished row promises."""
    mask, plan = lm.spec.mask_token_id, Plan(row.config, lm.spec)
    canvas = [mask if is_open else token for token, is_open in zip(row.tokens, row.open, strict=True)]
    still_open, canvases = set(np.flatnonzero(row.open).tolist()), [list(canvas)]
    counts: dict[int, list[int]] = {}
    began: dict[int, int] = {}
    for step, commit in enumerate(commits):
        assert commit.step == step
        assert commit.done == (step == len(commits) - 1)
        assert commit.positions == sorted(set(commit.positions))
        assert len(commit.positions) == len(commit.tokens) == len(commit.confidences)
        # an open position of an unfinished block, or a revision in a block that was just filled
        current = {block_of(row, min(still_open))} if still_open else set()
        revisable = {block_of(row, commit.positions[0])} if plan.edits and commit.positions else set()
        assert {block_of(row, place) for place in commit.positions} <= current | revisable
        for place, token in zip(commit.positions, commit.tokens, strict=True):
            assert row.open[place]
            assert plan.edits or place in still_open  # once only
            assert token != mask and token not in row.config.suppress_tokens
            canvas[place] = token
        if current:
            [block] = current
            began.setdefault(block, step)
            counts.setdefault(block, []).append(len(still_open & set(commit.positions)))
        still_open -= set(commit.positions)
        canvases.append(list(canvas))
    assert not still_open
    assert canvases[-1] == done.tokens
    assert canvases == done.history.tolist()
    assert done.nfe <= len(commits)
    assert done.nfe == len(commits) or plan.rules_by_quota  # only a schedule has steps without a forward

    for block, made in counts.items():
        masks = sum(is_open and block_of(row, place) == block for place, is_open in enumerate(row.open))
        assert sum(made) == masks
        drawn_after_first = plan.first_alone and (row.config.stochastic or plan.is_random)
        if plan.rules_by_quota and not drawn_after_first:
            assert tuple(made) == plan.counts(masks, row, began[block])
            assert len(made) <= row.steps_per_block or (plan.first_alone and len(made) == 2)


@EVERY
@given(data=st.data())
@settings(max_examples=4, **FEW)
def test_a_row_is_written_block_by_block_by_its_schedule_and_its_events_tell_all(models, policy, cache, data):
    lm = models[data.draw(st.sampled_from(FITTING[cache]))]
    config = data.draw(configs(policy, cache, filtered=data.draw(st.booleans())))
    infill = data.draw(st.booleans())
    source = gaps(lm.spec.mask_token_id) if infill else texts()
    drawn = data.draw(st.lists(source, min_size=1, max_size=3))
    rows = rows_of(lm, config, drawn, list(range(len(drawn))), infill)
    engine = Engine(lm, max_rows=data.draw(st.sampled_from([None, 2])), trace=True, events=True)
    for row in rows:
        engine.admit(row)
    done, commits = finish(engine)
    for row in rows:
        check(lm, row, done[row.key], [commit for commit in commits if commit.row == row.key])


@given(data=st.data())
@settings(max_examples=40, **FEW)
def test_a_row_is_what_it_is_alone_whatever_else_is_in_the_batch(models, data):
    name = data.draw(st.sampled_from(["full", "full", "causal", "encoder"]))
    lm = models[name]
    filtered = data.draw(st.booleans())  # all or none: see the last test of this file
    allowed = [cache for cache in CACHES if name in FITTING[cache]]
    engine = Engine(lm, max_rows=data.draw(st.sampled_from([None, 1, 2, 3])), trace=True)
    rows, done = [], {}
    for key in range(data.draw(st.integers(2, 5))):
        config = data.draw(configs(cache=data.draw(st.sampled_from(allowed)), filtered=filtered))
        infill = data.draw(st.booleans())
        source = gaps(lm.spec.mask_token_id) if infill else texts()
        [row] = rows_of(lm, config, [data.draw(source)], [data.draw(st.integers(0, 2**40))], infill)
        rows.append(dataclasses.replace(row, key=key))
        engine.admit(rows[-1])
        for _ in range(data.draw(st.integers(0, 4))):  # rows join while others are under way
            engine.step()
        done |= {item.row: item for item in engine.take_finished()}
    done |= finish(engine)[0]
    for row in rows:
        single = alone(lm, row)
        assert done[row.key].tokens == single.tokens
        assert done[row.key].history.tolist() == single.history.tolist()
        assert done[row.key].nfe == single.nfe


# --- randomness

PROMPTS = [[40, 41, 42, 43, 44], [50, 51], [60, 61, 62, 63, 64, 65, 66]]


@EVERY
def test_seeds_reproduce_and_tell_rows_apart(models, policy, cache):
    config = SamplerConfig(
        max_new_tokens=12, block_size=4, steps=12, policy=policy, cache=cache, temperature=1.0, eos_early_stop=False
    )

    def run(seed: int) -> list[list[int]]:
        return Sampler(models["full"], dataclasses.replace(config, seed=seed)).sample([PROMPTS[0]] * 2).sequences

    first = run(1)
    assert run(1) == first
    assert run(2) != first
    assert first[0] != first[1]


@pytest.mark.parametrize("policy", ["low_confidence", "entropy", "topk_margin", "maskgit_plus"])
def test_an_order_drawn_by_confidence_is_the_seeds(models, policy):
    config = SamplerConfig(
        max_new_tokens=12, block_size=12, steps=12, policy=policy, alg_temperature=1.0, eos_early_stop=False
    )

    def order(**changes) -> list[int]:
        events = Sampler(models["full"], dataclasses.replace(config, **changes)).stream([PROMPTS[0]])
        return [place for event in events for place in event.positions]

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(seed=1, alg_temperature=1e-4) == order(seed=2, alg_temperature=None)  # cold: the most confident


# --- the end of a text


def ending(lm: DiffusionLM, token: int) -> DiffusionLM:
    """The same model, with another token as the end of a text."""
    return DiffusionLM(lm.model, None, dataclasses.replace(lm.spec, eos_token_id=token, eot_token_id=None))


@EVERYWHERE
def test_early_stop_leaves_the_text_and_saves_forwards(models, policy, cache, model):
    lm = models[model]
    config = SamplerConfig(
        max_new_tokens=16, block_size=4, steps=16, policy=policy, cache=cache, seed=3, eos_early_stop=False
    )
    written = Sampler(lm, config).sample(PROMPTS).sequences
    lm = ending(
        lm, token=written[0][len(PROMPTS[0]) + 5]
    )  # one that the first row writes in its second block or before

    full = Sampler(lm, config).sample(PROMPTS)
    assert full.sequences == written
    stopped = Sampler(lm, dataclasses.replace(config, eos_early_stop=True)).sample(PROMPTS, trace=True)
    assert stopped.completions == full.completions
    assert stopped.row_nfe[0] < full.row_nfe[0]
    assert all(early <= late for early, late in zip(stopped.row_nfe, full.row_nfe, strict=True))
    for prompt, sequence, whole in zip(PROMPTS, stopped.sequences, full.sequences, strict=True):
        assert sequence[: len(prompt)] == prompt
        assert len(sequence) == len(whole)
        assert lm.spec.mask_token_id not in sequence


@EVERY
def test_a_model_that_only_says_the_end_stops_at_once(models, policy, cache):
    config = SamplerConfig(
        max_new_tokens=16, block_size=4, steps=16, policy=policy, cache=cache, seed=3, eos_penalty=-60.0
    )
    out = Sampler(models["full"], config).sample(PROMPTS)
    assert out.completions == [[], [], []]
    assert max(out.row_nfe) <= (4 + 16 if policy == "llada21" else 4)  # the first block, where revisions may follow
    eos = models["full"].spec.eos_token_id
    assert [sequence[len(prompt) :] for prompt, sequence in zip(PROMPTS, out.sequences, strict=True)] == [
        [eos] * 16
    ] * 3
    full = Sampler(models["full"], dataclasses.replace(config, eos_early_stop=False)).sample(PROMPTS)
    assert full.sequences == out.sequences
    assert min(full.row_nfe) > max(out.row_nfe) or policy in LLADA2_POLICIES
    assert sum(full.row_nfe) > sum(out.row_nfe)


# --- infilling


@EVERYWHERE
def test_infilling_writes_the_masks_and_nothing_else(models, policy, cache, model):
    lm = models[model]
    mask, eos = lm.spec.mask_token_id, lm.spec.eos_token_id
    rows = [
        [40, mask, mask, 41, 42, 43, 44, 45, mask, mask, 46],  # its second block is given
        [47, *[mask] * 6],
        [50, eos, mask, 51, mask],  # an end of text before a mask
        [60, 61],
    ]
    config = SamplerConfig(block_size=4, steps=12, policy=policy, cache=cache, seed=3)
    out = Sampler(lm, config).infill(rows)
    for row, sequence, completion in zip(rows, out.sequences, out.completions, strict=True):
        assert [new for old, new in zip(row, sequence, strict=True) if old == mask] == completion
        assert [new for old, new in zip(row, sequence, strict=True) if old != mask] == [
            old for old in row if old != mask
        ]
        assert mask not in completion
    assert out.row_nfe[3] == 0
    for row, sequence, seed in zip(rows, out.sequences, Sampler(lm, config)._seeds(4, None), strict=True):
        alike = dataclasses.replace(config, steps_per_block=4)  # what twelve steps in three blocks are
        assert Sampler(lm, alike).infill([row], seeds=[seed]).sequences == [sequence]


# --- what the settings are for


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("loose", "strict"), [({"threshold": 0.05}, {"threshold": 1.0}), ({"factor": 4.0}, {"factor": 0.01})], ids=str
)
def test_a_looser_bound_needs_fewer_forwards(models, cache, loose, strict):
    config = SamplerConfig(max_new_tokens=16, block_size=4, steps=4, cache=cache, eos_early_stop=False)
    nfe = [
        Sampler(models["full"], dataclasses.replace(config, **change)).sample(PROMPTS[:1]).row_nfe[0]
        for change in (loose, strict)
    ]
    assert nfe[0] < nfe[1] == 16  # the strict one commits a token a step


@pytest.mark.parametrize("cache", CACHES)
def test_every_token_of_a_step_reaches_the_threshold_unless_it_is_the_only_one(models, cache):
    config = SamplerConfig(max_new_tokens=16, block_size=8, steps=16, cache=cache, threshold=0.25, eos_early_stop=False)
    sizes = Counter()
    for event in Sampler(models["full"], config).stream(PROMPTS):
        assert len(event.positions) == 1 or min(event.confidences) >= np.float32(0.25)
        sizes[len(event.positions) > 1] += 1
    assert sizes[True] and sizes[False]


def test_revised_tokens_are_surer_than_the_threshold_and_new(models):
    config = SamplerConfig(
        max_new_tokens=24, block_size=8, policy="llada21", threshold=0.1, editing_threshold=0.3, eos_early_stop=False
    )
    revisions = 0
    for prompt in PROMPTS:
        canvas = prompt + [None] * 24
        for event in Sampler(models["full"], config).stream([prompt]):
            for place, token, sure in zip(event.positions, event.tokens, event.confidences, strict=True):
                if canvas[place] is not None:
                    revisions += 1
                    assert sure > 0.3
                    assert token != canvas[place]
                canvas[place] = token
    assert revisions


# --- to be mended

MIXED = [
    ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}),
    ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}),
    ({"temperature": 1.0, "policy": "entropy"}, {"temperature": 1.0, "policy": "entropy", "top_p": 0.5}),
]


@pytest.mark.parametrize(("plain", "filtered"), MIXED)
def test_a_row_without_filters_is_the_same_beside_one_with(models, plain, filtered):
    lm, rows = models["full"], []
    for key, change in enumerate((plain, filtered)):
        config = SamplerConfig(max_new_tokens=12, block_size=4, steps=12, eos_early_stop=False, **change)
        rows.append(dataclasses.replace(rows_of(lm, config, [PROMPTS[key]], [key], infill=False)[0], key=key))
    engine = Engine(lm, trace=True)
    for row in rows:
        engine.admit(row)
    assert finish(engine)[0][0].tokens == alone(lm, rows[0]).tokens


@pytest.fixture
def masking_lm(models):
    """A model that often sees a mask coming."""
    lm = models["full"]
    head, mask = lm.model.get_output_embeddings().weight.data, lm.spec.mask_token_id
    before = head[mask].clone()
    head[mask] *= 3
    yield lm
    head[mask] = before


@pytest.mark.parametrize(
    ("settings", "one", "other"),
    [
        ({"policy": "entropy"}, {}, {"top_k": 5}),
        ({"policy": "topk_margin"}, {}, {"top_k": 5}),
        ({"policy": "llada2", "temperature": 1.0, "threshold": 0.3}, {"top_p": 0.5}, {"top_k": 5}),
    ],
    ids=lambda value: value.get("policy") if isinstance(value, dict) else None,
)
def test_a_row_is_ranked_the_same_beside_one_with_other_filters(masking_lm, settings, one, other):
    lm, rows = masking_lm, []
    for key, change in enumerate((one, other)):
        config = SamplerConfig(max_new_tokens=24, block_size=24, steps=24, eos_early_stop=False, **settings, **change)
        rows.append(dataclasses.replace(rows_of(lm, config, [PROMPTS[key]], [key], infill=False)[0], key=key))
    engine = Engine(lm, trace=True)
    for row in rows:
        engine.admit(row)
    assert finish(engine)[0][0].history.tolist() == alone(lm, rows[0]).history.tolist()
