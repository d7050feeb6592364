"""`TrainConfig` refuses values that can't work, by the field's name."""

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.training.config import Elastic, TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("workers", 0),
        ("batch_size", 0),
        ("micro_batch_size", -1),
        ("max_steps", 0),
        ("max_length", 0),
        ("keep_checkpoints", 0),
        ("epochs", 0.0),
        ("epochs", float("inf")),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("clip_norm", -1.0),
        ("clip_norm", float("nan")),
        ("max_failures", -1),
        ("warmup", 1.5),
        ("betas", (0.9, 1.0)),
    ],
)
def test_a_value_out_of_range_names_its_field(field, value):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{field: value})
    assert error.value.field == field


@pytest.mark.parametrize(
    ("strategy", "offload", "fits"),
    [("ddp", "optimizer", False), ("ddp", "all", False), ("fsdp2", "optimizer", False), ("fsdp2", "all", True),
     ("zero1", "optimizer", True), ("zero2", "all", False), ("zero3", "all", True)],
)  # fmt: skip
def test_a_strategy_offloads_what_it_can(strategy, offload, fits):
    if fits:
        assert TrainConfig(strategy=strategy, offload=offload).offload == offload
    else:
        with pytest.raises(ConfigError) as error:
            TrainConfig(strategy=strategy, offload=offload)
        assert error.value.field == "offload"


def test_a_number_of_workers_may_follow_the_cluster():
    assert TrainConfig(workers=Elastic(min=1, max=4), batch_size=4).workers.max == 4
    with pytest.raises(ConfigError, match="4 rows can't be shared by 5 workers"):
        TrainConfig(workers=Elastic(min=1, max=5), batch_size=4)
    with pytest.raises(ConfigError, match="expected 1 <= min <= max, got min 3, max 2"):
        Elastic(min=3, max=2)


def test_fewer_rows_than_workers_is_refused():
    with pytest.raises(ConfigError, match="4 rows can't be shared by 5 workers"):
        TrainConfig(batch_size=4, workers=5)
