"""Commits -> text that can no longer change, as early as it can't; and the text of single tokens.

`FinalTokens` finds the tokens that are final, `FinalText` what they read as. The pieces that `FinalText` gives make the
text that `chat.decode` makes of all tokens, cut before the first stop string.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence

from dllm_ray import chat
from dllm_ray.sampling.engine import Commit, Row

_BROKEN = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_FEW_TOKENS, _MANY_TOKENS = 16, 48  # of a window: kept when it moves on, and from which on it does
_LOOK_AHEAD = 6  # characters: as far back as cleaning up spaces reaches (" n ' t" becomes "n't")
_LONGEST_CHARACTER = 4  # bytes, which may be tokens of their own
_LONGEST_GROUP = 12  # tokens that make whole characters; one may end in the middle of a character, and so the next
_MOST_KNOWN = 200_000


class FinalTokens:
    """The tokens of an answer that can't change any more: those before the first open position; where written tokens
    may be revised, those in blocks that are done.

    Args:
        row: the row that is denoised.
        revises: whether the policy revises tokens of the block that it is in.
        stops: tokens that end the answer; () where a gap is filled.
        most: tokens of the answer; the row may have more positions (of its last block).
    """

    def __init__(self, row: Row, revises: bool, stops: Collection[int] = (), most: int | None = None):
        self.tokens: list[int] = []
        """The final ones, without one that ends the answer."""
        self.confidences: list[float] = []
        """What the policy measured of each when it was written."""
        self.ended = False
        """Whether a token ended the answer."""
        self._row = row
        self._revises = revises
        self._stops = frozenset(stops)
        self._places = [place for place, is_open in enumerate(row.open) if is_open][:most]
        self._written: dict[int, tuple[int, float]] = {}
        self._passed = 0  # of the places

    def take(self, commit: Commit) -> list[int]:
        """The tokens that became final with a commit."""
        self._written |= dict(zip(commit.positions, zip(commit.tokens, commit.confidences, strict=True), strict=True))
        bound = None
        if self._revises and not commit.done:
            if not commit.positions:
                return []
            row = self._row
            bound = row.block_start + (commit.positions[0] - row.block_start) // row.block_size * row.block_size
        return self._advance(bound)

    def finish(self, canvas: Sequence[int]) -> list[int]:
        """The rest, of the finished canvas; a token that no commit told of has confidence 0."""
        for place in self._places[self._passed :]:
            self._written.setdefault(place, (canvas[place], 0.0))
        return self._advance(None)

    def _advance(self, bound: int | None) -> list[int]:
        before = len(self.tokens)
        while not self.ended and self._passed < len(self._places):
            place = self._places[self._passed]
            if place not in self._written or (bound is not None and place >= bound):
                break
            token, confidence = self._written.pop(place)
            self._passed += 1
            if token in self._stops:
                self.ended = True
            else:
                self.tokens.append(token)
                self.confidences.append(confidence)
        return self.tokens[before:]


class Detokenizer:
    """How a tokenizer's ids become text, and what of it later ids may change.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        controls = {*tokenizer.all_special_ids, *(token for token, added_token in added.items() if added_token.special)}
        self._controls = frozenset(token for token in controls if not self.decode([token, token]))
        self._last = max(vocabulary.values())
        self.bytes = frozenset(token for text, token in vocabulary.items() if _BYTE.fullmatch(text))
        """Tokens that stand for a byte each; a run of them is read as a whole, and one bad byte spoils all of it."""
        self.looks_back = not self._is_plain()
        """Whether a token may change the text of those before it."""
        self._known: dict[tuple[int | None, int], str] = {}

    def _is_plain(self) -> bool:
        """Whether text is made by the library `tokenizers` alone, by decoders known to leave earlier text as it is."""
        if not self.tokenizer.is_fast:
            return False
        backend = self.tokenizer.backend_tokenizer
        if getattr(self.tokenizer, "clean_up_tokenization_spaces", False) and type(backend.model).__name__ != "BPE":
            return False
        if getattr(self.tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False):
            return False
        decoder = json.loads(backend.to_str()).get("decoder")
        return decoder is None or _kinds(decoder) <= _PLAIN

    def is_silent(self, token: int) -> bool:
        """Whether a token has no text: a control token, or one that the model knows and the tokenizer doesn't."""
        return token in self._controls or (token > self._last and self.tokenizer.is_fast)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, as `chat.decode` begins with it."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True) if tokens else ""

    def spell(self, tokens: Sequence[int], before: int | None = None) -> list[str]:
        """The text of each token as it reads after the one before it; control tokens have none.

        A character that several tokens make is the text of the first of them, and the others' is empty.

        Args:
            tokens: token ids that follow each other.
            before: the one before them.
        """
        texts = []
        while len(texts) < len(tokens):
            place = len(texts)
            text = self._after(before, tokens[place])
            size = 1
            if _BROKEN in text:
                size, text = self._character(before, tokens[place : place + _LONGEST_GROUP], text)
            texts += [text, *[""] * (size - 1)]
            before = next(
                (token for token in reversed(tokens[place : place + size]) if not self.is_silent(token)), before
            )
        return texts

    def _character(self, before: int | None, tokens: Sequence[int], alone: str) -> tuple[int, str]:
        """The fewest of the next tokens that make whole characters, and their text; one token where none do."""
        start = "" if before is None else self.decode([before])
        context = [] if before is None or _BROKEN in start else [before]
        start = start if context else ""
        for size in range(1, len(tokens) + 1):
            whole = self.decode([*context, *tokens[:size]])
            if whole.startswith(start) and _BROKEN not in whole[len(start) :]:
                return size, whole[len(start) :]
        return 1, alone

    def _after(self, before: int | None, token: int) -> str:
        text = self._known.get((before, token))
        if text is None:
            start = "" if before is None else self.decode([before])
            whole = self.decode([token] if before is None else [before, token])
            text = whole[len(start) :] if whole.startswith(start) else self.decode([token])
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[before, token] = text
        return text


_PLAIN = frozenset(("ByteLevel", "Metaspace", "WordPiece", "ByteFallback", "Fuse", "Strip", "Replace", "Sequence"))


def _kinds(decoder: dict) -> set[str]:
    return {decoder["type"]}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


def endings_of(tokenizer, eot_text: str | None) -> tuple[str, ...]:
    """The texts of which each ends an answer, as `chat.decode` finds them: the first one, then the second."""
    return () if eot_text is None else (eot_text, tokenizer.decode(chat.encode_text(tokenizer, eot_text)))


class FinalText:
    """The text of tokens that come in order, as far as no later token can change it.

    Args:
        detokenizer: of the model.
        endings: what ends an answer (`endings_of`); where there is any, white space at the end goes.
        stop: strings before the first of which the text ends; first is the one that begins first.
    """

    def __init__(self, detokenizer: Detokenizer, endings: Iterable[str] = (), stop: Iterable[str] = ()):
        self.text = ""
        """What was given so far."""
        self.ended = False
        """Whether the text is whole, whatever tokens follow."""
        self.stopped = False
        """Whether a stop string ended it."""
        self._growing = _Growing(detokenizer)
        self._filters: list[_Cut | _Trim] = [_Cut([ending]) for ending in endings]
        if self._filters:
            self._filters.append(_Trim())
        stop = tuple(stop)
        self._stop = _Cut(stop) if stop else None
        if self._stop is not None:
            self._filters.append(self._stop)

    @property
    def cut(self) -> bool:
        """Whether a stop string or the text that ends answers was found."""
        return any(part.ended for part in self._filters)

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is final with these tokens, beyond what was given before."""
        return "" if self.ended else self._through(self._growing.feed(tokens), is_last=False)

    def finish(self) -> str:
        """The rest: no token follows."""
        return "" if self.ended else self._through(self._growing.finish(), is_last=True)

    def _through(self, piece: str, is_last: bool) -> str:
        for part in self._filters:
            piece = part.feed(piece)
            if is_last:
                piece += part.finish()
            is_last = is_last or part.ended
        self.ended = is_last
        self.stopped = self._stop is not None and self._stop.ended
        self.text += piece
        return piece


class _Growing:
    """`Detokenizer.decode` of tokens that come one after the other, from the last of them only.

    The window moves on where its second half reads the same without the tokens before it.
    """

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text
        self._limit = _MANY_TOKENS

    def feed(self, tokens: Sequence[int]) -> str:
        self._window += [token for token in tokens if not self._detokenizer.is_silent(token)]
        whole = self._detokenizer.decode(self._window)
        stable = self._stable(whole)
        piece = stable[self._given :]
        self._given += len(piece)
        if len(self._window) > self._limit:
            self._move(whole)
        return piece

    def finish(self) -> str:
        return self._detokenizer.decode(self._window)[self._given :]

    def _stable(self, whole: str) -> str:
        """The part of the window's text that no further token changes."""
        detokenizer, window = self._detokenizer, self._window
        stop = len(window)
        if detokenizer.looks_back:
            ahead = 0
            while stop and ahead < _LOOK_AHEAD:
                stop -= 1
                ahead = len(detokenizer.decode(window[stop:]))
        if detokenizer.bytes:
            while stop and window[stop - 1] in detokenizer.bytes:
                stop -= 1
        if stop < len(window):
            whole = _common(detokenizer.decode(window[:stop]), whole)
        # the last bytes may be the beginning of a character
        end = len(whole)
        while end and len(whole) - end < _LONGEST_CHARACTER - 1 and whole[end - 1] == _BROKEN:
            end -= 1
        return whole[:end]

    def _move(self, whole: str) -> None:
        start = len(self._window) - _FEW_TOKENS
        while start > len(self._window) - 2 * _FEW_TOKENS and self._window[start] in self._detokenizer.bytes:
            start -= 1
        shorter = self._detokenizer.decode(self._window[start:])
        held, half = len(whole) - self._given, shorter[len(shorter) // 2 :]
        if half and held <= len(half) and whole.endswith(half):
            self._window = self._window[start:]
            self._given = len(shorter) - held
            self._limit = _MANY_TOKENS
        else:  # a long run of bytes: later
            self._limit = 2 * len(self._window)


class _Cut:
    """Ends a text before the first of some strings; holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]):
        self.ended = False
        self._strings = strings
        self._held = ""

    def feed(self, piece: str) -> str:
        if self.ended or not piece:
            return ""
        held = self._held + piece
        found = self._find(held)
        begun = min(_beginning(held, string) for string in self._strings)
        if found <= begun and found < len(held):
            self.ended, self._held = True, ""
            return held[:found]
        self._held = held[begun:]
        return held[:begun]

    def finish(self) -> str:
        held, self._held = self._held, ""
        found = self._find(held)
        self.ended = self.ended or found < len(held)
        return held[:found]

    def _find(self, text: str) -> int:
        """Where the first of the strings begins; the end of the text where there is none."""
        places = [place for string in self._strings if (place := text.find(string)) >= 0]
        return min(places, default=len(text))


def _common(one: str, other: str) -> str:
    """The longest beginning that two texts share."""
    length = min(len(one), len(other))
    return one[: next((place for place in range(length) if one[place] != other[place]), length)]


def _beginning(text: str, string: str) -> int:
    """Where the text's longest end that may become `string` begins; the end of the text where there is none."""
    for place in range(max(len(text) - len(string) + 1, 0), len(text)):
        if string.startswith(text[place:]):
            return place
    return len(text)


class _Trim:
    """Leaves out white space at the end of a text."""

    ended = False

    def __init__(self):
        self._held = ""

    def feed(self, piece: str) -> str:
        text = self._held + piece
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept

    def finish(self) -> str:
        return ""
