"""The published curves are those of their authors, and are found by name."""

import json

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.tuning import published


def test_every_curve_of_the_facts_is_there(golden):
    wanted = json.loads((golden.parent / "facts" / "aup_published.json").read_text())
    expected = {
        f"{model}/{task}": {method: [tuple(pair) for pair in pairs] for method, pairs in methods.items()}
        for model, tasks in wanted.items()
        for task, methods in tasks.items()
    }
    assert {name: published.curves(name) for name in published.names()} == expected


def test_curves_are_tokens_per_forward_and_percent_from_slow_to_fast():
    assert published.curves("llada/GSM8K-CoT")["d3LLM-LLaDA"] == [(1.0, 74.02), (9.11, 73.09)]
    for name in published.names():
        for curve in published.curves(name).values():
            assert curve == sorted(curve)
            assert all(1 <= tpf < 20 and 1 < accuracy <= 100 for tpf, accuracy in curve)


def test_the_source_is_named():
    assert "arXiv 2601.07568" in published.source()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("llada/gsm8k-cot", "llada/GSM8K-CoT"),
        ("LLADA/MATH", "llada/MATH"),
        ("dreamcoder/MBPP", "dream_coder/MBPP"),
        ("llada/GSM8K", "llada/GSM8K-CoT"),
    ],
)
def test_an_unknown_name_meets_the_nearest_and_all(name, nearest):
    with pytest.raises(ConfigError) as caught:
        published.curves(name)
    assert caught.value.field == "sweep.background"
    assert repr(name) in str(caught.value) and all(known in str(caught.value) for known in published.names())
    assert nearest in str(caught.value).split("the nearest: ")[1].split(";")[0]


@pytest.mark.parametrize("name", ["", "llada", "llada/", "nothing of the kind at all"])
def test_half_a_name_is_unknown_too(name):
    with pytest.raises(ConfigError, match="there are: llada/GSM8K-CoT"):
        published.curves(name)


def test_what_a_caller_does_with_curves_stays_with_it():
    published.curves("llada/MATH")["LLaDA"].clear()
    assert published.curves("llada/MATH")["LLaDA"] == [(1.0, 32.2)]
