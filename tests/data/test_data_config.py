"""Data settings that can't work are refused when they are made, with the field's name."""

import pytest

from dllm_ray.config import read, to_dict
from dllm_ray.data.config import DataConfig, FilterConfig, SourceConfig
from dllm_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"valid_rows": -1}, "valid_rows"),
        ({"shuffle_mb": 0}, "shuffle_mb"),
        ({"path": ""}, "path"),
        ({"path": []}, "path"),
        ({"sources": []}, "sources"),
        ({"path": "a", "sources": [SourceConfig("b")]}, "sources"),
        ({"sources": [SourceConfig("a", weight=1), SourceConfig("b")]}, "sources"),
        ({"sources": [SourceConfig("a"), SourceConfig("a")]}, "sources"),
        ({"random_length": 1.5}, "random_length"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch"),
        ({"max_tokens_per_batch": 9, "packing": True}, "max_tokens_per_batch"),
        ({"padding": "eos", "packing": True}, "padding"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, field):
    with pytest.raises(ConfigError) as caught:
        DataConfig(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"path": []}, "path"),
        ({"weight": 0}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"repeat": 0}, "repeat"),
        ({"rows": 0}, "rows"),
        ({"seed": -1}, "seed"),
    ],
)
def test_so_is_one_of_a_source(settings, field):
    with pytest.raises(ConfigError) as caught:
        SourceConfig(**{"path": "a", **settings})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"), [({"min_tokens": -1}, "min_tokens"), ({"min_tokens": 5, "max_tokens": 4}, "max_tokens")]
)
def test_and_of_a_filter(settings, field):
    with pytest.raises(ConfigError) as caught:
        FilterConfig(**settings)
    assert caught.value.field == field


def test_the_smallest_settings_are_allowed():
    assert not DataConfig(path=None, valid_rows=0, shuffle_mb=1e-6).named


def test_a_mixture_is_read_from_plain_values_and_written_back():
    tree = {
        "sources": [
            {"path": "a.jsonl", "weight": 0.5, "filter": {"where": {"language": "en", "score": [4, 5]}}},
            {"path": ["b.jsonl", "c.jsonl"], "weight": 0.5, "name": "rest", "repeat": 2, "rows": 10},
        ]
    }
    config = read(DataConfig, tree, "data.yaml")
    one, two = config.mixture()
    assert (one.label, two.label) == ("a.jsonl", "rest")
    assert one.filter == FilterConfig(where={"language": ["en"], "score": [4, 5]})
    assert read(DataConfig, to_dict(config), "again") == config


def test_a_list_of_paths_is_a_mixture_without_weights():
    assert [source.path for source in DataConfig(path=["a", "b"]).mixture()] == ["a", "b"]
    assert [source.path for source in DataConfig(path="a").mixture()] == ["a"]
