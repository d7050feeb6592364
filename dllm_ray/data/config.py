"""Settings of the training data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dllm_ray.errors import ConfigError

RowFormat = Literal["auto", "messages", "prompt_response", "instruction", "question_answer", "text"]
LossOn = Literal["last_answer", "all_answers"]


@dataclass
class FilterConfig:
    """Which rows of a source are used."""

    min_tokens: int = 0
    """Fewest tokens, prompt and answer together."""
    max_tokens: int | None = None
    """Most tokens, before the row is cut at `train.max_length`."""
    where: dict[str, Any] = field(default_factory=dict)
    """Column of the raw row -> the value it must have, or a list of allowed values."""

    def __post_init__(self):
        if self.min_tokens < 0:
            raise ConfigError(f"must not be negative, got {self.min_tokens}", "min_tokens")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            raise ConfigError(f"must be at least min_tokens and 1, got {self.max_tokens}", "max_tokens")
        self.where = {
            column: list(wanted) if isinstance(wanted, list | tuple) else [wanted]
            for column, wanted in self.where.items()
        }


@dataclass
class SourceConfig:
    """One source of a mixture."""

    path: str | list[str]
    """Its files, as in `data.path`."""
    name: str | None = None
    """What reports call it; null: its path."""
    weight: float | None = None
    """Its share of the training rows or tokens (`data.weight_by`), relative to the other sources' weights. All sources
    have one or none has; without weights each gives all it has, spread evenly over the epoch."""
    rows: int | None = None
    """Only its first so many usable rows; null: all."""
    repeat: float = 1.0
    """Passes over it in an epoch. With weights: the most passes; the epoch ends where a source has given them."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Which of its rows are used."""
    seed: int | None = None
    """Decides the order of its rows; null: follows from the job's seed."""
    format: RowFormat | None = None
    """As `data.format`; null: the same."""
    columns: dict[str, str] | None = None
    """As `data.columns`; null: the same."""
    loss_on: LossOn | None = None
    """As `data.loss_on`; null: the same."""

    def __post_init__(self):
        if not self.path:
            raise ConfigError("name at least one file, folder or data set", "path")
        for name in ("weight", "repeat"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"must be above 0, got {value}", name)
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"must be at least 1, got {self.rows}", "rows")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"must not be negative, got {self.seed}", "seed")

    @property
    def label(self) -> str:
        """What reports call the source."""
        return self.name or (self.path if isinstance(self.path, str) else ", ".join(self.path))


@dataclass
class DataConfig:
    """Where conversations or documents come from, and how they become token rows and batches."""

    path: str | list[str] | None = None
    """One source or a list: files (jsonl, json, parquet, csv, txt), globs, folders, a hub data set with an optional
    slice (`name[train:10000]`), or a generated task such as `builtin:digits[train:40000]`
    (`dllm_ray.data.builtin`)."""
    sources: list[SourceConfig] | None = None
    """A mixture, in place of `path`: sources with weights, repeats and filters."""
    weight_by: Literal["rows", "tokens"] = "tokens"
    """What the sources' weights share out."""
    valid_path: str | list[str] | None = None
    """Source of the validation rows; null holds `valid_rows` rows of the training data out."""
    valid_rows: int = 256
    """Most validation rows; 0 turns validation off."""
    format: RowFormat = "auto"
    """Columns of a row: `messages`; `prompt`, `response`; `instruction`, `input`, `output`; `question`, `answer`; or
    `text`, a document without turns. auto: the first of the conversations that the first row has."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other column names, e.g. `{prompt: query, response: completion}`."""
    loss_on: LossOn = "last_answer"
    """Which of an assistant's turns carry loss and get masked."""
    truncation: Literal["right", "filter"] = "right"
    """Rows over `train.max_length`: cut at the end, or dropped. A row whose prompt fills it is always dropped."""
    padding: Literal["eos", "ignore", "block", "eos_block"] | None = None
    """eos: rows are filled with end-of-text tokens that are attended and carry loss, so that the model learns to stop
    (LLaDA, arXiv 2502.09992); ignore: with padding that is neither seen nor trained; block: end-of-text up to a whole
    number of blocks (`objective.block_size`), the rest ignored; eos_block: end-of-text past the longest row, in whole
    blocks, but ignored in rows that were cut. null: as the model's family does, eos for most; ignore for documents."""
    packing: bool = False
    """Several samples in one row of `train.max_length` tokens, each attending to itself only; `train.batch_size` counts
    such rows. Padding is then `block` or `ignore`."""
    max_tokens_per_batch: int | None = None
    """Batches of rows of similar lengths that hold at most so many tokens, padding included, over all workers; in place
    of a fixed `train.batch_size`."""
    document_eos: bool = True
    """Documents end with an end-of-text token."""
    drop_tail: bool = False
    """Documents: the last tokens of a file's part, too few for a row of `train.max_length`, are dropped, not kept as a
    shorter row."""
    random_length: float = 0.0
    """Documents: share of rows that are cut to a random length (0.01 in LLaDA, arXiv 2502.09992)."""
    shuffle_mb: float = 16.0
    """Megabytes of a source whose rows are shuffled together; its files and their parts are visited in shuffled order
    beyond that."""
    cache_dir: str | None = None
    """Folder or URL, reachable from all nodes, where tokenized rows are kept for later passes and runs."""

    def __post_init__(self):
        if self.path is not None and self.sources is not None:
            raise ConfigError("give either data.path or data.sources, not both", "sources")
        if self.path is not None and not self.path:
            raise ConfigError("name at least one source", "path")
        if self.sources is not None:
            _check_sources(self.sources)
        if self.valid_rows < 0:
            raise ConfigError(f"must not be negative, got {self.valid_rows}", "valid_rows")
        if not 0 < self.shuffle_mb < float("inf"):
            raise ConfigError(f"must be above 0, got {self.shuffle_mb}", "shuffle_mb")
        if not 0 <= self.random_length <= 1:
            raise ConfigError(f"is a share of the rows, between 0 and 1; got {self.random_length}", "random_length")
        if self.max_tokens_per_batch is not None:
            if self.max_tokens_per_batch < 1:
                raise ConfigError(f"must be at least 1, got {self.max_tokens_per_batch}", "max_tokens_per_batch")
            if self.packing:
                raise ConfigError("packed rows are all of one length: choose packing or this", "max_tokens_per_batch")
        if self.packing and self.padding not in (None, "ignore", "block"):
            raise ConfigError(f"packed samples take ignore or block, got {self.padding}", "padding")

    @property
    def named(self) -> bool:
        """Whether the settings name training data at all."""
        return self.path is not None or self.sources is not None

    def mixture(self) -> list[SourceConfig]:
        """The training sources, whichever way they are given."""
        if self.sources is not None:
            return self.sources
        return [SourceConfig(path) for path in ([self.path] if isinstance(self.path, str) else self.path or [])]


def _check_sources(sources: Sequence[SourceConfig]) -> None:
    if not sources:
        raise ConfigError("name at least one source", "sources")
    without = [source.label for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise ConfigError(f"give all sources a weight or none; {without[0]} has none", "sources")
    labels = [source.label for source in sources]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"two sources are called {twice}: give each a name of its own", "sources")
