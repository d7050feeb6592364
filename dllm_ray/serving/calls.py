"""What goes between the HTTP side and the replicas that hold a model: a call, and the events that answer it.

Plain data: it is sent between processes. No tokenizer, tensor or framework here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Call:
    """A request for `n` texts. One of `messages` and `prompt` is given."""

    id: str
    """Of the request, for logs and cancelling."""
    client: str = ""
    """Who asks; clients take turns."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """A conversation, `{"role": ..., "content": ...}` each, to be answered by the assistant."""
    prompt: str | tuple[int, ...] | None = None
    """A text, or token ids, to be continued as it is."""
    suffix: str | None = None
    """Text after the gap that is to be filled; with `prompt` only."""
    max_tokens: int | None = None
    """Most tokens to write, or tokens of the gap; None: the sampler's."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model's sampler settings, as plain values."""
    seed: int | None = None
    """Seeds the draws; None draws a seed. Text number i is that of row i of `Sampler.sample` with this seed."""
    n: int = 1
    """Texts to write."""
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""
    stream: bool = False
    """Send `Text` events while texts are written; else only `Done` events."""
    canvas: bool = False
    """Send `Canvas` events as well."""
    spelled: bool = False
    """Tell the tokens of texts, and their confidences; spelling them takes a while."""
    deadline: float | None = None
    """Time (`time.time()`) by which it must be answered; None: no limit."""


@dataclass(frozen=True)
class Text:
    """Text that can no longer change, following what was sent before."""

    index: int
    """Which of the `n` texts."""
    text: str
    tokens: tuple[str, ...] = ()
    """The tokens that it is made of, as text; of a call with `spelled`."""
    confidences: tuple[float, ...] = ()
    """What the policy measured of each when it was committed."""


@dataclass(frozen=True)
class Canvas:
    """What one step wrote, for viewers. Positions count from the first token of the answer, or of the whole text where
    a gap is filled. Changes are made one after another: an insertion moves on what stands there, a deletion moves up
    what follows."""

    index: int
    step: int
    """The first event of a text has step -1 and tells the canvas: its length and what is given."""
    length: int
    """Tokens and masks after the step."""
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text of each token written; masks and tokens that are deleted are empty."""
    confidences: tuple[float, ...]
    kinds: tuple[Literal["write", "edit", "insert", "delete"], ...] = ()
    """What was done at each position: write over a mask, or tell how a token that stays reads now; edit, over another
    token; insert; delete. Empty: all were written."""


@dataclass(frozen=True)
class Done:
    """A text is finished."""

    index: int
    text: str
    """The whole text, from its beginning, also where parts were sent before."""
    reason: Literal["stop", "length", "deadline", "cancelled"]
    prompt_tokens: int
    completion_tokens: int
    """Tokens before the end of the text, as far as it was kept."""
    nfe: int
    """Forwards that it took part in."""
    seconds: float
    """From the call's arrival at the replica."""
    seed: int
    """Row seed that it was drawn with."""
    tokens: tuple[str, ...] = ()
    """Its tokens as text; of a call with `spelled`."""
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The call is not answered; the only event."""

    kind: Literal["invalid", "unsupported", "too_long", "full", "draining", "failed"]
    """invalid: settings or messages that can't be; unsupported: a setting that means nothing to this kind of model;
    too_long: it doesn't fit the model's context or the limits; full: the queue is; draining: this replica is going
    away; failed: a defect."""
    message: str
    field: str | None = None
    """What of the request is wrong, by its name in the API."""
    retry_after_s: float | None = None
    """When to try again."""


Event = Text | Canvas | Done | Refused


@dataclass(frozen=True)
class ModelFacts:
    """What clients may know of a served model."""

    name: str
    family: str
    created: int
    """Seconds since 1970."""
    context: int | None
    """Tokens of prompt and answer together; None: unlimited."""
    can_chat: bool
    """Whether it has a chat template."""
    can_infill: bool
    sampler: Mapping[str, Any]
    """Its sampler settings, as far as calls may change them; `max_new_tokens` by `max_tokens`."""
    edits: bool = False
    """Whether it edits: its texts grow and shrink while they are written."""
    version: str | None = None
    """Its version in MLflow's registry, as `models:/name/3`; None: it isn't from there."""
