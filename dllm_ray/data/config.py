"""Settings of the training data."""

from dataclasses import dataclass, field
from typing import Literal

from dllm_ray.errors import ConfigError


@dataclass
class DataConfig:
    """Where conversations come from, and how they become token rows."""

    path: str | list[str] | None = None
    """One source or a list: files (jsonl, json, parquet, csv), globs, folders, a hub data set with an optional slice
    (`name[train:10000]`), or the generated task `builtin:digits[train:40000]`."""
    valid_path: str | list[str] | None = None
    """Source of the validation rows; null holds `valid_rows` rows of `path` out."""
    valid_rows: int = 256
    """Most validation rows; 0 turns validation off."""
    format: Literal["auto", "messages", "prompt_response", "instruction", "question_answer"] = "auto"
    """Columns of a row: `messages`; `prompt`, `response`; `instruction`, `input`, `output`; `question`, `answer`.
    auto: the first of these that the first row has."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other column names, e.g. `{prompt: query, response: completion}`."""
    loss_on: Literal["last_answer", "all_answers"] = "last_answer"
    """Which of an assistant's turns carry loss and get masked."""
    truncation: Literal["right", "filter"] = "right"
    """Rows over `train.max_length`: cut at the end, or dropped. A row whose prompt fills it is always dropped."""
    padding: Literal["eos", "ignore"] | None = None
    """eos: rows are filled with end-of-text tokens that are attended and carry loss, so that the model learns to stop
    (LLaDA, arXiv 2502.09992); ignore: with padding that is neither seen nor trained. null: as the model's family does,
    eos for most."""
    shuffle_window: int = 10_000
    """Rows shuffled together; files and their parts are visited in shuffled order beyond that."""

    def __post_init__(self):
        if self.valid_rows < 0:
            raise ConfigError(f"must not be negative, got {self.valid_rows}", "valid_rows")
        if self.shuffle_window < 1:
            raise ConfigError(f"must be at least 1, got {self.shuffle_window}", "shuffle_window")
        if self.path is not None and not self.path:
            raise ConfigError("name at least one source", "path")
