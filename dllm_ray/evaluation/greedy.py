"""Whether greedy denoising would write a given target: beginning with masks only, the likeliest token of the most
certain position, one a step; block by block where attention is block-causal.

Shapes: P pairs, N masked positions of a forward, B rows, W columns.
"""

import numpy as np
import torch

from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.evaluation.texts import Texts, lay
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.proposals import Rules, guide, propose


@torch.inference_mode()
def writes(lm: DiffusionLM, texts: Texts, config: LikelihoodConfig) -> np.ndarray:
    """[P] bool. A pair is given up at the first token that differs.

    Args:
        lm: the model, in eval mode.
        texts: prefixes and targets.
        config: `batch_size` and `cfg_scale`.
    """
    pair_L = np.repeat(np.arange(len(texts.length)), texts.length)
    place_L = np.arange(len(texts.tokens)) - texts.begin[pair_L]
    open_L = place_L >= texts.prefix[pair_L]
    greedy = np.ones(len(texts.length), dtype=bool)
    waiting = np.argsort(-texts.length, kind="stable")
    while len(waiting):
        for start in range(0, len(waiting), config.batch_size):
            pairs = waiting[start : start + config.batch_size]
            at, token = _most_certain(lm, texts, pairs, open_L, config.cfg_scale)
            greedy[pairs] = texts.tokens[at] == token
            open_L[at] = False
        left = np.bincount(pair_L, open_L, len(greedy))
        waiting = waiting[greedy[waiting] & (left[waiting] > 0)]
    return greedy


def _most_certain(
    lm: DiffusionLM, texts: Texts, pairs: np.ndarray, open_L: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair, where in `texts.tokens` the most certain masked position is, and its likeliest token."""
    spec, device = lm.spec, lm.device
    stop = texts.length[pairs]
    if spec.grid is not None:  # what follows the first block with masks isn't seen
        where = np.flatnonzero(open_L)
        first = where[np.searchsorted(where, texts.begin[pairs])] - texts.begin[pairs]
        stop = np.minimum((first // spec.grid + 1) * spec.grid, stop)
    rows = lay(np.zeros_like(pairs), stop, np.arange(len(pairs)))
    at = texts.begin[pairs[rows.row]] + rows.place
    masked_N = np.flatnonzero(open_L[at])
    row_N, width = rows.row[masked_N], rows.shape[1]
    positions = torch.from_numpy(row_N * width + rows.column[masked_N]).to(device)
    seen = rows.grid(np.ones_like(rows.place), 0, device) if rows.ragged else None

    def logits(hidden: np.ndarray) -> torch.Tensor:
        ids = np.where(hidden, spec.mask_token_id, texts.tokens[at])
        return lm.logits(rows.grid(ids, spec.pad_token_id, device), seen, positions=positions)

    logits_NV = logits(open_L[at])
    if scale:
        blind = logits(open_L[at] | (rows.place < texts.prefix[pairs[rows.row]]))
        logits_NV = guide(logits_NV, blind, logits_NV.new_full((len(masked_N),), scale))
    tokens_N, confidence_N = (values.cpu().numpy() for values in propose(logits_NV, Rules(), spec.mask_token_id))
    confidence = np.full(rows.shape, -1.0)
    confidence[row_N, rows.column[masked_N]] = confidence_N
    number = np.full(rows.shape, 0)
    number[row_N, rows.column[masked_N]] = np.arange(len(masked_N))
    best = number[np.arange(len(pairs)), confidence.argmax(axis=1)]
    return at[masked_N[best]], tokens_N[best]
