"""How fast a sampler is, beside the time of the forwards that it needs.

The forwards of a run are recorded (same ids, same positions, same cache) and run again by themselves. The ratio of the
two times is what everything around the model costs: 1 is the limit.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler


@dataclass
class Speed:
    """What a measurement found: the fastest of its rounds, which other work on the machine disturbs least."""

    seconds: float
    """Wall time of a call of the sampler."""
    forward_seconds: float
    """Time of its forwards alone."""
    ratio: float
    """The first over the second."""
    nfe: int
    """Steps in which the model ran."""
    tpf: float
    """Tokens written per step and row, those after an end of text included."""
    tokens_per_s: float
    """Tokens written per second, over all rows."""


def measure(
    lm: DiffusionLM,
    config: SamplerConfig,
    prompts: Sequence[Sequence[int]],
    rounds: int = 3,
    max_rows: int | None = None,
) -> Speed:
    """Measures a sampler on prompts.

    Args:
        lm: the model.
        config: the settings. Give a seed, or every round has its own tokens.
        prompts: token ids.
        rounds: how often run and replay take turns, after one turn that isn't counted.
        max_rows: most prompts that are denoised together; None: all.
    """
    sampler = Sampler(lm, config, max_rows)
    record, replay = (_record, _replay) if lm.spec.edit_heads is None else (_record_edits, _replay_edits)
    walls, bares, output = [], [], None
    for _ in range(rounds + 1):
        _wait(lm)
        began = time.perf_counter()
        output = sampler.sample(prompts)
        _wait(lm)
        walls.append(time.perf_counter() - began)
        bares.append(replay(lm, record(lm, sampler, prompts)))
    tokens = sum(map(len, output.sequences)) - sum(map(len, prompts))
    wall, bare = min(walls[1:]), min(bares[1:])
    return Speed(
        seconds=wall,
        forward_seconds=bare,
        ratio=wall / bare,
        nfe=output.nfe,
        tpf=tokens / sum(output.row_nfe),
        tokens_per_s=tokens / wall,
    )


class _Recorder(nn.Module):
    """Keeps what the model was called with."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.calls: list[tuple] = []

    def forward(self, input_ids, attention_mask=None, position_ids=None, positions=None, past_key_values=None):
        window = None if past_key_values is None else past_key_values.layers[0].current
        self.calls.append(((input_ids, attention_mask, position_ids, positions, past_key_values), window))
        return self.module(input_ids, attention_mask, position_ids, positions, past_key_values)


def _record(lm: DiffusionLM, sampler: Sampler, prompts: Sequence[Sequence[int]]) -> list[tuple]:
    recorder = _Recorder(lm.module)
    lm.module = recorder
    try:
        sampler.sample(prompts)
    finally:
        lm.module = recorder.module
    return recorder.calls


@torch.inference_mode()
def _replay(lm: DiffusionLM, calls: list[tuple]) -> float:
    _wait(lm)
    began = time.perf_counter()
    for (*arguments, cache), window in calls:
        if cache is not None:
            for layer in cache.layers:
                layer.current = window
        lm.module(*arguments, cache)
    _wait(lm)
    return time.perf_counter() - began


@dataclass
class _EditForward:
    """What a model that edits was asked in one step."""

    ids: Tensor
    mask: Tensor | None
    t: Tensor | None = None
    """None until the heads are told the time."""
    asked: tuple[Tensor, Tensor] | None = None
    """Hidden states whose tokens were wanted, and which of these were insertions."""


def _record_edits(lm: DiffusionLM, sampler: Sampler, prompts: Sequence[Sequence[int]]) -> list[_EditForward]:
    module, heads, calls = lm.module, lm.module.heads, []
    hidden, at_time, tokens = module.hidden, heads.at_time, module.tokens

    def note_hidden(ids, mask=None):
        calls.append(_EditForward(ids, mask))
        return hidden(ids, mask)

    def note_time(hidden_BTH, t_B):
        calls[-1].t = t_B
        return at_time(hidden_BTH, t_B)

    def note_tokens(hidden_NH, inserted_N):
        calls[-1].asked = (hidden_NH, inserted_N)
        return tokens(hidden_NH, inserted_N)

    module.hidden, heads.at_time, module.tokens = note_hidden, note_time, note_tokens
    try:
        sampler.sample(prompts)
    finally:
        del module.hidden, heads.at_time, module.tokens  # the classes' own show again
    return calls


@torch.inference_mode()
def _replay_edits(lm: DiffusionLM, calls: list[_EditForward]) -> float:
    module, heads = lm.module, lm.module.heads
    _wait(lm)
    began = time.perf_counter()
    for call in calls:
        heads.rates_of(heads.at_time(module.hidden(call.ids, call.mask), call.t), lm.spec.shift_logits)
        if call.asked is not None:
            module.tokens(*call.asked)
    _wait(lm)
    return time.perf_counter() - began


def _wait(lm: DiffusionLM) -> None:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
