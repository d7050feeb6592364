"""What rows of the loop write -> events of the call that they answer."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dllm_ray.sampling.engine import Commit, Finished, Row
from dllm_ray.serving.calls import Call, Done, Event, Refused, Text
from dllm_ray.serving.edited import EditedTokens
from dllm_ray.serving.loop import Dropped, RowEvent, Ticket
from dllm_ray.serving.text import Detokenizer, FinalText, FinalTokens
from dllm_ray.serving.view import View

OnEvent = Callable[[Event], None]
"""Called in the loop's thread."""

_BROKEN = "\ufffd"
_TEXT_EVERY_S = 0.04  # least time between two pieces of a text: making them takes time from the batch


@dataclass(frozen=True)
class TextRules:
    """How a model's tokens become text."""

    detokenizer: Detokenizer
    endings: Sequence[str]
    """Texts of which each ends an answer (`endings_of`)."""
    stop_tokens: Sequence[int]
    """Tokens of which each ends an answer."""
    revises: bool
    """Whether written tokens are always revised within their block, whatever the policy."""


class Writing:
    """A call that is being answered.

    Args:
        call: what was asked.
        on_event: told what is written.
        began: when it came, by `time.monotonic`.
    """

    def __init__(self, call: Call, on_event: OnEvent, began: float):
        self.call = call
        self.began_at = began
        self._on_event = on_event
        self._left = 0  # texts that have no end yet
        self._tickets: Sequence[Ticket] = ()
        self._is_over = False

    def cancel(self) -> None:
        """Lets its rows go before the next step; from any thread. Texts that are not finished end as they are."""
        for ticket in self._tickets:
            ticket.cancel()

    def expect(self, texts: int) -> None:
        self._left = texts

    def began(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets
        if self._is_over:
            self.cancel()

    def emit(self, event: Event) -> None:
        """Hands an event on, unless the call was given up."""
        if self._is_over:
            return
        if isinstance(event, Done):
            self._left -= 1
            self._is_over = self._left == 0
        self._on_event(event)

    def refuse(self, event: Refused) -> None:
        """Gives the call up."""
        if not self._is_over:
            self._is_over = True
            self._on_event(event)
            self.cancel()


class AnswerRow:
    """One text of a call: what its row writes becomes events.

    Args:
        rules: of the model.
        writing: the call.
        index: which of its texts.
        row: what is denoised.
        infill: a gap is filled.
        given: tokens of the prompt.
    """

    def __init__(self, rules: TextRules, writing: Writing, index: int, row: Row, infill: bool, given: int):
        self._detokenizer = rules.detokenizer
        self._writing = writing
        self._call = writing.call
        self._index = index
        self._seed = row.seed
        self._given = given
        config, new = row.config, None
        stops = () if infill else rules.stop_tokens
        if row.longest is not None:
            self._tokens = EditedTokens(row, infill, stops)
        else:
            if not infill:
                new = config.max_new_tokens or config.max_length - given
            self._tokens = FinalTokens(row, rules.revises or config.policy == "llada21", stops, new)
        self._text = FinalText(self._detokenizer, () if infill else rules.endings, self._call.stop)
        self._follows = self._call.stream or bool(self._call.stop)  # text is made as it is written, not in the end
        self._fed = self._sent = self._sent_length = 0
        self._fed_at = 0.0
        self._spelled: list[str] = []
        self._view = View(self._detokenizer, row, infill, new, rules.stop_tokens) if self._call.canvas else None
        self._is_shown = False

    def on_event(self, ticket: Ticket, event: RowEvent) -> None:
        """Takes what the loop tells of its row."""
        if self._view is not None and not self._is_shown:
            self._is_shown = True
            self._writing.emit(self._view.first(self._index))
        if isinstance(event, Commit):
            self._commit(ticket, event)
        elif isinstance(event, Finished):
            self._finish(event)
        else:
            self._dropped(event)

    def _commit(self, ticket: Ticket, commit: Commit) -> None:
        self._tokens.take(commit)
        if self._view is not None:
            self._writing.emit(self._view.event(self._index, commit))
        if self._follows and self._is_time() and self._feed() and not commit.done:
            ticket.cancel()

    def _is_time(self) -> bool:
        """Whether text is to be made now. A stop string is looked for at each step, so that it ends a text at the same
        one whenever it is asked."""
        return bool(self._call.stop) or time.monotonic() - self._fed_at >= _TEXT_EVERY_S

    def _feed(self) -> bool:
        """Makes text of the tokens that became final and sends it; whether a stop string ended it."""
        fresh = self._tokens.tokens[self._fed :]
        if fresh:
            self._fed += len(fresh)
            self._fed_at = time.monotonic()
            self._send(self._text.feed(fresh))
        return self._text.stopped

    def _finish(self, finished: Finished) -> None:
        if finished.answer is None:
            self._tokens.finish(finished.tokens)
        else:
            self._tokens.finish(finished.tokens, finished.answer)
        self._feed()
        piece = self._text.finish()
        tokens = self._kept()
        self._send(piece, tokens)
        ended = self._tokens.ended or self._text.cut
        self._done("stop" if ended else "length", tokens, finished.nfe)

    def _dropped(self, dropped: Dropped) -> None:
        if dropped.reason == "failed":
            self._writing.refuse(Refused("failed", dropped.message))
            return
        if dropped.reason == "closed":
            self._writing.refuse(Refused("draining", "the model was put away while it answered", retry_after_s=1.0))
            return
        if dropped.so_far is not None and dropped.so_far.answer is not None:  # as final as it will ever be
            self._tokens.finish(dropped.so_far.tokens, dropped.so_far.answer)
        self._feed()
        nfe = 0 if dropped.so_far is None else dropped.so_far.nfe
        tokens = self._kept()
        if self._text.stopped:
            self._send("", tokens)
            self._done("stop", tokens, nfe)
        else:
            self._done(dropped.reason, tokens, nfe)

    def _done(self, reason: str, tokens: int, nfe: int) -> None:
        self._writing.emit(
            Done(
                index=self._index,
                text=self._text.text,
                reason=reason,
                prompt_tokens=self._given,
                completion_tokens=tokens,
                nfe=nfe,
                seconds=time.monotonic() - self._writing.began_at,
                seed=self._seed,
                tokens=tuple(self._spell(tokens)) if self._call.spelled else (),
                confidences=tuple(self._tokens.confidences[:tokens]) if self._call.spelled else (),
            )
        )

    def _send(self, piece: str, tokens: int | None = None) -> None:
        """Sends a piece of text with the tokens that it holds the end of, or with all up to number `tokens`."""
        if not self._call.stream or not (piece or tokens is not None):
            return
        if not self._call.spelled:
            if piece:
                self._writing.emit(Text(self._index, piece))
            return
        first = self._sent
        if tokens is None:
            tokens, spelled = self._sent, self._spell(self._fed)
            while tokens < self._fed and self._sent_length + len(spelled[tokens]) <= len(self._text.text):
                self._sent_length += len(spelled[tokens])
                tokens += 1
        if piece or tokens > first:
            self._sent = max(tokens, first)
            texts, confidences = tuple(self._spell(tokens)[first:]), tuple(self._tokens.confidences[first:tokens])
            self._writing.emit(Text(self._index, piece, texts, confidences))

    def _kept(self) -> int:
        """How many tokens the text is made of; those whose text was cut off don't count."""
        length, count = len(self._text.text), len(self._tokens.tokens)
        if not self._text.cut:
            return count
        passed = 0
        for number, text in enumerate(self._spell(count)):
            if passed >= length:
                return number
            passed += len(text)
        return count

    def _spell(self, count: int) -> list[str]:
        """The texts of the first tokens."""
        known, tokens = self._spelled, self._tokens.tokens
        if count > len(known):
            first = len(known)
            while first and _BROKEN in known[first - 1]:  # half a character, unless it is one that no token completes
                first -= 1
            known[first:] = self._detokenizer.spell(tokens[first:count], tokens[first - 1] if first else None)
        return known[:count]
