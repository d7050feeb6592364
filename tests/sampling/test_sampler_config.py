"""Settings of the sampler are checked when they are made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError
from dllm_ray.sampling import SamplerConfig
from dllm_ray.sampling.config import DREAM_POLICIES, LLADA2_POLICIES, POLICIES

NAN, INFINITE = float("nan"), float("inf")
COUNTS = (
    "max_new_tokens",
    "max_length",
    "steps",
    "steps_per_block",
    "block_size",
    "top_k",
    "max_post_steps",
    "num_to_transfer",
    "minimal_topk",
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in COUNTS for value in (0, -1)),
        *((field, value) for field in ("top_p", "threshold") for value in (0.0, -0.5, 1.01, NAN, INFINITE)),
        *(
            (field, value)
            for field in ("temperature", "cfg_scale", "alg_temperature")
            for value in (-0.1, NAN, INFINITE)
        ),
        *(("factor", value) for value in (0.0, -1.0, NAN, INFINITE)),
        *(("eos_penalty", value) for value in (NAN, INFINITE, -INFINITE)),
        ("seed", -1),
        ("seed", 2**63),
        ("policy", "bravest"),
        ("policy", None),
        ("schedule", "quadratic"),
        ("cache", "delayed"),
        ("cache", None),
    ],
)
def test_an_impossible_value_names_its_field_and_is_shown(field, value):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("value", [0.0, 1.5, NAN])
def test_an_impossible_editing_threshold_names_its_field(value):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(policy="llada21", editing_threshold=value)
    assert caught.value.field == "editing_threshold"


@pytest.mark.parametrize(("field", "known"), [("policy", POLICIES), ("cache", ("none", "prefix", "dual", "block"))])
def test_an_unknown_choice_lists_the_known_ones(field, known):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**{field: "unheard of"})
    assert all(name in str(caught.value) for name in known)


@pytest.mark.parametrize(
    "change",
    [
        *({field: 1} for field in COUNTS),
        {"top_p": 1.0},
        {"threshold": 1.0},
        {"threshold": 1e-6},
        {"factor": 0.5},
        {"temperature": 0.0},
        {"alg_temperature": 0.0, "policy": "random"},  # 0 is off
        {"eos_penalty": -3.0},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"block_size": None, "top_p": None, "top_k": None, "steps_per_block": None, "max_length": None},
        {"policy": "llada21", "editing_threshold": 1.0},
    ],
    ids=str,
)
def test_the_bounds_themselves_are_possible(change):
    config = SamplerConfig(**change)
    assert all(getattr(config, name) == value for name, value in change.items())


def test_some_length_is_needed():
    with pytest.raises(ConfigError, match="max_new_tokens or max_length") as caught:
        SamplerConfig(max_new_tokens=None)
    assert caught.value.field == "max_new_tokens"


# --- settings that don't go together

ENTROPIES = ("entropy", "topk_margin")
APART = [
    *(({"policy": policy, name: 0.5}, name) for policy in ("random", "origin") for name in ("threshold", "factor")),
    *(({"policy": policy, "alg_temperature": 0.5}, "alg_temperature") for policy in ("random", "origin")),
    *(({"policy": policy, name: 0.5}, name) for policy in LLADA2_POLICIES for name in ("factor", "alg_temperature")),
    *(({"policy": policy, "threshold": 0.5}, "threshold") for policy in ENTROPIES),
    ({"threshold": 0.5, "factor": 1.0}, "factor"),
    *(({"policy": name, "editing_threshold": 0.5}, "editing_threshold") for name in POLICIES if name != "llada21"),
    *(
        ({"policy": name, "begin_suppress_tokens": (5,)}, "begin_suppress_tokens")
        for name in (*DREAM_POLICIES, *LLADA2_POLICIES)
    ),
    *(({"policy": policy, "factor": 0.5}, "factor") for policy in ENTROPIES),
]


@pytest.mark.parametrize(("settings", "field"), APART)
def test_settings_that_exclude_each_other_are_one_error_that_names_the_field_to_change(settings, field):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**settings)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "block"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "dream"])
def test_every_policy_goes_with_every_cache_and_schedule(policy, cache, schedule):
    config = SamplerConfig(policy=policy, cache=cache, schedule=schedule)
    assert (config.policy, config.cache, config.schedule) == (policy, cache, schedule)


def test_token_lists_become_tuples():
    config = SamplerConfig(suppress_tokens=[1], begin_suppress_tokens=[2, 3], cfg_keep_tokens=[])
    assert (config.suppress_tokens, config.begin_suppress_tokens, config.cfg_keep_tokens) == ((1,), (2, 3), ())


# --- blocks and steps


def test_blocks_and_their_steps_follow_from_the_length_of_the_answer():
    assert SamplerConfig(max_new_tokens=20, block_size=8, steps=7).blocks() == (8, 3)
    assert SamplerConfig(max_new_tokens=20, block_size=None, steps=7).blocks() == (20, 7)
    assert SamplerConfig(max_new_tokens=20, block_size=32, steps=7).blocks() == (20, 7)
    assert SamplerConfig(max_new_tokens=20, block_size=8, steps_per_block=2, steps=1).blocks() == (8, 2)
    assert SamplerConfig(max_new_tokens=20, block_size=8, steps=7).blocks(new_tokens=30) == (8, 2)
    assert SamplerConfig(max_new_tokens=None, max_length=20, block_size=8, steps=7).blocks() == (8, 3)


@given(new=st.integers(1, 200), size=st.none() | st.integers(1, 200), steps=st.integers(1, 300))
def test_the_blocks_hold_the_answer_and_share_the_steps(new, size, steps):
    config = SamplerConfig(max_new_tokens=new, block_size=size, steps=steps)
    count = -(-new // min(size or new, new))
    if steps < count:
        with pytest.raises(ConfigError, match=f"{steps} steps are fewer than the {count} blocks") as caught:
            config.blocks()
        assert caught.value.field == "steps"
        return
    block, each = config.blocks()
    assert (count - 1) * block < new <= count * block
    assert (each - 1) * count < steps <= each * count


def test_steps_per_block_need_no_steps_for_all():
    config = SamplerConfig(max_new_tokens=20, block_size=2, steps=1, steps_per_block=3)
    assert config.blocks() == (2, 3)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": "0.3"}, "temperature"),
        ({"steps": 12.0}, "steps"),
        ({"block_size": True}, "block_size"),
        ({"suppress_tokens": 5}, "suppress_tokens"),
        ({"suppress_tokens": "5"}, "suppress_tokens"),
        ({"cfg_keep_tokens": [1.5]}, "cfg_keep_tokens"),
        ({"seed": 1.0}, "seed"),
        ({"steps": 10**9}, "steps"),
        ({"steps_per_block": 10**9}, "steps_per_block"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"cfg_scale": 3e38}, "cfg_scale"),
        ({"eos_penalty": -1e39}, "eos_penalty"),
        ({"eos_penalty": float("nan")}, "eos_penalty"),
    ],
    ids=str,
)
def test_values_that_no_model_could_use_are_refused_by_name(settings, field):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**settings)
    assert caught.value.field == field
