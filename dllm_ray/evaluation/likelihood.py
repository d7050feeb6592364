"""The log-likelihood of a target after a prefix, estimated from masked copies of the target. Token ids and a model: no
text, disk or Ray.

Full attention: the masked-diffusion bound (LLaDA, arXiv 2502.09992), with the target as one block. Block-causal
attention: the sum of the bounds of the target's blocks, each given the clean ones before it (BD3LM, arXiv 2503.09573),
on the model's grid from the text's first token; with blocks of one token that is the autoregressive log-likelihood.

A forward has copies of as many targets as fit; the vocabulary head runs over masked positions only. Where attention is
block-causal, copies of one target share a row and its one clean copy.

Shapes: P pairs, I items (a masked copy of one block of one target), S spans, B rows, W columns, N masked positions.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dllm_ray.errors import ModelError
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.evaluation.greedy import writes
from dllm_ray.evaluation.masks import design
from dllm_ray.evaluation.texts import Rows, Texts, lay, texts_of
from dllm_ray.models.attention import Pattern
from dllm_ray.models.cross_entropy import cross_entropy
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.proposals import guide
from dllm_ray.sampling.sampler import row_seeds

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prefix and of a target."""

FIRST_ROUND = 16
"""Copies after which an adaptive estimate looks at the ranking for the first time; then whenever they have doubled."""

DECIDED = 3.0
"""Standard errors of a difference by which the best choice must lead to be taken for the best."""

_LOGITS_AT_ONCE = 512  # masked positions whose vocabulary logits are held at a time
_PACKED = 256  # positions that a row with a clean copy may always have beside it, however short that is
_TOKENS_ON_CPU = 1024  # of a forward: what more of them do per second falls, as activations outgrow the caches


class Likelihood(NamedTuple):
    """The estimate of one target."""

    mean: float
    """Log-likelihood in nats: an unbiased estimate of the bound."""
    stderr: float
    """Its standard error, from the differences between independent halves of each stratum of masks
    (`masks.Design.sign`); 0 where all masks were summed, nan where one copy can't tell."""
    copies: int
    """Masked copies that were evaluated; with guidance, each in two forwards."""
    greedy: bool
    """Whether greedy denoising would write the target; False where nobody asked."""


def log_likelihood(
    lm: DiffusionLM, pairs: Sequence[Pair], mc_num: int = 128, seed: int = 0
) -> list[tuple[float, float]]:
    """Mean and standard error of each target's log-likelihood, in nats; `estimate` with its defaults.

    Args:
        lm: the model, in eval mode.
        pairs: token ids of prefix and target.
        mc_num: most masked copies of each target.
        seed: seeds the masks; each pair has its own, by its place.
    """
    found = estimate(lm, pairs, LikelihoodConfig(mc_num=mc_num), row_seeds(seed, range(len(pairs))))
    return [(item.mean, item.stderr) for item in found]


@torch.inference_mode()
def estimate(
    lm: DiffusionLM,
    pairs: Sequence[Pair],
    config: LikelihoodConfig,
    seeds: Sequence[int],
    groups: Sequence[Sequence[int]] | None = None,
    sizes: Sequence[float] | None = None,
) -> list[Likelihood]:
    """Estimates log-likelihoods of targets.

    What is found of a pair depends on the pair, the settings and its own seed; but with `adaptive`, on the other
    choices of its group as well.

    Args:
        lm: the model, in eval mode.
        pairs: token ids of prefix and target; only targets are masked.
        config: how.
        seeds: one for each pair.
        groups: indices of pairs that are choices of one question, for `adaptive`: a question's choices are done when
            the best leads every other by `DECIDED` standard errors of the difference, both in their means and in means
            by size. A pair of no group, or alone in one, gets all its copies.
        sizes: what means are divided by for the second ranking, e.g. characters; None: there is no second one.

    Raises:
        ConfigError, ModelError: as of `texts.texts_of`; or the model gives NaN.
    """
    texts = texts_of(lm, pairs)
    tally = _Tally(len(pairs))
    asked = np.arange(len(pairs))
    for number, copies in enumerate(_rounds(config)):
        if not len(asked):
            break
        sources = [np.random.default_rng([seeds[pair] % 2**64, number]) for pair in asked]
        items = _items(texts, asked, lm.spec.grid, copies, sources)
        tally.add(asked, items, _sums(lm, texts, items, config), copies)
        asked = tally.undecided(groups or (), sizes)
    greedy = writes(lm, texts, config) if config.check_greedy else np.zeros(len(pairs), dtype=bool)
    return [
        Likelihood(float(mean), float(error), int(copies), bool(written))
        for mean, error, copies, written in zip(tally.mean, tally.stderr, tally.copies, greedy, strict=True)
    ]


def _rounds(config: LikelihoodConfig) -> list[int]:
    """Copies of each round."""
    totals = [0]
    while config.adaptive and max(2 * totals[-1], FIRST_ROUND) * 1.5 <= config.mc_num:  # so that no round is tiny
        totals.append(max(2 * totals[-1], FIRST_ROUND))
    return np.diff([*totals, config.mc_num]).tolist()


class _Items(NamedTuple):
    """Masked copies of blocks, [I] each, in the order of their pairs."""

    pair: np.ndarray
    first: np.ndarray  # place of the block's first token in its text, a prefix's tokens included
    stop: np.ndarray  # place behind its last
    begin: np.ndarray  # place of its first target token
    copy: np.ndarray  # number of the copy of the target that it is in
    mask: np.ndarray  # where its mask begins in `masks`
    weight: np.ndarray
    stratum: np.ndarray  # counted over all; -1: none
    sign: np.ndarray
    masks: np.ndarray  # bool, all masks end to end
    exact: np.ndarray  # [P asked] whether all masks of the pair are there

    def take(self, order: np.ndarray) -> "_Items":
        return _Items(*(values[order] for values in self[:9]), self.masks, self.exact)


def _items(
    texts: Texts, asked: np.ndarray, grid: int | None, copies: int, sources: Sequence[np.random.Generator]
) -> _Items:
    columns: list[list[np.ndarray]] = [[] for _ in range(9)]
    masks, exact = [], []
    mask_count = strata = 0
    for pair, source in zip(asked, sources, strict=True):
        prefix, length = int(texts.prefix[pair]), int(texts.length[pair])
        size = length if grid is None else grid
        all_there = True
        for first in range(prefix // size * size, length, size):
            begin, stop = max(first, prefix), min(first + size, length)
            part = design(stop - begin, copies, source)
            count = len(part.masks)
            all_there &= part.exact
            same = np.ones(count, dtype=np.int64)
            numbers = np.arange(count)
            stratum = np.where(part.stratum < 0, -1, part.stratum + strata)
            values = (pair * same, first * same, stop * same, begin * same, numbers)
            values += (mask_count + numbers * (stop - begin), part.weight, stratum, part.sign)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            masks.append(part.masks.ravel())
            mask_count += part.masks.size
            strata = max(strata, int(stratum.max()) + 1)
        exact.append(all_there)
    return _Items(*map(np.concatenate, columns), np.concatenate(masks), np.array(exact))


class _Tally:
    """Means, standard errors and copies of all pairs, over the rounds."""

    def __init__(self, pairs: int):
        self.mean = np.zeros(pairs)
        self._variance = np.zeros(pairs)
        self.copies = np.zeros(pairs, dtype=np.int64)
        self._planned = 0  # copies that a pair could have had so far
        self._exact = np.zeros(pairs, dtype=bool)
        self._going = np.ones(pairs, dtype=bool)

    @property
    def stderr(self) -> np.ndarray:
        return np.sqrt(self._variance)

    def add(self, asked: np.ndarray, items: _Items, sums: np.ndarray, copies: int) -> None:
        """A round's cross-entropies, summed over each item's masked positions, of the pairs that took part."""
        pairs = len(self.mean)
        values = items.weight * sums
        mean = -np.bincount(items.pair, values, pairs)
        drawn = items.stratum >= 0
        difference = np.bincount(items.stratum[drawn], (values * items.sign)[drawn])
        of_stratum = np.zeros(len(difference), dtype=np.int64)
        of_stratum[items.stratum[drawn]] = items.pair[drawn]
        variance = np.bincount(of_stratum, difference**2, pairs)
        count = np.zeros(pairs, dtype=np.int64)
        np.maximum.at(count, items.pair, items.copy + 1)
        # estimates of the rounds are independent; an exact one needs no other
        share = np.where(items.exact, 1.0, copies / (self._planned + copies))
        self.mean[asked] += share * (mean[asked] - self.mean[asked])
        self._variance[asked] = (1 - share) ** 2 * self._variance[asked] + share**2 * variance[asked]
        self.copies += count
        self._planned += copies
        self._exact[asked] = items.exact

    def undecided(self, groups: Sequence[Sequence[int]], sizes: Sequence[float] | None) -> np.ndarray:
        """Pairs that another round would tell more about."""
        for group in groups:
            choices = np.asarray(group, dtype=np.int64)
            if len(choices) > 1 and self._going[choices].any():
                scales = [np.ones(len(choices))] if sizes is None else [1.0, np.asarray(sizes, dtype=float)[choices]]
                mean, variance = self.mean[choices], self._variance[choices]
                self._going[choices] = not all(_is_decided(mean / by, variance / np.square(by)) for by in scales)
        return np.flatnonzero(self._going & ~self._exact)


def _is_decided(mean: np.ndarray, variance: np.ndarray) -> bool:
    best = int(mean.argmax())
    others = np.arange(len(mean)) != best
    return bool(np.all(mean[best] - mean[others] > DECIDED * np.sqrt(variance[best] + variance[others])))


def _sums(lm: DiffusionLM, texts: Texts, items: _Items, config: LikelihoodConfig) -> np.ndarray:
    """[I] cross-entropies of each item's masked tokens, summed."""
    hidden = np.add.reduceat(items.masks, items.mask, dtype=np.int64)
    row, copies = _rows(texts, items, lm.spec.grid, config.batch_size)
    order = np.argsort(row, kind="stable")
    items, row, hidden = items.take(order), row[order], hidden[order]
    found, owner = [], []
    for start, stop in _batches(row, _loads(lm, items, row, copies, hidden, config)):
        nll_N, item_N = _forward(lm, texts, items, np.arange(start, stop), row[start:stop] - row[start], config)
        found.append(nll_N)
        owner.append(item_N)
    sums = np.bincount(np.concatenate(owner), torch.cat(found).double().cpu().numpy(), len(order))
    if np.isnan(sums).any():
        raise ModelError("the model's logits are not numbers (NaN): its weights or their dtype are broken")
    back = np.empty_like(sums)
    back[order] = sums
    return back


def _rows(texts: Texts, items: _Items, grid: int | None, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of each item [I], longest rows first, and how many copies each row has."""
    size = items.stop - items.first
    if grid is None:
        order = np.argsort(-size, kind="stable")
        row = np.empty_like(order)
        row[order] = np.arange(len(order))
        return row, np.ones_like(row)
    # as many noisy positions beside a clean copy as it has itself: more would cost more attention than they save
    noisy = texts.length - texts.prefix // grid * grid
    clean = (texts.length - 1) // grid * grid
    together = np.clip(np.maximum(clean, _PACKED) // noisy, 1, batch_size)[items.pair]
    key = np.stack([items.pair, items.copy // together])
    _, row = np.unique(key, axis=1, return_inverse=True)
    rank = np.argsort(np.argsort(-np.bincount(row, size), kind="stable"))
    row = rank[row]
    copies = np.zeros(row.max() + 1, dtype=np.int64)
    np.maximum.at(copies, row, items.copy % together + 1)
    return row, copies


def _loads(
    lm: DiffusionLM, items: _Items, row: np.ndarray, copies: np.ndarray, hidden: np.ndarray, config: LikelihoodConfig
) -> np.ndarray:
    """[B] share of a forward that each row takes.

    Args:
        row: [I] ascending.
        copies: [B] of each row.
        hidden: [I] masked tokens.
    """
    load = copies / config.batch_size
    if config.cfg_scale:  # all logits of a forward are held at once
        load = np.maximum(load, np.bincount(row, hidden) / _LOGITS_AT_ONCE)
    if lm.device.type == "cpu":
        width = np.bincount(row, items.stop - items.first)
        if lm.spec.grid is not None:
            clean = np.zeros_like(copies)
            np.maximum.at(clean, row, items.first)
            width = width + clean
        load = np.maximum(load, width / _TOKENS_ON_CPU)
    return load


def _batches(row: np.ndarray, load: np.ndarray) -> Iterator[tuple[int, int]]:
    """Items of each forward: whole rows, as many as fill it, and at least one.

    Args:
        row: [I] ascending.
        load: [B] share of a forward that each row takes.
    """
    first, taken = 0, 0.0
    for number, more in enumerate(load.tolist()):
        if taken + more > 1 + 1e-9 and number > first:
            yield int(np.searchsorted(row, first)), int(np.searchsorted(row, number))
            first, taken = number, 0.0
        taken += more
    yield int(np.searchsorted(row, first)), len(row)


def _forward(
    lm: DiffusionLM, texts: Texts, items: _Items, chosen: np.ndarray, row: np.ndarray, config: LikelihoodConfig
) -> tuple[Tensor, np.ndarray]:
    """[N] cross-entropies of the masked tokens of some items, and the item of each.

    Args:
        chosen: the items.
        row: the row of each, from 0, in ascending order.
    """
    spec, device = lm.spec, lm.device
    item, first, stop, pair = chosen, items.first[chosen], items.stop[chosen], items.pair[chosen]
    if spec.grid is not None:
        # each row's clean copy goes behind its noisy blocks
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        clean = np.maximum.reduceat(first, begins)
        order = np.argsort(np.concatenate([row, row[begins]]), kind="stable")
        item = np.concatenate([item, np.full(len(begins), -1)])[order]
        first = np.concatenate([first, np.zeros_like(clean)])[order]
        stop = np.concatenate([stop, clean])[order]
        pair = np.concatenate([pair, pair[begins]])[order]
        row = np.concatenate([row, row[begins]])[order]
    rows = lay(first, stop - first, row)
    item, pair = item[rows.span], pair[rows.span]
    clean_ids = texts.tokens[texts.begin[pair] + rows.place]
    inside = rows.place - items.begin[item]
    can_hide = np.flatnonzero((item >= 0) & (inside >= 0))
    masked_N = can_hide[items.masks[items.mask[item[can_hide]] + inside[can_hide]]]
    ids = clean_ids.copy()
    ids[masked_N] = spec.mask_token_id

    column_N = rows.column[masked_N]
    if spec.shift_logits:
        column_N = column_N - 1
    if spec.shift_logits and spec.grid is not None:
        # what a block's first token is read from is clean: the last token of the block before
        begins_block = rows.place[masked_N] == first[rows.span[masked_N]]
        clean_column = rows.column[item < 0] - rows.place[item < 0]
        of_row = np.zeros(rows.shape[0], dtype=np.int64)
        of_row[rows.row[item < 0]] = clean_column
        in_clean = of_row[rows.row[masked_N]] + rows.place[masked_N] - 1
        column_N = np.where(begins_block, in_clean, column_N)
    positions = torch.from_numpy(rows.row[masked_N] * rows.shape[1] + column_N).to(device)
    targets = torch.from_numpy(clean_ids[masked_N]).to(device)
    places = None if spec.grid is None else rows.grid(rows.place, 0, device)
    attention = _attention(rows, items.copy[item], item < 0, spec.grid, places, device)

    ids_BW = rows.grid(ids, spec.pad_token_id, device)
    if not config.cfg_scale:
        nll_N = lm.nll(ids_BW, attention, places, positions, targets, shift=False, at_once=_LOGITS_AT_ONCE)
        return nll_N, item[masked_N]
    own = lm.logits(ids_BW, attention, places, positions, shift=False)
    blind_ids = np.where(rows.place < texts.prefix[pair], spec.mask_token_id, ids)
    blind = lm.logits(rows.grid(blind_ids, spec.pad_token_id, device), attention, places, positions, shift=False)
    parts = zip(*(values.split(_LOGITS_AT_ONCE) for values in (own, blind, targets)), strict=True)
    scale = torch.full((_LOGITS_AT_ONCE,), config.cfg_scale, device=device)
    nll = [cross_entropy(guide(a.float(), b.float(), scale[: len(t)]), t) for a, b, t in parts]
    return torch.cat(nll), item[masked_N]


def _attention(
    rows: Rows, copy: np.ndarray, clean: np.ndarray, grid: int | None, places: Tensor | None, device: torch.device
) -> Tensor | Pattern | None:
    """Who sees whom: all of a row; with blocks, a noisy block itself and the clean ones before it.

    Args:
        copy: [N] number of a noisy token's copy.
        clean: [N] whether a token is of the clean copy.
    """
    if grid is None:
        return rows.grid(np.ones_like(rows.place), 0, device) if rows.ragged else None
    # Copies of a block must not see each other: each gets a block number of its own, below the clean block's, which is
    # below those of all copies of the next.
    several = int(copy.max()) + 2
    block = rows.place // grid * several + np.where(clean, several - 1, copy)
    return Pattern(
        sample=rows.grid(np.ones_like(rows.place), 0, device),
        position=places,
        block=rows.grid(block, 0, device),
        noisy=rows.grid(~clean, False, device),
    )
