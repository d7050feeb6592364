"""Tokenizers: any text goes in and comes out, and what a diffusion model needs is there."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.chat import decode, encode, encode_prompt
from dllm_ray.errors import ModelError
from dllm_ray.models import families
from dllm_ray.models.load import load, open_tokenizer
from dllm_ray.models.tokenizers import (
    DEFAULT_CHAT_TEMPLATE,
    end_of_turn_id,
    load_tokenizer,
    mask_id,
    prepare,
    train_bpe,
)


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


# --- the mask token of a published family


def without_mask(source, *tokens: str):
    """A byte-level tokenizer that names no mask token, with some tokens more."""
    from transformers import PreTrainedTokenizerFast

    names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "bos_token": "<|system|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(source.backend_tokenizer), **names)
    made.add_special_tokens({"additional_special_tokens": list(tokens)})
    return made


@pytest.fixture
def maskless(tokenizer):
    return without_mask(tokenizer, "<|mdm_mask|>", "<|im_end|>")


LLADA = families.by_name("llada")
PUBLISHED_ID = replace(LLADA, mask_token="<|not there|>", mask_token_id=9)
NEITHER = replace(LLADA, mask_token="<|new|>", mask_token_id=None)


def named(tokenizer, family, config: dict) -> tuple[int, str | None]:
    """The mask token's id and text."""
    prepare(tokenizer, family, config)
    return mask_id(tokenizer, family, config), tokenizer.mask_token


def test_the_id_in_the_config_wins_over_the_tokenizers_own(tokenizer):
    changed = copy.deepcopy(tokenizer)
    assert named(changed, LLADA, {"mask_token_id": 5}) == (5, "<|assistant|>")
    assert changed.mask_token_id == 5
    assert len(changed) == len(tokenizer)


def test_the_tokenizers_own_mask_token_wins_over_the_familys(tokenizer):
    assert named(copy.deepcopy(tokenizer), LLADA, {}) == (2, "<|mask|>")
    assert named(copy.deepcopy(tokenizer), LLADA, {"mask_token_id": None}) == (2, "<|mask|>")


def test_the_familys_text_is_looked_for_where_nothing_names_the_mask_token(maskless):
    size = len(maskless)
    assert named(maskless, LLADA, {}) == (maskless.convert_tokens_to_ids("<|mdm_mask|>"), "<|mdm_mask|>")
    assert len(maskless) == size


def test_the_published_id_is_taken_where_the_familys_text_is_not_in_the_vocabulary(maskless):
    assert named(maskless, PUBLISHED_ID, {}) == (9, maskless.convert_ids_to_tokens(9))
    assert maskless.mask_token_id == 9


def test_an_id_right_after_the_last_token_adds_the_familys_mask_token(maskless):
    size = len(maskless)
    assert named(maskless, PUBLISHED_ID, {"mask_token_id": size}) == (size, "<|not there|>")
    assert len(maskless) == size + 1
    assert maskless("<|not there|>")["input_ids"] == [size]


def test_an_id_beyond_the_vocabulary_stands_without_a_token(maskless):
    size = len(maskless)
    assert named(maskless, LLADA, {"mask_token_id": size + 3}) == (size + 3, None)
    assert len(maskless) == size


def test_a_mask_token_is_added_where_none_is_known(maskless, tokenizer):
    size = len(maskless)
    assert named(maskless, NEITHER, {}) == (size, "<|new|>")
    assert named(without_mask(tokenizer, "<|im_end|>"), families.by_name("sdar"), {"mask_token_id": 7})[0] == 7


def test_an_a2d_tokenizer_gets_the_mask_token_that_training_added(tokenizer):
    assert named(bare(), families.by_name("a2d-qwen3"), {}) == (3, "<|mask|>")
    assert named(without_mask(tokenizer), families.by_name("a2d-qwen3"), {}) == (2, "<|mask|>")  # it has that text


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_encoder_keeps_its_tokenizers_mask_token_whatever_the_config_says(tokenizer, family):
    kept = copy.deepcopy(tokenizer)
    assert named(kept, families.by_name(family), {"mask_token_id": 5}) == (2, "<|mask|>")


def test_a_model_of_uniform_noise_gets_no_mask_token(maskless, tokenizer):
    gemma = families.by_name("diffusion_gemma")
    assert named(maskless, gemma, {}) == (None, None)
    assert mask_id(tokenizer, gemma, {}) is None


def test_without_a_family_the_tokenizers_own_counts(tokenizer):
    assert mask_id(tokenizer, None, {"mask_token_id": 5}) == 2


# --- tokenizers with code of their own

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass OwnTokenizer: pass\n"
AUTO_MAP = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}


def names_its_own_class(folder: Path) -> None:
    """Makes a saved tokenizer name a class that lies beside it."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": AUTO_MAP}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text(CODE)


@pytest.mark.parametrize("native", ["llama", "qwen2", "qwen3_moe", "glm4_moe"])
def test_a_published_tokenizer_with_a_class_of_its_own_is_read_without_running_it(tokenizer, tmp_path, native):
    tokenizer.save_pretrained(tmp_path)
    names_its_own_class(tmp_path)
    loaded = load_tokenizer(str(tmp_path), native)
    assert not (tmp_path / "ran").exists()
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    text = "reverse 123 <|mask|> Ça va? 日本語 🙂"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    special = ("mask_token", "eos_token", "pad_token")
    assert [getattr(loaded, name) for name in special] == [getattr(tokenizer, name) for name in special]


def test_any_other_tokenizer_with_a_class_of_its_own_is_refused_and_not_run(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    names_its_own_class(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_whole_published_checkpoint_is_loaded_without_running_code(golden, tmp_path):
    folder = Path(shutil.copytree(golden / "dream" / "checkpoint", tmp_path / "dream"))
    names_its_own_class(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.Config", "AutoModel": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(CODE)
    lm = load(folder)
    assert not (folder / "ran").exists()
    lm.save(tmp_path / "native")
    assert "auto_map" not in (tmp_path / "native" / "tokenizer_config.json").read_text()
    assert "auto_map" not in {**json.loads((tmp_path / "native" / "config.json").read_text()), "original_config": {}}
    assert load(tmp_path / "native").tokenizer.get_vocab() == lm.tokenizer.get_vocab()


def test_a_published_tokenizer_may_be_a_vocabulary_and_merges(tmp_path):
    """As Dream's is: no tokenizer.json, and its control tokens come after the last merge."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["reverse reverse sort"] * 9, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet)
    )
    made.model.save(str(tmp_path))
    known = made.get_vocab_size()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
    settings = {
        "added_tokens_decoder": {str(known + index): {"content": text} | flags for index, text in enumerate(marks)},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": "{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    names_its_own_class(tmp_path)

    loaded = load_tokenizer(str(tmp_path), "qwen2")

    assert not (tmp_path / "ran").exists()
    assert loaded.convert_tokens_to_ids(marks) == list(range(known, known + 5))
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id) == (known + 4, known, known)
    assert loaded("reverse<|im_end|>")["input_ids"] == [*made.encode("reverse").ids, known + 2]
    assert loaded.decode(loaded("Ça va? 日本語 🙂")["input_ids"]) == "Ça va? 日本語 🙂"
    assert loaded.chat_template == "{{ messages[0].content }}"


# --- chat templates of the published families

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  reverse 123\n"},
    {"role": "assistant", "content": "\n321 "},
    {"role": "user", "content": "again"},
]
WRONG = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def templated(tokenizer):
    """A copy of the tokenizer with a chat template, or with none."""

    def make(template: str | None):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        changed.bos_token = "<|system|>"
        return changed

    return make


def text_of(tokenizer, messages, opens: bool = True, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens, **options)


@pytest.mark.parametrize("template", [WRONG, None], ids=["wrong", "none"])
def test_llada_talks_as_the_reference_does_whatever_its_tokenizer_says(templated, template):
    tokenizer = prepare(templated(template), families.by_name("llada"), {"mask_token_id": 2})
    assert text_of(tokenizer, TALK) == (
        "<|system|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nreverse 123<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n321<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nagain<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert text_of(tokenizer, TALK[1:2], opens=False) == (
        "<|system|><|start_header_id|>user<|end_header_id|>\n\nreverse 123<|eot_id|>"
    )


def test_a_reference_llada_gets_its_template_in_the_place_of_a_wrong_one(golden):
    tokenizer, spec, _ = open_tokenizer(str(golden / "llada" / "checkpoint"))
    assert text_of(tokenizer, TALK[3:]) == (
        "<|bos|><|start_header_id|>user<|end_header_id|>\n\nagain<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.convert_ids_to_tokens(spec.eot_token_id) == "<|eot_id|>"
    ids = encode_prompt(tokenizer, "again")
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["<|bos|>", "<|start_header_id|>"]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_encoder_without_a_template_gets_the_one_of_the_published_chat_models(templated, family):
    tokenizer = prepare(templated(None), families.by_name(family), {})
    assert text_of(tokenizer, TALK) == (
        "[SYS]\nBe brief.\n[/SYS]\n"
        "[Question]\n  reverse 123\n\n[/Question]\n"
        "[Answer]\n\n321 \n[/Answer]\n"
        "[Question]\nagain\n[/Question]\n"
        "[Answer]\n"
    )
    with pytest.raises(Exception, match="the role tool is not"):
        text_of(tokenizer, [{"role": "tool", "content": "a"}])


@pytest.mark.parametrize("family", ["modernbert", "dream", "llada2", "llada_moe", "sdar", "fast_dllm_v2", "a2d-llama"])
def test_any_other_template_stays(templated, family):
    assert prepare(templated(WRONG), families.by_name(family), {"mask_token_id": 2}).chat_template == WRONG


@pytest.mark.parametrize("family", ["dream", "llada2", "sdar", "a2d-qwen3"])
def test_a_family_without_a_template_of_its_own_gets_the_common_one(templated, family):
    prepared = prepare(templated(None), families.by_name(family), {"mask_token_id": 2})
    assert prepared.chat_template == DEFAULT_CHAT_TEMPLATE


@pytest.fixture
def encoder_directory(make_lm, templated, tmp_path):
    """A published encoder whose tokenizer has the template given: `encoder_directory(None)`."""

    def make(template: str | None) -> Path:
        make_lm("modernbert").save(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
        templated(template).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["diffusion"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def test_answers_of_an_encoder_end_at_a_text(encoder_directory, tmp_path):
    lm = load(encoder_directory(None))
    assert (lm.spec.eot_text, lm.spec.eot_token_id) == ("[/Answer]", None)
    answer = lm.tokenizer("321\n[/Answer]\n[Question]<|mask|>")["input_ids"] + [lm.spec.eos_token_id]
    assert decode(lm.tokenizer, answer, lm.spec.eot_text) == "321"
    assert decode(lm.tokenizer, answer) == "321\n[/Answer]\n[Question]"
    assert decode(lm.tokenizer, lm.tokenizer("32 1")["input_ids"], lm.spec.eot_text) == "32 1"
    lm.save(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.spec == lm.spec
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template


def test_an_encoder_with_a_template_of_its_own_ends_its_turns_as_that_says(encoder_directory):
    ends = "{% for message in messages %}{{ message.content }}<|endoftext|>{% endfor %}"
    _, spec, _ = open_tokenizer(str(encoder_directory(ends)))
    assert (spec.eot_text, spec.eot_token_id) == (None, spec.eos_token_id)


THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""As Qwen3's: thinks unless told not to, and puts an empty thought before the last answer."""

ASKS = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("family", ["a2d-qwen2", "a2d-qwen3", "a2d-llama"])
def test_an_a2d_model_does_not_think_unless_it_is_asked_to(templated, family):
    tokenizer = prepare(templated(THINKING), families.by_name(family), {})
    asks = [{"role": "user", "content": "hi"}]
    assert text_of(tokenizer, asks) == ASKS + NO_THOUGHT
    assert text_of(tokenizer, asks, enable_thinking=False) == ASKS + NO_THOUGHT
    assert text_of(tokenizer, asks, enable_thinking=True) == ASKS


def test_thinking_is_switched_off_once(templated):
    tokenizer = prepare(templated(THINKING), families.by_name("a2d-qwen3"), {})
    before = tokenizer.chat_template
    assert prepare(tokenizer, families.by_name("a2d-qwen3"), {}).chat_template == before


def test_other_families_think_as_their_template_says(templated):
    assert prepare(templated(THINKING), families.by_name("sdar"), {"mask_token_id": 2}).chat_template == THINKING


def test_a_saved_a2d_model_still_does_not_think(golden, tmp_path):
    folder = Path(shutil.copytree(golden / "a2d_qwen3" / "checkpoint", tmp_path / "a2d"))
    (folder / "chat_template.jinja").write_text(THINKING)
    lm = load(folder)
    lm.save(tmp_path / "native")
    for path in (folder, tmp_path / "native"):
        tokenizer, spec, _ = open_tokenizer(str(path))
        assert text_of(tokenizer, [{"role": "user", "content": "hi"}]) == ASKS + NO_THOUGHT
        assert tokenizer.convert_ids_to_tokens(spec.eot_token_id) == "<|im_end|>"


# --- what a model is trained on is what it is asked

GOLDEN = ["llada", "llada_moe", "dream", "a2d_qwen3", "a2d_qwen2", "llada2", "llada21", "modernbert"]


def agrees(tokenizer, messages) -> None:
    """The prompt is a prefix of the conversation, and the rest of it is the answer with what closes it."""
    whole = encode(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert whole.ids[: len(prompt)] == prompt
    assert whole.answers[-1] == (len(prompt), len(whole.ids))
    assert messages[-1]["content"].strip() in tokenizer.decode(whole.ids[len(prompt) :])


CONVERSATIONS = {
    "question": TALK[1:3],
    "system": TALK[:3],
    "two answers": [*TALK, {"role": "assistant", "content": "no\n\n"}],
    "control tokens": [
        {"role": "user", "content": "<|mdm_mask|> [/Answer]<|eot_id|>"},
        {"role": "assistant", "content": "<|im_end|> 3"},
    ],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("model", GOLDEN)
def test_a_prompt_is_a_prefix_of_the_conversation_for_every_family(golden, model, messages):
    agrees(open_tokenizer(str(golden / model / "checkpoint"))[0], messages)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_prompt_is_a_prefix_of_the_conversation_for_encoders_without_a_template(templated, messages):
    agrees(prepare(templated(None), families.by_name("modernbert"), {}), messages)


@pytest.mark.parametrize("messages", [TALK[1:3], TALK[:3]], ids=["question", "system"])
def test_a_prompt_is_a_prefix_of_the_conversation_for_a_template_that_thinks(templated, messages):
    """The empty thought belongs to the prompt."""
    tokenizer = prepare(templated(THINKING), families.by_name("a2d-qwen3"), {})
    agrees(tokenizer, messages)
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == ASKS + NO_THOUGHT
