"""The search space of a sweep: which settings are in it, and what it refuses."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.config import read, to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning.space import Space

BASE = SamplerConfig(max_new_tokens=64, steps=64, block_size=16)


def space(base=BASE, /, **tree):
    return Space(tree, base)


def names(candidates):
    return [candidate.name for candidate in candidates]


# --- grids


def test_a_grid_is_the_product_in_order_the_last_field_varying_fastest():
    found = space(temperature=[0.0, 0.5], steps=[64, 32, 4]).grid()
    assert names(found) == [
        f"temperature={temperature},steps={steps}" for temperature in ("0", "0.5") for steps in (64, 32, 4)
    ]
    assert [candidate.changes for candidate in found][-1] == {"temperature": 0.5, "steps": 4}
    assert found[1].sampler == dataclasses.replace(BASE, temperature=0.0, steps=32)


@pytest.mark.parametrize("kind", ["choice", "grid"])
def test_a_list_alone_is_a_choice(kind):
    assert space(steps={kind: [8, 4]}).grid() == space(steps=[8, 4]).grid()


def test_a_field_varies_only_where_its_condition_holds():
    found = space(
        threshold={"choice": [0.9, 0.7], "when": {"cache": ["prefix", "dual"]}}, cache=["none", "dual", "block"]
    ).grid()
    # in the order of the space, where threshold comes first, though cache decides about it
    assert [candidate.changes for candidate in found] == [
        {"cache": "none"},
        {"threshold": 0.9, "cache": "dual"},
        {"cache": "block"},
        {"threshold": 0.7, "cache": "dual"},
    ]
    assert names(found)[:2] == ["cache=none", "threshold=0.9,cache=dual"]
    assert found[0].sampler.threshold is None


def test_a_condition_may_name_fields_outside_the_space_and_several_must_hold():
    tree = {"eos_penalty": {"choice": [1.0, 2.0], "when": {"cache": "none", "policy": "low_confidence"}}}
    assert names(Space(tree, BASE).grid()) == ["eos_penalty=1", "eos_penalty=2"]
    assert names(Space(tree, dataclasses.replace(BASE, cache="dual")).grid()) == ["base"]
    assert names(Space(tree, dataclasses.replace(BASE, policy="random")).grid()) == ["base"]


def test_a_field_whose_own_condition_fails_counts_with_the_bases_value():
    found = space(
        dataclasses.replace(BASE, threshold=0.8),
        cache=["none", "dual"],
        threshold={"choice": [0.9], "when": {"cache": "dual"}},
        temperature={"choice": [0.5], "when": {"threshold": 0.8}},
    ).grid()
    assert names(found) == ["cache=none,temperature=0.5", "cache=dual,threshold=0.9"]


@pytest.mark.parametrize(
    ("base", "tree", "expected"),
    [
        ({}, {"steps_per_block": [None, 2], "steps": [8, 4]}, ["null,8", "null,4", "2"]),
        ({}, {"temperature": [0.0, 1.0], "top_p": [0.9, 0.8]}, ["0", "1,0.9", "1,0.8"]),
        ({}, {"policy": ["random", "entropy"], "top_k": [2, 3]}, ["random", "entropy,2", "entropy,3"]),
        ({}, {"cfg_scale": [0.0, 1.0], "cfg_keep_tokens": [[], [3, 4]]}, ["0", "1,[]", "1,[3 4]"]),
        ({}, {"policy": ["llada2", "llada21"], "minimal_topk": [1, 2]}, ["llada2,1", "llada2,2", "llada21"]),
        (
            {"policy": "llada21"},
            {"max_post_steps": [1], "num_to_transfer": [2], "minimal_topk": [1], "policy": ["llada2", "llada21"]},
            ["1,llada2", "1,2,llada21"],
        ),
        ({"max_length": 96}, {"max_new_tokens": [None, 32], "max_length": [64, 96]}, ["null,64", "null,96", "32"]),
    ],
)
def test_settings_that_mean_the_same_are_in_a_grid_once(base, tree, expected):
    found = Space(tree, dataclasses.replace(BASE, **base)).grid()
    values = [",".join(part.partition("=")[2] for part in candidate.name.split(",")) for candidate in found]
    assert values == expected


def test_impossible_combinations_are_left_out_and_told():
    tried = space(steps=[2, 64], policy=["low_confidence", "random"], threshold=[None, 0.9])
    assert names(tried.grid()) == [
        "steps=64,policy=low_confidence,threshold=null",
        "steps=64,policy=low_confidence,threshold=0.9",
        "steps=64,policy=random,threshold=null",
    ]
    reasons = dict(tried.impossible)
    assert len(reasons) == len(tried.impossible) == 5
    assert reasons["steps=64,policy=random,threshold=0.9"].startswith("threshold: needs a policy by confidence")
    assert reasons["steps=2,policy=random,threshold=null"].startswith("steps: 2 steps are fewer than the 4 blocks")


def test_a_space_without_any_possible_combination_says_why():
    tried = space(steps=[1, 2])
    for find in (tried.grid, lambda: tried.sample(3, 0)):
        with pytest.raises(ConfigError, match=r"^sweep\.space: no combination is possible; .*fewer than the 4 blocks"):
            find()


def test_a_grid_needs_lists_and_no_more_than_can_be_asked():
    with pytest.raises(ConfigError, match=r"^sweep\.space\.cfg_scale: a grid needs a list.*sweep\.searcher"):
        space(steps=[8, 4], cfg_scale={"uniform": [0.0, 1.0]}).grid()
    counts = list(range(4, 64))
    with pytest.raises(ConfigError, match=r"^sweep\.space: a grid of more than 10,000 settings"):
        space(steps=counts, block_size=counts, seed=counts).grid()


# --- random ones

MIXED = {
    "temperature": {"uniform": [0.0, 1.5]},
    "cache": ["none", "prefix", "dual"],
    "steps": {"log_integer": [4, 64]},
    "block_size": {"integer": [16, 18]},
    "alg_temperature": {"loguniform": [0.01, 1.0], "when": {"cache": "none"}},
    "threshold": {"uniform": [0.5, 1.0], "when": {"cache": ["prefix", "dual"]}},
    "suppress_tokens": [[], [1, 2]],
    "eos_penalty": {"integer": [0, 2]},
}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_drawn_lies_in_the_space(seed):
    changes = Space(MIXED, BASE).draw(np.random.default_rng(seed)).changes
    assert list(changes) == [name for name in MIXED if name in changes]
    assert ("alg_temperature" in changes) == (changes["cache"] == "none") != ("threshold" in changes)
    for name, (low, high) in {"temperature": (0, 1.5), "alg_temperature": (0.01, 1), "threshold": (0.5, 1)}.items():
        assert low <= changes.get(name, low) <= high
    for name, (low, high) in {"steps": (4, 64), "block_size": (16, 18)}.items():
        assert isinstance(changes[name], int) and low <= changes[name] <= high
    assert changes["eos_penalty"] in (0.0, 1.0, 2.0) and isinstance(changes["eos_penalty"], float)
    assert changes["suppress_tokens"] in ([], [1, 2])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equal_names_mean_equal_settings_and_names_are_short(seed):
    found = Space(MIXED, BASE).sample(40, seed)
    assert len({candidate.name for candidate in found}) == len(found) == 40
    assert all(a.sampler != b.sampler for i, a in enumerate(found) for b in found[:i])
    for candidate in found:
        values = dict(part.split("=") for part in candidate.name.split(","))
        assert float(values["temperature"]) == candidate.sampler.temperature
        assert len(values["temperature"]) <= 5


def test_names_of_numbers_that_are_almost_equal_differ():
    tried = space(threshold=[0.9, 0.9000001], temperature={"uniform": [0.70001, 0.70002]})
    assert names(space(threshold=[0.9, 0.9000001]).grid()) == ["threshold=0.9", "threshold=0.9000001"]
    assert len(set(names(tried.sample(30, 0)))) == 30


def test_a_seed_draws_the_same_settings_again():
    assert Space(MIXED, BASE).sample(8, 3) == Space(MIXED, BASE).sample(8, 3)
    assert names(Space(MIXED, BASE).sample(8, 3)) != names(Space(MIXED, BASE).sample(8, 4))


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_never_repeats_and_ends_with_the_space(seed):
    tried = space(steps={"integer": [2, 33]}, policy=["low_confidence", "random"], threshold=[None, 0.9])
    found = tried.sample(1000, seed)  # of 128: fewer than 4 steps, and random with a threshold, are impossible
    assert len(set(names(found))) == len(found) == 30 * 3
    assert len(tried.impossible) == 128 - 90
    assert len(tried.sample(7, seed)) == 7


def test_every_value_of_a_range_of_whole_numbers_is_drawn_about_as_often():
    random = np.random.default_rng(0)
    tried = space(block_size={"integer": [16, 19]})
    counts = np.bincount([tried.draw(random).sampler.block_size for _ in range(4000)])[16:]
    assert len(counts) == 4 and counts.min() > 850 and counts.max() < 1150


@pytest.mark.parametrize(
    ("name", "tree", "low", "middle", "high"),
    [
        ("steps", {"log_integer": [4, 64]}, 4, 16, 64),
        ("alg_temperature", {"loguniform": [0.01, 1.0]}, 0.01, 0.1, 1.0),
        ("temperature", {"uniform": [0.0, 2.0]}, 0.0, 1.0, 2.0),
    ],
)
def test_half_of_the_draws_lie_below_the_middle_of_their_scale(name, tree, low, middle, high):
    random, tried = np.random.default_rng(0), Space({name: tree}, BASE)
    values = [tried.draw(random).changes[name] for _ in range(2000)]
    assert low <= min(values) < low + (middle - low) / 10 and high - (high - middle) / 10 < max(values) <= high
    assert abs(np.mean(np.array(values) < middle) - 0.5) < 0.05


def test_drawing_an_impossible_combination_is_an_error():
    with pytest.raises(ConfigError, match=r"^sweep\.space: steps=2: steps: 2 steps are fewer"):
        space(steps=[2]).draw(np.random.default_rng(0))


# --- optuna's, and given ones


def optunas_trials(tree, count):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        trial = study.ask()
        yield trial, Space(tree, BASE).suggest(trial)
        study.tell(trial, 0.0)


def test_a_trial_is_asked_only_for_fields_that_vary_in_it():
    caches = set()
    for trial, candidate in optunas_trials(MIXED, 20):
        assert set(trial.params) == set(candidate.changes)
        caches.add(candidate.sampler.cache)
        for name in ("temperature", "alg_temperature", "threshold"):
            if name in trial.params:
                assert math.isclose(trial.params[name], candidate.changes[name], abs_tol=1e-3)
        for name in ("steps", "block_size", "cache", "eos_penalty"):
            assert trial.params[name] == candidate.changes[name]
    assert caches == {"none", "prefix", "dual"}


@pytest.mark.filterwarnings("error")  # optuna warns of choices that it can't store
def test_lists_and_nulls_can_be_suggested():
    tree = {"suppress_tokens": [[], [1, 2]], "block_size": [None, 32]}
    found = [candidate.sampler for _, candidate in optunas_trials(tree, 20)]
    assert {(sampler.suppress_tokens, sampler.block_size) for sampler in found} == {
        (tokens, size) for tokens in ((), (1, 2)) for size in (None, 32)
    }


def test_an_impossible_suggestion_is_an_error():
    with pytest.raises(ConfigError, match="fewer than the 4 blocks"):
        list(optunas_trials({"steps": [1, 2]}, 1))


def test_a_given_combination_is_named_like_a_drawn_one():
    tried = Space(MIXED, BASE)
    given_one = tried.candidate({"threshold": "0.75", "cache": "dual", "alg_temperature": 0.5, "temperature": 0})
    assert given_one.name == "temperature=0,cache=dual,threshold=0.75"  # alg_temperature only without a cache
    assert given_one.sampler == dataclasses.replace(BASE, cache="dual", threshold=0.75)
    assert (tried.candidate({}).name, tried.candidate({}).sampler) == ("base", BASE)


def test_a_candidates_settings_are_read_like_those_of_a_job():
    tried = Space(MIXED, BASE)
    for candidate in tried.sample(10, 0):
        assert tried.candidate(candidate.changes) == candidate
        assert read(SamplerConfig, to_dict(BASE) | candidate.changes, "sampler") == candidate.sampler


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_p": 0.5}, r"sweep\.space\.top_p: no field of the space; there are: temperature, cache"),
        ({"temperature": -1}, r"sweep\.space\.temperature: must be a number that is not negative"),
        ({"steps": 1}, r"sweep\.space: steps=1: steps: 1 steps are fewer than the 4 blocks"),
    ],
)
def test_a_given_combination_that_can_not_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        Space(MIXED, BASE).candidate(changes)


def test_a_space_can_be_sent_to_another_process():
    tried = Space(MIXED, BASE)
    assert pickle.loads(pickle.dumps(tried)).sample(5, 0) == tried.sample(5, 0)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "tree", "said"),
    [
        ("step", [8], "no field of the sampler is called 'step'; the nearest: steps"),
        (3, [8], "no field of the sampler is called '3'; --help lists them"),
        ("steps", 8, "expected a list of values, or a mapping such as {uniform: .*, got 8"),
        ("steps", None, "expected a list of values, .*got None"),
        ("steps", "8", "expected a list of values, .*got '8'"),
        ("steps", [], "an empty list"),
        ("steps", {"choice": []}, "an empty list"),
        ("steps", {"choice": 8}, "expected a list of values, got 8"),
        ("steps", {}, "expected .* got no values"),
        ("steps", {"when": {"cache": "dual"}}, "expected .* got no values"),
        ("steps", {"choices": [8]}, r"unknown kind 'choices'; did you mean choice\?"),
        ("steps", {"gauss": [0, 1]}, "unknown kind 'gauss'; expected one of choice, grid, uniform"),
        ("steps", {"choice": [8], "integer": [4, 8]}, "got two kinds: choice and integer"),
        ("steps", [8, 4, 8], "8 stands twice"),
        ("temperature", [0, 0.0], "0 stands twice"),
        ("steps", [8, "many"], "expected int, got many"),
        ("steps", [8, None], "expected int, got null"),
        ("steps", [8, 0], "must be at least 1, got 0"),
        ("steps", [8, True], "expected int, got True"),
        ("cache", ["none", "dul"], "expected one of 'none', 'prefix', 'dual', 'block', got dul"),
        ("threshold", [1.5], "must lie above 0 and at most at 1, got 1.5"),
        ("temperature", [float("nan")], "must be a number that is not negative.*got nan"),
        ("suppress_tokens", [1, 2], "expected list of int, got 1"),
        ("steps", {"uniform": [4, 8]}, "takes whole numbers: write integer, not uniform"),
        ("steps", {"loguniform": [4, 8]}, "takes whole numbers: write log_integer, not loguniform"),
        ("cache", {"uniform": [0, 1]}, "isn't a number, so it has no range"),
        ("stochastic", {"integer": [0, 1]}, "isn't a number, so it has no range"),
        ("steps", {"integer": 4}, r"integer: expected the lowest and the highest value, as \[low, high\], got 4"),
        ("steps", {"integer": [4]}, "integer: expected the lowest and the highest"),
        ("steps", {"integer": [4, 8, 16]}, "integer: expected the lowest and the highest"),
        ("steps", {"integer": [4, 8.5]}, "expected int, got 8.5"),
        ("eos_penalty", {"integer": [0, 1.5]}, "integer: expected whole numbers of at most 63 bits, got 1.5"),
        ("factor", {"integer": [1, 1e300]}, "integer: expected whole numbers of at most 63 bits, got 1e"),
        ("threshold", {"uniform": [None, 1]}, "uniform: expected numbers, got null"),
        ("threshold", {"uniform": [0, 1]}, "must lie above 0 and at most at 1, got 0"),
        ("temperature", {"uniform": [1, 0]}, "uniform: expected the lowest value before the highest, got 1 and 0"),
        ("temperature", {"uniform": [1, 1]}, "uniform: expected the lowest value before the highest"),
        ("temperature", {"loguniform": [0, 1]}, "loguniform: expected a lowest value above 0, got 0"),
        ("seed", {"log_integer": [0, 9]}, "log_integer: expected a lowest value above 0, got 0"),
        *(
            (name, {"uniform": bounds}, r"must (be|lie) .*, got (nan|-?inf)")
            for name in ("temperature", "threshold", "factor", "eos_penalty")
            for bounds in ([0.5, float("nan")], [float("nan"), 0.5], [0.5, float("inf")], [float("-inf"), 0.5])
        ),
        ("steps", {"choice": [8], "when": {}}, "when: expected a mapping of fields to values"),
        ("steps", {"choice": [8], "when": "cache"}, "when: expected a mapping of fields to values"),
        ("steps", {"choice": [8], "when": {"cach": "dual"}}, "no field of the sampler is called 'cach'.*cache"),
        ("steps", {"choice": [8], "when": {"cache": "dul"}}, r"when\.cache: expected one of 'none'.*got dul"),
        ("steps", {"choice": [8], "when": {"cache": []}}, r"when\.cache: an empty list"),
        ("steps", {"choice": [8], "when": {"steps": 4}}, "whether it varies depends on itself: steps -> steps"),
    ],
)
def test_what_no_space_can_hold_is_refused_by_name(name, tree, said):
    with pytest.raises(ConfigError, match=said) as refused:
        Space({name: tree}, BASE)
    assert refused.value.field == f"sweep.space.{name}"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tree", [{}, [], None])
def test_a_space_names_at_least_one_field(tree):
    with pytest.raises(ConfigError, match=r"^sweep\.space: name at least one field"):
        Space(tree, BASE)


def test_conditions_in_a_circle_are_refused():
    with pytest.raises(ConfigError, match=r"depends on itself: (\w+) -> \w+ -> \w+ -> \1$"):
        space(
            temperature={"choice": [1.0], "when": {"cache": "dual"}},
            cache={"choice": ["dual"], "when": {"seed": 1}},
            seed={"choice": [1], "when": {"temperature": 1.0}},
        )


@pytest.mark.parametrize(
    ("base", "tree", "said"),
    [
        (
            {"steps_per_block": 8},
            {"steps": [8, 4]},
            "steps: has no effect unless steps_per_block is null, and here steps_per_block is 8: change that, or "
            "leave steps out",
        ),
        ({}, {"steps": [8, 4], "steps_per_block": [2, 4]}, "steps: has no effect unless steps_per_block is null"),
        ({}, {"max_length": [128]}, "max_length: has no effect unless max_new_tokens is null"),
        ({}, {"top_p": [0.9]}, "top_p: has no effect unless temperature is above 0 or policy is entropy"),
        ({}, {"top_k": [9], "temperature": [0.0]}, "top_k: has no effect unless temperature is above 0"),
        ({}, {"max_post_steps": [4]}, "max_post_steps: has no effect unless policy is llada21"),
        ({"policy": "llada21"}, {"minimal_topk": [4]}, "minimal_topk: has no effect unless policy is llada2"),
        ({}, {"cfg_keep_tokens": [[1]]}, "cfg_keep_tokens: has no effect unless cfg_scale is above 0"),
        (
            {},
            {"cache": ["none", "dual"], "threshold": {"choice": [0.9], "when": {"cache": ["block", "prefix"]}}},
            "threshold: never varies: the space doesn't let cache be block or prefix",
        ),
        (
            {},
            {"steps": {"integer": [4, 8]}, "seed": {"choice": [1], "when": {"steps": 16}}},
            "seed: never varies: the space doesn't let steps be 16",
        ),
    ],
)
def test_a_field_that_never_has_an_effect_is_refused(base, tree, said):
    with pytest.raises(ConfigError) as refused:
        Space(tree, dataclasses.replace(BASE, **base))
    assert str(refused.value).startswith(f"sweep.space.{said}")


@pytest.mark.parametrize(
    ("base", "tree"),
    [
        ({"steps_per_block": 8}, {"steps_per_block": [None, 8], "steps": [8, 4]}),
        ({}, {"steps": [8], "steps_per_block": {"choice": [2], "when": {"cache": "dual"}}, "cache": ["none", "dual"]}),
        ({}, {"top_p": [0.9], "temperature": {"uniform": [0.0, 1.0]}}),
        ({}, {"top_p": [0.9], "policy": ["low_confidence", "entropy"]}),
        ({"policy": "llada21"}, {"editing_threshold": {"uniform": [0.5, 1.0]}, "num_to_transfer": [1, 2]}),
        ({"max_new_tokens": None, "max_length": 64}, {"max_length": [64, 128]}),
        ({}, {"temperature": {"loguniform": ["1e-3", "1"]}}),  # as YAML reads 1e-3
    ],
)
def test_a_field_that_has_an_effect_somewhere_is_taken(base, tree):
    assert Space(tree, dataclasses.replace(BASE, **base)).sample(4, 0)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplerConfig)])
def test_the_defaults_of_any_field_can_stand_in_a_list(field):
    base = dataclasses.replace(BASE, cfg_scale=1.0, temperature=1.0)
    policy = {"minimal_topk": "llada2", "max_post_steps": "llada21", "num_to_transfer": "llada21"}.get(field)
    if policy:
        base = dataclasses.replace(base, policy=policy)
    if field == "max_length":
        base = dataclasses.replace(base, max_new_tokens=None, max_length=64)
    value = to_dict(base)[field]
    assert names(Space({field: [value]}, base).grid())[0].startswith(f"{field}=")
