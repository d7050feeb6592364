"""Tokenizers: loading, training a byte-level BPE, and the special tokens and chat template that a DLM can't do without.

Knows nothing of models or of training; `dllm_ray.chat` turns conversations into token ids with what is set up here.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models.checkpoint import find
from dllm_ray.models.families import Family

logger = logging.getLogger(__name__)

MASK_TOKEN = "<|mask|>"
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role ' + message['role'] ~ ' is not system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""For tokenizers without a chat template: a role marker, the text, and the end-of-text token that ends the turn."""


def load_tokenizer(path: str, native: str | None = None):
    """The tokenizer of a directory or hub id; no code that lies beside it is ever run.

    Args:
        path: where it lies.
        native: for a published family, the `model_type` of the transformers architecture it maps onto: its own config
            names classes that transformers doesn't have.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    try:
        if native is None:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        elif find(path, "tokenizer.json") is not None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            tokenizer = tokenizer_class_from_name(TOKENIZER_MAPPING_NAMES[native]).from_pretrained(path)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others here
        raise ModelError(
            f"{path}: no tokenizer could be loaded from it (expected tokenizer.json or the files of a tokenizer "
            f"that transformers knows, beside config.json): {first_line(error)}"
        ) from error
    tokenizer.init_kwargs.pop("auto_map", None)  # what we save doesn't ask others to run code either
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int):
    """Trains a byte-level BPE tokenizer with the tokens and template a chat DLM needs.

    Args:
        texts: what to learn merges from. Any text can be encoded afterwards, seen or not.
        vocab_size: most tokens; 256 bytes and the special tokens come first, merges fill the rest.

    Returns:
        A `PreTrainedTokenizerFast` with mask, eos and pad tokens and `DEFAULT_CHAT_TEMPLATE`.

    Raises:
        ModelError: `vocab_size` doesn't hold the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD_TOKEN, EOS_TOKEN, MASK_TOKEN, *ROLE_TOKENS]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ModelError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special)} special tokens need room")
    tokenizer = Tokenizer(models.BPE())
    # Digits stay single tokens, as numbers are read and written digit by digit.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        mask_token=MASK_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = DEFAULT_CHAT_TEMPLATE
    return fast


def prepare(tokenizer, family: Family | None = None, config: Mapping[str, Any] | None = None):
    """Adds, in place, what a diffusion model needs and the tokenizer lacks; says so in the log.

    A published family's mask token is the one that its config names, else the tokenizer's, else the family's; any other
    tokenizer without one gets a new one. A missing end-of-text token is taken from the padding token, as the published
    BERT chat models do, and a missing padding token from end-of-text. The chat template is the family's where the
    tokenizer has none or a wrong one, else its own, else `DEFAULT_CHAT_TEMPLATE`.

    Args:
        tokenizer: from `load_tokenizer` or `train_bpe`.
        family: what the model is, if it is one of the published families.
        config: its config.json.
    """
    if family is not None and not family.is_native:
        _name_mask(tokenizer, family, config or {})
    elif tokenizer.mask_token is None and not (family is not None and family.uniform_noise):
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        logger.info("the tokenizer has no mask token: %s is token %d", MASK_TOKEN, tokenizer.mask_token_id)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": tokenizer.pad_token or EOS_TOKEN})
        logger.info("the tokenizer has no end-of-text token: %s takes its part", tokenizer.eos_token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if family is not None and family.chat_template and (family.replace_template or tokenizer.chat_template is None):
        tokenizer.chat_template = family.chat_template
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    if family is not None and family.thinking_off:
        tokenizer.chat_template = _without_thinking(tokenizer.chat_template)
    return tokenizer


def mask_id(tokenizer, family: Family | None, config: Mapping[str, Any]) -> int | None:
    """The mask token's id, from a prepared tokenizer and what is published; None where noise is uniform."""
    if family is not None and family.uniform_noise:
        return None
    if family is not None and not family.is_native and config.get("mask_token_id") is not None:
        return config["mask_token_id"]
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    return family.mask_token_id if family is not None else None


def _name_mask(tokenizer, family: Family, config: Mapping[str, Any]) -> None:
    """Makes the tokenizer name the mask token that the model was trained with."""
    wanted = config.get("mask_token_id")
    if wanted is None and tokenizer.mask_token is not None:
        return
    if wanted is None and family.mask_token in tokenizer.get_vocab():
        tokenizer.mask_token = family.mask_token
        return
    if wanted is None:
        wanted = family.mask_token_id
    if wanted is None or wanted == len(tokenizer):
        tokenizer.add_special_tokens({"mask_token": family.mask_token or MASK_TOKEN})
        return
    token = tokenizer.convert_ids_to_tokens(wanted) if wanted < len(tokenizer) else None
    if token is not None and token != tokenizer.mask_token:
        tokenizer.mask_token = token


def _without_thinking(template: Any) -> Any:
    """A template that leaves the thinking block empty unless it is asked for."""
    switch = "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}"
    if not isinstance(template, str) or "enable_thinking" not in template or template.startswith(switch):
        return template
    return switch + template


def end_of_turn_id(tokenizer) -> int | None:
    """The special token with which the chat template closes an assistant's turn, if it does so with one."""
    marker = "\ue000answer\ue000"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": marker}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program: it may refuse anything
        logger.warning("the chat template can't render a question and an answer: %s", first_line(error))
        return None
    after = text.rpartition(marker)[2]
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) else None
