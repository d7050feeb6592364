"""A canvas that is denoised elsewhere, drawn in the terminal from what a server tells of it: texts, no tokens."""

from collections.abc import Sequence
from typing import Literal

from dllm_ray.output import printable
from dllm_ray.viz.spelling import END, MASK
from dllm_ray.viz.terminal import Drawing


class LiveTexts(Drawing):
    """The drawing of a canvas of texts, told of every step with `update`.

    Args:
        colour: as in `Drawing`.
    """

    def __init__(self, colour: Literal["step", "confidence"] = "step"):
        super().__init__(0, colour)
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
            confidences = confidences or (0.0,) * len(positions)  # what is given has none
            for position, text, confidence, kind in zip(positions, texts, confidences, kinds, strict=True):
                if kind in ("insert", "delete"):
                    self._move(position, kind == "insert")
                if kind == "delete" or not 0 <= position < max(length, len(self._cells)):
                    continue
                self._cells += [None] * (position + 1 - len(self._cells))
                self._cells[position] = printable(text)
                if step >= 0:
                    self._wrote(step, position, confidence, kind == "edit")
            self._cells = self._cells[:length] + [None] * (length - len(self._cells))
            self._drew(step, positions if step >= 0 else ())
        if self._live is None and step >= 0:
            self._print_line()

    def finish(self) -> None:
        """Takes in that nothing more is written."""
        with self._lock:
            self._done = True

    def _move(self, position: int, is_insert: bool) -> None:
        """Makes room at a position, or closes it."""
        by = 1 if is_insert else -1

        def moved(old: int) -> int:
            return old + by if old >= position else old

        if is_insert:
            self._cells.insert(position, None)
        else:
            del self._cells[position : position + 1]
            self._written.pop(position, None)
            self._edited.discard(position)
        self._written = {moved(old): mark for old, mark in self._written.items()}
        self._edited = set(map(moved, self._edited))

    def __len__(self) -> int:
        return len(self._cells)

    def _texts(self) -> list[str]:
        mask = "" if self._done else MASK
        return [mask if text is None else text for text in self._cells]

    def _is_mask(self, position: int) -> bool:
        return self._cells[position] is None

    def _is_end(self, position: int) -> bool:
        return self._cells[position] == END
