"""Denoises one prompt while somebody watches: each step may be drawn as it happens, and is kept for a replay."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile
from typing import Literal

from dllm_ray.sampling.sampler import SampleOutput, Sampler
from dllm_ray.viz.terminal import LiveCanvas


def denoise(
    sampler: Sampler,
    prompt: Sequence[int],
    canvas: Sequence[int],
    infill: bool = False,
    seed: int | None = None,
    colour: Literal["step", "confidence"] | None = "step",
) -> SampleOutput:
    """What `Sampler.sample` (or `infill`) makes of a prompt, with `commits`.

    Args:
        sampler: the model and how to denoise.
        prompt: token ids.
        canvas: what it begins with (`Sampler.canvases`).
        infill: fill the mask tokens inside the prompt instead of continuing it.
        seed: the row's; None: derived from the sampler's settings.
        colour: draw every step, coloured so (`LiveCanvas`); None: draw nothing.
    """
    lm, config = sampler.lm, sampler.config
    mask, stops, start = lm.spec.mask_token_id, lm.spec.stop_token_ids, 0 if infill else len(prompt)
    tokens, commits = list(canvas), []
    drawing = nullcontext() if colour is None else LiveCanvas(lm.tokenizer, lm.spec, canvas, start, colour)
    began = time.perf_counter()
    with drawing as drawn:
        for commit in sampler.stream([prompt], None if seed is None else [seed], infill):
            commits.append(commit)
            for position, token in zip(commit.positions, commit.tokens, strict=True):
                tokens[position] = token
            if drawn is not None:
                drawn.update(commit)
    seconds = time.perf_counter() - began
    # masks that are left lie behind the end of the text
    tokens[start:] = [lm.spec.eos_token_id if token == mask else token for token in tokens[start:]]
    if infill:
        answer = [token for token, before in zip(tokens, canvas, strict=True) if before == mask]
    else:
        # a canvas may be longer than the answer: the last block of a model with blocks of its own is a whole one
        new = config.max_new_tokens or config.max_length - start
        answer = list(takewhile(lambda token: token not in stops, tokens[start : start + new]))
    return SampleOutput([tokens], [answer], [len(commits)], len(commits), seconds, None, [commits])
