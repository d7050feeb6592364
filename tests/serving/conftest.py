"""Random models that are sure of what they say, so that their choices don't hang on rounding."""

from functools import cache

import pytest
import torch


@pytest.fixture(scope="session")
def sharp_lm(make_lm):
    """`sharp_lm("llama", seed=1)`: a small model whose logits spread over several units and depend on the context."""

    @cache
    def make(architecture: str = "bert", seed: int = 0, **sizes):
        lm = make_lm(architecture, seed=seed, **sizes)
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in lm.model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5, generator=source)
            lm.model.get_output_embeddings().weight *= 3
        return lm

    return make
