"""Tokenizers: any text goes in and comes out, and what a diffusion model needs is there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import ModelError
from dllm_ray.models.tokenizers import DEFAULT_CHAT_TEMPLATE, end_of_turn_id, load_tokenizer, prepare, train_bpe


def bare(**names: str):
    """A word-level tokenizer with just the special tokens named."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["a", "b", "?"])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", **names)


# --- train_bpe


@given(st.text())
def test_any_text_seen_or_not_comes_back_whole(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token_even_without_training_text():
    empty = train_bpe([], 300)
    text = "".join(map(chr, range(256))) + "日本語 🙂"
    assert empty.decode(empty(text)["input_ids"]) == text
    assert len(empty) == 262


def test_the_vocabulary_stays_within_its_limit_and_learns_what_is_frequent():
    trained = train_bpe(["banana banana banana bandana"] * 20, 270)
    assert len(trained) <= 270
    assert len(trained("banana")["input_ids"]) < 6


def test_digits_are_single_tokens():
    trained = train_bpe(["2024 2024 2024"] * 50, 400)
    assert len(trained("2024")["input_ids"]) == 4


def test_special_tokens_are_single_distinct_tokens(tokenizer):
    names = ("<|pad|>", "<|endoftext|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>")
    ids = [tokenizer(name)["input_ids"] for name in names]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids}) == len(names)
    assert ids[:3] == [[tokenizer.pad_token_id], [tokenizer.eos_token_id], [tokenizer.mask_token_id]]


def test_the_same_texts_give_the_same_tokenizer():
    texts = ["the quick brown fox", "jumps over"] * 5
    assert train_bpe(texts, 290).get_vocab() == train_bpe(texts, 290).get_vocab()


def test_control_tokens_in_training_text_are_not_learned_as_words():
    trained = train_bpe(["say <|mask|> and <|endoftext|>"] * 50, 400)
    ids = trained("<|mask|><|endoftext|>", split_special_tokens=True)["input_ids"]
    assert not {trained.mask_token_id, trained.eos_token_id} & set(ids)


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ModelError, match="vocab_size 261 is too small"):
        train_bpe(["a"], 261)
    train_bpe(["a"], 262)


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.mask_token, loaded.eos_token, loaded.pad_token) == ("<|mask|>", "<|endoftext|>", "<|pad|>")


# --- prepare


def test_what_is_missing_is_added():
    tokenizer = prepare(bare())
    assert (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token) == (
        *("<|mask|>", "<|endoftext|>", "<|endoftext|>"),
    )
    assert sorted([tokenizer.mask_token_id, tokenizer.eos_token_id]) == [3, 4]
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE


def test_end_of_text_is_taken_from_padding_and_padding_from_end_of_text():
    assert prepare(bare(pad_token="[PAD]")).eos_token == "[PAD]"
    assert prepare(bare(eos_token="</s>")).pad_token == "</s>"


def test_what_is_there_stays():
    tokenizer = bare(mask_token="[M]", eos_token="[E]", pad_token="[P]")
    tokenizer.chat_template = "{{ messages }}"
    before = dict(tokenizer.get_vocab())
    prepare(tokenizer)
    assert (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token) == ("[M]", "[E]", "[P]")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.get_vocab() == before


def test_preparing_twice_changes_nothing_more():
    tokenizer = prepare(bare())
    size = len(tokenizer)
    assert len(prepare(tokenizer)) == size


# --- end_of_turn_id

ENDINGS = {
    "eos": ("{{ message.content }}</s>", "</s>"),
    "a token of its own": ("{{ message.content }}<|im_end|>", "<|im_end|>"),
    "a line break after it": ("{{ message.content }}<|im_end|>\n", "<|im_end|>"),
    "a space before it": ("{{ message.content }} <|im_end|>", "<|im_end|>"),
    "nothing": ("{{ message.content }}", None),
    "a word": ("{{ message.content }} so</s>", None),
    "a template that refuses": ("{{ raise_exception('no') }}", None),
}


@pytest.mark.parametrize(("turn", "ends"), ENDINGS.values(), ids=ENDINGS)
def test_the_token_that_closes_a_turn_is_read_from_the_template(turn, ends):
    tokenizer = train_bpe([], 300)
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for message in messages %}" + turn + "{% endfor %}"
    assert end_of_turn_id(tokenizer) == (None if ends is None else tokenizer.convert_tokens_to_ids(ends))


def test_a_directory_without_a_readable_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer could be loaded") as refused:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refused.value)
