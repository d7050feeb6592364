"""From the data settings to everything training needs to know of its data, before any worker starts.

Every row is read and tokenized once here: broken files are found now and not in the middle of a run, rows that can't be
used are counted with their reason, and the number of usable rows fixes the order of the whole run (`plan`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dllm_ray.data import formats, sources
from dllm_ray.data.batches import PaddingRule
from dllm_ray.data.config import DataConfig
from dllm_ray.data.plan import Plan, Window, priorities
from dllm_ray.data.sources import Shard
from dllm_ray.data.tokenize import Account, RowRules, TokenRows, tokenize_shard
from dllm_ray.errors import DataError

LOCAL_BYTES = 64 << 20
"""Sources up to this size are surveyed by the driver itself, before it connects to Ray."""

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Applies a function to items, like the built-in `map`, possibly elsewhere."""


@dataclass(frozen=True)
class Corpus:
    """One source, resolved: its shards and how their rows are read."""

    shards: tuple[Shard, ...]
    """Readable pieces, in order."""
    rules: tuple[RowRules, ...]
    """How conversations become token rows, for each shard."""

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus together with the tokenizer that reads it. Picklable: it travels to data tasks."""

    corpus: Corpus
    tokenizer: Any
    stop_token_ids: tuple[int, ...]

    def read(self, shard: int) -> tuple[TokenRows, Account]:
        """The usable rows of a shard, and what became of the others."""
        return tokenize_shard(self.corpus.shards[shard], self.tokenizer, self.stop_token_ids, self.corpus.rules[shard])


@dataclass(frozen=True)
class Prepared:
    """What training needs to know of its data."""

    source: TokenizedCorpus
    """Where the training rows come from."""
    held_out: tuple[np.ndarray, ...]
    """For each shard, its usable rows that are kept for validation."""
    plan: Plan
    """The order of the training rows."""
    padding: PaddingRule
    """How rows of a batch are filled up."""
    account: Account
    """What became of the rows of the training source, held-out ones included."""
    valid: TokenRows
    """Validation rows."""
    valid_account: Account | None
    """What became of the rows of a validation source of its own."""

    def read(self, window: Window) -> TokenRows:
        """The training rows of a window, in order."""
        parts = []
        for shard in window.shards:
            rows, _ = self.source.read(shard)
            parts.append(rows.take(np.setdiff1d(np.arange(len(rows)), self.held_out[shard], assume_unique=True)))
        return TokenRows.join(parts).take(self.plan.order(window))

    def global_batches(self, batch_size: int, total_rows: int, start: int = 0) -> Iterator[TokenRows]:
        """The rows of each global batch from row `start` on, read in this process."""
        left = TokenRows.of([])
        position = start
        for window in self.plan.windows(start, total_rows):
            left = TokenRows.join([left, self.read(window)])
            while len(left) >= min(batch_size, total_rows - position) > 0:
                size = min(batch_size, total_rows - position)
                yield left.take(np.arange(size))
                left = left.take(np.arange(size, len(left)))
                position += size


def resolve(config: DataConfig, path: str | Sequence[str], max_length: int) -> Corpus:
    """Looks sources up and decides the format of each from its first row. Cheap: reads one row of each.

    Raises:
        DataError: nothing there, nothing in it, broken, or columns of no known format.
    """
    shards: list[Shard] = []
    rules: list[RowRules] = []
    for source in [path] if isinstance(path, str) else path:
        found = sources.resolve(source)
        first = sources.head(found, 1)
        if not first:
            raise DataError(f"{source}: holds no rows")
        where, row = first[0]
        row_format = formats.detect(row, config.format, config.columns, where)
        shards += found
        rules += [RowRules(row_format, config.columns, config.loss_on, config.truncation, max_length)] * len(found)
    return Corpus(tuple(shards), tuple(rules))


def prepare(
    config: DataConfig,
    corpus: Corpus,
    valid_corpus: Corpus | None,
    tokenizer,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
    mapper: Mapper = map,
    padding: str = "eos",
) -> Prepared:
    """Surveys the data, sets validation rows aside and plans the order of training.

    Args:
        config: the settings.
        corpus: the training source.
        valid_corpus: a validation source of its own, or None to hold rows out of `corpus`.
        tokenizer: prepared.
        stop_token_ids: end-of-text token first.
        pad_token_id: filler where padding is ignored.
        seed: decides the order of rows and which are held out.
        mapper: how to go over shards; `map` does it in this process.
        padding: the model's own rule, for settings that name none.

    Raises:
        DataError: a broken file, or one without a usable row.
    """
    source = TokenizedCorpus(corpus, tokenizer, tuple(stop_token_ids))
    own_valid = config.valid_rows > 0 and valid_corpus is not None
    keep = 0 if own_valid else config.valid_rows
    surveys = list(mapper(partial(_survey, source, keep, seed), range(len(corpus.shards))))
    by_file: dict[str, list[Account]] = {}
    for shard, survey in zip(corpus.shards, surveys, strict=True):
        by_file.setdefault(shard.name, []).append(survey.account)
    for name, accounts in by_file.items():
        _require_usable(_total(accounts), name)
    account = _total([survey.account for survey in surveys])
    # never more than a tenth, so that a handful of rows can still be trained on
    valid, held_out = _hold_out(surveys, min(keep, account.usable // 10))
    valid_account = None
    if own_valid:
        valid_source = TokenizedCorpus(valid_corpus, tokenizer, tuple(stop_token_ids))
        valid, valid_account = _first_rows(valid_source, config.valid_rows)
        _require_usable(valid_account, _name(config.valid_path))
    remaining = tuple(survey.account.usable - len(rows) for survey, rows in zip(surveys, held_out, strict=True))
    supervised = (config.padding or padding) == "eos"
    return Prepared(
        source=source,
        held_out=held_out,
        plan=Plan(remaining, config.shuffle_window, seed),
        padding=PaddingRule(stop_token_ids[0] if supervised else pad_token_id, supervised),
        account=account,
        valid=valid,
        valid_account=valid_account,
    )


@dataclass(frozen=True)
class _Survey:
    """One shard: its account, and its candidates for validation."""

    account: Account
    numbers: np.ndarray  # [k] usable rows of the shard
    priorities: np.ndarray  # [k]
    rows: TokenRows  # k rows


def _survey(source: TokenizedCorpus, keep: int, seed: int, shard: int) -> _Survey:
    rows, account = source.read(shard)
    priority = priorities(len(rows), shard, seed)
    numbers = np.sort(np.argsort(priority)[:keep])
    return _Survey(account, numbers, priority[numbers], rows.take(numbers))


def _hold_out(surveys: Sequence[_Survey], count: int) -> tuple[TokenRows, tuple[np.ndarray, ...]]:
    """The `count` candidates with the smallest priorities: their tokens, and their numbers in each shard."""
    everything = np.concatenate([survey.priorities for survey in surveys])
    limit = np.sort(everything)[count - 1] if count else -1.0
    chosen = [survey.priorities <= limit for survey in surveys]
    rows = TokenRows.join(
        [survey.rows.take(np.flatnonzero(mask)) for survey, mask in zip(surveys, chosen, strict=True)]
    )
    return rows, tuple(survey.numbers[mask] for survey, mask in zip(surveys, chosen, strict=True))


def _first_rows(source: TokenizedCorpus, count: int) -> tuple[TokenRows, Account]:
    parts: list[TokenRows] = []
    account = Account()
    for shard in range(len(source.corpus.shards)):
        rows, part = source.read(shard)
        parts.append(rows)
        account = account + part
        if account.usable >= count:
            break
    rows = TokenRows.join(parts)
    return rows.take(np.arange(min(count, len(rows)))), account


def _total(accounts: Sequence[Account]) -> Account:
    return sum(accounts[1:], accounts[0])


def _require_usable(account: Account, name: str) -> None:
    if account.usable:
        return
    reasons = ", ".join(f"{reason} ({count})" for reason, count in account.dropped.most_common())
    reason = account.dropped.most_common(1)[0][0] if account.dropped else None
    first = f"; the first: {account.examples[reason]}" if reason else ""
    raise DataError(f"{name}: none of its {account.read} rows can be used: {reasons or 'it holds none'}{first}")


def _name(path: str | Sequence[str] | None) -> str:
    return path if isinstance(path, str) else ", ".join(path or ())
