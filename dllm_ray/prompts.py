"""Rows of conversations or of texts with gaps -> token ids, all of them checked before any is answered.

Knows columns, messages and the model's tokenizer; nothing of models that run, of files, or of Ray.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

from dllm_ray import chat
from dllm_ray.data import formats
from dllm_ray.data.sources import snippet
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.infilling import encode_gaps, has_gaps
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling.config import SamplerConfig

_ENCODED_TOGETHER = 1000


def encode_rows(
    rows: Iterable[tuple[Callable[[], str], Mapping[str, Any]]], tokenizer, columns: Mapping[str, str]
) -> tuple[list[list[chat.Message]], list[array]]:
    """The conversations in rows up to where the assistant is to answer, and their token ids.

    Args:
        rows: a function that says where a row is from, and the row.
        tokenizer: of the model.
        columns: our column name -> the rows' own.

    Raises:
        DataError: a row that can't be used; it is named.
    """
    formats.check_columns(columns)
    conversations: list[list[chat.Message]] = []
    prompts: list[array] = []
    rows = iter(rows)
    while chunk := list(islice(rows, _ENCODED_TOGETHER)):
        pieces = []
        for where, row in chunk:
            try:
                messages = formats.to_prompt(row, columns)
                pieces.append(chat.render(tokenizer, messages, add_generation_prompt=True))
            except (formats.RowError, DataError) as error:
                raise DataError(f"{where()}: {error}: {snippet(row)}") from None
            conversations.append(messages)
        # four times as small as lists of numbers, which counts where prompts are many
        prompts += [array("i", encoded.ids) for encoded in chat.encode_pieces(tokenizer, pieces)]
    return conversations, prompts


def encode_drafts(
    rows: Iterable[tuple[Callable[[], str], Mapping[str, Any]]],
    tokenizer,
    spec: DiffusionSpec,
    columns: Mapping[str, str],
) -> tuple[list[list[chat.Message]], list[array], list[array]]:
    """The conversations in rows and their token ids, as of `encode_rows`, and those of drafts of their answers: what
    would follow the prompt in a conversation with that answer, without what ends it.

    Args:
        rows: a function that says where a row is from, and the row: its column `draft`, and those of `encode_rows`.
        tokenizer: of the model.
        spec: of the model, which says what ends an answer.
        columns: our column name (`draft` too) -> the rows' own.

    Raises:
        ConfigError: the model has no edit heads.
        DataError: a row that can't be used; it is named.
    """
    if spec.edit_heads is None:
        raise ConfigError(
            "the model has no edit heads, so it can't revise a draft: give it some with jobs/convert.py --to editflow, "
            "and train it",
            "edit",
        )
    name = columns.get("draft", "draft")
    kept: list[tuple[Callable[[], str], str]] = []

    def noted() -> Iterator[tuple[Callable[[], str], Mapping[str, Any]]]:
        for where, row in rows:
            kept.append((where, _draft(where, row, name)))
            yield where, row

    others = {ours: theirs for ours, theirs in columns.items() if ours != "draft"}
    conversations, prompts = encode_rows(noted(), tokenizer, others)
    drafts: list[array] = []
    for start in range(0, len(kept), _ENCODED_TOGETHER):
        pieces = []
        chunk = slice(start, start + _ENCODED_TOGETHER)
        for messages, (where, draft) in zip(conversations[chunk], kept[chunk], strict=True):
            try:
                pieces.append([(_answer(tokenizer, messages, draft, spec.eot_text), True)])
            except DataError as error:
                raise DataError(f"{where()}: {error}") from None
        drafts += [
            array("i", takewhile(lambda token: token not in spec.stop_token_ids, encoded.ids))
            for encoded in chat.encode_pieces(tokenizer, pieces)
        ]
    return conversations, prompts, drafts


def _draft(where: Callable[[], str], row: Mapping[str, Any], name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str):
        reason = f"no {name}, which is to be revised" if text is None else f"{name} is not text"
        raise DataError(f"{where()}: {reason}: {snippet(row)}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise DataError(f"{where()}: {name} is not valid Unicode") from None
    return text


def _answer(tokenizer, messages: Sequence[chat.Message], draft: str, eot_text: str | None) -> str:
    """The draft as the chat template writes an answer to these messages."""
    text, is_answer = chat.render(tokenizer, [*messages, {"role": "assistant", "content": draft}])[-1]
    if not is_answer:  # an empty one, that no token ends
        return ""
    if eot_text is not None and eot_text in text:
        text = text.rpartition(eot_text)[0].rstrip()  # as `chat.decode` reads what such a model writes
    return text


def encode_texts(
    rows: Iterable[tuple[Callable[[], str], Mapping[str, Any]]],
    tokenizer,
    mask_token_id: int | None,
    columns: Mapping[str, str],
) -> tuple[list[str], list[array]]:
    """The texts in rows, with gaps to fill in (`[MASK]`, `[MASK:8]`), and their token ids.

    Args:
        rows: a function that says where a row is from, and the row: its column `infill`, or else `text`.
        tokenizer: of the model.
        mask_token_id: the model's.
        columns: our column name (`infill`) -> the rows' own.

    Raises:
        DataError: a row that can't be used; it is named.
    """
    if mask_token_id is None:
        raise ConfigError("this model has no mask token, so it can't fill in gaps", "infill")
    for name in columns.keys() - {"infill"}:
        raise ConfigError(f"{name!r} is no column of texts to fill in; expected infill", "columns")
    texts: list[str] = []
    prompts: list[array] = []
    for where, row in rows:
        name = columns.get("infill") or ("infill" if "infill" in row else "text")
        text = row.get(name)
        try:
            if not isinstance(text, str):
                raise DataError(f"no {name}" if text is None else f"{name} is not text")
            text.encode()
            if not has_gaps(text):
                raise DataError(f"{name} has no gap: write [MASK:8] where 8 tokens are to be filled in")
            prompts.append(array("i", encode_gaps(tokenizer, mask_token_id, text)))
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise DataError(f"{where()}: {name} is not valid Unicode") from None
        except DataError as error:
            raise DataError(f"{where()}: {error}: {snippet(row)}") from None
        texts.append(text)
    return texts, prompts


def require_room(
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    limit: int | None,
    infill: bool = False,
    drafts: Sequence[Sequence[int]] | None = None,
) -> None:
    """Makes sure that every prompt fits the model together with its answer, before any is answered.

    Args:
        prompts: token ids.
        config: says how long an answer may be.
        limit: tokens in the model's context; None: unlimited.
        infill: the answers lie inside the prompts.
        drafts: that the answers are made of; they may be longer than other answers.

    Raises:
        DataError: the first prompt that doesn't.
    """
    new = 0 if infill else config.max_new_tokens or 1
    for number, prompt in enumerate(prompts, start=1):
        draft = 0 if drafts is None else len(drafts[number - 1])
        if limit is not None and draft > new and len(prompt) + draft > limit:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens and its draft {draft}: they don't fit the model's context "
                f"of {limit}. Shorten them"
            )
        if limit is not None and len(prompt) + new > limit:
            what, advice = f"with {new} of an answer it", "Shorten it, or lower sampler.max_new_tokens"
            if infill:
                what, advice = "it", "Shorten it or its gaps"
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens: {what} doesn't fit the model's context of {limit}. {advice}"
            )
