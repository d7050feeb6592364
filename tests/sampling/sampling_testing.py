"""What several tests of sampling do."""

import torch

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Engine


def sharpen(lm: DiffusionLM, seed: int) -> DiffusionLM:
    """Gives a model weights whose logits spread over several units and depend on the context."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=source)
        lm.model.get_output_embeddings().weight *= 3
    return lm


def finish(engine: Engine) -> dict[int, list[int]]:
    """Steps until every row is done; returns their canvases by key."""
    texts = {}
    while engine.busy:
        engine.step()
        texts |= {item.row: item.tokens for item in engine.take_finished()}
    return texts
