"""How many masks a step commits, and which."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.sampling.unmasking import commit_schedule, most_confident, quota_table

SCHEDULES = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def test_commit_schedules_are_the_references(golden):
    tables = json.loads((golden / "common" / "schedulers.json").read_text())["get_num_transfer_tokens"]
    assert len(tables) > 10
    for table in tables:
        counts = table["counts"]
        ours = quota_table(counts, [table["steps"]] * len(counts), [table["scheduler"]] * len(counts))
        assert ours.tolist() == table["out"], table


@pytest.mark.parametrize(
    ("masks", "steps", "counts"),
    [
        (8, 8, (1,) * 8),
        (8, 4, (2, 2, 2, 2)),
        (10, 4, (2, 3, 2, 3)),  # 10/4 -> 2, 8/3 -> 3, 5/2 -> 2 (half to even), 3
        (3, 8, (1, 1, 1)),  # more steps than masks: the others are left out
        (5, 1, (5,)),
        (0, 4, ()),
    ],
)
def test_linear_schedules_by_hand(masks, steps, counts):
    assert commit_schedule(masks, steps) == counts


@SCHEDULES
@given(masks=st.integers(0, 300), steps=st.integers(1, 300))
@settings(deadline=None)
def test_a_schedule_commits_every_mask_within_its_steps(schedule, masks, steps):
    counts = commit_schedule(masks, steps, schedule)
    assert sum(counts) == masks
    assert len(counts) <= steps
    assert all(count > 0 for count in counts)


def test_a_cosine_schedule_commits_few_tokens_first():
    counts = commit_schedule(256, 16, "cosine")
    assert sum(counts[:8]) < 256 / 3 < sum(counts[8:])


def test_a_quota_table_pads_short_rows_with_zeros():
    table = quota_table([4, 1, 0], [2, 2, 2], ["linear", "cosine", "linear"])
    assert table.tolist() == [[2, 2], [1, 0], [0, 0]]


@st.composite
def confidences(draw):
    """Rows of few distinct values, so that ties are common, as between certainties of a trained model."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    level = st.sampled_from([-torch.inf, 0.0, 0.25, 0.5, 1.0])
    values = draw(st.lists(st.lists(level, min_size=width, max_size=width), min_size=rows, max_size=rows))
    quotas = draw(st.lists(st.integers(0, width + 2), min_size=rows, max_size=rows))
    return torch.tensor(values), torch.tensor(quotas)


@given(confidences())
@settings(deadline=None)
def test_the_most_confident_are_those_a_slow_loop_takes_leftmost_first(case):
    confidence, quota = case
    expected = torch.zeros_like(confidence, dtype=torch.bool)
    for row, values in enumerate(confidence.tolist()):
        for _ in range(quota[row]):
            best = max(range(len(values)), key=values.__getitem__)  # the leftmost of the largest
            if values[best] > -torch.inf:
                expected[row, best], values[best] = True, -torch.inf
    assert torch.equal(most_confident(confidence, quota), expected)
