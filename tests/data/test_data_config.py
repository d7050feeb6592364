"""Data settings that can't work are refused when they are made, with the field's name."""

import pytest

from dllm_ray.data.config import DataConfig
from dllm_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"valid_rows": -1}, "valid_rows"),
        ({"shuffle_window": 0}, "shuffle_window"),
        ({"path": ""}, "path"),
        ({"path": []}, "path"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, field):
    with pytest.raises(ConfigError) as caught:
        DataConfig(**settings)
    assert caught.value.field == field


def test_the_smallest_settings_are_allowed():
    assert DataConfig(path=None, valid_rows=0, shuffle_window=1).path is None
