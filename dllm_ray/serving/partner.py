"""A served model as the partner of a conversation in the terminal (`dllm_ray.conversation`). It loads no model."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from dllm_ray.config import read, to_dict
from dllm_ray.conversation import Colour
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.infilling import split_gaps
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving.calls import Canvas, ModelFacts
from dllm_ray.serving.client import Answer, Client, Piece


class ServedPartner:
    """A model behind an address.

    Args:
        client: of its server.
        facts: what the server tells of the model.
    """

    def __init__(self, client: Client, facts: ModelFacts):
        self.client = client
        self.name = facts.name
        self._own = settings_of(facts)
        self._edits = facts.edits

    def check(self, config: SamplerConfig) -> None:
        """Whether the server allows the settings, and whether they fit its model, is told at the next question."""

    def check_system(self, system: str | None) -> None:
        """Whether the model's template takes it is told at the next question."""

    def answer(self, messages: Sequence[Mapping[str, str]], config: SamplerConfig, colour: Colour | None) -> str:
        """As `Partner.answer`."""
        options = {"sampler": self._changes(config), "canvas": colour is not None}
        return _drawn(self.client.chat(messages, self.name, **options), colour, self._edits).text

    def fill(self, text: str, config: SamplerConfig, colour: Colour | None) -> str:
        """As `Partner.fill`, for one gap."""
        texts, gaps = split_gaps(text)
        if len(gaps) > 1:
            raise DataError(
                f"a server fills one gap at a time, this text has {len(gaps)}: load the model here, with --model.path"
            )
        before, after = texts
        changes = self._changes(config) | {"max_new_tokens": gaps[0]}
        pieces = self.client.complete(before, self.name, after or None, sampler=changes, canvas=colour is not None)
        return before + _drawn(pieces, colour, self._edits).text + after

    def replay(self, path: Path) -> None:
        """As `Partner.replay`: a page needs tokens, and a server sends texts."""
        raise ConfigError("a server's answers can't be replayed: load the model here, with --model.path", "/html")

    def _changes(self, config: SamplerConfig) -> dict[str, Any]:
        """What differs from the served model's own settings."""
        own = to_dict(self._own)
        return {name: value for name, value in to_dict(config).items() if value != own[name]}


def settings_of(facts: ModelFacts) -> SamplerConfig:
    """The sampler settings that a served model begins with; those that this version doesn't know are left out."""
    known = {field.name for field in dataclasses.fields(SamplerConfig)}
    told = {name: value for name, value in facts.sampler.items() if name in known}
    return read(SamplerConfig, told, f"settings of {facts.name}")


def _drawn(pieces: Iterator[Piece], colour: Colour | None, grows: bool) -> Answer:
    """The end of a stream, whose canvas is drawn on the way. Leaving early, as Ctrl-C does, closes the connection."""
    from dllm_ray.viz.live_texts import LiveTexts

    with closing(pieces), nullcontext() if colour is None else LiveTexts(colour, grows) as drawing:
        for piece in pieces:
            if isinstance(piece, Answer):
                if drawing is not None:
                    drawing.finish()
                return piece
            if isinstance(piece, Canvas) and drawing is not None:
                drawing.update(piece.step, piece.length, piece.positions, piece.tokens, piece.confidences, piece.kinds)
    raise AssertionError("a stream ends with its answer")
