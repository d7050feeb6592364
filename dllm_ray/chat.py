"""Messages <-> token ids, for training, sampling, evaluation and serving alike.

A conversation is rendered by the tokenizer's chat template and tokenized piece by piece, cut where an assistant's turn
begins and ends. So the tokens of a prompt are the same whether an answer follows or not, and what a model saw in
training is what it sees when it answers. A template that rewrites earlier turns can't be cut so: a prompt is then
taken as a whole, a conversation to learn from is refused. Text that looks like a control token stays text.
"""

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_ray.errors import DataError

Message = dict[str, Any]
"""`{"role": "user", "content": "..."}`"""

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters that stand in for control tokens inside user text


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids."""

    ids: list[int]
    answers: list[tuple[int, int]]
    """[start, stop) of each assistant turn in `ids`, closing token included; empty for a prompt taken as a whole."""


def encode(tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> Encoded:
    """Token ids of one conversation.

    Args:
        tokenizer: with a chat template.
        messages: role and text of each turn.
        add_generation_prompt: end with the words that open an assistant's turn.

    Raises:
        DataError: the template refuses the conversation.
    """
    return encode_all(tokenizer, [messages], add_generation_prompt)[0]


def encode_prompt(tokenizer, messages: Sequence[Message] | str) -> list[int]:
    """Token ids of a conversation (or of one user message) up to where the assistant is to answer."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return encode(tokenizer, messages, add_generation_prompt=True).ids


def encode_all(
    tokenizer, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = False
) -> list[Encoded]:
    """`encode` for many conversations; the tokenizer sees all their pieces at once.

    Raises:
        DataError: the template refuses one of them. Use `render` first where rows may be refused one by one.
    """
    return encode_pieces(tokenizer, [render(tokenizer, messages, add_generation_prompt) for messages in conversations])


def render(tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[tuple[str, bool]]:
    """The conversation as text, in pieces: (text, whether it is an assistant's turn).

    Control tokens inside messages are replaced by stand-ins that `encode_pieces` turns into plain text. A prompt
    (`add_generation_prompt`) is a single piece where the template rewrites earlier turns, as Qwen3's drops what was
    thought in them: nothing in it is to be learned, so no turn needs to be found.

    Raises:
        DataError: the template raises; or, unless it is a prompt, rewrites earlier text when turns are added.
    """
    safe = [shield(tokenizer, message) for message in messages]
    whole = _apply(tokenizer, safe, add_generation_prompt)
    try:
        return _cut(tokenizer, safe, whole, add_generation_prompt)
    except DataError:
        if add_generation_prompt:
            return [(whole, False)]
        raise


def _cut(tokenizer, safe: list[Message], whole: str, add_generation_prompt: bool) -> list[tuple[str, bool]]:
    """The rendered conversation, cut where an assistant's turn begins and ends.

    Raises:
        DataError: the template refuses a beginning of the conversation, or renders it otherwise than inside the whole.
    """
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(safe):
        if message.get("role") != "assistant":
            continue
        before = _apply(tokenizer, safe[:index], True)
        last = index + 1 == len(safe) and not add_generation_prompt
        through = whole if last else _apply(tokenizer, safe[: index + 1], False)
        if not (whole.startswith(through) and through.startswith(before) and len(before) >= done):
            raise DataError("the chat template changes earlier text when a turn is added")
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(through)], True)]
        done = len(through)
    pieces.append((whole[done:], False))
    return [piece for piece in pieces if piece[0]]


def encode_pieces(tokenizer, conversations: Sequence[list[tuple[str, bool]]]) -> list[Encoded]:
    """Token ids of rendered conversations (`render`)."""
    texts: list[str] = []  # every piece, cut once more at the stand-ins for control tokens
    plain: list[bool] = []  # whether control tokens in it are to be read as text
    layout: list[list[tuple[range, bool]]] = []
    for pieces in conversations:
        spans = []
        for text, is_answer in pieces:
            start = len(texts)
            for part, is_shielded in _unshield(tokenizer, text):
                texts.append(part)
                plain.append(is_shielded)
            spans.append((range(start, len(texts)), is_answer))
        layout.append(spans)
    ids = _tokenize(tokenizer, texts, plain)
    encoded = []
    for spans in layout:
        row: list[int] = []
        answers = []
        for span, is_answer in spans:
            start = len(row)
            for index in span:
                row += ids[index]
            if is_answer:
                answers.append((start, len(row)))
        encoded.append(Encoded(row, answers))
    return encoded


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of an already rendered prompt; control tokens in it count as such."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_plain(tokenizer, text: str) -> list[int]:
    """Token ids of a text outside a conversation; what looks like a control token in it stays text."""
    return encode_plain_all(tokenizer, [text])[0] if text else []


def encode_plain_all(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode_plain` for many texts, none of them empty."""
    rows = _encode(tokenizer, texts, split_special_tokens=True)
    controls = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for index, row in enumerate(rows):
        if len(texts[index]) > 1 and not controls.isdisjoint(row):  # a Unigram vocabulary holds them as words too
            rows[index] = [token for letter in encode_plain_all(tokenizer, list(texts[index])) for token in letter]
    return rows


def decode(tokenizer, ids: Sequence[int], eot_text: str | None = None) -> str:
    """The text of generated tokens, without control tokens.

    Args:
        tokenizer: of the model.
        ids: token ids.
        eot_text: the text before its first occurrence is returned (`DiffusionSpec.eot_text`).
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    if eot_text is None:
        return text
    # some tokenizers write it otherwise than it was: BERT's in lower case, with spaces
    for ending in (eot_text, tokenizer.decode(encode_text(tokenizer, eot_text))):
        text = text.partition(ending)[0]
    return text.rstrip()


def _apply(tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if not messages and not add_generation_prompt:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program: jinja errors, TypeError, KeyError, ...
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the chat template refuses the conversation: {first}") from None


def _tokenize(tokenizer, texts: list[str], plain: list[bool]) -> list[list[int]]:
    if not texts:
        return []
    ids = _encode(tokenizer, texts)
    shielded = [index for index, is_plain in enumerate(plain) if is_plain]
    if shielded:
        for index, row in zip(shielded, encode_plain_all(tokenizer, [texts[index] for index in shielded]), strict=True):
            ids[index] = row
    return ids


def _encode(tokenizer, texts: Sequence[str], split_special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each text, and nothing else: transformers would build masks and offsets too."""
    if not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def shield(tokenizer, value: Any) -> Any:
    """`value` (a text, or a structure that holds texts) with stand-ins for the control tokens in its texts;
    `encode_pieces` turns them back into text."""
    if isinstance(value, Mapping):
        return {key: shield(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shield(tokenizer, item) for item in value]
    if not isinstance(value, str):
        return value
    controls, pattern = _controls(tokenizer)
    return pattern.sub(lambda match: f"{_OPEN}{controls.index(match[0])}{_CLOSE}", value)


def _unshield(tokenizer, text: str) -> list[tuple[str, bool]]:
    if _OPEN not in text:
        return [(text, False)]
    controls, _ = _controls(tokenizer)
    parts = re.split(f"{_OPEN}(\\d+){_CLOSE}", text)  # text, number, text, number, ...
    cut = [(part, False) if index % 2 == 0 else (controls[int(part)], True) for index, part in enumerate(parts)]
    return [part for part in cut if part[0]]


def _controls(tokenizer) -> tuple[list[str], re.Pattern]:
    """The texts that must not turn into control tokens, and a pattern that finds them; longest first."""
    size = len(tokenizer)
    known = _KNOWN_CONTROLS.get(tokenizer)
    if known is None or known[0] != size:
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
        controls = [*tokens, _OPEN, _CLOSE]
        known = (size, controls, re.compile("|".join(map(re.escape, controls))))
        _KNOWN_CONTROLS[tokenizer] = known
    return known[1:]


_KNOWN_CONTROLS: weakref.WeakKeyDictionary[Any, tuple[int, list[str], re.Pattern]] = weakref.WeakKeyDictionary()
