"""Rows as token ids: what can't be used is named before anything is answered."""

import pytest

from dllm_ray.chat import encode_prompt
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.infilling import encode_gaps
from dllm_ray.prompts import encode_rows, encode_texts, require_room
from dllm_ray.sampling.config import SamplerConfig

CONFIG = SamplerConfig(max_new_tokens=8, block_size=4, steps=4)


def test_rows_become_conversations_and_their_tokens(tokenizer):
    talk = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]
    rows = [{"query": "sort 21"}, {"messages": talk}, {"instruction": "sort", "input": "21"}]
    conversations, prompts = encode_rows([(str, row) for row in rows], tokenizer, {"prompt": "query"})
    assert [messages[-1]["content"] for messages in conversations] == ["sort 21", "sort 21", "sort\n\n21"]
    assert [list(prompt) for prompt in prompts] == [encode_prompt(tokenizer, messages) for messages in conversations]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "sort 21"}, "here: no messages, prompt, instruction or question"),
        ({"question": 5}, "here: question is not text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "here: the chat template refuses the conversation"),
    ],
)
def test_rows_that_can_not_be_answered_are_named(tokenizer, row, complaint):
    good = {"prompt": "sort 21"}
    with pytest.raises(DataError, match=f"^{complaint}"):
        encode_rows([(lambda: "there", good), (lambda: "here", row)], tokenizer, {})


def test_texts_with_gaps_become_tokens(tokenizer):
    text = "sort [MASK:3] fox"
    assert encode_texts([(str, {"text": text})], tokenizer, 4, {})[0] == [text]
    [prompt] = encode_texts([(str, {"text": text})], tokenizer, 4, {})[1]
    assert list(prompt) == encode_gaps(tokenizer, 4, text)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "no gap"}, "here: text has no gap"),
        ({"infill": None}, "here: no infill"),
        ({"text": 5}, "here: text is not text"),
        ({"text": "[MASK:0]"}, r"here: .*a gap has between 1 and"),
        ({"text": "\ud800 [MASK]"}, "here: text is not valid Unicode"),
    ],
)
def test_texts_that_can_not_be_filled_in_are_named(tokenizer, row, complaint):
    with pytest.raises(DataError, match=complaint):
        encode_texts([(lambda: "here", row)], tokenizer, 4, {})


def test_texts_need_their_column_and_a_mask_token(tokenizer):
    with pytest.raises(ConfigError, match="columns: 'prompt' is no column of texts"):
        encode_texts([], tokenizer, 4, {"prompt": "q"})
    with pytest.raises(ConfigError, match="infill: this model has no mask token"):
        encode_texts([], tokenizer, None, {})
    texts, _ = encode_texts([(str, {"story": "a [MASK]", "text": "-"})], tokenizer, 4, {"infill": "story"})
    assert texts == ["a [MASK]"]


def test_prompts_that_leave_no_room_are_refused():
    require_room([[1] * 8, [1] * 56], CONFIG, 64)
    require_room([[1] * 999], CONFIG, None)
    with pytest.raises(DataError, match=r"^prompt 2 has 57 tokens: with 8 of an answer"):
        require_room([[1] * 8, [1] * 57], CONFIG, 64)
    require_room([[1] * 64], CONFIG, 64, infill=True)
    with pytest.raises(DataError, match=r"^prompt 1 has 65 tokens: it doesn't fit .* Shorten it or its gaps"):
        require_room([[1] * 65], CONFIG, 64, infill=True)
