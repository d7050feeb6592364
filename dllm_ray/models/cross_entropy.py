"""Cross-entropy through an architecture's own vocabulary head, run again on further hidden states.

Shapes: N positions, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """[N] cross-entropy in float32."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def through_head(model: nn.Module, trunk: nn.Module, kind: type, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    """[N] cross-entropy out of hidden states, by all that a model does after its trunk. Logits are not kept: the
    backward pass makes them again.

    Args:
        model: a model of transformers.
        trunk: the direct child of it that makes hidden states.
        kind: the class of the trunk's output.
        hidden_NH: what the trunk would have given.
        targets_N: tokens.
    """

    def run(hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        with _spoken_for(model, trunk, kind(last_hidden_state=hidden_NH.unsqueeze(0))):
            logits_1NV = model(input_ids=targets_N.unsqueeze(0)).logits
        return cross_entropy(logits_1NV.squeeze(0), targets_N)

    # sharded weights don't have the same shape whenever they are saved, which the check would mistake for a difference
    return checkpoint(run, hidden_NH, targets_N, use_reentrant=False, determinism_check="none")


@contextmanager
def _spoken_for(model: nn.Module, trunk: nn.Module, output: Any) -> Iterator[None]:
    """For as long as it lasts, the trunk of a model gives this output, whatever it is given."""
    [name] = [name for name, child in model.named_children() if child is trunk]
    model._modules[name] = _Spokesman(output)
    try:
        yield
    finally:
        model._modules[name] = trunk


class _Spokesman(nn.Module):
    def __init__(self, output: Any):
        super().__init__()
        self._output = output

    def forward(self, *_args, **_kwargs) -> Any:
        return self._output
