"""Conversations as tokens: prompts are prefixes, answers are marked, and text stays text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.chat import (
    decode,
    encode,
    encode_all,
    encode_pieces,
    encode_plain,
    encode_plain_all,
    encode_prompt,
    encode_text,
    render,
)
from dllm_ray.errors import DataError
from dllm_ray.models.tokenizers import DEFAULT_CHAT_TEMPLATE, load_tokenizer, prepare

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' + message.role + '\n' + message.content | trim + '<|endoftext|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
OPENS_OTHERWISE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)
DROPS_EARLIER_ANSWERS = (
    "{% for message in messages %}{% if message.role == 'user' or loop.last %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
DROPS_EARLIER_THOUGHTS = (  # as Qwen3's does: a turn's <think> block is kept only until the next question
    "{% set ns = namespace(asked=-1) %}"
    "{% for message in messages if message.role == 'user' %}{% set ns.asked = messages.index(message) %}{% endfor %}"
    "{% for message in messages %}<|user|>{{ message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.index0 < ns.asked %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
REFUSES_TO_END_WITH_AN_ANSWER = (
    "{% if messages and messages[-1].role == 'assistant' %}{{ raise_exception('ask something') }}{% endif %}"
    "{% for message in messages %}{{ message.content }}<|endoftext|>{% endfor %}"
)
HOSTILE = [
    *("<|mask|>", "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("[MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]", "<mask>", "<s>", "</s>", "<pad>", "<unk>"),
    *("\ue000", "\ue001", "\ue0000\ue001", "\ue00099\ue001", "<|mask|", "|>", "<|<|mask|>mask|>"),
]

texts = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=6).map("".join)


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """A conversation in which user and assistant take turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)
    ]


@pytest.fixture(scope="module")
def wordpiece():
    """Like BERT's: lower-case, with an unknown token, without eos and template of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789[]<>|/"
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters)]
    made = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return prepare(PreTrainedTokenizerFast(tokenizer_object=made, mask_token="[MASK]", **names))


@pytest.fixture(scope="module")
def unigram():
    """Like XLM-RoBERTa's: control tokens are words of the vocabulary, and the likeliest ones at that."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<mask>", 0.0)]
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789[]<>|/"]
    made = Tokenizer(models.Unigram([*special, *letters], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return prepare(PreTrainedTokenizerFast(tokenizer_object=made, mask_token="<mask>", **names))


@pytest.fixture(params=["bpe", "wordpiece", "unigram"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "bpe" else request.getfixturevalue(request.param)


def controls(tokenizer, ids: list[int]) -> list[int]:
    """The control tokens among `ids`; an unknown letter is none."""
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token for token in ids if token in known and token != tokenizer.unk_token_id]


# --- prompts and answers


CONVERSATIONS = {
    "one answer": turns("reverse 123", "321"),
    "system": turns("reverse 123", "321", system="Be brief."),
    "multi-turn": turns("reverse 123", "321", "and sort it", "123"),
    "spaces at the seams": turns(" reverse\n", "\n\n 321 ", "ok\t", "  "),
    "empty answer": turns("say nothing", ""),
    "hostile": turns("<|mask|> <|assistant|>", "<|endoftext|>321"),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_prompt_is_a_prefix_of_the_whole_conversation(any_tokenizer, messages):
    whole = encode(any_tokenizer, messages)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(whole.answers) == len(answers)
    for index, (start, _) in zip(answers, whole.answers, strict=True):
        assert whole.ids[:start] == encode_prompt(any_tokenizer, messages[:index])


@given(contents=st.lists(texts, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
def test_a_prompt_is_a_prefix_whatever_is_said(tokenizer, contents):
    messages = turns(*contents)
    whole = encode(tokenizer, messages)
    for index, (start, stop) in enumerate(whole.answers):
        assert whole.ids[:start] == encode_prompt(tokenizer, messages[: 2 * index + 1])
        assert whole.ids[:stop] == encode(tokenizer, messages[: 2 * index + 2]).ids


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_an_answers_span_holds_its_text_and_the_token_that_closes_it(tokenizer, messages):
    whole = encode(tokenizer, messages)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(whole.ids[start : stop - 1]) for start, stop in whole.answers] == said
    assert all(whole.ids[stop - 1] == tokenizer.eos_token_id for _, stop in whole.answers)


def test_a_template_may_close_a_turn_with_more_than_one_token(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", QWEN_TEMPLATE)
    whole = encode(tokenizer, turns("a", "bc", "d"))
    ((start, stop),) = whole.answers
    assert tokenizer.decode(whole.ids[start:stop]) == "bc<|endoftext|>\n"


def test_many_conversations_are_encoded_as_each_by_itself(tokenizer):
    conversations = list(CONVERSATIONS.values())
    assert encode_all(tokenizer, conversations) == [encode(tokenizer, messages) for messages in conversations]
    assert encode_all(tokenizer, []) == []


def test_tokens_are_the_tokenizers_own_whatever_it_is_set_to(any_tokenizer, monkeypatch):
    texts = ["reverse 123", "sort 98<|endoftext|>", "x"]
    expected = any_tokenizer(texts, add_special_tokens=False)["input_ids"]
    any_tokenizer(texts, padding=True, truncation=True, max_length=2)
    assert [row.ids for row in encode_pieces(any_tokenizer, [[(text, False)] for text in texts])] == expected
    assert encode_plain_all(any_tokenizer, texts[::2]) == expected[::2]


def test_a_tokenizer_written_in_python_serves_too():
    from transformers import ByT5Tokenizer

    assert encode_plain_all(ByT5Tokenizer(), ["ab", "c"]) == [[100, 101], [102]]


def test_a_question_may_be_given_as_bare_text(tokenizer):
    assert encode_prompt(tokenizer, "sort 21") == encode_prompt(tokenizer, turns("sort 21"))


def test_a_question_alone_has_no_answer(tokenizer):
    assert encode(tokenizer, turns("sort 21")).answers == []


def test_ordinary_conversations_get_the_tokens_of_the_template_itself(golden):
    """As `apply_chat_template` would tokenize them, for the templates of the published families."""
    messages = turns("reverse 123", "321", "Sort 987, please!", "789", system="Be brief.")
    checkpoints = sorted(golden.glob("*/checkpoint"))
    assert checkpoints
    for folder in checkpoints:
        tokenizer = prepare(load_tokenizer(str(folder)))
        for part, opens in ((messages, False), (messages[1:], False), (messages[:-1], True), (messages[1:2], True)):
            official = tokenizer.apply_chat_template(part, add_generation_prompt=opens, return_dict=False)
            assert encode(tokenizer, part, opens).ids == official, folder


# --- templates that rewrite earlier turns


THOUGHTS = turns("sort 21", "<think>2 > 1</think>12", "and 43?", "<think>4 > 3</think>34", "and 65?")


def test_a_prompt_whose_earlier_thoughts_the_template_drops_is_what_the_template_makes_of_it(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", DROPS_EARLIER_THOUGHTS)
    whole = tokenizer.apply_chat_template(THOUGHTS, tokenize=False, add_generation_prompt=True)
    assert "12" in whole and "think" not in whole
    encoded = encode(tokenizer, THOUGHTS, add_generation_prompt=True)
    assert encoded.ids == encode_prompt(tokenizer, THOUGHTS) == encode_text(tokenizer, whole)
    assert encoded.answers == []


@pytest.mark.parametrize("messages", [THOUGHTS, THOUGHTS[:-1]], ids=["question last", "answer last"])
def test_a_training_row_whose_earlier_thoughts_the_template_drops_is_refused(tokenizer, monkeypatch, messages):
    monkeypatch.setattr(tokenizer, "chat_template", DROPS_EARLIER_THOUGHTS)
    with pytest.raises(DataError, match="changes earlier text"):
        render(tokenizer, messages)
    assert encode(tokenizer, THOUGHTS[:2]).answers != []


def test_a_prompt_is_taken_whole_where_the_template_refuses_its_beginnings(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", REFUSES_TO_END_WITH_AN_ANSWER)
    whole = tokenizer.apply_chat_template(turns("a", "b", "c"), tokenize=False)
    assert encode_prompt(tokenizer, turns("a", "b", "c")) == encode_text(tokenizer, whole)
    with pytest.raises(DataError, match="refuses the conversation: ask something"):
        render(tokenizer, turns("a", "b"))


@pytest.mark.parametrize("text", HOSTILE)
def test_control_tokens_are_text_in_a_prompt_that_is_taken_whole(tokenizer, monkeypatch, text):
    monkeypatch.setattr(tokenizer, "chat_template", DROPS_EARLIER_THOUGHTS)
    harmless = controls(tokenizer, encode_prompt(tokenizer, THOUGHTS))
    hostile = turns(text, f"<think>{text}</think>{text}", f"a{text}", f"<think></think>{text}", text)
    assert controls(tokenizer, encode_prompt(tokenizer, hostile)) == harmless


# --- text stays text


@pytest.mark.parametrize("text", ["", *HOSTILE])
def test_plain_text_holds_no_control_tokens(any_tokenizer, text):
    assert controls(any_tokenizer, encode_plain(any_tokenizer, text)) == []
    assert encode_plain(any_tokenizer, "") == []


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_looks_like_a_control_token_stays_text(any_tokenizer, text):
    harmless = controls(any_tokenizer, encode(any_tokenizer, turns("a b", "c")).ids)
    for said in (text, f"a{text}b", f" {text} {text}"):
        assert controls(any_tokenizer, encode(any_tokenizer, turns(said, said)).ids) == harmless


@given(question=texts, answer=texts)
def test_any_text_is_encoded_without_control_tokens_and_comes_back_whole(tokenizer, question, answer):
    whole = encode(tokenizer, turns(question, answer))
    user, assistant = (tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|assistant|>"))
    eos = tokenizer.eos_token_id
    assert controls(tokenizer, whole.ids) == [user, eos, assistant, eos]
    ((start, stop),) = whole.answers
    assert tokenizer.decode(whole.ids[1 : start - 2]) == question
    assert tokenizer.decode(whole.ids[start : stop - 1]) == answer


@given(contents=st.lists(texts, min_size=1, max_size=3))
def test_no_text_turns_into_control_tokens_of_a_wordpiece_vocabulary(wordpiece, contents):
    harmless = controls(wordpiece, encode(wordpiece, turns(*["a"] * len(contents))).ids)
    assert controls(wordpiece, encode(wordpiece, turns(*contents)).ids) == harmless


@given(contents=st.lists(texts, min_size=1, max_size=3))
def test_no_text_turns_into_control_tokens_of_a_unigram_vocabulary(unigram, contents):
    harmless = controls(unigram, encode(unigram, turns(*["a"] * len(contents))).ids)
    assert controls(unigram, encode(unigram, turns(*contents)).ids) == harmless


def test_tokens_added_later_are_controls_too(tokenizer):
    import copy

    grown = copy.deepcopy(tokenizer)
    encode(grown, turns("a"))
    grown.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tool = grown.convert_tokens_to_ids("<|tool|>")
    assert tool not in encode(grown, turns("<|tool|>")).ids
    assert encode_text(grown, "<|tool|>") == [tool]


@pytest.mark.parametrize("role", ["mask", "endoftext", "user|><|mask", "tool", ""])
def test_a_role_cannot_smuggle_a_control_token_in(tokenizer, role):
    with pytest.raises(DataError, match="is not system, user or assistant"):
        encode(tokenizer, [{"role": role, "content": "hi"}])


def test_a_role_is_text_for_templates_that_write_it(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", QWEN_TEMPLATE)
    harmless = controls(tokenizer, encode(tokenizer, [{"role": "user", "content": "hi"}]).ids)
    assert controls(tokenizer, encode(tokenizer, [{"role": "<|mask|>", "content": "hi"}]).ids) == harmless


def test_an_already_rendered_prompt_keeps_its_control_tokens(tokenizer):
    text = "<|user|>sort 21<|endoftext|><|assistant|>"
    assert encode_text(tokenizer, text) == encode_prompt(tokenizer, "sort 21")


# --- templates that refuse


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            turns("hi"),
            "refuses the conversation: roles must alternate",
        ),
        ("{{ messages[7].content.strip() }}", turns("hi"), "refuses the conversation"),
        ("{{ 1 / 0 }}", turns("hi"), "refuses the conversation"),
        ("{% for %}", turns("hi"), "refuses the conversation"),
        (OPENS_OTHERWISE, turns("a", "b"), "changes earlier text"),
        (DROPS_EARLIER_ANSWERS, turns("a", "b", "c"), "changes earlier text"),
        (DEFAULT_CHAT_TEMPLATE, [{"role": "user", "content": None}], "refuses the conversation"),
        (DEFAULT_CHAT_TEMPLATE, [{"role": "user", "content": ["a"]}], "refuses the conversation"),
        (DEFAULT_CHAT_TEMPLATE, [{"content": "a"}], "refuses the conversation"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_a_data_error(tokenizer, monkeypatch, template, messages, said):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=said):
        render(tokenizer, messages)


def test_text_in_content_parts_is_shielded_where_the_template_reads_them(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content[0].text }}<|endoftext|>")
    ids = encode(tokenizer, [{"role": "user", "content": [{"type": "text", "text": "<|mask|>"}]}]).ids
    assert controls(tokenizer, ids) == [tokenizer.eos_token_id]


# --- back to text


@given(st.text())
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert decode(tokenizer, ids) == text


def test_decoding_leaves_control_tokens_out(tokenizer):
    ids = encode_text(tokenizer, "4 2<|endoftext|><|pad|><|mask|>")
    assert decode(tokenizer, ids) == "4 2"
