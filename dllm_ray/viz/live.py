"""Denoises one prompt while somebody watches: each step may be drawn as it happens, and is kept for a replay."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal

from dllm_ray.sampling.output import SampleOutput
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.viz.terminal import LiveCanvas


def denoise(
    sampler: Sampler,
    prompt: Sequence[int],
    canvas: Sequence[int],
    infill: bool = False,
    seed: int | None = None,
    colour: Literal["step", "confidence"] | None = "step",
    draft: Sequence[int] | None = None,
) -> SampleOutput:
    """What `Sampler.sample` (or `infill`, or `edit`) makes of a prompt, with its trace.

    Args:
        sampler: the model and how to denoise.
        prompt: token ids.
        canvas: what it begins with (`Sampler.canvases`; with a draft, the prompt and it).
        infill: fill the mask tokens inside the prompt instead of continuing it.
        seed: the row's; None: derived from the sampler's settings.
        colour: draw every step, coloured so (`LiveCanvas`); None: draw nothing.
        draft: an answer to revise in place.
    """
    lm, given = sampler.lm, 0 if infill or sampler.config.edit_prompt else len(prompt)
    write = sampler.infill if infill else sampler.sample
    if draft is not None:
        write = partial(sampler.edit, drafts=[draft])
    drawing = nullcontext() if colour is None else LiveCanvas(lm.tokenizer, lm.spec, canvas, given, colour)
    with drawing as drawn:
        return write(
            [prompt],
            trace=True,
            seeds=None if seed is None else [seed],
            on_commit=None if drawn is None else drawn.update,
        )
