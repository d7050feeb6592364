"""`torch.compile` for a model's trunk, CUDA graphs included, with caches that are written in place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_trunk(trunk: nn.Module, mode: str) -> None:
    """Compiles the trunk's forward, in place.

    Shapes that change are compiled as dynamic after their first change; the vocabulary head, whose rows change in every
    step, stays as it is. The first forward of a new cache runs as it is too: it makes the cache's buffers.

    Args:
        trunk: the model without its head.
        mode: of `torch.compile`: `default`, or `reduce-overhead` for CUDA graphs.
    """
    trunk.forward = _Compiled(trunk.forward, mode)


class _Compiled:
    """A forward, compiled where its cache, if any, has its buffers."""

    def __init__(self, forward: Callable[..., Any], mode: str):
        # rows that come and go in a batch make more kinds of shapes than the 8 that are compiled by default
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._plain = forward
        self._compiled = torch.compile(forward, mode=mode)

    def __call__(self, *args, past_key_values=None, **kwargs):
        if past_key_values is None:
            return self._compiled(*args, **kwargs)
        if past_key_values.is_initialized:
            return self._compiled(*args, past_key_values=past_key_values, **kwargs)
        output = self._plain(*args, past_key_values=past_key_values, **kwargs)
        for layer in past_key_values.layers:  # CUDA graphs write into them
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)
        return output
