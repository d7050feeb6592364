"""Looks at a model while it trains: sample texts and scores. `tests/jobs` runs them beside a training."""

import numpy as np
import pytest

from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.training.observe import Look, look_at, sample_texts

SHORT = SamplerConfig(max_new_tokens=8, block_size=8, steps=2)


def test_sample_texts_take_the_first_questions_that_leave_room(make_lm, tokenizer):
    lm = make_lm()  # a context of 64
    nine, answer = tokenizer("9")["input_ids"], tokenizer("12")["input_ids"]
    rows = []
    for length in (4, 60, 5, 6):
        question = nine * length
        rows.append((question + answer, [IGNORE_INDEX] * length + answer))
    texts = sample_texts(lm, TokenRows.of(rows), 2, SHORT)
    assert [text["prompt"] for text in texts] == ["9999", "99999"]
    assert [text["expected"] for text in texts] == ["12", "12"]
    with pytest.raises(ConfigError, match="no validation prompt leaves room"):
        sample_texts(lm, TokenRows.of(rows).take(np.array([1])), 2, SHORT)


def test_a_document_is_continued_from_its_middle(make_lm, tokenizer):
    ids = tokenizer("12345678")["input_ids"]
    [text] = sample_texts(make_lm(), TokenRows.of([(ids, ids)]), 1, SHORT)
    assert (text["prompt"], text["expected"]) == ("1234", "5678")


def look(rows: TokenRows, **changes) -> Look:
    values = {"sample_rows": 1, "evaluation": None, "sampler": SHORT, "seed": 0} | changes
    return Look(model=ModelConfig(), rows=rows, **values)


def test_a_look_scores_the_tasks_and_says_what_it_could_not_do(make_lm, tokenizer):
    ids = tokenizer("12345678")["input_ids"]
    rows = TokenRows.of([(ids, ids)])
    lm = make_lm()
    seen = look_at(lm, look(rows, evaluation=EvaluateConfig(tasks=("digits",), limit=3, chat_template=False)), step=7)
    assert seen.step == 7 and len(seen.samples) == 1
    assert 0 <= seen.metrics["eval/digits/exact_match"] <= 1
    assert seen.problems == []

    long = SamplerConfig(max_new_tokens=80, block_size=8, steps=10)
    seen = look_at(lm, look(rows, sampler=long))
    assert seen.samples == [] and "no sample texts: sampler.max_new_tokens" in seen.problems[0]
