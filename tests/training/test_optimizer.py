"""The learning rate's course, and which parameters decay."""

import pytest
import torch
from torch import nn

from dllm_ray.training.config import TrainConfig
from dllm_ray.training.optimizer import build_optimizer, learning_rate


def course(schedule: str, total: int = 100, warmup: float = 0.1) -> list[float]:
    config = TrainConfig(learning_rate=1.0, lr_schedule=schedule, warmup=warmup)
    return [learning_rate(step, total, config) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_linearly_to_its_peak(schedule):
    assert course(schedule)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_cosine_and_linear_fall_to_zero_and_constant_stays():
    assert course("linear")[55] == pytest.approx(0.5)
    assert course("cosine")[55] == pytest.approx(0.5)
    assert course("cosine")[32] == pytest.approx(0.5 * (1 + 2**-0.5), abs=0.01)  # a quarter of the way: cos(pi/4)
    for schedule in ("cosine", "linear"):
        falling = course(schedule)[10:]
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] < 0.02
    assert course("constant")[10:] == [1.0] * 90


def test_a_run_of_one_step_learns():
    assert course("cosine", total=1, warmup=0.0) == [1.0]


def test_matrices_decay_and_vectors_and_frozen_parameters_do_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    decayed, plain = build_optimizer(model.parameters(), TrainConfig(weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], decayed["params"]) == (0.5, [model[0].weight])
    assert plain["weight_decay"] == 0.0
    assert {id(parameter) for parameter in plain["params"]} == {id(p) for p in model[1].parameters()}


def test_a_step_is_adamw():
    weight = nn.Parameter(torch.ones(2, 2))
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.99))
    optimizer = build_optimizer([weight], config)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.full((2, 2), 3.0)
    optimizer.step()
    # the first bias-corrected Adam step is the gradient's sign; decay is decoupled
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 1 - 0.1 * 0.5 - 0.1), rtol=0, atol=1e-6)
