"""Raw rows -> token rows with labels, and an account of the rows that could not be used.

Pure functions over one shard, so that the driver, a Ray Data task and a test run the same code.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from dllm_ray import chat
from dllm_ray.data.formats import RowError, to_messages
from dllm_ray.data.sources import Shard, snippet
from dllm_ray.errors import DataError
from dllm_ray.models.spec import IGNORE_INDEX

_CHUNK = 1_000  # conversations the tokenizer sees at once


@dataclass(frozen=True)
class RowRules:
    """How a conversation becomes a token row."""

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


@dataclass
class TokenRows:
    """Token rows of different lengths in flat arrays."""

    ids: np.ndarray
    """[total] int32, the rows' tokens one after the other."""
    labels: np.ndarray
    """[total] int32, -100 where there is no loss."""
    lengths: np.ndarray
    """[rows] int32."""

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: np.ndarray) -> "TokenRows":
        """The rows with these numbers, in this order."""
        lengths = self.lengths[rows]
        starts = (np.cumsum(self.lengths) - self.lengths)[rows]
        # index of every token: its row's start, plus its place in the row
        place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        where = np.repeat(starts, lengths) + place
        return TokenRows(self.ids[where], self.labels[where], lengths)

    @classmethod
    def join(cls, parts: Sequence["TokenRows"]) -> "TokenRows":
        """The rows of all parts, in order."""
        empty = np.zeros(0, dtype=np.int32)
        return cls(
            np.concatenate([empty, *(part.ids for part in parts)]),
            np.concatenate([empty, *(part.labels for part in parts)]),
            np.concatenate([empty, *(part.lengths for part in parts)]),
        )

    @classmethod
    def of(cls, rows: Sequence[tuple[list[int], list[int]]]) -> "TokenRows":
        """Rows given as (ids, labels)."""
        flat_ids = [token for ids, _ in rows for token in ids]
        flat_labels = [label for _, labels in rows for label in labels]
        return cls(
            np.array(flat_ids, dtype=np.int32),
            np.array(flat_labels, dtype=np.int32),
            np.array([len(ids) for ids, _ in rows], dtype=np.int32),
        )


@dataclass
class Account:
    """What became of the rows of a shard, or of a whole source."""

    read: int = 0
    """Rows read."""
    usable: int = 0
    """Rows that became token rows."""
    truncated: int = 0
    """Usable rows that were cut at `max_length`."""
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
        stop_token_ids: end-of-text tokens; a row whose template ends its answers with none of them gets the first.
        rules: how conversations become rows.

    Raises:
        DataError: the shard can't be read or parsed.
    """
    account = Account()
    hasher = hashlib.sha256()
    parts = []
    rows_left = iter(shard.read())
    while chunk := list(islice(rows_left, _CHUNK)):
        rendered: list[tuple[list[tuple[str, bool]], list[bool]]] = []
        origins = []
        for number, row in chunk:
            account.read += 1
            try:
                rendered.append(_render(row, tokenizer, rules))
                origins.append((number, row))
            except RowError as error:
                _drop(account, str(error), shard, number, row)
        encoded = chat.encode_pieces(tokenizer, [pieces for pieces, _ in rendered])
        kept = []
        for row, (_, supervised), (number, raw) in zip(encoded, rendered, origins, strict=True):
            try:
                ids, labels = _label(row, supervised, stop_token_ids, rules)
            except RowError as error:
                _drop(account, str(error), shard, number, raw)
                continue
            account.truncated += len(ids) > rules.max_length
            kept.append((ids[: rules.max_length], labels[: rules.max_length]))
        rows = TokenRows.of(kept)
        hasher.update(rows.ids.tobytes() + rows.labels.tobytes() + rows.lengths.tobytes())
        account.usable += len(rows)
        account.tokens += len(rows.ids)
        account.targets += int((rows.labels != IGNORE_INDEX).sum())
        parts.append(rows)
    account.digest = hasher.hexdigest()
    return TokenRows.join(parts), account


def texts(shards: Sequence[Shard], rules: Sequence[RowRules], limit: int) -> Iterator[str]:
    """The messages of the first `limit` usable rows, to train a tokenizer on; `rules` has one entry for each shard."""
    seen = 0
    for shard, rule in zip(shards, rules, strict=True):
        for _, row in shard.read():
            if seen == limit:
                return
            try:
                messages = to_messages(row, rule.row_format, rule.columns)
            except RowError:
                continue
            seen += 1
            yield from (message["content"] for message in messages)


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
    row: chat.Encoded, supervised: list[bool], stop_token_ids: Sequence[int], rules: RowRules
) -> tuple[list[int], list[int]]:
    ids = list(row.ids)
    spans = [span for span, carries_loss in zip(row.answers, supervised, strict=True) if carries_loss]
    last_start, last_stop = row.answers[-1]
    if not set(ids[last_start:last_stop]) & set(stop_token_ids):
        ids.append(stop_token_ids[0])
        spans = [(start, stop + 1 if stop == last_stop else stop) for start, stop in spans]
    if len(ids) > rules.max_length and rules.truncation == "filter":
        raise RowError("longer than max_length")
    if spans[0][0] >= rules.max_length:
        raise RowError("prompt longer than max_length")
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return ids, labels


def _drop(account: Account, reason: str, shard: Shard, number: int, row: dict) -> None:
    account.dropped[reason] += 1
    if reason not in account.examples:
        account.examples[reason] = f"{shard.where(number)}: {snippet(row)}"
