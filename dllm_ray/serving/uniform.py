"""`OneByOne`: models without a mask token (DiffusionGemma) behind the engine's interface, so that one loop serves all.

`generate` of transformers denoises their rows one after the other; a step here is a step of the row whose turn it is.
"""

import dataclasses
from collections import deque
from collections.abc import Generator

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import uniform_noise
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit, Finished, Row


def row_of(lm: DiffusionLM, config: SamplerConfig, prompt: list[int], seed: int) -> Row:
    """A row for `OneByOne`: a prompt, and the canvases behind it.

    Raises:
        ConfigError: a setting that has no meaning for the model, or a prompt that doesn't fit it.
    """
    [canvas] = uniform_noise.canvases(lm, config, [prompt])
    start = len(prompt) or 1  # an empty one becomes the beginning-of-text token
    return Row(
        tokens=canvas,
        open=[False] * start + [True] * (len(canvas) - start),
        config=config,
        block_start=start,
        block_size=lm.model.config.canvas_length,
        steps_per_block=config.steps_in_block(-(-(len(canvas) - start) // lm.model.config.canvas_length)),
        seed=seed,
        early_stop=config.eos_early_stop,
    )


class OneByOne:
    """Denoises rows one after the other.

    Args:
        lm: the model.
    """

    def __init__(self, lm: DiffusionLM):
        self.lm = lm
        self._waiting: deque[Row] = deque()
        self._row: Row | None = None
        self._commits: Generator[Commit] | None = None
        self._canvas: list[int] = []
        self._nfe = 0
        self._finished: list[Finished] = []

    def check(self, row: Row) -> None:
        """Rows are checked when they are made."""

    def admit(self, row: Row) -> None:
        """Queues a row."""
        self._waiting.append(row)

    def cancel(self, key: int) -> Finished | None:
        """Takes a row out; returns what it had come to."""
        for row in self._waiting:
            if row.key == key:
                self._waiting.remove(row)
                return Finished(key, row.tokens, nfe=0)
        if self._row is None or self._row.key != key:
            return None
        self._commits.close()
        return self._end()

    @property
    def busy(self) -> bool:
        """Whether any row is under way or waits."""
        return self._row is not None or bool(self._waiting)

    def take_finished(self) -> list[Finished]:
        """Rows that became done since the last call."""
        done, self._finished = self._finished, []
        return done

    def step(self) -> list[Commit]:
        """One step of the row whose turn it is."""
        if self._row is None:
            if not self._waiting:
                return []
            self._begin(self._waiting.popleft())
        try:
            commit = next(self._commits, None)
        except BaseException:
            self._end()
            raise
        if commit is None:
            self._finished.append(self._end())
            return []
        commit = dataclasses.replace(commit, row=self._row.key)
        for place, token in zip(commit.positions, commit.tokens, strict=True):
            self._canvas[place] = token
        self._nfe = commit.step + 1
        if commit.done:
            self._commits.close()
            self._finished.append(self._end())
        return [commit]

    def _begin(self, row: Row) -> None:
        prompt = row.tokens[: row.open.index(True)]
        self._row, self._canvas, self._nfe = row, list(row.tokens), 0
        self._commits = uniform_noise.stream(self.lm, row.config, [prompt], [row.seed])

    def _end(self) -> Finished:
        result = Finished(self._row.key, self._canvas, self._nfe)
        self._row = self._commits = None
        return result
