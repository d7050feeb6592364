"""One raw row -> one conversation, or one document. Knows column names and message shapes, not files or tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from dllm_ray.errors import ConfigError, DataError

FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "prompt_response": (("prompt", "response"), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "question_answer": (("question", "answer"), ()),
    "text": (("text",), ()),
}
"""Format -> (columns it must have, columns it may have). All but `text`, a document, are conversations."""


class RowError(ValueError):
    """A row that can't be used; the text is the reason under which such rows are counted."""


def detect(row: Mapping[str, Any], wanted: str, columns: Mapping[str, str], where: str) -> str:
    """The format of a source, judged by its first row.

    Args:
        row: the first row.
        wanted: a format, or `auto`: the first kind of conversation that fits. `text` must be asked for, or its column
            mapped.
        columns: our column name -> the source's.
        where: the row's origin, for the message.

    Raises:
        ConfigError: `columns` maps a name that no format has.
        DataError: the row lacks the columns.
    """
    check_columns(columns)
    if wanted != "auto":
        candidates = {wanted: FORMATS[wanted]}
    elif columns:  # a mapped column says which format is meant
        candidates = {
            name: parts for name, parts in FORMATS.items() if any(column in parts[0] + parts[1] for column in columns)
        }
    else:
        candidates = {name: parts for name, parts in FORMATS.items() if name != "text"}
    for name, (needed, _) in candidates.items():
        if all(columns.get(column, column) in row for column in needed):
            return name
    expected = " or ".join(
        "(" + ", ".join(columns.get(column, column) for column in needed) + ")" for needed, _ in candidates.values()
    )
    raise DataError(
        f"{where}: the columns {', '.join(map(repr, row)) or '(none)'} are of no known format; expected {expected}. "
        "Name other columns with data.columns, e.g. --data.columns.prompt query"
        + (", or train on documents with --data.format text" if wanted == "auto" and "text" in row else "")
    )


def check_columns(columns: Mapping[str, str]) -> None:
    """Makes sure that a mapping of columns maps columns of ours.

    Raises:
        ConfigError: it maps another name.
    """
    ours = {name for needed, optional in FORMATS.values() for name in needed + optional}
    for name in columns:
        if name not in ours:
            raise ConfigError(f"{name!r} is no column of ours; expected {', '.join(sorted(ours))}", "columns")


def to_messages(row: Mapping[str, Any], row_format: str, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The conversation in a row: messages of `role`, `content` (text) and, where the row says so, `loss_weight`.

    Raises:
        RowError: why the row can't be used.
    """

    def get(column: str, required: bool = True) -> Any:
        value = row.get(columns.get(column, column))
        if value is None and required:
            raise RowError(f"no {columns.get(column, column)}")
        return value

    if row_format == "messages":
        return _conversation(get("messages"))
    if row_format == "prompt_response":
        prompt = get("prompt")
        if not isinstance(prompt, Sequence):
            raise RowError(f"{columns.get('prompt', 'prompt')} is neither text nor a list of messages")
        question = _conversation(prompt) if not isinstance(prompt, str) else [_turn("user", prompt, "prompt")]
        return [*question, _turn("assistant", get("response"), "response")]
    if row_format == "question_answer":
        return [_turn("user", get("question"), "question"), _turn("assistant", get("answer"), "answer")]
    instruction, context = get("instruction"), get("input", required=False)
    text = _text(instruction, "instruction")
    if context:
        text = f"{text}\n\n{_text(context, 'input')}"
    return [_turn("user", text, "instruction"), _turn("assistant", get("output"), "output")]


def to_text(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The document in a row.

    Raises:
        RowError: why the row can't be used.
    """
    name = columns.get("text", "text")
    if row.get(name) is None:
        raise RowError(f"no {name}")
    text = _text(row[name], name)
    if not text.strip():
        raise RowError("empty text")
    return text


def to_prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The conversation in a row up to where the assistant is to answer: `messages`, `prompt`, `instruction` (with
    `input`) or `question`. Answers that the row holds at its end are left out.

    Raises:
        RowError: none of these columns, or nothing to answer.
    """
    for row_format, column in (
        ("prompt_response", "prompt"),
        ("instruction", "instruction"),
        ("question_answer", "question"),
    ):
        name = columns.get(column, column)
        if name in row:
            answer = columns.get(FORMATS[row_format][0][1], FORMATS[row_format][0][1])
            return to_messages({**row, answer: "-"}, row_format, columns)[:-1]
    if columns.get("messages", "messages") not in row:
        raise RowError("no messages, prompt, instruction or question")
    messages = to_messages(row, "messages", columns)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowError("nothing to answer")
    return messages


def _conversation(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError("messages is not a list")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError("a message without a role")
        turn = _turn(message["role"], message.get("content"), "content")
        if isinstance(message.get("loss_weight"), int | float):
            turn["loss_weight"] = float(message["loss_weight"])
        turns.append(turn)
    return turns


def _turn(role: str, content: Any, column: str) -> dict[str, Any]:
    return {"role": role, "content": _text(content, column)}


def _text(content: Any, column: str) -> str:
    """Plain text, or the text of a list of typed parts (`{"type": "text", "text" or "value": ...}`)."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise RowError(f"{column} is not text")
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise RowError(f"{column} is not valid Unicode") from None
    return content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text") if part.get("text") is not None else part.get("value")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RowError(f"a content part of type {kind}")
