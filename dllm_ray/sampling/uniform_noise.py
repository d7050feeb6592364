"""Sampling for models without a mask token, whose noise is uniform (DiffusionGemma), by transformers' own `generate`.

Such a model denoises a canvas of `canvas_length` random tokens as a whole, again and again, then starts the next one
behind it. There is nothing to unmask, so the engine has no part in it; this module lends `generate` the interface of
the sampler: the same settings, seeds, counts, traces and commits. It knows token ids, never text, Ray or HTTP.

Rows are denoised one after the other. `generate` draws for a batch as a whole, keeps drawing for rows that are done,
and numbers positions from where the padding begins; alone, a row gets the same tokens whatever else is asked for.
"""

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit
from dllm_ray.sampling.output import OnCommit, SampleOutput, until_stop

_HONOURED = frozenset(
    ("max_new_tokens", "max_length", "steps", "steps_per_block", "temperature", "suppress_tokens", "eos_penalty")
    + ("eos_early_stop", "seed")
)
"""Settings that have a meaning here; `seed` is the caller's, who makes a seed for each row of it."""


def generate(
    lm: DiffusionLM,
    config: SamplerConfig,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    trace: bool = False,
    on_commit: OnCommit | None = None,
) -> SampleOutput:
    """Continues each prompt with `max_new_tokens` tokens.

    What `SamplerConfig` has no word for (entropy bound, when a canvas counts as stable) is as `generation_config` of
    the model says. `temperature` 0 keeps the model's own falling temperature (there is no greedy mode); above 0 it
    stays the same in all steps.

    `row_nfe` counts forwards of the decoder; those of the encoder, one for the prompt and one for every further canvas,
    run over tokens that no longer change. Rows share no forwards. A trace shows the likeliest tokens, of which the
    answer is made in the end, not the noise that the decoder is given; a position may change many times, and where
    padding is written, the confidence is that of the token it replaces. Behind an end of text `sequences` are padding,
    unless `eos_early_stop` is off.

    Args:
        lm: the model.
        config: the settings. A canvas counts as a block: `steps` are divided evenly over the canvases of an answer.
        prompts: token ids; lengths may differ. An empty one becomes the beginning-of-text token.
        seeds: one for each prompt.
        trace: keep what every step showed and changed.
        on_commit: called with what each step changed, as it happens.

    Raises:
        ConfigError: a setting that has no meaning here, or a prompt and its canvases don't fit the model's context.
        ModelError: the model gives NaN.
    """
    began = time.perf_counter()
    rows = _rows(lm, config, prompts, seeds)
    commits: list[list[Commit]] = [[] for _ in rows]

    def note(commit: Commit) -> None:
        commits[commit.row].append(commit)
        if on_commit is not None:
            on_commit(commit)

    watched = trace or on_commit is not None
    done = [_denoise(lm, config, row, note if watched else _ignore) for row in rows]
    return SampleOutput(
        sequences=[tokens for tokens, _ in done],
        completions=[
            until_stop(tokens[row.start :], lm.spec.stop_token_ids) for row, (tokens, _) in zip(rows, done, strict=True)
        ],
        row_nfe=[steps for _, steps in done],
        nfe=sum(steps for _, steps in done),
        seconds=time.perf_counter() - began,
        history=[_replay(row.canvas, commits[row.key]) for row in rows] if trace else None,
        commits=commits if trace else None,
    )


def stream(
    lm: DiffusionLM, config: SamplerConfig, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
) -> Iterator[Commit]:
    """Like `generate`, but yields what each step changed, row after row, as it happens.

    `generate` of transformers runs in a thread of its own, which ends at its next step when the iterator is closed.
    """
    rows = _rows(lm, config, prompts, seeds)
    events: queue.SimpleQueue[Commit | Exception | None] = queue.SimpleQueue()
    closed = threading.Event()

    def emit(commit: Commit) -> None:
        if closed.is_set():
            raise _Closed
        events.put(commit)

    def work() -> None:
        try:
            for row in rows:
                _denoise(lm, config, row, emit)
            events.put(None)
        except Exception as error:  # handed over: the iterator raises it, unless it is closed
            events.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        closed.set()
        thread.join()


def canvases(lm: DiffusionLM, config: SamplerConfig, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What is shown before the first step, and what commits change: each prompt and padding."""
    return [row.canvas for row in _rows(lm, config, prompts, [0] * len(prompts))]


@dataclass
class _Row:
    """One prompt and the room for its answer."""

    key: int
    canvas: list[int]
    start: int
    """Where the answer begins."""
    seed: int


def _rows(lm: DiffusionLM, config: SamplerConfig, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[_Row]:
    """The rows of a call, once everything about it was found to fit."""
    _check(lm, config)
    spec = lm.spec
    first = spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id
    prompts = [list(prompt) or [first] for prompt in prompts]
    longest = max(map(len, prompts), default=0)
    new = config.max_new_tokens
    if new is None:
        new = config.max_length - longest
        if new < 1:
            raise ConfigError(f"{config.max_length} leaves no room beside a prompt of {longest}", "max_length")
    size = lm.model.config.canvas_length
    length = longest + _canvas_count(lm, new) * size
    if lm.max_length is not None and length > lm.max_length:
        raise ConfigError(
            f"a prompt of {longest} tokens and the {_canvas_count(lm, new)} canvases of {size} for its answer don't "
            f"fit the model's context of {lm.max_length}: shorten the prompt or lower max_new_tokens"
        )
    config.steps_in_block(_canvas_count(lm, new))
    _check_tokens(lm, config.suppress_tokens)
    for prompt in prompts:
        _check_tokens(lm, prompt)
    return [
        _Row(key, prompt + [spec.pad_token_id] * new, len(prompt), seed)
        for key, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def _check(lm: DiffusionLM, config: SamplerConfig) -> None:
    """Refuses settings that would be without effect."""
    size = lm.model.config.canvas_length
    defaults = SamplerConfig()
    harmless = {"block_size": (None, size), "shift_logits": (False,)}
    for name in (item.name for item in dataclasses.fields(config)):
        value = getattr(config, name)
        if name in _HONOURED or value == getattr(defaults, name) or value in harmless.get(name, ()):
            continue
        raise ConfigError(
            f"{value!r} has no meaning for {lm.spec.family}, which has no mask token and denoises canvases of {size} "
            "tokens as a whole: leave it out",
            name,
        )


def _check_tokens(lm: DiffusionLM, tokens: Sequence[int]) -> None:
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise ConfigError(f"token {token} is outside the model's vocabulary of {vocabulary}")


def _canvas_count(lm: DiffusionLM, new_tokens: int) -> int:
    return math.ceil(new_tokens / lm.model.config.canvas_length)


def _denoise(
    lm: DiffusionLM, config: SamplerConfig, row: _Row, emit: Callable[[Commit], None]
) -> tuple[list[int], int]:
    """One row's tokens, and the forwards of the decoder that they took."""
    from transformers import LogitsProcessorList

    new = len(row.canvas) - row.start
    settings = {
        "max_new_tokens": new,
        "max_length": len(row.canvas),  # says the same; a length of the model's own would come before 256 new tokens
        "max_denoising_steps": config.steps_in_block(_canvas_count(lm, new)),
        "eos_token_id": list(lm.spec.stop_token_ids) if config.eos_early_stop else None,
        "pad_token_id": lm.spec.pad_token_id,
        "return_dict_in_generate": False,
        "disable_compile": True,  # a compiled step couldn't be given the row's generator
    }
    if config.temperature > 0:
        # a straight line between two temperatures, of which the first must be the larger
        settings |= {"t_min": config.temperature, "t_max": math.nextafter(config.temperature, math.inf)}
    watch = _Watch(row, emit)
    processors = LogitsProcessorList([_Edit(config, lm.spec.stop_token_ids), watch])
    prompt = torch.tensor([row.canvas[: row.start]], device=lm.device)
    with _Draws(row.seed, lm.device):
        sequence = lm.model.generate(prompt, streamer=watch, logits_processor=processors, **settings)
    tokens = sequence[0].tolist()[: len(row.canvas)]
    return tokens + row.canvas[len(tokens) :], watch.steps


class _Draws(TorchFunctionMode):
    """Gives a generator to the random draws of `generate`, which itself takes none.

    It holds for the calling thread, and neither reads nor moves torch's global generator, which others use meanwhile.
    """

    def __init__(self, seed: int, device: torch.device):
        super().__init__()
        self._generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.randint, torch.multinomial):
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


class _Edit:
    """A logits processor of transformers: makes ends of text less likely, and suppressed tokens impossible."""

    def __init__(self, config: SamplerConfig, stops: Sequence[int]):
        self._penalty, self._stops = config.eos_penalty, list(stops)
        self._suppressed = list(config.suppress_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # scores: [1, C, V]
        if self._penalty or self._suppressed:
            scores = scores.clone()
            scores[..., self._stops] -= self._penalty
            scores[..., self._suppressed] = -torch.inf
        return scores


class _Watch:
    """Follows one row through `generate`, as its streamer and as one of its logits processors.

    A step is told when the next one ends, or the row: only then it is known whether it was the last, and what the end
    of text in its canvas turned into padding.
    """

    def __init__(self, row: _Row, emit: Callable[[Commit], None]):
        self.steps = 0
        self._row = row
        self._emit = emit
        self._shown = list(row.canvas)
        self._start = row.start  # of the canvas in work
        self._draft: list[int] | None = None  # what the last step made of it, not told yet
        self._latest: Tensor | None = None  # [C] probabilities of the likeliest tokens, in the last forward
        self._confidences: list[float] = []  # those of the draft
        self._complete = False  # the draft is the last of its canvas

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # scores: [1, C, V]
        """Once for each forward of the decoder, before the temperature."""
        scores_CV = scores[0].float()
        self._latest = (scores_CV.amax(dim=1) - scores_CV.logsumexp(dim=1)).exp()
        if bool(self._latest.isnan().any()):
            raise ModelError("the model's logits are not numbers (NaN): its weights or their dtype are broken")
        return scores

    def put_draft(self, value: Tensor) -> None:
        """The likeliest tokens of the canvas, after each step."""
        self._tell(done=False)
        self._draft, self._confidences = value[0].tolist(), self._latest.tolist()
        self.steps += 1

    def put(self, value: Tensor) -> None:
        """The prompt, then each finished canvas."""
        if self._draft is not None:
            self._draft, self._complete = value[0].tolist(), True

    def end(self) -> None:
        self._tell(done=True)

    def _tell(self, done: bool) -> None:
        if self._draft is None:
            return
        room = range(self._start, min(self._start + len(self._draft), len(self._shown)))
        changed = [place for place in room if self._shown[place] != self._draft[place - self._start]]
        tokens = [self._draft[place - self._start] for place in changed]
        confidences = [self._confidences[place - self._start] for place in changed]
        for place, token in zip(changed, tokens, strict=True):
            self._shown[place] = token
        if self._complete:
            self._start += len(self._draft)
            self._complete = False
        self._draft = None
        self._emit(Commit(self._row.key, self.steps - 1, changed, tokens, confidences, done))


class _Closed(Exception):
    """Nobody reads the stream any more."""


def _ignore(commit: Commit) -> None:
    pass


def _replay(canvas: list[int], commits: Sequence[Commit]) -> Tensor:
    """[commits + 1, length], the canvas before the first and after every commit."""
    shown = [torch.tensor(canvas)]
    for commit in commits:
        shown.append(shown[-1].clone())
        shown[-1][commit.positions] = torch.tensor(commit.tokens, dtype=torch.long)
    return torch.stack(shown)
