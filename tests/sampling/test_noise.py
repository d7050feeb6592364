"""Random numbers by coordinates: in range, even, a pure function of every coordinate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.sampling.compiled_noise import uniform_of_one
from dllm_ray.sampling.noise import ORDER, TOKEN, mix, uniform

words = st.integers(-(2**63), 2**63 - 1)


def draw(seed=3, step=5, position=7, stream=TOKEN, count=1) -> torch.Tensor:
    coordinates = [torch.as_tensor(value).expand(count) for value in (seed, step, position)]
    return uniform(*coordinates, stream)


def splitmix(*numbers: int) -> int:
    """The hash in whole numbers without a limit: SplitMix64's output function, chained over the words."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


@given(words, words, words)
def test_mix_is_chained_splitmix64(one, two, three):
    assert mix(torch.tensor(one), two, torch.tensor(three)).item() % 2**64 == splitmix(one, two, three)


@given(words, st.integers(0, 2**20), st.integers(0, 2**20))
def test_numbers_lie_in_the_unit_interval_and_are_the_hashs_upper_bits(seed, step, position):
    number = draw(seed, step, position).item()
    assert 0 <= number < 1
    assert number == (splitmix(seed, step, position, TOKEN) >> 40) / 2**24


AXES = pytest.mark.parametrize("axis", ["seed", "step", "position"])


@AXES
def test_numbers_along_each_axis_are_even(axis):
    count = 20_000
    numbers = draw(**{axis: torch.arange(count)}, count=count)
    tenths = torch.histc(numbers, bins=10, min=0, max=1) / count
    torch.testing.assert_close(tenths, torch.full((10,), 0.1), atol=0.01, rtol=0)


@AXES
def test_neighbours_along_each_axis_are_unrelated(axis):
    count = 20_000
    numbers = draw(**{axis: torch.arange(count)}, count=count)
    neighbours = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))
    assert abs(neighbours[0, 1].item()) < 0.03


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 6}, {"position": 8}, {"stream": ORDER}], ids=str)
def test_every_coordinate_matters(change):
    assert draw(**change) != draw()


def test_swapped_coordinates_are_other_coordinates():
    assert draw(step=5, position=7) != draw(step=7, position=5)


def test_a_number_is_the_same_among_others():
    steps = torch.tensor([9, 5, 0])
    assert draw(step=steps, count=3)[1] == draw(step=5)


@given(words, st.integers(0, 2**40), st.integers(0, 2**20), st.integers(1, 6))
def test_compiled_loops_draw_the_same_numbers(seed, step, position, stream):
    assert uniform_of_one(seed, step, position, stream) == draw(seed, step, position, stream).item()
