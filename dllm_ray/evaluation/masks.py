"""Which tokens of a target are hidden in which noisy copy, so that few copies say much about its log-likelihood.

The log-likelihood bound of masked diffusion (Ou et al., arXiv 2406.03736; LLaDA, arXiv 2502.09992) is minus the sum
over all masks S of s(S) / (k C(T, k)): k tokens of T are hidden, s is the sum of their cross-entropies given the rest.
A `Design` is a set of masks with weights whose weighted sum of s has that expectation.

Shapes: T tokens, C masks.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

_DIFFERENCES = 16
"""Strata that a standard error is made of, where there are copies for as many: more would say better how large the
error is, fewer make it smaller."""


class Design(NamedTuple):
    """Masks of one target, or of the part of it in one block."""

    masks: np.ndarray
    """[C, T] bool, true where a token is hidden."""
    weight: np.ndarray
    """[C] what a mask's summed cross-entropy is multiplied with; the sum over masks estimates the target's."""
    stratum: np.ndarray
    """[C] number of the stratum, from 0; -1: one of the masks that are all there."""
    sign: np.ndarray
    """[C] which half of its stratum a mask is in, 1 or -1. The halves are alike and independent, so that the square of
    the difference of their weighted sums is an unbiased estimate of the stratum's variance. 0: none; nan: unknown,
    for want of a second half."""

    @property
    def exact(self) -> bool:
        """Whether all masks of the target are there."""
        return bool((self.stratum < 0).all())


def design(tokens: int, copies: int, source: np.random.Generator) -> Design:
    """Masks for a target.

    Numbers of hidden tokens whose masks all fit in their share of the copies are done exactly; if all are, nothing is
    random. The rest is stratified over the number of hidden tokens, of which small ones, whose sums vary most, get more
    copies (Neyman allocation). The masks of half a stratum cut a random order of the tokens into runs, one beginning
    where the last one ended, so that all tokens are hidden about equally often.

    Args:
        tokens: T, at least 1.
        copies: most masks.
        source: of randomness.
    """
    plan = _plan(tokens, copies)
    if not plan.strata:
        return plan.whole
    halves = 1 if plan.lone else 2
    shape = (plan.strata, halves, plan.run)
    place = (np.arange(plan.run) + source.random((plan.strata, halves, 1))) / plan.run
    quantile = (np.arange(plan.strata)[:, None, None] + place) / plan.strata
    number = np.minimum(np.searchsorted(plan.cumulative, quantile, side="right"), len(plan.hidden) - 1)
    hidden = plan.hidden[number]
    rank = source.permuted(np.broadcast_to(np.arange(tokens), (plan.strata, halves, tokens)), axis=2)
    begin = hidden.cumsum(axis=2) - hidden
    masks = (rank[:, :, None] - begin[..., None]) % tokens < hidden[..., None]
    sign = np.array([np.nan] if plan.lone else [1.0, -1.0])
    whole = plan.whole
    return Design(
        masks=np.concatenate([whole.masks, masks.reshape(-1, tokens)]),
        weight=np.concatenate([whole.weight, plan.weight[number].ravel()]),
        stratum=np.concatenate([whole.stratum, np.broadcast_to(np.arange(plan.strata)[:, None, None], shape).ravel()]),
        sign=np.concatenate([whole.sign, np.broadcast_to(sign[:, None], shape).ravel()]),
    )


class _Plan(NamedTuple):
    """What all designs of a size share."""

    whole: Design  # the masks that are all there
    hidden: np.ndarray  # [K] numbers of hidden tokens that are drawn
    cumulative: np.ndarray  # [K] chance to draw this number or a smaller one
    weight: np.ndarray  # [K] of a mask with so many hidden tokens
    strata: int
    run: int  # masks in half a stratum
    lone: bool  # one copy: there is no second half


@lru_cache(maxsize=4096)
def _plan(tokens: int, copies: int) -> _Plan:
    hidden = np.arange(1, tokens + 1)
    # (T / k) s has a variance of about 1 / k, up to a factor that is the same for all k
    chance = hidden**-0.5
    few = list(_with_few_masks(tokens, copies))
    drawn = np.ones(tokens, dtype=bool)
    whole: list[int] = []
    while drawn.any():
        share = copies * chance / chance[drawn].sum()
        fit = [k for k in few if drawn[k - 1] and math.comb(tokens, k) <= share[k - 1]]
        if not fit:
            break
        whole += fit
        copies -= sum(math.comb(tokens, k) for k in fit)
        drawn[[k - 1 for k in fit]] = False
    hidden, chance = hidden[drawn], chance[drawn] / chance[drawn].sum()
    run = max(1, copies // (2 * _DIFFERENCES))
    strata = 0 if not len(hidden) else max(1, copies // (2 * run))
    lone = copies < 2
    drawn_copies = strata * run * (1 if lone else 2)
    return _Plan(
        whole=_all_masks(tokens, whole),
        hidden=hidden,
        cumulative=chance.cumsum(),
        weight=1 / (hidden * chance * drawn_copies) if strata else chance,
        strata=strata,
        run=run,
        lone=lone,
    )


def _with_few_masks(tokens: int, copies: int) -> Iterator[int]:
    """Numbers of hidden tokens that have at most `copies` masks."""
    for rest in range(tokens // 2 + 1):
        if math.comb(tokens, rest) > copies:
            return
        yield from {rest, tokens - rest} - {0}


def _all_masks(tokens: int, numbers: list[int]) -> Design:
    """All masks that hide these numbers of tokens."""
    chosen = [places for k in numbers for places in combinations(range(tokens), k)]
    masks = np.zeros((len(chosen), tokens), dtype=bool)
    for mask, places in zip(masks, chosen, strict=True):
        mask[list(places)] = True
    weight = np.array([1 / (len(places) * math.comb(tokens, len(places))) for places in chosen])
    return Design(masks, weight, np.full(len(chosen), -1), np.zeros(len(chosen)))
