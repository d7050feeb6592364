"""Fixtures of the data tests: files and prepared data made on the spot."""

import json
from pathlib import Path

import pytest

from dllm_ray.data.config import DataConfig
from dllm_ray.data.prepare import Prepared, prepare, resolve, resolve_valid


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows into a jsonl file of the test's own folder: `write_jsonl(rows, "train.jsonl")`."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def prepare_data(tokenizer):
    """Everything from settings to `Prepared`: `prepare_data("rows.jsonl", seed=1, shuffle_mb=0.01)`."""

    def run(
        path=None,
        seed: int = 0,
        max_length: int = 64,
        batch_size: int = 16,
        max_steps: int | None = None,
        mapper=map,
        tokenizer=tokenizer,
        **settings,
    ) -> Prepared:
        config = DataConfig(path=path, **settings)
        return prepare(
            config,
            resolve(config, max_length, seed),
            resolve_valid(config, max_length, seed),
            tokenizer,
            [tokenizer.eos_token_id],
            tokenizer.pad_token_id,
            seed,
            batch_size=batch_size,
            max_length=max_length,
            max_steps=max_steps,
            block_size=4,
            mapper=mapper,
        )

    return run
