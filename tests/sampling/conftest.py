"""Random models that are sure of what they say, so that their choices don't hang on rounding."""

from functools import cache

import pytest
from sampling_testing import sharpen


@pytest.fixture(scope="session")
def sharp_lm(make_lm):
    """`sharp_lm("llama", seed=1)`: a small model whose logits spread over several units and depend on the context."""

    @cache
    def make(architecture: str = "bert", seed: int = 0):
        return sharpen(make_lm(architecture, seed=seed), seed)

    return make
