"""A canvas for its viewers: what each step wrote, as text in its places."""

from collections.abc import Iterable, Iterator, Sequence

from dllm_ray.sampling.engine import Commit, Row
from dllm_ray.serving.calls import Canvas
from dllm_ray.serving.text import Detokenizer

_END = "∎"  # how viewers are shown the end of a text
_NEAR = 12  # tokens that may share characters


class View:
    """A canvas as its viewers see it: the answer, or the whole text where a gap is filled."""

    def __init__(self, detokenizer: Detokenizer, row: Row, infill: bool, new: int | None, stops: Sequence[int]):
        self._detokenizer = detokenizer
        self._stops = frozenset(stops)
        self._start = 0 if infill else row.open.index(True)
        self._tokens: list[int | None] = [
            None if is_open else token for token, is_open in zip(row.tokens, row.open, strict=True)
        ][self._start :][:new]
        self._texts = [""] * len(self._tokens)
        self._confidences = [1.0] * len(self._tokens)

    def first(self, index: int) -> Canvas:
        """What is given."""
        given = [place for place, token in enumerate(self._tokens) if token is not None]
        self._respell(given)
        return self._canvas(index, -1, given, ())

    def event(self, index: int, commit: Commit) -> Canvas:
        """What a step wrote, and the neighbours that read otherwise now: a character may be several tokens."""
        kinds = {}
        for place, token, confidence in zip(commit.positions, commit.tokens, commit.confidences, strict=True):
            place -= self._start
            if place < len(self._tokens):
                kinds[place] = "write" if self._tokens[place] is None else "edit"
                self._tokens[place], self._confidences[place] = token, confidence
        for place in self._respell(kinds):
            kinds.setdefault(place, "write")
        places = sorted(kinds)
        return self._canvas(index, commit.step, places, [kinds[place] for place in places])

    def _canvas(self, index: int, step: int, places: Sequence[int], kinds: Sequence[str]) -> Canvas:
        return Canvas(
            index=index,
            step=step,
            length=len(self._tokens),
            positions=tuple(places),
            tokens=tuple(self._texts[place] for place in places),
            confidences=tuple(self._confidences[place] for place in places),
            kinds=tuple(kinds) if "edit" in kinds else (),
        )

    def _respell(self, places: Iterable[int]) -> list[int]:
        """Spells what was written anew, and around it; returns where the text has changed."""
        changed = []
        for start, stop in self._runs(sorted(places)):
            before = self._tokens[start - 1] if start else None
            texts = self._detokenizer.spell(self._tokens[start:stop], before)
            for place, text in enumerate(texts, start=start):
                text = _END if self._tokens[place] in self._stops else text
                if text != self._texts[place]:
                    self._texts[place] = text
                    changed.append(place)
        return changed

    def _runs(self, places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where tokens stand that may share characters with those at some places."""
        end, given = 0, set(places)
        for place in places:
            if place < end:
                continue
            start, end = place, place + 1
            while start and place - start < _NEAR and self._tokens[start - 1] is not None:
                start -= 1
            last = place
            while end < len(self._tokens) and self._tokens[end] is not None and end - last < _NEAR:
                last = end if end in given else last
                end += 1
            yield start, end
