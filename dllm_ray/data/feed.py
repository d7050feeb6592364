"""Where token rows come from: sources, their shards, and the order in which they are gone through.

Everything here is a picklable description that reads on any machine with the same storage: the driver, a data task and
the batch server hold the same one. Knows nothing of batches or Ray.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from dllm_ray.data.blend import Share
from dllm_ray.data.cache import Cache
from dllm_ray.data.plan import Plan, Window
from dllm_ray.data.sources import Shard
from dllm_ray.data.tokenize import Account, RowRules, TokenRows, tokenize_shard


@dataclass(frozen=True)
class Source:
    """One source, resolved: its shards and how their rows are read."""

    name: str
    """What reports call it."""
    shards: tuple[Shard, ...]
    """Readable pieces, in order."""
    rules: tuple[RowRules, ...]
    """How conversations or documents become token rows, for each shard."""
    share: Share
    """Its part in the mixture."""
    limit: int | None
    """Only its first so many usable rows."""
    seed: tuple[int, ...]
    """Decides the order of its rows, and which are held out."""

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class Corpus:
    """All sources of training, or of validation."""

    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return sum(source.size for source in self.sources)

    @property
    def shards(self) -> list[Shard]:
        """The shards of all sources in turn, so that the first ones tell of every source."""
        return [shard for shard, _ in self._in_turn()]

    @property
    def rules(self) -> list[RowRules]:
        """The rules of `shards`."""
        return [rules for _, rules in self._in_turn()]

    def _in_turn(self) -> Iterable[tuple[Shard, RowRules]]:
        columns = zip_longest(*(zip(source.shards, source.rules, strict=True) for source in self.sources))
        return (pair for column in columns for pair in column if pair is not None)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus together with the tokenizer that reads it. Picklable: it travels to data tasks."""

    corpus: Corpus
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    cache: Cache | None = None

    def read(self, source: int, shard: int) -> tuple[TokenRows, Account]:
        """The usable rows of a shard, and what became of the others.

        Raises:
            DataError: the shard can't be read or parsed.
        """
        piece, rules = self.corpus.sources[source].shards[shard], self.corpus.sources[source].rules[shard]

        def tokenize() -> tuple[TokenRows, Account]:
            return tokenize_shard(piece, self.tokenizer, self.stop_token_ids, rules)

        rows, account = tokenize() if self.cache is None else self.cache.get(piece, rules, tokenize)
        return rows.in_shard(shard), account


@dataclass(frozen=True)
class Feed:
    """Where the training rows come from. Picklable: it travels to data tasks."""

    tokenized: TokenizedCorpus
    plans: tuple[Plan, ...]
    """The order of each source's rows."""
    left_out: tuple[dict[int, np.ndarray], ...]
    """For each source: shard -> its usable rows that are not trained on: held out, or beyond the source's `rows`."""
    pass_times: tuple[float, ...]
    """Virtual time that a pass over each source takes, roughly."""
    inflation: tuple[float, ...]
    """Bytes of tokenized rows for each byte of a source, roughly."""
    kept: dict[tuple[int, int], tuple[TokenRows, Account]]
    """(source, shard) -> what `read_shard` gives, where the survey's rows are held in memory."""

    @property
    def names(self) -> list[str]:
        """What reports call the sources."""
        return [source.name for source in self.tokenized.corpus.sources]

    @property
    def shares(self) -> list[Share]:
        """The sources' parts in the mixture."""
        return [source.share for source in self.tokenized.corpus.sources]

    def read(self, source: int, window: Window) -> TokenRows:
        """The training rows of a window of a source, in the order of its shards.

        Raises:
            DataError: a shard can't be read or parsed.
        """
        return TokenRows.join([self.read_shard(source, shard)[0] for shard in window.shards])

    def read_shard(self, source: int, shard: int) -> tuple[TokenRows, Account]:
        """The training rows of a shard, and what became of all of its rows."""
        if (source, shard) in self.kept:
            return self.kept[source, shard]
        rows, account = self.tokenized.read(source, shard)
        return self.training(source, shard, rows), account

    def training(self, source: int, shard: int, usable: TokenRows) -> TokenRows:
        """Those of a shard's usable rows that are trained on."""
        out = self.left_out[source].get(shard)
        if out is None:
            return usable
        return usable.take(np.setdiff1d(np.arange(len(usable)), out, assume_unique=True))
