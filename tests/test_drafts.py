"""Rows with drafts of answers -> token ids."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dllm_ray import chat
from dllm_ray.answers import ended_by_stop
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.models.families.bert import FAMILIES
from dllm_ray.prompts import encode_drafts, require_room
from dllm_ray.sampling.config import SamplerConfig

BERT = FAMILIES[0]
HEADS = {"time": False, "reads": None}


@pytest.fixture
def spec(make_lm):
    return replace(make_lm().spec, edit_heads=HEADS)


def encoded(rows, tokenizer, spec, columns=()):
    named = [(lambda number=number: f"row {number}", row) for number, row in enumerate(rows)]
    return encode_drafts(named, tokenizer, spec, dict(columns))


def test_a_draft_has_the_tokens_of_an_answer_in_a_conversation(tokenizer, spec):
    rows = [{"prompt": "sort 321", "draft": "1 2 <|endoftext|> 3"}, {"prompt": "sort 21", "draft": ""}]
    conversations, prompts, drafts = encoded(rows, tokenizer, spec)
    for row, messages, prompt, draft in zip(rows, conversations, prompts, drafts, strict=True):
        assert messages == [{"role": "user", "content": row["prompt"]}]
        whole = chat.encode(tokenizer, [*messages, {"role": "assistant", "content": row["draft"]}])
        ((start, _),) = whole.answers
        assert whole.ids[:start] == list(prompt)
        assert whole.ids[start:] == [*draft, spec.eos_token_id]  # and what ends it is left out
        assert chat.decode(tokenizer, draft) == row["draft"]


def test_a_text_that_ends_answers_is_left_out_too(tokenizer, spec):
    before = tokenizer.chat_template
    tokenizer.chat_template = BERT.chat_template
    try:
        *_, (draft,) = encoded([{"prompt": "a", "draft": "12"}], tokenizer, replace(spec, eot_text=BERT.eot_text))
    finally:
        tokenizer.chat_template = before
    assert tokenizer.decode(list(draft)) == "12"


def test_the_column_may_be_called_otherwise(tokenizer, spec):
    rows = [{"query": "sort 321", "guess": "12"}]
    _, _, (draft,) = encoded(rows, tokenizer, spec, {"prompt": "query", "draft": "guess"})
    assert chat.decode(tokenizer, draft) == "12"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "row 1: no draft, which is to be revised: "),
        ({"prompt": "a", "draft": 12}, "row 1: draft is not text: "),
        ({"prompt": "a", "draft": "\ud800"}, "row 1: draft is not valid Unicode"),
        ({"draft": "12"}, "row 1: no messages, prompt, instruction or question"),
    ],
)
def test_a_row_without_a_draft_is_named(tokenizer, spec, row, said):
    with pytest.raises(DataError) as caught:
        encoded([{"prompt": "b", "draft": ""}, row], tokenizer, spec)
    assert str(caught.value).startswith(said)


def test_a_model_without_edit_heads_is_refused(tokenizer, make_lm):
    with pytest.raises(ConfigError, match=r"^edit: the model has no edit heads"):
        encoded([{"prompt": "a", "draft": ""}], tokenizer, make_lm().spec)


def test_prompt_and_draft_have_to_fit_the_context():
    config = SamplerConfig(max_new_tokens=8)
    require_room([[1] * 20], config, 64, drafts=[[1] * 44])
    with pytest.raises(DataError, match=r"^prompt 2 has 20 tokens and its draft 45: they don't fit .* of 64"):
        require_room([[1], [1] * 20], config, 64, drafts=[[1], [1] * 45])
    with pytest.raises(DataError, match="with 8 of an answer it doesn't fit"):
        require_room([[1] * 60], config, 64, drafts=[[1]])


def test_an_answer_has_ended_also_where_its_prompt_was_edited():
    output = SimpleNamespace(sequences=[[20, 5, 6], [20, 5, 9, 7]], completions=[[5, 6], [5]])
    assert ended_by_stop([[20, 21]] * 2, output, [9]) == [False, True]
