"""The tokens of an answer of a model that edits: any may still change until the row is done."""

from collections.abc import Collection, Sequence
from itertools import takewhile

from dllm_ray.sampling.edits import after
from dllm_ray.sampling.engine import Commit, Row


class EditedTokens:
    """What `FinalTokens` is for rows whose canvas stays as long as it is; here nothing is final before the end.

    Args:
        row: the row that is denoised.
        infill: a gap is filled, and not the end of a text.
        stops: tokens that end the answer; () where a gap is filled.
    """

    def __init__(self, row: Row, infill: bool, stops: Collection[int] = ()):
        self.tokens: list[int] = []
        """The final ones, without one that ends the answer."""
        self.confidences: list[float] = []
        """The probability of each when it was written; 0 of one that was there from the beginning."""
        self.ended = False
        """Whether the answer ended by itself, and not for want of room."""
        self._stops = frozenset(stops)
        self._most = row.longest - row.open.count(False) if infill else row.block_size
        self._known = [0.0] * len(row.tokens)

    def take(self, commit: Commit) -> None:
        """Follows what a step changed."""
        self._known = after(commit, self._known, commit.confidences)

    def finish(self, canvas: Sequence[int], answer: Sequence[bool]) -> None:
        """Makes the tokens final.

        Args:
            canvas: the finished sequence.
            answer: which of it is the answer.
        """
        both = zip(canvas, self._known, answer, strict=True)
        written = [(token, confidence) for token, confidence, is_its in both if is_its][: self._most]
        kept = list(takewhile(lambda one: one[0] not in self._stops, written))
        self.tokens, self.confidences = [token for token, _ in kept], [confidence for _, confidence in kept]
        self.ended = len(kept) < self._most
