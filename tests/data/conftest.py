"""Fixtures of the data tests: files and prepared data made on the spot."""

import json
from pathlib import Path

import pytest

from dllm_ray.data.config import DataConfig
from dllm_ray.data.prepare import Prepared, prepare, resolve


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
    """Everything from settings to `Prepared`: `prepare_data("rows.jsonl", seed=1, shuffle_window=8)`."""

    def run(path, seed: int = 0, max_length: int = 64, mapper=map, tokenizer=tokenizer, **settings) -> Prepared:
        config = DataConfig(path=path, **settings)
        corpus = resolve(config, path, max_length)
        valid_corpus = resolve(config, config.valid_path, max_length) if config.valid_path else None
        stop, pad = [tokenizer.eos_token_id], tokenizer.pad_token_id
        return prepare(config, corpus, valid_corpus, tokenizer, stop, pad, seed, mapper)

    return run
