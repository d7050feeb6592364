"""Rows of conversations or of texts with gaps -> token ids, all of them checked before any is answered.

Knows columns, messages and the model's tokenizer; nothing of models that run, of files, or of Ray.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from dllm_ray import chat
from dllm_ray.data import formats
from dllm_ray.data.sources import snippet
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.infilling import encode_gaps, has_gaps
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
    prompts: Sequence[Sequence[int]], config: SamplerConfig, limit: int | None, infill: bool = False
) -> None:
    """Makes sure that every prompt fits the model together with its answer, before any is answered.

    Args:
        prompts: token ids.
        config: says how long an answer may be.
        limit: tokens in the model's context; None: unlimited.
        infill: the answers lie inside the prompts.

    Raises:
        DataError: the first prompt that doesn't.
    """
    new = 0 if infill else config.max_new_tokens or 1
    for number, prompt in enumerate(prompts, start=1):
        if limit is not None and len(prompt) + new > limit:
            what, advice = f"with {new} of an answer it", "Shorten it, or lower sampler.max_new_tokens"
            if infill:
                what, advice = "it", "Shorten it or its gaps"
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens: {what} doesn't fit the model's context of {limit}. {advice}"
            )
