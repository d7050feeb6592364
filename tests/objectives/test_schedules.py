"""Noise schedules against recorded numbers, hand-computed ones, and their own definitions."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError
from dllm_ray.objectives.schedules import (
    alpha_schedule,
    edit_rate,
    edit_share,
    elbo_weight,
    kappa_schedule,
    unmask_probability,
)

NAMES = pytest.mark.parametrize("name", ["linear", "cosine"])
times = st.floats(1 / 1024, 1, width=32)


def at(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@NAMES
def test_agrees_with_the_reference(golden, name):
    recorded = json.loads((golden / "common" / "schedulers.json").read_text())[f"{name.title()}AlphaScheduler"]
    schedule, t = alpha_schedule(name), torch.tensor(recorded["t"])
    torch.testing.assert_close(schedule.alpha(t), torch.tensor(recorded["alpha"]))
    torch.testing.assert_close(schedule.derivative(t), torch.tensor(recorded["dalpha"]))
    torch.testing.assert_close(elbo_weight(schedule, t), torch.tensor(recorded["weight"]))
    for (s, later), still_masked in zip(recorded["rmp_args"], recorded["rmp"], strict=True):
        assert 1 - unmask_probability(schedule, at(later), at(s)).item() == pytest.approx(still_masked, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "t", "alpha", "weight"),
    [
        ("linear", 0.25, 0.75, 4.0),
        ("linear", 1.0, 0.0, 1.0),
        ("cosine", 1 / 3, 0.5, math.pi / 2 * math.sqrt(3)),  # cos(60 degrees) = 1/2, sin = sqrt(3) / 2
        ("cosine", 1.0, 0.0, 0.0),
    ],
)
def test_values_by_hand(name, t, alpha, weight):
    schedule = alpha_schedule(name)
    assert schedule.alpha(at(t)).item() == pytest.approx(alpha, abs=1e-12)
    assert elbo_weight(schedule, at(t)).item() == pytest.approx(weight, rel=1e-5, abs=1e-12)


@NAMES
def test_everything_is_clean_at_0_and_masked_at_1(name):
    assert alpha_schedule(name).alpha(at(0, 1)).tolist() == pytest.approx([1, 0])


@NAMES
@given(times, times)
def test_alpha_falls(name, one, other):
    early, late = sorted((one, other))
    alphas = alpha_schedule(name).alpha(at(early, late))
    assert alphas[0] > alphas[1] if early < late else alphas[0] == alphas[1]


@NAMES
@given(times)
def test_the_weight_is_the_slope_over_the_masked_share(name, time):
    schedule, t = alpha_schedule(name), at(time).requires_grad_()
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(elbo_weight(schedule, t), -slope / (1 - alpha), rtol=2e-3, atol=1e-9)


@NAMES
@given(st.lists(times, min_size=3, max_size=3))
def test_unmasking_in_two_strides_is_unmasking_in_one(name, three):
    schedule = alpha_schedule(name)
    early, middle, late = (at(value) for value in sorted(three))
    stays = (1 - unmask_probability(schedule, late, middle)) * (1 - unmask_probability(schedule, middle, early))
    torch.testing.assert_close(1 - stays, unmask_probability(schedule, late, early))


@NAMES
def test_all_masks_are_due_at_time_0(name):
    assert unmask_probability(alpha_schedule(name), at(0.3, 1), at(0, 0)).tolist() == pytest.approx([1, 1])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"'quadratic'.*linear, cosine"):
        alpha_schedule("quadratic")


KAPPAS = pytest.mark.parametrize("name", ["linear", "cubic", "cosine"])


@KAPPAS
def test_kappas_agree_with_the_reference(golden, name):
    recorded = json.loads((golden / "common" / "schedulers.json").read_text())[f"{name.title()}KappaScheduler"]
    schedule, t = kappa_schedule(name), torch.tensor(recorded["t"])
    torch.testing.assert_close(schedule.kappa(t), torch.tensor(recorded["kappa"]))
    torch.testing.assert_close(schedule.derivative(t), torch.tensor(recorded["dkappa"]))
    # 1 - kappa has few digits left near t = 1
    torch.testing.assert_close(edit_rate(schedule, t), torch.tensor(recorded["weight"]), rtol=1e-4, atol=1e-5)


@KAPPAS
@given(t=times)
def test_kappas_rise_from_0_to_1_as_their_derivatives_say(name, t):
    schedule = kappa_schedule(name)
    assert schedule.kappa(at(0.0, 1.0)).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    x = at(t).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.kappa(x).sum(), x)
    torch.testing.assert_close(schedule.derivative(at(t)), slope)
    assert slope.item() >= 0


def test_an_unknown_kappa_is_refused():
    with pytest.raises(ConfigError, match="linear, cubic, cosine"):
        kappa_schedule("square")


@pytest.mark.parametrize("name", ["linear", "cubic", "cosine"])
def test_the_inverse_of_kappa_and_the_share_of_a_step(name):
    schedule = kappa_schedule(name)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse(schedule.kappa(t)), t, rtol=0, atol=1e-9)
    early, late = t[:-1], t[1:]
    left = 1 - schedule.kappa(early)
    share = edit_share(schedule, early, late)
    torch.testing.assert_close(share * left, schedule.kappa(late) - schedule.kappa(early), rtol=0, atol=1e-5)
    short = edit_share(schedule, early, early + 1e-6) / 1e-6
    torch.testing.assert_close(short, edit_rate(schedule, early), rtol=1e-2, atol=1e-3)
