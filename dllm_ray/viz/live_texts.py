"""A canvas that is denoised elsewhere, drawn in the terminal from what a server tells of it: texts, no tokens."""

from collections.abc import Sequence
from typing import Literal

from dllm_ray.output import printable
from dllm_ray.viz.spelling import END, MASK
from dllm_ray.viz.terminal import Drawing


class LiveTexts(Drawing):
    """The drawing of a canvas of texts, told of every step with `update`.

    Args:
        colour, grows: as in `Drawing`.
    """

    def __init__(self, colour: Literal["step", "confidence"] = "step", grows: bool = False):
        super().__init__(0, colour, grows)
        self._cells: list[str | None] = []  # None: a mask

    def update(
        self,
        step: int,
        length: int,
        positions: Sequence[int],
        texts: Sequence[str],
        confidences: Sequence[float],
        kinds: Sequence[str] = (),
    ) -> None:
        """Takes in what a step wrote.

        Args:
            step: its number; -1 tells what is given.
            length: positions of the canvas after it.
            positions: where; changes are made one after another.
            texts: of the token at each of them.
            confidences: in each of them.
            kinds: what was done there: write, edit, insert (what follows moves on) or delete (what follows moves up);
                empty: all were written.
        """
        kinds = kinds or ("write",) * len(positions)
        with self._lock:
            if step < 0:
                self._cells, self._written, self._edited = [None] * length, {}, set()
            self._begin(step)
            confidences = confidences or (0.0,) * len(positions)  # what is given has none
            for position, text, confidence, kind in zip(positions, texts, confidences, kinds, strict=True):
                if 0 <= position < max(length, len(self._cells) + (kind == "insert")):
                    self._take(kind, position, printable(text), None if step < 0 else confidence)
            self._cells = self._cells[:length] + [None] * (length - len(self._cells))
        if self._live is None and step >= 0:
            self._print_line()

    def finish(self) -> None:
        """Takes in that nothing more is written."""
        with self._lock:
            self._done = True

    def _take(self, kind: str, position: int, text: str, confidence: float | None) -> None:
        """Makes one change; what is given has no confidence."""
        self._cells += [None] * (position + (kind != "insert") - len(self._cells))
        before = self._cells[position : position + 1]
        if kind == "delete":
            del self._cells[position]
        elif kind == "insert":
            self._cells.insert(position, text)
        else:
            self._cells[position] = text
        if confidence is not None and not (kind == "write" and before[0] is not None):  # else it reads otherwise now
            gone = (MASK if text is None else text for text in before)
            self._change(kind, position, confidence, "".join(gone))

    def __len__(self) -> int:
        return len(self._cells)

    def _texts(self) -> list[str]:
        mask = "" if self._done else MASK
        return [mask if text is None else text for text in self._cells]

    def _is_mask(self, position: int) -> bool:
        return self._cells[position] is None

    def _is_end(self, position: int) -> bool:
        return self._cells[position] == END
