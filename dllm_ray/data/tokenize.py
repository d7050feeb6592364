"""Raw rows -> token rows with labels, and an account of the rows that could not be used.

Pure functions over one shard, so that the driver, a Ray Data task and a test run the same code.
"""

import dataclasses
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from dllm_ray import chat
from dllm_ray.data import documents
from dllm_ray.data.formats import RowError, to_messages, to_text
from dllm_ray.data.sources import GOES_ON, Shard, snippet
from dllm_ray.errors import DataError
from dllm_ray.models.spec import IGNORE_INDEX

_CHUNK = 1_000  # conversations the tokenizer sees at once
_PIECES = 16  # pieces of documents it sees at once; they may be long


@dataclass(frozen=True)
class RowRules:
    """How raw rows become token rows."""

    row_format: str
    """A format of `dllm_ray.data.formats`, never `auto`."""
    columns: dict[str, str]
    """Our column name -> the source's."""
    loss_on: str
    """`last_answer` or `all_answers`."""
    truncation: str
    """`right` or `filter`."""
    max_length: int
    """Most tokens in a row."""
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Column of the raw row -> the values it may have."""
    min_tokens: int = 0
    """Fewest tokens of a conversation or document."""
    max_tokens: int | None = None
    """Most tokens of a conversation or document, before it is cut at `max_length`."""
    document_eos: bool = True
    """Documents end with an end-of-text token."""
    drop_tail: bool = False
    """Documents: the last tokens of a shard, too few for a row, are dropped."""
    random_length: float = 0.0
    """Documents: share of rows that are cut at a random length."""
    seed: int = 0
    """Documents: decides which rows are cut, and where."""


@dataclass
class TokenRows:
    """Token rows of different lengths in flat arrays, each with where it comes from."""

    ids: np.ndarray
    """[total] int32, the rows' tokens one after the other."""
    labels: np.ndarray
    """[total] int32, -100 where there is no loss."""
    lengths: np.ndarray
    """[rows] int32."""
    numbers: np.ndarray | None = None
    """[rows] int32, the raw row a row was made of (`Shard.where` names it); None: 0, 1, 2, ..."""
    shards: np.ndarray | None = None
    """[rows] int32, the shard it lies in, as a number in its source's list; None: all in shard 0."""

    def __post_init__(self):
        if self.numbers is None:
            self.numbers = np.arange(len(self.lengths), dtype=np.int32)
        if self.shards is None:
            self.shards = np.zeros(len(self.lengths), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: np.ndarray) -> "TokenRows":
        """The rows with these numbers, in this order."""
        lengths = self.lengths[rows]
        starts = (np.cumsum(self.lengths) - self.lengths)[rows]
        # index of every token: its row's start, plus its place in the row
        place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        where = np.repeat(starts, lengths) + place
        return TokenRows(self.ids[where], self.labels[where], lengths, self.numbers[rows], self.shards[rows])

    def in_shard(self, shard: int) -> "TokenRows":
        """The same rows as rows of the shard with this number."""
        return dataclasses.replace(self, shards=np.full(len(self), shard, dtype=np.int32))

    @classmethod
    def join(cls, parts: Sequence["TokenRows"]) -> "TokenRows":
        """The rows of all parts, in order."""
        empty = np.zeros(0, dtype=np.int32)
        return cls(
            **{
                item.name: np.concatenate([empty, *(getattr(part, item.name) for part in parts)])
                for item in dataclasses.fields(cls)
            }
        )

    @classmethod
    def of(cls, rows: Sequence[tuple[list[int], list[int]]]) -> "TokenRows":
        """Rows given as (ids, labels)."""
        return cls(
            np.array([token for ids, _ in rows for token in ids], dtype=np.int32),
            np.array([label for _, labels in rows for label in labels], dtype=np.int32),
            np.array([len(ids) for ids, _ in rows], dtype=np.int32),
        )


@dataclass
class Account:
    """What became of the rows of a shard, or of a whole source."""

    read: int = 0
    """Rows read."""
    usable: int = 0
    """Token rows they became. Conversations make one each; documents make as many as their tokens fill."""
    truncated: int = 0
    """Conversations that were cut at `max_length`."""
    tokens: int = 0
    """Tokens in usable rows."""
    targets: int = 0
    """Of these, tokens that carry loss."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows that could not be used for it."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> origin and text of the first such row."""
    digest: str = ""
    """SHA-256 over the usable rows' tokens and labels."""

    def __add__(self, other: "Account") -> "Account":
        return Account(
            read=self.read + other.read,
            usable=self.usable + other.usable,
            truncated=self.truncated + other.truncated,
            tokens=self.tokens + other.tokens,
            targets=self.targets + other.targets,
            dropped=self.dropped + other.dropped,
            examples=other.examples | self.examples,
            digest=hashlib.sha256((self.digest + other.digest).encode()).hexdigest(),
        )


def tokenize_shard(
    shard: Shard, tokenizer, stop_token_ids: Sequence[int], rules: RowRules
) -> tuple[TokenRows, Account]:
    """The usable rows of a shard, in order, and what became of the others.

    Args:
        shard: what to read.
        tokenizer: prepared (`dllm_ray.models.tokenizers.prepare`).
        stop_token_ids: end-of-text tokens; a conversation whose template ends its answers with none of them gets the
            first, and so does a document.
        rules: how raw rows become token rows.

    Raises:
        DataError: the shard can't be read or parsed.
    """
    account = Account()
    tokenize = _documents if rules.row_format == "text" else _conversations
    rows = tokenize(shard, tokenizer, tuple(stop_token_ids), rules, account)
    account.usable = len(rows)
    account.tokens = len(rows.ids)
    account.targets = int((rows.labels != IGNORE_INDEX).sum())
    hasher = hashlib.sha256()
    for array in (rows.ids, rows.labels, rows.lengths):
        hasher.update(array)
    account.digest = hasher.hexdigest()
    return rows, account


def texts(shards: Sequence[Shard], rules: Sequence[RowRules], limit: int) -> Iterator[str]:
    """The messages or documents of the first `limit` usable rows, to train a tokenizer on; `rules` has one entry for
    each shard."""
    seen = 0
    for shard, rule in zip(shards, rules, strict=True):
        for _, row in shard.read():
            if seen == limit:
                return
            try:
                if rule.row_format == "text":
                    found = [to_text(row, rule.columns)]
                else:
                    found = [message["content"] for message in to_messages(row, rule.row_format, rule.columns)]
            except RowError:
                continue
            seen += 1
            yield from found


@dataclass(frozen=True)
class _Labelled:
    """A tokenized conversation."""

    number: int  # of its raw row
    ids: list[int]
    spans: list[tuple[int, int]]  # [start, stop) that carry loss, not overlapping


def _conversations(
    shard: Shard, tokenizer, stop_token_ids: tuple[int, ...], rules: RowRules, account: Account
) -> TokenRows:
    parts = []
    for chunk in _chunks(shard):
        rendered: list[tuple[list[tuple[str, bool]], list[bool]]] = []
        raw = []
        for number, row in chunk:
            account.read += 1
            try:
                _check_where(row, rules)
                rendered.append(_render(row, tokenizer, rules))
                raw.append((number, row))
            except RowError as error:
                _drop(account, str(error), shard, number, row)
        encoded = chat.encode_pieces(tokenizer, [pieces for pieces, _ in rendered])
        kept = []
        for tokens, (_, supervised), (number, row) in zip(encoded, rendered, raw, strict=True):
            try:
                kept.append(_label(number, tokens, supervised, stop_token_ids, rules))
            except RowError as error:
                _drop(account, str(error), shard, number, row)
        account.truncated += sum(len(row.ids) > rules.max_length for row in kept)
        parts.append(_flatten(kept, rules.max_length))
    return TokenRows.join(parts)


def _documents(
    shard: Shard, tokenizer, stop_token_ids: tuple[int, ...], rules: RowRules, account: Account
) -> TokenRows:
    tokens = [np.zeros(0, dtype=np.int32)]
    numbers: list[int] = []
    for chunk in _chunks(shard):
        used = []  # raw row and its pieces
        for number, row in chunk:
            account.read += 1
            try:
                _check_where(row, rules)
                used.append((number, row, list(documents.pieces(to_text(row, rules.columns)))))
            except RowError as error:
                _drop(account, str(error), shard, number, row)
        pieces = [piece for _, _, own in used for piece in own]
        encoded = chain.from_iterable(
            chat.encode_plain_all(tokenizer, pieces[first : first + _PIECES])
            for first in range(0, len(pieces), _PIECES)
        )
        for number, row, own in used:
            ids = list(chain.from_iterable(islice(encoded, len(own))))
            try:
                _check_length(len(ids), rules)
            except RowError as error:
                _drop(account, str(error), shard, number, row)
                continue
            if rules.document_eos and not (shard.kind == "txt" and row[GOES_ON]):
                ids.append(stop_token_ids[0])
            tokens.append(np.array(ids, dtype=np.int32))
            numbers.append(number)
    # not the path: a file that moved is cut as before
    name = zlib.crc32(f"{shard.name.rpartition('/')[2]}:{shard.start}".encode())
    random = np.random.default_rng([rules.seed, name, 0x6C656E677468])
    ends = np.cumsum([len(ids) for ids in tokens])
    lengths = documents.row_lengths(int(ends[-1]), rules.max_length, rules.random_length, rules.drop_tail, random)
    ids = np.concatenate(tokens)[: lengths.sum()]
    if len(ids) < ends[-1]:
        reason = "too few tokens for a row"
        account.dropped[reason] += 1
        account.examples[reason] = f"{shard.where(numbers[-1])}: {ends[-1] - len(ids)} tokens at the end"
    begins_in = np.searchsorted(ends, np.cumsum(lengths) - lengths, side="right") - 1  # the document of a row's start
    return TokenRows(ids, ids, lengths, np.array(numbers, dtype=np.int32)[begins_in])


def _chunks(shard: Shard) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    rows = iter(shard.read())
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _check_where(row: dict, rules: RowRules) -> None:
    for column, values in rules.where.items():
        if row.get(column) not in values:
            raise RowError(f"filtered out by {column}")


def _check_length(length: int, rules: RowRules) -> None:
    if length < rules.min_tokens:
        raise RowError(f"shorter than {rules.min_tokens} tokens")
    if rules.max_tokens is not None and length > rules.max_tokens:
        raise RowError(f"longer than {rules.max_tokens} tokens")


def _render(row: dict, tokenizer, rules: RowRules) -> tuple[list[tuple[str, bool]], list[bool]]:
    """The conversation's pieces up to its last answer, and which of its answers carry loss."""
    messages = to_messages(row, rules.row_format, rules.columns)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    messages = messages[: answers[-1] + 1]  # a question without an answer teaches nothing
    if not messages[-1]["content"].strip():
        raise RowError("empty answer")
    supervised = [messages[index].get("loss_weight", 1.0) > 0 for index in answers]
    if rules.loss_on == "last_answer":
        supervised = [False] * (len(answers) - 1) + supervised[-1:]
    if not any(supervised):
        raise RowError("every answer has loss_weight 0")
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return chat.render(tokenizer, plain), supervised
    except DataError as error:
        raise RowError(str(error)) from None


def _label(
    number: int, row: chat.Encoded, supervised: list[bool], stop_token_ids: tuple[int, ...], rules: RowRules
) -> _Labelled:
    ids = row.ids
    spans = [span for span, carries_loss in zip(row.answers, supervised, strict=True) if carries_loss]
    last_start, last_stop = row.answers[-1]
    if not any(token in stop_token_ids for token in reversed(ids[last_start:last_stop])):
        ids = [*ids, stop_token_ids[0]]
        spans = [(start, stop + 1 if stop == last_stop else stop) for start, stop in spans]
    _check_length(len(ids), rules)
    if len(ids) > rules.max_length and rules.truncation == "filter":
        raise RowError("longer than max_length")
    if spans[0][0] >= rules.max_length:
        raise RowError("prompt longer than max_length")
    return _Labelled(number, ids, spans)


def _flatten(rows: Sequence[_Labelled], max_length: int) -> TokenRows:
    """The rows, cut at `max_length`."""
    lengths = np.array([min(len(row.ids), max_length) for row in rows], dtype=np.int32)
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(islice(row.ids, max_length) for row in rows), dtype=np.int32, count=total)
    edges = np.zeros(total + 1, dtype=np.int8)  # +1 where a supervised span begins, -1 where it ends
    starts = np.cumsum(lengths) - lengths
    spans = [
        (start + first, start + min(last, max_length))
        for row, start in zip(rows, starts.tolist(), strict=True)
        for first, last in row.spans
        if first < max_length
    ]
    firsts, lasts = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    np.add.at(edges, firsts, 1)
    np.add.at(edges, lasts, -1)
    labels = np.where(np.cumsum(edges[:-1], dtype=np.int8) > 0, ids, np.int32(IGNORE_INDEX))
    return TokenRows(ids, labels, lengths, np.array([row.number for row in rows], dtype=np.int32))


def _drop(account: Account, reason: str, shard: Shard, number: int, row: dict) -> None:
    account.dropped[reason] += 1
    if reason not in account.examples:
        account.examples[reason] = f"{shard.where(number)}: {snippet(row)}"
