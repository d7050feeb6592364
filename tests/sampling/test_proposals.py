"""Which token a position would get, and how sure the model is of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dllm_ray.sampling import proposals
from dllm_ray.sampling.proposals import (
    CHOSEN,
    ENTROPY,
    MARGIN,
    PLAIN,
    Rules,
    guide,
    kept,
    likeliest,
    probability,
    propose,
    suppress,
    tempered,
)

LAST = 1 - 2**-24
"""The largest random number there is."""
MASK = 3
KINDS = pytest.mark.parametrize("kind", [PLAIN, CHOSEN, MARGIN, ENTROPY], ids=["plain", "chosen", "margin", "entropy"])

# --- a slow reference, for one position, in float64


def softmax(values: np.ndarray) -> np.ndarray:
    shares = np.exp(values - values.max())
    return shares / shares.sum()


def nucleus(
    shares: np.ndarray, top_p: float | None, top_k: int | None, top_k_first: bool, possible: np.ndarray
) -> list[int]:
    """The tokens that stay, likeliest first: while less than top_p comes before them, and top_k at most."""
    order = [int(token) for token in np.argsort(-shares, kind="stable") if possible[token]]
    if top_k_first and top_k is not None:
        order = order[:top_k]
        shares = shares / shares[order].sum()
    stay, before = [], 0.0
    for token in order:
        if not stay or top_p is None or before <= top_p:
            stay.append(token)
        before += shares[token]
    return stay[:top_k]


def distribution(
    logits: np.ndarray, kind: int, temperature: float, top_p: float | None, top_k: int | None, top_k_first: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What a token is drawn from, and what confidence looks at. The mask token is drawn never; where no filter is on,
    it keeps its share in the latter."""
    scaled = np.float64(logits) / (temperature or 1.0)
    possible = np.arange(len(logits)) != MASK
    textual = softmax(np.where(possible, scaled, -np.inf))
    if top_p is None and top_k is None:
        return textual, softmax(scaled)
    # of a plain distribution the nucleus is one of text alone; else the mask has its share in it
    shares = textual if kind == PLAIN else softmax(scaled)
    stay = nucleus(shares, top_p, top_k, top_k_first, possible)
    left = np.zeros_like(textual)
    left[stay] = textual[stay] / textual[stay].sum()
    return left, left


def confidence(logits: np.ndarray, seen: np.ndarray, token: int, kind: int, last_resort: tuple[int, ...] = ()) -> float:
    if kind == PLAIN:
        plain = np.float64(logits).copy()
        plain[list(last_resort)] = -np.inf
        return float(softmax(plain)[token])
    if kind == CHOSEN:
        return float(seen[token])
    if kind == MARGIN:
        best = np.sort(seen)
        return float(best[-1] - best[-2])
    return float(sum(share * np.log(share) for share in seen if share > 0))


def some_logits(seed: int, rows: int, width: int = 12, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def rules_of(
    rows: int,
    kind: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    numbers: torch.Tensor | None = None,
    top_k_first: bool = False,
) -> Rules:
    if numbers is None:
        numbers = torch.full((rows,), 0.5)
    warm = temperature > 0
    return Rules(
        kind,
        numbers if warm else None,
        torch.full((rows,), temperature) if warm else None,
        None if top_p is None else torch.full((rows,), top_p),
        None if top_k is None else torch.full((rows,), top_k),
        top_k_first,
    )


# --- proposals against the reference

FILTERS = pytest.mark.parametrize(
    ("top_p", "top_k"), [(None, None), (0.8, None), (None, 4), (0.9, 5), (0.05, None), (None, 2)]
)


@KINDS
@FILTERS
@pytest.mark.parametrize("top_k_first", [False, True])
def test_a_greedy_proposal_is_the_likeliest_text_with_the_references_confidence(kind, top_p, top_k, top_k_first):
    logits = some_logits(seed=1, rows=40)
    logits[:8, MASK] = 9.0  # however likely the mask token is
    rules = rules_of(40, kind, 0.0, top_p, top_k, top_k_first=top_k_first)
    tokens, sure = propose(logits.clone(), rules, MASK)
    for row, token, found in zip(logits.numpy(), tokens.tolist(), sure.tolist(), strict=True):
        drawn, seen = distribution(row, kind, 0.0, top_p, top_k, top_k_first)
        assert token == int(drawn.argmax())
        assert found == pytest.approx(confidence(row, seen, token, kind), rel=1e-4, abs=1e-6)


@KINDS
@FILTERS
@pytest.mark.parametrize("top_k_first", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_drawn_tokens_follow_the_filtered_distribution(kind, top_p, top_k, top_k_first, temperature):
    count = 4000
    logits = some_logits(seed=2, rows=1, spread=1.5)
    logits[0, MASK] = 2.0
    numbers = (torch.arange(count) + 0.5) / count
    rules = rules_of(count, kind, temperature, top_p, top_k, numbers, top_k_first)
    tokens, sure = propose(logits.repeat(count, 1), rules, MASK)
    drawn, seen = distribution(logits[0].numpy(), kind, temperature, top_p, top_k, top_k_first)
    shares = np.bincount(tokens.numpy(), minlength=12) / count
    assert np.abs(shares - drawn).max() < 2 / count
    for token in np.flatnonzero(shares):
        found = sure[tokens == int(token)]
        assert found.min() == found.max()
        expected = confidence(logits[0].numpy(), seen, int(token), kind)
        assert found[0].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@KINDS
def test_positions_of_several_temperatures_share_a_call(kind):
    logits = some_logits(seed=3, rows=6)
    temperature = torch.tensor([0.1, 1.0, 3.0, 2.0, 0.5, 9.0])
    numbers = torch.tensor([LAST, 0.1, 0.0, 0.7, LAST, 0.5])
    together = propose(logits.clone(), Rules(kind, numbers, temperature), MASK)
    for row in range(6):
        alone = propose(logits[[row]].clone(), Rules(kind, numbers[[row]], temperature[[row]]), MASK)
        assert together[0][row] == alone[0][0]
        torch.testing.assert_close(together[1][[row]], alone[1])


def test_positions_have_their_own_filters():
    logits = some_logits(seed=4, rows=4)
    top_p, top_k = torch.tensor([1.0, 0.3, 1.0, 0.6]), torch.tensor([12, 12, 3, 2])
    _, together = propose(logits.clone(), Rules(CHOSEN, None, None, top_p, top_k), MASK)
    for row in range(1, 4):
        _, alone = propose(logits[[row]].clone(), Rules(CHOSEN, None, None, top_p[[row]], top_k[[row]]), MASK)
        torch.testing.assert_close(together[[row]], alone)


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from([PLAIN, CHOSEN, MARGIN, ENTROPY]),
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 50.0]),
    top_p=st.none() | st.floats(0.01, 1.0),
    top_k=st.none() | st.integers(2, 20),
    number=st.sampled_from([0.0, 2**-24, 0.3, 0.5, LAST]),
    first=st.booleans(),
    like_masks=st.booleans(),
)
def test_the_mask_token_is_never_proposed_and_confidence_is_a_number(
    seed, kind, temperature, top_p, top_k, number, first, like_masks
):
    logits = some_logits(seed, rows=3)
    if like_masks:
        logits[:, MASK] = 40.0
    rules = rules_of(3, kind, temperature, top_p, top_k, torch.full((3,), number), first)
    tokens, sure = propose(logits, rules, MASK)
    assert MASK not in tokens.tolist()
    assert sure.dtype == torch.float32
    assert sure.isfinite().all()
    if kind in (PLAIN, CHOSEN, MARGIN):
        assert ((sure >= 0) & (sure <= 1 + 1e-6)).all()
    else:
        assert (sure <= 1e-6).all()


@pytest.mark.parametrize("kind", [PLAIN, CHOSEN])
def test_the_mask_token_keeps_its_share_in_the_confidence_of_others(kind):
    logits = torch.tensor([[0.0, 1.0, -1.0, 5.0]])
    expected = torch.softmax(logits.double(), 1)[0, 1].item()
    tokens, sure = propose(logits, Rules(kind), MASK)
    assert tokens.item() == 1
    assert sure.item() == pytest.approx(expected, rel=1e-5)
    assert expected < 0.02  # without its share it would be more than a half


# --- filters


@given(
    seed=st.integers(0, 2**31),
    top_p=st.none() | st.floats(0.001, 1.0),
    top_k=st.none() | st.integers(1, 15),
    first=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_filters_keep_the_set_of_a_slow_loop_with_the_crossing_token_and_never_nothing(
    seed, top_p, top_k, first, temperature
):
    assume(top_p is not None or top_k is not None)
    logits = some_logits(seed, rows=1, width=12)
    scaled = tempered(logits, torch.tensor([temperature]))
    rules = rules_of(1, CHOSEN, 0.0, top_p, top_k, top_k_first=first)
    shares, ids = kept(scaled, torch.logsumexp(scaled, dim=1), rules)
    found = [token for token, share in zip(ids[0].tolist(), shares[0].tolist(), strict=True) if share > 0]

    whole = softmax(np.float64(logits[0].numpy()) / temperature)
    stay = nucleus(whole, top_p, top_k, first, np.ones(12, bool))
    if top_p is not None:  # float32 sums may fall on the other side of a bound that is met almost exactly
        base = whole / whole[np.argsort(-whole)[:top_k]].sum() if first else whole
        edges = np.cumsum(np.sort(base)[::-1])
        assume(np.abs(edges - top_p).min() > 1e-5)
    assert found == stay
    assert found
    assert shares.sum().item() == pytest.approx(1.0, abs=1e-5)
    if top_k is not None:
        assert len(found) <= top_k
    if top_p is not None and not first and (top_k is None or len(found) < top_k):
        assert whole[found].sum() >= min(top_p, 1) - 1e-6  # the one that crosses the line is in


def test_the_two_orders_of_filters_differ_where_top_k_takes_much_away():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    rules = rules_of(1, CHOSEN, 0.0, top_p=0.55, top_k=2)
    total = torch.logsumexp(logits, dim=1)
    assert (kept(logits, total, rules)[0] > 0).sum() == 2  # 0.4, and 0.3 that crosses 0.55
    rules = replace(rules, top_k_first=True)
    assert (kept(logits, total, rules)[0] > 0).sum() == 1  # 0.4 / 0.7 is beyond 0.55 already


def test_a_tiny_temperature_does_not_overflow():
    logits = torch.tensor([[100.0, 99.0, -100.0, 0.0]])
    numbers = torch.tensor([LAST])
    for kind in (PLAIN, CHOSEN):
        tokens, sure = propose(logits.clone(), Rules(kind, numbers, torch.tensor([1e-30])), MASK)
        assert tokens.item() == 0
        assert sure.isfinite().all()


# --- precision


@KINDS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bfloat16_logits_give_the_confidences_of_their_float32_values(kind, temperature):
    logits = some_logits(seed=5, rows=50).to(torch.bfloat16)
    rules = rules_of(50, kind, temperature, numbers=torch.linspace(0, LAST, 50))
    tokens, sure = propose(logits.clone(), rules, MASK)
    wide_tokens, wide = propose(logits.float(), rules, MASK)
    assert tokens.tolist() == wide_tokens.tolist()
    assert sure.dtype == torch.float32
    torch.testing.assert_close(sure, wide)


def test_certain_tokens_are_told_apart_in_bfloat16():
    logits = torch.zeros(2, 6, dtype=torch.bfloat16)
    logits[0, 1], logits[1, 1] = 10.0, 12.0
    for kind in (PLAIN, CHOSEN, MARGIN, ENTROPY):
        _, sure = propose(logits.clone(), Rules(kind), MASK)
        assert sure[0] < sure[1]  # in bfloat16 both would be 1


# --- tokens of last resort


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_of_last_resort_may_be_proposed_but_with_confidence_0(temperature):
    logits = some_logits(seed=6, rows=60, width=6)
    resort = (1, 5)
    rules = rules_of(60, PLAIN, temperature, numbers=torch.linspace(0, LAST, 60))
    plain, _ = propose(logits.clone(), rules, MASK)
    tokens, sure = propose(logits.clone(), rules, MASK, last_resort=resort)
    assert tokens.tolist() == plain.tolist()  # proposals are what they were
    assert {1, 5} & set(tokens.tolist()) and set(tokens.tolist()) - {1, 5}
    for row, token, found in zip(logits.numpy(), tokens.tolist(), sure.tolist(), strict=True):
        if token in resort:
            assert found == 0
        else:  # renormalised without them
            assert found == pytest.approx(confidence(row, row, token, PLAIN, resort), rel=1e-4)


# --- the parts


def test_guidance_is_unguided_plus_scale_plus_one_times_the_difference():
    guided, unguided = torch.randn(3, 5), torch.randn(3, 5)
    for scale in (0.0, 0.5, 2.0):
        expected = unguided + (scale + 1) * (guided - unguided)
        torch.testing.assert_close(guide(guided, unguided, torch.full((3,), scale)), expected)


def test_every_position_has_its_own_guidance():
    guided, unguided = torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1)
    assert guide(guided, unguided, torch.tensor([0.0, 3.0])).tolist() == [[1], [4]]


def test_suppressed_tokens_are_impossible_and_others_untouched():
    logits = torch.zeros(2, 4)
    suppress(logits, (1, 3))
    assert logits.tolist() == [[0, -torch.inf, 0, -torch.inf]] * 2
    suppress(logits, ())
    assert logits.isinf().sum() == 4


@given(
    width=st.integers(5, 400),
    possible=st.sets(st.integers(0, 400), min_size=1, max_size=5),
    number=st.sampled_from([0.0, 2**-24, 0.5, LAST]),
    temperature=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
    kind=st.sampled_from([PLAIN, CHOSEN, MARGIN, ENTROPY]),
    top_p=st.none() | st.sampled_from([0.1, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_an_impossible_token_is_never_drawn(width, possible, number, temperature, kind, top_p, seed):
    possible = {1 + token % (width - 2) for token in possible} - {MASK}  # neither the first nor the last
    assume(possible)
    logits = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
    suppress(logits, tuple(set(range(width)) - possible))
    rules = rules_of(1, kind, temperature, top_p, None, torch.tensor([number]))
    tokens, sure = propose(logits, rules, MASK)
    assert tokens.item() in possible
    assert sure.isfinite().all()


@given(
    width=st.sampled_from([1, 7, 64, 128, 192, 300, 512, 1024, 1025]),
    levels=st.sampled_from([1, 2, 5, 1000]),  # few values: ties
    impossible=st.sampled_from([0.0, 0.5, 1.0]),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_likeliest_token_is_the_first_of_the_largest(width, levels, impossible, wide, seed):
    source = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (3, width), generator=source).float() - levels / 2
    logits[torch.rand(3, width, generator=source) < impossible] = -torch.inf
    expected = [values.index(max(values)) for values in logits.tolist()]
    assert likeliest(logits if wide else logits.to(torch.float16)).tolist() == expected


def test_probability_is_that_of_softmax():
    logits = torch.randn(6, 9)
    tokens = torch.arange(6)
    expected = torch.softmax(logits.double(), 1)[tokens, tokens].float()
    torch.testing.assert_close(probability(logits, tokens), expected)


def test_a_single_token_left_leads_by_all_there_is():
    _, sure = propose(some_logits(seed=7, rows=2), rules_of(2, MARGIN, 0.0, top_k=1), MASK)
    assert sure.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "temperature", "mask_logit"), [(CHOSEN, 0.05, 12.0), (ENTROPY, 0.0, 120.0), (MARGIN, 0.0, 120.0)]
)
def test_text_is_proposed_by_its_logits_however_far_the_mask_token_leads(kind, temperature, mask_logit):
    logits = torch.tensor([[0.0, 5.0, -torch.inf, mask_logit, -torch.inf]])
    tokens, _ = propose(logits, rules_of(1, kind, temperature), MASK)
    assert tokens.item() == 1


@pytest.mark.parametrize("top_p", [0.3, 0.999999])
def test_a_nucleus_is_the_same_whether_the_vocabulary_is_sorted_whole(monkeypatch, top_p):
    logits, numbers = some_logits(seed=11, rows=5), torch.linspace(0, 0.99, 5)
    rules = Rules(CHOSEN, numbers, torch.ones(5), torch.full((5,), top_p))
    whole = propose(logits.clone(), rules, MASK)
    monkeypatch.setattr(proposals, "_NUCLEUS", 4)
    for ours, theirs in zip(propose(logits.clone(), rules, MASK), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
