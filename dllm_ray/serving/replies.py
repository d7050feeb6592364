"""The answer to a request, made of the events that its calls give: JSON, whole or in chunks."""

import math
from typing import Any, ClassVar

from dllm_ray.serving.calls import Canvas, Done, Event, Refused, Text
from dllm_ray.serving.errors import ApiError, of_refused
from dllm_ray.serving.protocol import Asked

_IMPOSSIBLE = -9999.0  # how OpenAI writes the logarithm of a probability that is as good as 0


class Reply:
    """Grows with its events. Text number i of call number c is choice c * n + i.

    Args:
        asked: the request.
        id: of the answer.
        model: its name.
        created: seconds since 1970.
    """

    object: ClassVar[str]
    """What OpenAI calls a whole answer."""
    chunk_object: ClassVar[str]
    """What OpenAI calls a part of a streamed one."""

    def __init__(self, asked: Asked, id: str, model: str, created: int):
        self.asked = asked
        self._head = {"id": id, "created": created, "model": model}
        self._n = asked.calls[0].n
        self._done: dict[int, Done] = {}
        self._sent: dict[int, int] = {}  # choice -> characters of it that went out
        self._tokens: dict[int, int] = {}  # choice -> where its next token begins in its text

    @property
    def is_complete(self) -> bool:
        """Whether all texts are finished."""
        return len(self._done) == self._n * len(self.asked.calls)

    def opening(self) -> list[dict[str, Any]]:
        """The chunks with which a stream begins."""
        return []

    def take(self, number: int, event: Event) -> list[dict[str, Any]]:
        """Takes an event of call `number` in.

        Returns:
            The chunks that a stream sends of it.

        Raises:
            ApiError: it ends the request.
        """
        if isinstance(event, Refused):
            raise of_refused(event)
        choice = number * self._n + event.index
        if isinstance(event, Canvas):
            return [self._chunk([], diffusion=_canvas(choice, event))]
        if isinstance(event, Text):
            self._sent[choice] = self._sent.get(choice, 0) + len(event.text)
            has_news = event.text or (event.tokens and self.asked.logprobs)
            return [self._chunk([self._piece(choice, event)])] if has_news else []
        if event.reason == "deadline":
            raise ApiError(504, "there was not enough time for the answer: ask for fewer tokens or steps, or more time")
        if event.reason == "cancelled":
            raise ApiError(503, "the model stopped answering: try again")
        self._done[choice] = event
        rest = event.text[self._sent.get(choice, 0) :]
        pieces = [self._piece(choice, Text(event.index, rest))] if rest and self.asked.stream else []
        return [self._chunk([piece]) for piece in [*pieces, self._end(choice, event)]]

    def closing(self) -> list[dict[str, Any]]:
        """The chunks with which a stream ends."""
        if not self.asked.include_usage:
            return []
        return [self._chunk([]) | {"usage": self.usage()}]

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(number, done) for number, done in sorted(self._done.items())]
        return self._head | {"object": self.object, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """What it took, as far as texts are finished: the prompt counts once for all of its texts."""
        prompts = {choice // self._n: done.prompt_tokens for choice, done in self._done.items()}
        written = sum(done.completion_tokens for done in self._done.values())
        nfe = sum(done.nfe for done in self._done.values())
        seconds = max((done.seconds for done in self._done.values()), default=0.0)
        return {
            "prompt_tokens": sum(prompts.values()),
            "completion_tokens": written,
            "total_tokens": sum(prompts.values()) + written,
            "diffusion": {"nfe": nfe, "tpf": written / max(nfe, 1), "tokens_per_s": written / max(seconds, 1e-9)},
        }

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.include_usage else {}
        return self._head | {"object": self.chunk_object, "choices": choices} | more | usage

    def _piece(self, choice: int, text: Text) -> dict[str, Any]:
        """A choice of a chunk, with text."""
        raise NotImplementedError

    def _end(self, choice: int, done: Done) -> dict[str, Any]:
        """A choice of a chunk, which is finished."""
        raise NotImplementedError

    def _choice(self, choice: int, done: Done) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError

    def _logprob(self, confidence: float) -> float | None:
        if not self.asked.measures_probability:
            return None
        return max(math.log(confidence), _IMPOSSIBLE) if confidence > 0 else _IMPOSSIBLE


class ChatReply(Reply):
    """To `/v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])
            for choice in range(self._n)
        ]

    def _piece(self, choice: int, text: Text) -> dict[str, Any]:
        logprobs = self._logprobs(text.tokens, text.confidences)
        return {"index": choice, "delta": {"content": text.text}, "logprobs": logprobs, "finish_reason": None}

    def _end(self, choice: int, done: Done) -> dict[str, Any]:
        return {"index": choice, "delta": {}, "logprobs": None, "finish_reason": done.reason}

    def _choice(self, choice: int, done: Done) -> dict[str, Any]:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": done.text, "refusal": None},
            "logprobs": self._logprobs(done.tokens, done.confidences),
            "finish_reason": done.reason,
        }

    def _logprobs(self, tokens: tuple[str, ...], confidences: tuple[float, ...]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        content = [
            {
                "token": token,
                "logprob": self._logprob(confidence),
                "bytes": None if "\ufffd" in token else list(token.encode("utf-8")),  # part of a character is none
                "top_logprobs": [],
                "confidence": _finite(confidence),
            }
            for token, confidence in zip(tokens, confidences, strict=True)
        ]
        return {"content": content, "refusal": None}


class CompletionReply(Reply):
    """To `/v1/completions`."""

    object = "text_completion"
    chunk_object = "text_completion"

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._chunk([{"index": choice, "text": echo, "logprobs": None, "finish_reason": None}])
            for choice in range(self._n * len(self.asked.calls))
            if (echo := self._echo(choice))
        ]

    def _piece(self, choice: int, text: Text) -> dict[str, Any]:
        logprobs = self._logprobs(choice, text.tokens, text.confidences)
        return {"index": choice, "text": text.text, "logprobs": logprobs, "finish_reason": None}

    def _end(self, choice: int, done: Done) -> dict[str, Any]:
        return {"index": choice, "text": "", "logprobs": None, "finish_reason": done.reason}

    def _choice(self, choice: int, done: Done) -> dict[str, Any]:
        return {
            "index": choice,
            "text": self._echo(choice) + done.text,
            "logprobs": self._logprobs(choice, done.tokens, done.confidences),
            "finish_reason": done.reason,
        }

    def _echo(self, choice: int) -> str:
        return self.asked.echoes[choice // self._n] if self.asked.echoes else ""

    def _logprobs(self, choice: int, tokens: tuple[str, ...], confidences: tuple[float, ...]) -> dict | None:
        if not self.asked.logprobs:
            return None
        offsets = [self._tokens.get(choice, 0)]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        self._tokens[choice] = offsets.pop()
        return {
            "tokens": list(tokens),
            "token_logprobs": [self._logprob(confidence) for confidence in confidences],
            "top_logprobs": None,
            "text_offset": offsets,
            "confidences": [_finite(confidence) for confidence in confidences],
        }


def _canvas(choice: int, event: Canvas) -> dict[str, Any]:
    return {
        "event": "canvas",
        "index": choice,
        "step": event.step,
        "length": event.length,
        "positions": event.positions,
        "tokens": event.tokens,
        "confidences": [_finite(confidence) for confidence in event.confidences],
        "kinds": event.kinds,
    }


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None
