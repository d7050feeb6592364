"""From the data settings to everything training needs to know of its data, before any worker starts.

A *survey* reads and tokenizes rows once: broken files are found now and not in the middle of a run, rows that can't be
used are counted with their reason, and validation rows are set aside. It covers all of the data where the length of the
run must be known or the data is small; else the beginning of each source, and the rest is met as training goes along.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from dllm_ray.data import formats, sources, stream
from dllm_ray.data.batches import PaddingRule
from dllm_ray.data.batching import Batching
from dllm_ray.data.blend import Share
from dllm_ray.data.cache import Cache, fingerprint
from dllm_ray.data.config import DataConfig, SourceConfig
from dllm_ray.data.feed import Corpus, Feed, Source, TokenizedCorpus
from dllm_ray.data.plan import Plan, priorities
from dllm_ray.data.sources import Shard
from dllm_ray.data.tokenize import Account, RowRules, TokenRows
from dllm_ray.errors import DataError

LOCAL_BYTES = 64 << 20
"""Sources up to this size are surveyed by the driver itself, before it connects to Ray."""
_KEPT_TOKENS = 8 << 20  # surveyed rows up to so many tokens are kept in memory
_GROUP = 16  # shards surveyed at once where only the first rows of a source are wanted

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Applies a function to items, like the built-in `map`, possibly elsewhere."""


@dataclass(frozen=True)
class Prepared:
    """What training needs to know of its data."""

    feed: Feed
    """Where the training rows come from, and their order."""
    batching: Batching
    """How rows become global batches."""
    padding: PaddingRule
    """How a batch is filled up."""
    accounts: dict[str, Account]
    """Source -> what became of the rows that were surveyed, held-out ones included."""
    surveyed: bool
    """Whether that is all of them."""
    lengths: tuple[tuple[np.ndarray, ...], ...] | None
    """[sources][shards] tokens of each training row; None if not surveyed."""
    held_out: int
    """Validation rows taken out of the training data."""
    valid: TokenRows
    """Validation rows."""
    valid_account: Account | None
    """What became of the rows of a validation source of its own."""
    fingerprint: str
    """SHA-256 that tells the data apart from other data: over all tokens if surveyed, else over names and sizes of
    files and the first tokens."""

    @property
    def account(self) -> Account:
        """What became of the rows that were surveyed, over all sources."""
        return _total(list(self.accounts.values()))

    @property
    def rows(self) -> int | None:
        """Rows in one pass over all sources; None if not surveyed."""
        return None if self.lengths is None else sum(len(rows) for shards in self.lengths for rows in shards)

    def run(self, epochs: float, max_steps: int | None) -> stream.Run:
        """How long a run is.

        Args:
            epochs: how often the data is gone through; without meaning if there is `max_steps`.
            max_steps: global batches.
        """
        if max_steps is not None:
            return stream.Run(max_steps, None)
        return stream.plan_run(self.feed, self.batching, self.lengths, epochs)

    def batches(self, run: stream.Run, cursor: stream.Cursor | None = None) -> Iterator[stream.GlobalBatch]:
        """The run's global batches after a cursor, read in this process."""
        return stream.batches(self.feed, self.batching, self.padding, run, cursor)

    def where(self, source: int, shard: int, number: int) -> str:
        """The origin of a row, for people, from what `GlobalBatch.origins` says of it."""
        return self.feed.tokenized.corpus.sources[source].shards[shard].where(number)


def resolve(config: DataConfig, max_length: int, seed: int = 0) -> Corpus:
    """Looks the training sources up and decides the format of each file from its first row. Cheap: reads one row each.

    Args:
        config: the settings.
        max_length: most tokens in a row.
        seed: the run's; a source's order follows from it unless it has a seed of its own.

    Raises:
        DataError: nothing there, nothing in it, broken, or columns of no known format.
    """
    return Corpus(
        tuple(_resolve(source, config, max_length, seed, number) for number, source in enumerate(config.mixture()))
    )


def resolve_valid(config: DataConfig, max_length: int, seed: int = 0) -> Corpus | None:
    """The validation source of its own, if there is one and it is wanted; otherwise as `resolve`."""
    if config.valid_path is None or not config.valid_rows:
        return None
    return Corpus((_resolve(SourceConfig(config.valid_path), config, max_length, seed, 0),))


def needs_ray(corpus: Corpus, max_steps: int | None) -> bool:
    """Whether the survey is too much for this process: then `prepare` wants a mapper."""
    limited = any(source.limit for source in corpus.sources)
    return corpus.size > LOCAL_BYTES and (max_steps is None or limited)


def prepare(
    config: DataConfig,
    corpus: Corpus,
    valid_corpus: Corpus | None,
    tokenizer,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
    *,
    batch_size: int,
    max_length: int,
    max_steps: int | None = None,
    padding: str = "eos",
    block_size: int | None = None,
    mapper: Mapper = map,
) -> Prepared:
    """Surveys the data, sets validation rows aside and fixes the order of training.

    Args:
        config: the settings.
        corpus: the training sources.
        valid_corpus: a validation source of its own, or None to hold rows out of `corpus`.
        tokenizer: prepared.
        stop_token_ids: end-of-text token first.
        pad_token_id: filler where padding is ignored.
        seed: decides the order of a chunk's batches.
        batch_size: rows in a global batch.
        max_length: most tokens in a row.
        max_steps: global batches of the run; None: it is told by epochs, and all of the data is surveyed.
        padding: the model's own rule, for settings that name none.
        block_size: tokens in a block of the objective.
        mapper: how to go over shards; `map` does it in this process.

    Raises:
        DataError: a broken file, or one without a usable row.
        ConfigError: batches or padding that can't be formed.
    """
    rule = _padding(config, corpus, stop_token_ids[0], pad_token_id, max_length, padding, block_size)
    batching = Batching(
        batch_size=batch_size,
        max_length=max_length,
        rule="packed" if config.packing else "bucketed" if config.max_tokens_per_batch else "fixed",
        max_tokens=config.max_tokens_per_batch,
        block_size=rule.multiple,
        seed=seed,
    )
    cache = None if config.cache_dir is None else Cache(config.cache_dir, fingerprint(tokenizer, stop_token_ids))
    tokenized = TokenizedCorpus(corpus, tokenizer, tuple(stop_token_ids), cache)
    surveyed = max_steps is None or corpus.size <= LOCAL_BYTES
    candidates = 0 if valid_corpus is not None else config.valid_rows
    keep = not needs_ray(corpus, max_steps)  # rows that are tokenized elsewhere are not sent here
    look = partial(_survey, tokenized, candidates, keep)
    surveys = _survey_sources(corpus, look, surveyed, mapper)
    accounts = {source.name: _account(source, own) for source, own in zip(corpus.sources, surveys, strict=True)}
    usable = sum(len(survey.lengths) for own in surveys for survey in own)
    # never more than a tenth, so that a handful of rows can still be trained on
    valid, held_out = _hold_out(surveys, min(candidates, usable // 10))
    held_out_rows, valid_account = len(valid), None
    if valid_corpus is not None:
        own_source = TokenizedCorpus(valid_corpus, tokenizer, tuple(stop_token_ids), cache)
        valid, valid_account = _first_rows(own_source, config.valid_rows)
        _require_usable(valid_account, valid_corpus.sources[0].name)

    feed = _feed(config, tokenized, surveys, held_out, at_hand_first=keep and not surveyed)
    if keep:
        feed = replace(feed, kept=_kept(feed, surveys))
    lengths = None
    if surveyed:
        lengths = tuple(
            tuple(np.delete(survey.lengths, out) for survey, out in zip(own, own_out, strict=True))
            for own, own_out in zip(surveys, held_out, strict=True)
        )
    return Prepared(
        feed=feed,
        batching=batching,
        padding=rule,
        accounts=accounts,
        surveyed=surveyed,
        lengths=lengths,
        held_out=held_out_rows,
        valid=valid,
        valid_account=valid_account,
        fingerprint=_fingerprint(corpus, accounts, surveyed),
    )


def _resolve(source: SourceConfig, config: DataConfig, max_length: int, seed: int, number: int) -> Source:
    shards: list[Shard] = []
    rules: list[RowRules] = []
    columns = config.columns if source.columns is None else source.columns
    for path in [source.path] if isinstance(source.path, str) else source.path:
        found = sources.resolve(path)
        first = sources.head(found, 1)
        if not first:
            raise DataError(f"{path}: holds no rows")
        where, row = first[0]
        row_format = formats.detect(row, source.format or config.format, columns, where)
        rule = RowRules(
            row_format=row_format,
            columns=columns,
            loss_on=source.loss_on or config.loss_on,
            truncation=config.truncation,
            max_length=max_length,
            document_eos=config.document_eos,
            drop_tail=config.drop_tail,
            random_length=config.random_length,
            seed=seed if source.seed is None else source.seed,
            where=source.filter.where,
            min_tokens=source.filter.min_tokens,
            max_tokens=source.filter.max_tokens,
        )
        shards += found
        rules += [rule] * len(found)
    return Source(
        name=source.label,
        shards=tuple(shards),
        rules=tuple(rules),
        share=Share(source.weight, config.weight_by, source.repeat),
        limit=source.rows,
        seed=(seed, number) if source.seed is None else (source.seed,),
    )


def _padding(
    config: DataConfig,
    corpus: Corpus,
    eos_token_id: int,
    pad_token_id: int,
    max_length: int,
    default: str,
    block_size: int | None,
) -> PaddingRule:
    documents = all(rules.row_format == "text" for source in corpus.sources for rules in source.rules)
    # a text that was cut somewhere must not learn to end there
    kind = config.padding or ("ignore" if documents else default)
    rule = PaddingRule(kind, eos_token_id, pad_token_id, max_length, block_size)
    return rule.in_packs() if config.packing else rule


@dataclass(frozen=True)
class _Survey:
    """One shard, or its first rows: its account, and its candidates for validation."""

    account: Account
    lengths: np.ndarray  # [usable rows]
    numbers: np.ndarray  # [k] usable rows of the shard
    priorities: np.ndarray  # [k]
    candidates: TokenRows  # k rows
    rows: TokenRows | None  # all, where they are to be kept


def _survey(source: TokenizedCorpus, candidates: int, keep: bool, item: tuple[int, int, int | None]) -> _Survey:
    """Surveys `item`: source, shard, and most rows of it."""
    number, shard, most = item
    rows, account = source.read(number, shard)
    count = len(rows) if most is None else min(len(rows), most)
    priority = priorities(count, shard, source.corpus.sources[number].seed)
    numbers = np.sort(np.argsort(priority)[:candidates])
    return _Survey(
        account, rows.lengths[:count], numbers, priority[numbers], rows.take(numbers), rows if keep else None
    )


def _survey_sources(
    corpus: Corpus, look: Callable[[tuple[int, int, int | None]], _Survey], everything: bool, mapper: Mapper
) -> list[list[_Survey]]:
    """[sources][shards] from the first shard of each source on, as many as are wanted."""
    whole = [everything and source.limit is None for source in corpus.sources]
    items = [
        (number, shard, None)
        for number, source in enumerate(corpus.sources)
        if whole[number]
        for shard in range(len(source.shards))
    ]
    surveys: list[list[_Survey]] = [[] for _ in corpus.sources]
    for (number, _, _), survey in zip(items, mapper(look, items), strict=True):
        surveys[number].append(survey)
    for number, source in enumerate(corpus.sources):
        if not whole[number]:
            surveys[number] = _survey_beginning(number, source, look, mapper)
    return surveys


def _survey_beginning(number: int, source: Source, look: Callable, mapper: Mapper) -> list[_Survey]:
    """The shards that hold the source's first `limit` usable rows; without a limit, up to the first that has any."""
    wanted = source.limit or 1
    surveys: list[_Survey] = []
    found = 0
    group = _GROUP if source.limit else 1
    while found < wanted and len(surveys) < len(source.shards):
        shards = range(len(surveys), min(len(surveys) + group, len(source.shards)))
        for survey in mapper(look, [(number, shard, None) for shard in shards]):
            if found >= wanted:
                break
            surveys.append(survey)
            found += survey.account.usable
    if source.limit and found > wanted:
        last = len(surveys) - 1
        surveys[last] = look((number, last, surveys[last].account.usable - (found - wanted)))
    return surveys


def _account(source: Source, surveys: Sequence[_Survey]) -> Account:
    """The source's account.

    Raises:
        DataError: one of its files has no usable row; with a filter, the source has none.
    """
    rules = source.rules[0]
    by_name: dict[str, list[Account]] = {}
    for shard, survey in zip(source.shards, surveys, strict=False):  # a survey may end early
        filtered = rules.where or rules.min_tokens or rules.max_tokens
        by_name.setdefault(source.name if filtered else shard.name, []).append(survey.account)
    for name, accounts in by_name.items():
        _require_usable(_total(accounts), name)
    return _total([survey.account for survey in surveys])


def _hold_out(surveys: Sequence[Sequence[_Survey]], count: int) -> tuple[TokenRows, list[list[np.ndarray]]]:
    """The `count` candidates with the smallest priorities: their tokens, and their numbers in each shard. A source that
    would lose all its rows keeps one to train on."""
    everything = np.concatenate([survey.priorities for own in surveys for survey in own])
    limit = np.sort(everything)[count - 1] if count else -1.0
    for own in surveys:
        chosen = np.concatenate([survey.priorities[survey.priorities <= limit] for survey in own])
        if len(chosen) and len(chosen) == sum(len(survey.lengths) for survey in own):
            for survey in own:
                survey.priorities[survey.priorities == chosen.max()] = np.inf
    rows = [survey.candidates.take(np.flatnonzero(survey.priorities <= limit)) for own in surveys for survey in own]
    return TokenRows.join(rows), [[survey.numbers[survey.priorities <= limit] for survey in own] for own in surveys]


def _feed(
    config: DataConfig,
    tokenized: TokenizedCorpus,
    surveys: Sequence[Sequence[_Survey]],
    held_out: Sequence[Sequence[np.ndarray]],
    at_hand_first: bool,
) -> Feed:
    found = tokenized.corpus.sources
    # a source with a limit ends where its survey did
    shards = [len(own) if source.limit else len(source.shards) for source, own in zip(found, surveys, strict=True)]
    return Feed(
        tokenized=tokenized,
        plans=tuple(
            Plan(
                shard_bytes=tuple(max(shard.size, 1) for shard in source.shards[:count]),
                window_bytes=int(config.shuffle_mb * (1 << 20)),
                seed=source.seed,
                first=len(own) if at_hand_first else 0,
            )
            for source, count, own in zip(found, shards, surveys, strict=True)
        ),
        left_out=tuple(
            {
                shard: np.concatenate([out, np.arange(len(survey.lengths), survey.account.usable)])
                for shard, (survey, out) in enumerate(zip(own, own_out, strict=True))
                if len(out) or len(survey.lengths) < survey.account.usable
            }
            for own, own_out in zip(surveys, held_out, strict=True)
        ),
        pass_times=tuple(map(_pass_time, found, surveys, shards)),
        inflation=tuple(map(_inflation, found, surveys)),
        kept={},
    )


def _kept(feed: Feed, surveys: Sequence[Sequence[_Survey]]) -> dict[tuple[int, int], tuple[TokenRows, Account]]:
    """The surveyed rows, as many as may be held in memory."""
    kept = {}
    room = _KEPT_TOKENS
    for source, own in enumerate(surveys):
        for shard, survey in enumerate(own):
            room -= len(survey.rows.ids)
            if room >= 0:
                kept[source, shard] = feed.training(source, shard, survey.rows), survey.account
    return kept


def _first_rows(source: TokenizedCorpus, count: int) -> tuple[TokenRows, Account]:
    parts: list[TokenRows] = []
    account = Account()
    for shard in range(len(source.corpus.sources[0].shards)):
        rows, part = source.read(0, shard)
        parts.append(rows)
        account = account + part
        if account.usable >= count:
            break
    rows = TokenRows.join(parts)
    return rows.take(np.arange(min(count, len(rows)))), account


def _pass_time(source: Source, surveys: Sequence[_Survey], shards: int) -> float:
    share = source.share
    if share.weight is None:
        return 1.0 / share.repeat
    amount = sum(len(survey.lengths) if share.by == "rows" else int(survey.lengths.sum()) for survey in surveys)
    return (
        amount / _surveyed_bytes(source, surveys) * sum(shard.size for shard in source.shards[:shards]) / share.weight
    )


def _inflation(source: Source, surveys: Sequence[_Survey]) -> float:
    account = _total([survey.account for survey in surveys])
    return (5 * account.tokens + 12 * account.usable) / _surveyed_bytes(source, surveys)


def _surveyed_bytes(source: Source, surveys: Sequence[_Survey]) -> int:
    return max(sum(shard.size for shard in source.shards[: len(surveys)]), 1)


def _fingerprint(corpus: Corpus, accounts: dict[str, Account], surveyed: bool) -> str:
    digests = [account.digest for account in accounts.values()]
    if surveyed:
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    shards = [[shard.name, shard.start, shard.stop, shard.size] for shard in corpus.shards]
    return hashlib.sha256(json.dumps([digests, shards]).encode()).hexdigest()


def _total(accounts: Sequence[Account]) -> Account:
    return sum(accounts[1:], accounts[0])


def _require_usable(account: Account, name: str) -> None:
    if account.usable:
        return
    reasons = ", ".join(f"{reason} ({count})" for reason, count in account.dropped.most_common())
    reason = account.dropped.most_common(1)[0][0] if account.dropped else None
    first = f"; the first: {account.examples[reason]}" if reason else ""
    raise DataError(f"{name}: none of its {account.read} rows can be used: {reasons or 'it holds none'}{first}")
