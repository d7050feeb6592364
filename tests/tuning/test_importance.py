"""What makes the difference is named first, whatever kind of setting it is; what makes none has no share."""

import itertools
import math

import numpy as np
import pytest

from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning.importance import TARGETS, importance
from dllm_ray.tuning.tried import Tried


def tried(score, changes, base=None, tpf=1.0, complete=True):
    sampler = {**vars(SamplerConfig()), **(base or {}), **changes}
    return Tried("", changes, sampler, {"0": float(score)}, tpf, 1.0, 1.0, complete)


def grid(figure, **choices):
    combinations = (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    return [tried(figure(**changes), changes) for changes in combinations]


def test_the_parameter_that_matters_comes_first_and_shares_sum_to_one():
    settings = grid(
        lambda steps, temperature, policy: steps / 64 + 0.1 * temperature,
        steps=[4, 16, 64],
        temperature=[0.0, 0.5, 1.0],
        policy=["low_confidence", "entropy"],
    )
    found = importance(settings, "score")
    assert list(found) == ["steps", "temperature", "policy"]
    assert sum(found.values()) == pytest.approx(1)
    assert found["steps"] > 0.9 and found["policy"] < 0.02
    assert list(importance(settings, "score", seed=1)) == list(found)


def test_shares_are_those_of_the_variance():
    """x + 2 y with independent x and y of like variance: one part to four."""
    settings = grid(lambda steps, top_k: steps + 2 * top_k, steps=list(range(1, 9)), top_k=list(range(1, 9)))
    assert importance(settings, "score") == pytest.approx({"top_k": 0.8, "steps": 0.2}, abs=0.06)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("policy", ["low_confidence", "entropy", "origin"]),
        ("suppress_tokens", [(1, 2), (), (3,)]),
        ("eos_early_stop", [True, False]),
        ("threshold", [None, 0.5, 0.9]),
        ("cfg_scale", [0, 0.5, 1.0]),
    ],
)
def test_settings_of_every_kind_count(name, values):
    settings = [
        tried(index, {name: value, "steps": steps}) for index, value in enumerate(values) for steps in (8, 16, 32)
    ]
    found = importance(settings, "score")
    assert next(iter(found)) == name and found[name] > 0.95


def test_a_list_and_a_tuple_and_1_and_1_0_are_one_value():
    settings = [
        tried(number, {"cfg_scale": one, "suppress_tokens": tokens, "steps": number + 1})
        for number, (one, tokens) in enumerate([(1, [5]), (1.0, (5,)), (1, (5,)), (1.0, [5])])
    ]
    assert importance(settings, "score") == {"steps": 1.0, "cfg_scale": 0.0, "suppress_tokens": 0.0}


def test_logarithmic_scales_count_alike():
    """Half of the draws are below 0.1, and that is where the score falls."""
    random = np.random.default_rng(0)
    drawn = np.exp(random.uniform(math.log(0.01), 0, 60))
    settings = [
        tried(value < 0.1, {"alg_temperature": float(value), "temperature": float(other)})
        for value, other in zip(drawn, random.random(60), strict=True)
    ]
    assert importance(settings, "score")["alg_temperature"] > 0.95


def test_a_parameter_with_a_condition_counts_where_it_is_off_too():
    random = np.random.default_rng(0)
    settings = []
    for _ in range(40):
        cache = str(random.choice(["none", "dual"]))
        changes = {"cache": cache, "temperature": float(random.random())}
        if cache == "dual":
            changes["threshold"] = float(random.uniform(0.5, 0.9))
        settings.append(tried(changes.get("threshold", 0.7), changes))
    found = importance(settings, "score")
    assert next(iter(found)) == "threshold" and found["threshold"] > 0.8
    assert found["temperature"] < 0.1


def test_noise_is_shared_out_among_all():
    random = np.random.default_rng(0)
    names = ("temperature", "cfg_scale", "eos_penalty", "top_p")
    settings = [tried(random.random(), {name: float(random.random()) for name in names}) for _ in range(60)]
    found = importance(settings, "score")
    assert set(found) == set(names) and max(found.values()) < 0.6


def test_each_figure_has_its_own_shares():
    settings = [
        tried(temperature, {"steps": steps, "temperature": temperature}, tpf=1 / steps)
        for steps in (4, 8, 16)
        for temperature in (0.0, 0.5, 1.0)
    ]
    assert next(iter(importance(settings, "score"))) == "temperature"
    assert next(iter(importance(settings, "tpf"))) == "steps"
    assert importance(settings, "nfe") == {}


def test_a_parameter_with_one_value_has_no_share():
    settings = grid(lambda steps, temperature: steps, steps=[4, 8, 16, 32], temperature=[0.5])
    assert importance(settings, "score") == {"steps": 1.0, "temperature": 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        [],
        grid(lambda steps: steps, steps=[4, 8, 16]),
        grid(lambda steps: 0.5, steps=[4, 8, 16, 32]),
        [tried(score, {"steps": 8}) for score in range(6)],
        grid(lambda steps: math.nan, steps=[4, 8, 16, 32]),
    ],
    ids=["none", "three", "all alike", "one value", "no scores"],
)
def test_nothing_is_explained_where_nothing_can_be(settings):
    assert importance(settings, "score") == {}


def test_settings_without_the_figure_are_left_out_and_dropped_ones_count():
    settings = grid(lambda steps: steps, steps=[4, 8, 16])
    assert importance([*settings, tried(math.nan, {"steps": 32})], "score") == {}
    assert importance([*settings, tried(0, {"steps": 32}, complete=False)], "score") == {"steps": 1.0}


def test_optuna_is_silent(capfd, recwarn):
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        importance(grid(lambda steps: steps, steps=[4, 8, 16, 32]), "score")
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_an_unknown_figure_is_refused():
    with pytest.raises(ValueError, match=", ".join(TARGETS)):
        importance([], "loss")
