"""Tokenized shards on disk are what tokenizing gives, are found only by what they were made of, and may be damaged."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from dllm_ray.data import cache as caches
from dllm_ray.data import sources
from dllm_ray.data.cache import Cache, fingerprint
from dllm_ray.data.compact import from_arrays, to_arrays
from dllm_ray.data.tokenize import RowRules, TokenRows, tokenize_shard
from dllm_ray.errors import DataError
from dllm_ray.models.tokenizers import train_bpe

RULES = RowRules("prompt_response", {}, "last_answer", "right", 64)


@pytest.fixture
def shard(write_jsonl):
    rows = [{"prompt": f"{n}", "response": "a" * (n % 3)} for n in range(20)]
    (found,) = sources.resolve(str(write_jsonl(rows)))
    return found


@pytest.fixture
def tokenize(shard, tokenizer):
    """Tokenizes the shard, and counts how often."""

    def run():
        run.calls += 1
        return tokenize_shard(shard, tokenizer, [tokenizer.eos_token_id], RULES)

    run.calls = 0
    return run


@pytest.fixture
def cache(tmp_path, tokenizer) -> Cache:
    return Cache(str(tmp_path / "cache" / "deep"), fingerprint(tokenizer, [1]))


def assert_equal(one, other):
    (rows, account), (other_rows, other_account) = one, other
    assert account == other_account
    for field in dataclasses.fields(TokenRows):
        values = getattr(rows, field.name)
        assert np.array_equal(values, getattr(other_rows, field.name))
        assert values.dtype == np.int32


def files(cache: Cache) -> list[Path]:
    return sorted(Path(cache.folder).iterdir())


def test_compact_rows_are_the_rows(tokenize):
    rows, account = tokenize()
    assert_equal((from_arrays(to_arrays(rows)), account), (rows, account))


def test_the_second_time_nothing_is_tokenized(cache, shard, tokenize):
    first, second = cache.get(shard, RULES, tokenize), cache.get(shard, RULES, tokenize)
    assert tokenize.calls == 1
    assert_equal(first, second)
    assert first[1].dropped == {"empty answer": 7}
    assert [path.suffix for path in files(cache)] == [".npz"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_made_again(cache, shard, tokenize, damage):
    first = cache.get(shard, RULES, tokenize)
    (path,) = files(cache)
    content = path.read_bytes()
    middle = content.index(first[0].ids.tobytes())  # members are not compressed
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": flipped, "empty": b""}[damage])
    assert_equal(cache.get(shard, RULES, tokenize), first)
    assert tokenize.calls == 2
    assert_equal(cache.get(shard, RULES, tokenize), first)
    assert tokenize.calls == 2


def test_whatever_decides_the_tokens_decides_the_file(cache, shard, tokenize, tokenizer, monkeypatch):
    cache.get(shard, RULES, tokenize)
    cache.get(shard, dataclasses.replace(RULES, max_length=9), tokenize)
    cache.get(dataclasses.replace(shard, stop=shard.stop - 1), RULES, tokenize)
    dataclasses.replace(cache, tokenizer="another").get(shard, RULES, tokenize)
    os.utime(shard.name, (1, 1))
    cache.get(shard, RULES, tokenize)
    monkeypatch.setattr(caches, "_VERSION", 0)
    cache.get(shard, RULES, tokenize)
    assert tokenize.calls == len(files(cache)) == 6


def test_a_tokenizers_fingerprint_tells_of_its_vocabulary_template_and_stop_tokens(tokenizer):
    other = train_bpe(["another text"] * 4, 280)
    again = train_bpe(["another text"] * 4, 280)
    assert fingerprint(other, [1]) == fingerprint(again, [1]) != fingerprint(tokenizer, [1])
    assert fingerprint(other, [1]) != fingerprint(other, [2])
    again.chat_template = "{{ messages }}"
    assert fingerprint(other, [1]) != fingerprint(again, [1])
    other(["a", "b c"], padding=True, truncation=True, max_length=4)
    again.chat_template = other.chat_template
    assert fingerprint(other, [1]) == fingerprint(again, [1])


def test_a_folder_that_cannot_be_written_is_named(tmp_path, shard, tokenize):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*file/.*npz can't be written"):
        Cache(str(tmp_path / "file"), "x").get(shard, RULES, tokenize)


def test_any_file_system_will_do(shard, tokenize):
    cache = Cache("memory://tokenized", "x")
    first, second = cache.get(shard, RULES, tokenize), cache.get(shard, RULES, tokenize)
    assert tokenize.calls == 1
    assert_equal(first, second)


def test_a_survey_fills_it_and_training_reads_it(shard, tmp_path, prepare_data, monkeypatch):
    folder = tmp_path / "cache"
    one = prepare_data(shard.name, cache_dir=str(folder), valid_rows=2)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr("dllm_ray.data.feed.tokenize_shard", None)
    two = prepare_data(shard.name, cache_dir=str(folder), valid_rows=2)
    assert one.fingerprint == two.fingerprint
    feed = dataclasses.replace(two.feed, kept={})
    assert feed.read(0, next(feed.plans[0].windows())).ids.tolist() == one.feed.kept[0, 0][0].ids.tolist()
