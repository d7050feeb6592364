"""`Writer`: calls -> rows in the loop, whose events `writing` makes. Here text becomes token ids, and limits are kept.

It knows the tokenizer, the sampler's settings and `calls`; no HTTP, no Ray. What it refuses is a `Refused` event, with
the name that the request has for what is wrong.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from dllm_ray import chat
from dllm_ray.config import leaf_types, section, to_dict
from dllm_ray.errors import ConfigError, DataError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import EDIT_FIELDS, READ_BY_EDITS, SamplerConfig
from dllm_ray.sampling.engine import Row
from dllm_ray.sampling.kv_cache import keeps
from dllm_ray.sampling.sampler import Sampler, row_seeds
from dllm_ray.serving import uniform
from dllm_ray.serving.calls import Call, ModelFacts, Refused
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.loop import Draining, EngineLoop, QueueFull, turn_of
from dllm_ray.serving.text import Detokenizer, endings_of
from dllm_ray.serving.writing import AnswerRow, OnEvent, TextRules, Writing

_HINTS = leaf_types(SamplerConfig)
_API_NAMES = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed"}
"""Sampler setting -> its name in a request; others are in the object `diffusion`."""
_LARGEST = 2**31 - 1  # of a whole number; nothing that fits a model comes near it
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_TOKENIZING: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
"""Held while a tokenizer encodes: that sets flags of it, which say whether control tokens are text."""


class Writer:
    """Answers calls with one model.

    Args:
        name: what the model is called.
        lm: the model, in eval mode, with its tokenizer.
        sampler: the settings that calls begin with; None: the model's own.
        limits: what calls may ask.
        observe, threads: as of `EngineLoop`.

    Raises:
        ModelError: the model can't be served.
        ConfigError: the settings don't fit it.
    """

    def __init__(
        self,
        name: str,
        lm: DiffusionLM,
        sampler: SamplerConfig | None = None,
        limits: Limits | None = None,
        observe: Callable[[int, int, float], None] | None = None,
        threads: int | None = None,
    ):
        if lm.tokenizer is None:
            raise ModelError(f"{name} has no tokenizer, so no text can be made of its tokens")
        self.lm = lm
        self.limits = limits or Limits()
        config = Sampler(lm, sampler).config
        self._seed = config.seed
        self._most_steps = max(config.steps, self.limits.max_steps)
        self.config = dataclasses.replace(config, seed=None)  # rows have their own; those alike share a plan
        self._is_uniform, self._edits = Sampler(lm).is_uniform, Sampler(lm).edits
        with turn_of(lm), section("sampler"):
            self._rows(self.config, [lm.spec.eos_token_id], [0], infill=False)
            if not self._is_uniform and not self._edits:
                keeps(lm)  # measured by running the model, and known from then on
        self._tokenizing = _TOKENIZING.setdefault(lm.tokenizer, threading.Lock())
        with self._tokenizing:
            endings = endings_of(lm.tokenizer, lm.spec.eot_text)
        self._rules = TextRules(Detokenizer(lm.tokenizer), endings, lm.spec.stop_token_ids, self._is_uniform)
        make_engine = (lambda: uniform.OneByOne(lm)) if self._is_uniform else None
        self.loop = EngineLoop(lm, self.limits, observe, make_engine, threads)
        settings = to_dict(self.config)
        self._fields = [name for name in self.limits.fields if self._reads(name)]
        self.facts = ModelFacts(
            name=name,
            family=lm.spec.family,
            created=int(time.time()),
            context=lm.max_length,
            can_chat=getattr(lm.tokenizer, "chat_template", None) is not None,
            can_infill=not self._is_uniform,
            sampler={field: settings[field] for field in ("max_new_tokens", *self._fields)},
            edits=self._edits,
        )

    def write(self, call: Call, on_event: OnEvent) -> Writing:
        """Begins to answer a call.

        Args:
            call: what is asked.
            on_event: told what is written, until each of the `n` texts had its `Done`; or told why it is `Refused`.

        Returns:
            What can be cancelled.
        """
        writing = Writing(call, on_event, time.monotonic())
        try:
            self.loop.require_room()
            self._begin(call, writing)
        except QueueFull as error:
            message = f"{self.facts.name} has as many calls as it can queue: try again later"
            writing.refuse(Refused("full", message, retry_after_s=error.retry_after_s))
        except Draining:
            writing.refuse(Refused("draining", f"{self.facts.name} is being put away: try again", retry_after_s=1.0))
        except _Refusal as refusal:
            writing.refuse(refusal.event)
        return writing

    def close(self) -> None:
        """Lets all rows go, and ends the loop."""
        self.loop.close()

    # --- what a call asks for

    def _begin(self, call: Call, writing: Writing) -> None:
        limits = self.limits
        if isinstance(call.n, bool) or not 1 <= call.n <= limits.max_n:
            raise _invalid(f"must lie between 1 and {limits.max_n}, got {call.n}", "n")
        if call.seed is not None and not 0 <= call.seed < 2**63:
            raise _invalid(f"must lie between 0 and 2^63 - 1, got {call.seed}", "seed")
        self._check_stops(call.stop)
        infill = call.suffix is not None
        config = self._config(call)
        prompt, given = self._prompt(call)
        if infill:
            if self._is_uniform:
                raise _invalid(f"{self.facts.name} can't fill in gaps", "suffix")
            gap = config.max_new_tokens or 0
            if not gap:
                raise _invalid("say how many tokens the gap has", "max_tokens")
            suffix = self._tokens(call.suffix, "suffix")
            given = len(prompt) + len(suffix)
            prompt = [*prompt, *[self.lm.spec.mask_token_id] * gap, *suffix]
        self._check_length(given, config, "prompt" if call.messages is None else "messages")
        try:
            seeds = row_seeds(self._seed if call.seed is None else call.seed, range(call.n))
            rows = self._rows(config, prompt, seeds, infill)
            self._check_steps(rows[0])
            answers = [AnswerRow(self._rules, writing, index, row, infill, given) for index, row in enumerate(rows)]
            writing.expect(len(answers))
            tickets = self.loop.submit_all(rows, call.client, [answer.on_event for answer in answers], call.deadline)
            writing.began(tickets)
        except ConfigError as error:
            raise _invalid(error.message, "prompt" if error.field is None else _api_name(error.field)) from None

    def _config(self, call: Call) -> SamplerConfig:
        changes = dict(call.sampler)
        for name, value in changes.items():
            if name not in self._fields:
                raise self._unchangeable(name)
            hint = _HINTS[name]
            if value is None and type(None) not in getattr(hint, "__args__", ()):
                raise _invalid("can't be null", _api_name(name))
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise _invalid(f"must lie between -{_LARGEST:,} and {_LARGEST:,}", _api_name(name))
            if hint is bool and not isinstance(value, bool):
                raise _invalid(f"expected true or false, got {value!r:.40}", _api_name(name))
        if call.max_tokens is not None:
            if isinstance(call.max_tokens, bool) or call.max_tokens < 1:
                raise _invalid(f"must be at least 1, got {call.max_tokens}", "max_tokens")
            changes["max_new_tokens"] = call.max_tokens
            # an answer is as good at any length; the steps of a model that edits are of time, and not of tokens
            if "steps" not in changes and call.suffix is None and not self._edits:
                changes["steps"] = min(self.config.for_length(call.max_tokens).steps, self._most_steps)
        try:
            config = dataclasses.replace(self.config, **changes) if changes else self.config
        except ConfigError as error:
            raise _invalid(error.message, _api_name(error.field)) from None
        self._check_sizes(config)
        return config

    def _reads(self, setting: str) -> bool:
        """Whether a sampler setting means something to this kind of model."""
        return setting in READ_BY_EDITS if self._edits else setting not in EDIT_FIELDS

    def _unchangeable(self, setting: str) -> "_Refusal":
        known, field = ", ".join(self._fields), _api_name(setting)
        if setting in _HINTS and not self._reads(setting):
            kind = "edits" if self._edits else "doesn't edit"
            message = f"{setting!r} means nothing to a model that {kind}: leave it out; what can be changed: {known}"
            return _Refusal(Refused("unsupported", message, field))
        return _invalid(f"{setting!r} can't be changed here; what can: {known}", field)

    def _check_sizes(self, config: SamplerConfig) -> None:
        limits = self.limits
        new = config.max_new_tokens
        if new is not None and new > limits.max_new_tokens:
            raise _too_long(f"{new} tokens are more than the {limits.max_new_tokens} of this server", "max_tokens")
        if config.steps_per_block is None and config.steps > limits.max_steps:
            raise _invalid(f"must be at most {limits.max_steps}, got {config.steps}", "diffusion.steps")
        most = max(limits.max_new_tokens, self.config.start_tokens)
        if config.start_tokens > most:
            raise _invalid(f"must be at most {most}, got {config.start_tokens}", "diffusion.start_tokens")
        most = max(limits.max_new_tokens, self.config.block_size or 0)
        if config.block_size is not None and config.block_size > most:
            raise _invalid(f"must be at most {most}, got {config.block_size}", "diffusion.block_size")

    def _check_steps(self, row: Row) -> None:
        blocks = -(-(len(row.tokens) - row.block_start) // row.block_size)
        per_block = row.config.steps_per_block
        if per_block is not None and per_block * blocks > self.limits.max_steps:
            raise _invalid(
                f"{per_block} steps for each of {blocks} blocks are more than this server's {self.limits.max_steps}",
                "diffusion.steps_per_block",
            )

    def _check_stops(self, stops: Sequence[str]) -> None:
        if len(stops) > _MOST_STOPS:
            raise _invalid(f"at most {_MOST_STOPS} strings, got {len(stops)}", "stop")
        for stop in stops:
            if not 1 <= len(stop) <= _LONGEST_STOP:
                raise _invalid(f"each must have between 1 and {_LONGEST_STOP} characters", "stop")
            _require_unicode(stop, "stop")

    def _prompt(self, call: Call) -> tuple[list[int], int]:
        """Token ids of what is given before the answer, and how many there are."""
        if (call.messages is None) == (call.prompt is None):
            raise _invalid("give messages or a prompt", "messages" if call.prompt is None else "prompt")
        if call.messages is not None:
            if call.suffix is not None:
                raise _invalid("goes with a prompt, not with messages", "suffix")
            if not call.messages:
                raise _invalid("must hold at least one message", "messages")
            _require_unicode(call.messages, "messages")
            try:
                with self._tokenizing:
                    tokens = chat.encode_prompt(self.lm.tokenizer, [dict(message) for message in call.messages])
            except DataError as error:
                raise _invalid(str(error), "messages") from None
        elif isinstance(call.prompt, str):
            tokens = self._tokens(call.prompt, "prompt")
        else:
            tokens = list(call.prompt)
        return tokens, len(tokens)

    def _tokens(self, text: str, field: str) -> list[int]:
        _require_unicode(text, field)
        with self._tokenizing:
            return chat.encode_plain(self.lm.tokenizer, text)

    def _check_length(self, given: int, config: SamplerConfig, field: str) -> None:
        limits, context = self.limits, self.lm.max_length
        if limits.max_prompt_tokens is not None and given > limits.max_prompt_tokens:
            raise _too_long(f"{given} tokens are more than the {limits.max_prompt_tokens} of this server", field)
        new = config.max_new_tokens
        if new is None:
            new = config.max_length - given
            if new < 1:
                raise _too_long(
                    f"{given} tokens leave no room for an answer: at most {config.max_length - 1} do", field
                )
            if new > limits.max_new_tokens:
                raise _too_long(
                    f"beside {given} tokens an answer has {new}, more than the {limits.max_new_tokens} of this server: "
                    "say how many",
                    "max_tokens",
                )
        if context is not None and given + new > context:
            raise _too_long(
                f"{given} tokens and {new} of an answer don't fit the model's context of {context}: shorten them, or "
                "lower max_tokens",
                field,
            )

    def _rows(self, config: SamplerConfig, prompt: list[int], seeds: Sequence[int], infill: bool) -> list[Row]:
        if self._is_uniform:
            return [uniform.row_of(self.lm, config, prompt, seed) for seed in seeds]
        return Sampler(self.lm, config).rows([prompt] * len(seeds), seeds, infill)


class _Refusal(Exception):
    """A call can't be answered."""

    def __init__(self, event: Refused):
        super().__init__(event.message)
        self.event = event


def _invalid(message: str, field: str) -> _Refusal:
    return _Refusal(Refused("invalid", message, field))


def _too_long(message: str, field: str) -> _Refusal:
    return _Refusal(Refused("too_long", message, field))


def _api_name(setting: str) -> str:
    return _API_NAMES.get(setting, f"diffusion.{setting}")


def _require_unicode(value: Any, field: str) -> None:
    """Refuses text that can't be written: JSON can spell half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _invalid("is not valid Unicode", field) from None
    elif isinstance(value, Mapping):
        _require_unicode([*value, *value.values()], field)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_unicode(item, field)
