"""Text that can no longer change: pieces that make the whole text exactly, given as early as they are sure."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dllm_ray import chat
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling.engine import Commit, Row
from dllm_ray.serving.text import Detokenizer, FinalText, FinalTokens, endings_of

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789[]<>|/.,!?'"
WORDS = ["hello", "do", "n", "'", "t", "s", "ve", "re", "m", "the", "cat", ".", ",", "!", "?"]


def wordpiece(clean: bool) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = dict.fromkeys([*special, *LETTERS, *WORDS, *(f"##{letter}" for letter in LETTERS)])
    made = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=clean)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=clean, **names)


def unigram() -> PreTrainedTokenizerFast:
    words = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words += [(letter, -5.0) for letter in "▁" + LETTERS] + [(f"▁{word}", -4.0) for word in WORDS if len(word) > 1]
    made = Tokenizer(models.Unigram(words, unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names)


def with_bytes() -> PreTrainedTokenizerFast:
    """Like Llama 2's: what has no token is spelled in bytes, of which one bad one spoils the whole run."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "▁the", "▁cat", "é"]
    made = Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names)


KINDS = ["bpe", "wordpiece", "wordpiece, spaces cleaned", "unigram", "byte fallback", "bytes"]
TEXTS = [
    "Ça va? 日本語 🙂",
    "do n't, he 's",
    "the cat  \n",
    "hello ! a ' b",
    "🙂🙂\u200d🙂",
    "  ",
    "END",
    "</a",
    "\ufffd",
]


@pytest.fixture(scope="module")
def detokenizers(tokenizer) -> dict[str, Detokenizer]:
    made = [tokenizer, wordpiece(False), wordpiece(True), unigram(), with_bytes(), ByT5Tokenizer()]
    return {kind: Detokenizer(each) for kind, each in zip(KINDS, made, strict=True)}


@st.composite
def token_lists(draw, tokenizer) -> list[int]:
    """Texts, random tokens (some past the vocabulary, where the tokenizer bears it), and runs of one kind."""
    tokens = []
    token = st.integers(0, len(tokenizer) - 1 + 2 * tokenizer.is_fast)
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.integers(0, 3))
        if kind == 0:
            tokens += tokenizer(draw(st.sampled_from(TEXTS)), add_special_tokens=False)["input_ids"]
        elif kind == 1:
            tokens += draw(st.lists(token, max_size=30))
        elif kind == 2:
            tokens += draw(st.lists(token, min_size=1, max_size=3)) * draw(st.integers(1, 40))
        else:
            tokens += tokenizer(draw(st.text(max_size=20)), add_special_tokens=False)["input_ids"]
    return tokens


def expected(tokenizer, tokens: list[int], eot_text: str | None, stops: list[str]) -> str:
    text = chat.decode(tokenizer, tokens, eot_text)
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=len(text))]


def pieces(text: FinalText, tokens: list[int], sizes: list[int]) -> list[str]:
    given, start = [], 0
    while start < len(tokens):
        size = sizes[len(given) % len(sizes)]
        given.append(text.feed(tokens[start : start + size]))
        start += size
    return [*given, text.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=120)
def test_pieces_make_the_text(detokenizers, kind, data):
    detokenizer = detokenizers[kind]
    tokenizer = detokenizer.tokenizer
    tokens = data.draw(token_lists(tokenizer))
    eot_text = data.draw(st.sampled_from([None, None, "</a>", "</answer>", "the"]))
    whole = chat.decode(tokenizer, tokens)
    snippets = st.builds(
        lambda start, size: whole[start : start + size], st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 6)
    )
    stops = data.draw(st.lists(snippets | st.text(min_size=1, max_size=3), max_size=3))
    stops = [stop for stop in stops if stop]
    text = FinalText(detokenizer, endings_of(detokenizer.tokenizer, eot_text), stops)
    given_out = pieces(text, tokens, data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    assert "".join(given_out) == text.text == expected(tokenizer, tokens, eot_text, stops)
    full = chat.decode(tokenizer, tokens, eot_text)
    assert text.stopped == any(stop in full for stop in stops)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40)
def test_a_text_that_ended_is_whole_whatever_follows(detokenizers, kind, data):
    detokenizer = detokenizers[kind]
    tokens = data.draw(token_lists(detokenizer.tokenizer))
    stops, eot_text = ["a", "e c"], data.draw(st.sampled_from([None, "the"]))
    text = FinalText(detokenizer, endings_of(detokenizer.tokenizer, eot_text), stops)
    for place, token in enumerate(tokens):
        text.feed([token])
        if text.ended:
            assert text.text == expected(detokenizer.tokenizer, tokens, eot_text, stops)
            assert text.text == expected(detokenizer.tokenizer, tokens[: place + 1], eot_text, stops)
            break


def test_letters_are_given_at_once_and_half_a_character_is_not(detokenizers):
    detokenizer = detokenizers["bpe"]
    text = FinalText(detokenizer)
    for word in ("reverse", " 12", "3", "🙂", "  ", "."):
        tokens = chat.encode_plain(detokenizer.tokenizer, word)
        assert "".join(text.feed([token]) for token in tokens) == word
    head, *_ = chat.encode_plain(detokenizer.tokenizer, "語")
    assert text.feed([head]) == ""
    assert text.finish() == "\ufffd"


def test_what_may_become_a_stop_string_is_held_back(detokenizers):
    detokenizer = detokenizers["bpe"]

    def feed(text: FinalText, *words: str) -> list[str]:
        return [text.feed(chat.encode_plain(detokenizer.tokenizer, word)) for word in words]

    text = FinalText(detokenizer, stop=["END."])
    assert feed(text, "the EN", "D", "S. E", "ND", ". more", "x") == ["the ", "", "ENDS. ", "", "", ""]
    assert text.ended and text.stopped and text.finish() == ""
    text = FinalText(detokenizer, stop=["b", "abcd"])
    assert feed(text, "xab", "c", "e") == ["x", "", "a"]  # the longer one might have begun before
    assert text.stopped
    text = FinalText(detokenizer, stop=["b", "abcd"])
    assert feed(text, "xab", "cd") == ["x", ""] and text.text == "x"


def test_white_space_at_the_end_goes_where_a_text_ends_answers(detokenizers):
    detokenizer = detokenizers["bpe"]
    tokens = chat.encode_plain(detokenizer.tokenizer, "fox  </answer> dog")
    text = FinalText(detokenizer, endings_of(detokenizer.tokenizer, "</answer>"))
    given_out = [text.feed([token]) for token in tokens]
    assert "".join(given_out) == "fox" and text.ended and text.cut and not text.stopped


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_decoded_from_its_end(detokenizers, kind, monkeypatch):
    detokenizer = detokenizers[kind]
    decoded = []
    decode = detokenizer.decode
    monkeypatch.setattr(detokenizer, "decode", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    tokens = chat.encode_plain(detokenizer.tokenizer, "the cat, hello 🙂 do n't " * 200)
    text = FinalText(detokenizer)
    for token in tokens:
        text.feed([token])
    assert max(decoded) <= 60 and sum(decoded) < 200 * len(tokens)
    text.finish()
    assert text.text == chat.decode(detokenizer.tokenizer, tokens)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40)
def test_spelled_tokens_read_as_the_text_does(detokenizers, kind, data):
    detokenizer = detokenizers[kind]
    words = data.draw(st.lists(st.sampled_from(["the cat", "hello", "日本語", "🙂", "é"]), min_size=1, max_size=5))
    tokens = chat.encode_plain(detokenizer.tokenizer, " ".join(words))
    texts = detokenizer.spell(tokens)
    assert len(texts) == len(tokens)
    if not detokenizer.looks_back:
        assert "".join(texts) == detokenizer.decode(tokens)


# --- tokens

POLICIES = [{}, {"policy": "random"}, {"policy": "llada2", "threshold": 0.3}, {"threshold": 0.3}]
POLICIES += [{"policy": "llada21", "threshold": 0.1, "editing_threshold": 0.2, "max_post_steps": 3}]


@pytest.mark.parametrize("change", POLICIES, ids=str)
@pytest.mark.parametrize("infill", [False, True])
def test_final_tokens_make_the_completion_and_never_change(sharp_lm, change, infill):
    lm = sharp_lm("llama")
    mask = lm.spec.mask_token_id
    config = SamplerConfig(max_new_tokens=18, block_size=6, steps=18, seed=1, temperature=1.0, **change)
    for number in range(6):
        prompt = [40 + number, 41, *[mask] * 9, 44, 45] if infill else [40 + number, 41, 42]
        sampler = Sampler(lm, config)
        [row] = sampler.rows([prompt], infill=infill)
        output = (sampler.infill if infill else sampler.sample)([prompt], trace=True, seeds=[number])
        stops = () if infill else lm.spec.stop_token_ids
        final = FinalTokens(row, config.policy == "llada21", stops, None if infill else 18)
        early = 0
        for commit in output.commits[0]:
            before = list(final.tokens)
            fresh = final.take(commit)
            assert final.tokens == before + fresh
            early += bool(fresh) and not commit.done
        final.finish(output.sequences[0])
        assert final.tokens == output.completions[0]
        assert len(final.confidences) == len(final.tokens)
        assert early or len(final.tokens) < 2


def test_a_block_that_may_be_revised_is_not_final():
    row = Row([1, 0, 0, 0, 0], [False, *[True] * 4], SamplerConfig(policy="llada21"), 1, 2, 2, 0, True)
    final = FinalTokens(row, revises=True)
    assert final.take(Commit(0, 0, [1, 2], [7, 8], [0.5, 0.5], False)) == []
    assert final.take(Commit(0, 1, [1], [9], [0.9], False)) == []
    assert final.take(Commit(0, 2, [], [], [], False)) == []
    assert final.take(Commit(0, 3, [3], [5], [0.5], False)) == [9, 8]
    assert final.take(Commit(0, 4, [4], [6], [0.5], True)) == [5, 6]
    assert final.confidences == [0.9, 0.5, 0.5, 0.5]
