"""Which token each masked position would get, and how sure the model is of it.

Shapes: N positions, V vocabulary. Logits are overwritten in place: they belong to one step.
"""

import torch
from torch import Tensor


def guide(logits_NV: Tensor, unguided_NV: Tensor, scale_N: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): unguided + (scale + 1) * (guided - unguided)."""
    return torch.lerp(unguided_NV, logits_NV, (scale_N + 1).unsqueeze(1).to(logits_NV.dtype))


def suppress(logits_NV: Tensor, token_ids: tuple[int, ...]) -> None:
    """Makes the tokens impossible, in place."""
    if token_ids:
        logits_NV[:, list(token_ids)] = -torch.inf


def propose(logits_NV: Tensor, temperature_N: Tensor, uniform_N: Tensor | None) -> Tensor:
    """One token for each position.

    Args:
        logits_NV: [N, V].
        temperature_N: [N]; where it is 0 the likeliest token is taken.
        uniform_N: [N] random numbers in [0, 1), one for each position, inverted through the cumulative distribution;
            None when every temperature is 0.
    """
    tokens_N = logits_NV.argmax(dim=1)
    if uniform_N is None:
        return tokens_N
    warm = (temperature_N > 0).nonzero().squeeze(1)
    warm_NV = logits_NV[warm].float()
    # the largest becomes 0 first: with a tiny temperature it would overflow
    scaled = (warm_NV - warm_NV.amax(dim=1, keepdim=True)) / temperature_N[warm].unsqueeze(1)
    cumulative = torch.softmax(scaled, dim=1).cumsum(dim=1)
    threshold = uniform_N[warm].unsqueeze(1) * cumulative[:, -1:]
    # right=True skips tokens of probability 0, whose cumulative value equals their predecessor's
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return tokens_N.index_copy(0, warm, drawn.clamp(max=logits_NV.shape[1] - 1))


def probability(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """[N] float32 softmax probability of the proposed tokens, without temperature or noise."""
    chosen = logits_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1).float()
    return (chosen - torch.logsumexp(logits_NV.float(), dim=1)).exp()
