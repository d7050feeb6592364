"""A canvas for its viewers: what each step wrote, as text in its places."""

from collections.abc import Iterable, Iterator, Sequence

from dllm_ray.sampling.edits import in_turn
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
        self._start = 0 if infill else row.block_start if row.longest is not None else row.open.index(True)
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
        if commit.edits:
            return self._edited(index, commit)
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

    def _edited(self, index: int, commit: Commit) -> Canvas:
        """`event` of a model that edits, whose prompt in front of the view may move as well."""
        new = iter(zip(commit.tokens, commit.confidences, strict=True))
        changes: list[tuple[int, str]] = []
        beside: set[int] = set()
        for edit in in_turn(commit.edits):
            kind, place = edit.kind, edit.position - self._start
            token, confidence = (None, 0.0) if kind == "delete" else next(new)
            if place < 0:
                self._start += (edit.kind == "insert") - (edit.kind == "delete")
                continue
            if kind == "delete":
                del self._tokens[place], self._texts[place], self._confidences[place]
                beside |= {place - 1, place}
            else:
                if kind == "substitute":
                    kind = "write" if self._tokens[place] is None else "edit"
                old = slice(place, place if kind == "insert" else place + 1)
                self._tokens[old], self._texts[old], self._confidences[old] = [token], [""], [confidence]
                beside.add(place)
            changes.append((place, kind))
        written = {place for place, kind in changes if kind != "delete"}
        there = {place for place in beside if 0 <= place < len(self._tokens) and self._tokens[place] is not None}
        changes += [(place, "write") for place in self._respell(there) if place not in written]
        return self._canvas(index, commit.step, [place for place, _ in changes], [kind for _, kind in changes])

    def _canvas(self, index: int, step: int, places: Sequence[int], kinds: Sequence[str]) -> Canvas:
        told = [
            ("", 0.0) if kind == "delete" else (self._texts[place], self._confidences[place])
            for place, kind in zip(places, kinds or ("write",) * len(places), strict=True)
        ]
        return Canvas(
            index=index,
            step=step,
            length=len(self._tokens),
            positions=tuple(places),
            tokens=tuple(text for text, _ in told),
            confidences=tuple(confidence for _, confidence in told),
            kinds=() if {*kinds} <= {"write"} else tuple(kinds),
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
