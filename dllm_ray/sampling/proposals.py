"""Which token each masked position would get, and how sure the model is of it.

Shapes: N positions, V vocabulary, K tokens that a filter may keep. Logits are overwritten in place: they belong to one
step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN, CHOSEN, MARGIN, ENTROPY = range(4)
"""What confidence means. PLAIN: probability of the token, whatever temperature and filters it was drawn with. CHOSEN:
its probability in the distribution it was drawn from. MARGIN: by how much the likeliest token of that distribution
leads. ENTROPY: the distribution's entropy, negated."""

_RUN = 64  # tokens in a run of the vocabulary
_NUCLEUS = 512  # tokens that hold most nuclei; sorting the whole vocabulary takes ten times the time of its head


@dataclass
class Rules:
    """How positions are proposed to. Each rule holds for all of them or, being None, for none."""

    confidence: int = PLAIN
    """One of PLAIN, CHOSEN, MARGIN, ENTROPY."""
    uniform_N: Tensor | None = None
    """[N] random numbers in [0, 1), inverted through the cumulative distribution; None: take the likeliest."""
    temperature_N: Tensor | None = None
    """[N] above 0, with `uniform_N`."""
    top_p_N: Tensor | None = None
    """[N] nucleus sizes; the token that crosses the line is kept."""
    top_k_N: Tensor | None = None
    """[N] most tokens kept."""
    top_k_first: bool = False
    """Whether the nucleus is one of the distribution that top-k left (LLaDA2), not of the whole one (Dream)."""


def guide(logits_NV: Tensor, unguided_NV: Tensor, scale_N: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): unguided + (scale + 1) * (guided - unguided)."""
    return torch.lerp(unguided_NV, logits_NV, (scale_N + 1).unsqueeze(1).to(logits_NV.dtype))


def suppress(logits_NV: Tensor, token_ids: tuple[int, ...]) -> None:
    """Makes the tokens impossible, in place."""
    if token_ids:
        logits_NV[:, list(token_ids)] = -torch.inf


def propose(
    logits_NV: Tensor, rules: Rules, mask_token_id: int, last_resort: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """A token and a confidence for each position.

    The mask token is no text: it is never proposed, but keeps its share in the probabilities of the others.

    Args:
        logits_NV: [N, V]; overwritten.
        rules: temperature, filters, and what confidence means.
        mask_token_id: the mask token.
        last_resort: tokens that may be proposed, but with confidence 0; the others' probabilities are renormalised
            without them. Only for PLAIN confidence.

    Returns:
        [N] tokens, [N] float32 confidences.
    """
    if rules.confidence == PLAIN:
        tokens_N = choose(logits_NV, rules, mask_token_id)
        suppress(logits_NV, last_resort)
        return tokens_N, probability(logits_NV, tokens_N)
    greedy = rules.uniform_N is None
    if greedy and rules.top_p_N is rules.top_k_N is None and rules.confidence == CHOSEN:
        return propose(logits_NV, Rules(), mask_token_id)
    return _shaped(logits_NV, rules, mask_token_id)


def choose(logits_NV: Tensor, rules: Rules, mask_token_id: int) -> Tensor:
    """[N] the tokens of `propose` alone, where confidence is PLAIN. Logits stay as they are."""
    mask_logit_N = logits_NV[:, mask_token_id].clone()
    logits_NV[:, mask_token_id] = -torch.inf
    tokens_N = likeliest(logits_NV) if rules.uniform_N is None else _draw(logits_NV, rules)
    logits_NV[:, mask_token_id] = mask_logit_N
    return tokens_N


def probability(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """[N] float32 softmax probability of the proposed tokens, without temperature or noise."""
    # of the ways to write this, the one that torch computes in a single pass over the vocabulary
    return F.cross_entropy(logits_NV.float(), tokens_N, reduction="none").neg().exp()


def likeliest(logits_NV: Tensor) -> Tensor:
    """[N] argmax, the first of equals."""
    if logits_NV.is_cuda or logits_NV.shape[1] % _RUN:
        return logits_NV.argmax(dim=1)
    # torch searches for places ten times slower than for values on a CPU: find the run that holds the largest first
    runs = logits_NV.unflatten(1, (-1, _RUN))
    run_N = runs.amax(dim=2).argmax(dim=1)
    inside_N = runs[torch.arange(len(runs)), run_N].argmax(dim=1)
    return run_N * _RUN + inside_N


def _draw(logits_NV: Tensor, rules: Rules) -> Tensor:
    """[N] drawn tokens."""
    scaled = tempered(logits_NV, rules.temperature_N)
    if rules.top_p_N is None and rules.top_k_N is None:
        return invert(torch.softmax(scaled, dim=1), rules.uniform_N)
    shares_NK, ids_NK = kept(scaled, torch.logsumexp(scaled, dim=1), rules)
    return ids_NK.gather(1, invert(shares_NK, rules.uniform_N).unsqueeze(1)).squeeze(1)


def _shaped(logits_NV: Tensor, rules: Rules, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Token and confidence from the distribution that temperature and filters leave."""
    scaled = logits_NV.float() if rules.temperature_N is None else tempered(logits_NV, rules.temperature_N)
    filtered = rules.top_p_N is not None or rules.top_k_N is not None
    if filtered:
        total_N = torch.logsumexp(scaled, dim=1)
        scaled[:, mask_token_id] = -torch.inf
        measured, ids = kept(scaled, total_N, rules)
        text = measured
    else:
        measured = torch.softmax(scaled, dim=1)  # the mask token has its part in confidence, but can't be chosen
        scaled[:, mask_token_id] = -torch.inf
        text = scaled if rules.uniform_N is None else torch.softmax(scaled, dim=1)
    choice_N = likeliest(text) if rules.uniform_N is None else invert(text, rules.uniform_N)
    chosen = choice_N.unsqueeze(1)
    tokens_N = ids.gather(1, chosen).squeeze(1) if filtered else choice_N
    return tokens_N, _measure(measured, chosen, rules.confidence)


def _measure(shares: Tensor, chosen: Tensor, confidence: int) -> Tensor:
    """[N] confidence in what was chosen from a distribution."""
    if confidence == ENTROPY:
        return -torch.special.entr(shares).sum(dim=1)
    if confidence == CHOSEN:
        return shares.gather(1, chosen).squeeze(1)
    first, *second = shares.topk(min(2, shares.shape[1]), dim=1).values.unbind(dim=1)
    return first - second[0] if second else first


def tempered(logits_NV: Tensor, temperature_N: Tensor) -> Tensor:
    """[N, V] float32 logits / temperature, up to a constant of each position."""
    logits_NV = logits_NV.float()
    # the largest becomes 0 first: with a tiny temperature it would overflow
    return (logits_NV - logits_NV.amax(dim=1, keepdim=True)) / temperature_N.unsqueeze(1)


def kept(scaled_NV: Tensor, total_N: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """The tokens that the filters leave, likeliest first.

    Args:
        scaled_NV: [N, V] logits over temperature.
        total_N: [N] logarithm of the sum of their exponentials, before anything was taken out.
        rules: top-p and top-k.

    Returns:
        [N, K] probabilities that sum to 1, 0 where filtered out, and [N, K] token ids.
    """
    if rules.top_k_N is None:
        values, ids = scaled_NV.topk(min(_NUCLEUS, scaled_NV.shape[1]), dim=1)
        reached_N = (values - total_N.unsqueeze(1)).exp().sum(dim=1) > rules.top_p_N
        if not bool(reached_N.all()):
            values, ids = scaled_NV.sort(dim=1, descending=True)
    else:
        values, ids = scaled_NV.topk(min(int(rules.top_k_N.max()), scaled_NV.shape[1]), dim=1)
    keep = torch.ones_like(values, dtype=torch.bool)
    if rules.top_k_N is not None:
        keep = torch.arange(values.shape[1], device=values.device) < rules.top_k_N.unsqueeze(1)
        if rules.top_k_first:
            total_N = torch.logsumexp(values.masked_fill(~keep, -torch.inf), dim=1)
    shares = (values - total_N.unsqueeze(1)).exp()
    if rules.top_p_N is not None:
        before = shares.cumsum(dim=1) - shares
        keep &= before <= rules.top_p_N.unsqueeze(1)
    keep[:, 0] = True
    return torch.softmax(values.masked_fill(~keep, -torch.inf), dim=1), ids


def invert(shares: Tensor, uniform_N: Tensor) -> Tensor:
    """[N] where the cumulative distribution crosses each random number."""
    cumulative = shares.cumsum(dim=1)
    threshold = uniform_N.unsqueeze(1) * cumulative[:, -1:]
    # right=True skips tokens of probability 0, whose cumulative value equals their predecessor's
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return drawn.clamp(max=shares.shape[1] - 1)
