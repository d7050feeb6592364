"""What Edit Flow is trained on: for each row, a sequence to begin with, aligned with the one to end with.

Runs where batches are formed, beside the training; numpy and a compiled loop, no torch. Shapes: B rows, T positions, A
columns of alignments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.objectives.alignment import BLANK, align


@dataclass(frozen=True)
class EditPairs:
    """Draws beginnings and aligns them.

    What carries no label, such as the prompt, stays as it is. A row that begins with a label gets a BOS.
    """

    x0: Sequence[str]
    """What follows the prompt at the beginning, one of them drawn for each row: `empty`: nothing; `masks`: `length`
    mask tokens; `uniform`: `length` tokens, each as likely; `noised`: the answer without an end of text, with a share
    `noise` of its tokens replaced, dropped or doubled."""
    length: int
    noise: float
    vocabulary: int
    """Uniform tokens are drawn from 0 up to this one, but for `reserved`."""
    reserved: tuple[int, ...]
    """Tokens that are no text."""
    mask_token_id: int | None
    bos_token_id: int
    longest: int | None
    """Most tokens that a sequence may have on its way; beginnings are cut where one could have more."""
    seed: int

    def __call__(self, arrays: Mapping[str, np.ndarray], step: int, first: int = 0) -> dict[str, np.ndarray]:
        """A batch with its alignments.

        Args:
            arrays: `input_ids`, `labels` [B, T], and `attention_mask` [B, T] where there is padding.
            step: with the seed and a row's place it fixes the draws.
            first: place of the first row in the global batch.

        Returns:
            The arrays and `z0`, `z1` [B, A] int64, `BLANK` where a sequence has no token and behind the end.
        """
        seen = arrays.get("attention_mask")
        seen = np.ones_like(arrays["input_ids"]) if seen is None else seen
        # what tokens are replaced by has to be likely, or there would be nothing to learn from it
        answers = arrays["input_ids"][arrays["labels"] != IGNORE_INDEX]
        others = answers[~np.isin(answers, self.reserved)]
        pairs = []
        for row, (ids, labels, own) in enumerate(
            zip(arrays["input_ids"], arrays["labels"], seen.astype(bool), strict=True), start=first
        ):
            labelled = np.flatnonzero(labels[own] != IGNORE_INDEX)
            pairs.append(self._pair(ids[own], labelled, others, np.random.default_rng([self.seed, step, row])))
        width = max(len(z0) for z0, _ in pairs)
        padded = np.full((2, len(pairs), width), BLANK, dtype=np.int64)
        for row, pair in enumerate(pairs):
            padded[:, row, : len(pair[0])] = pair
        return {**arrays, "z0": padded[0], "z1": padded[1]}

    def _pair(
        self, x1: np.ndarray, labelled: np.ndarray, others: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        if not len(labelled):  # filler of a batch, or a row that teaches nothing
            return x1, x1
        is_answer = np.zeros(len(x1), np.bool_)
        is_answer[labelled] = True
        if is_answer[0]:
            if x1[0] != self.bos_token_id:
                x1, is_answer = np.concatenate([[self.bos_token_id], x1]), np.concatenate([[False], is_answer])
            is_answer[0] = False
        x1, is_answer = x1[: self.longest], is_answer[: self.longest]
        # each answer by itself: aligned together with what is given, an insertion could land inside that, where
        # samplers make none
        stretches = np.split(np.arange(len(x1)), np.flatnonzero(np.diff(is_answer)) + 1)
        begun = [self._beginning(x1[own], others, random) if is_answer[own[0]] else x1[own] for own in stretches]
        pairs = [align(x0, x1[own]) for x0, own in zip(begun, stretches, strict=True)]
        room = None if self.longest is None else self.longest - len(x1)
        if room is not None and sum(len(z0) for z0, _ in pairs) > self.longest:
            for number, own in enumerate(stretches):
                if is_answer[own[0]]:
                    pairs[number] = align(begun[number][:room], x1[own])
                    room -= min(room, len(begun[number]))
        z0, z1 = (np.concatenate(side) for side in zip(*pairs, strict=True))
        return z0, z1

    def _beginning(self, answer: np.ndarray, others: np.ndarray, random: np.random.Generator) -> np.ndarray:
        kind = self.x0[random.integers(len(self.x0))]
        if kind == "masks":
            return np.full(self.length, self.mask_token_id)
        if kind == "uniform":
            allowed = np.setdiff1d(np.arange(self.vocabulary), self.reserved)
            return allowed[random.integers(len(allowed), size=self.length)]
        text = np.flatnonzero(~np.isin(answer, self.reserved))
        if kind == "empty" or not len(text):
            return answer[:0]
        draft = answer[: text[-1] + 1]
        return noised(draft, self.noise, others[random.integers(len(others), size=len(draft))], random)


def noised(tokens: np.ndarray, share: float, others: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A copy with mistakes: a share of the tokens is replaced, dropped or doubled, each as likely.

    Args:
        tokens: [n].
        share: between 0 and 1.
        others: [n] what tokens are replaced by.
        random: of the draws.
    """
    mistake = np.where(random.random(len(tokens)) < share, random.integers(3, size=len(tokens)), -1)
    copy = np.where(mistake == 0, others, tokens)
    return np.repeat(copy, np.where(mistake == 1, 0, np.where(mistake == 2, 2, 1)))
