"""Raw rows become conversations or documents, or are refused with a reason."""

import pytest

from dllm_ray.data.formats import FORMATS, RowError, detect, to_messages, to_prompt, to_text
from dllm_ray.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}

ROWS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "prompt_response": {"prompt": "Q", "response": "A"},
    "instruction": {"instruction": "Q", "output": "A"},
    "question_answer": {"question": "Q", "answer": "A"},
}


def conversation(row: dict, columns: dict | None = None) -> list[dict]:
    columns = columns or {}
    return to_messages(row, detect(row, "auto", columns, "here"), columns)


def test_there_is_a_row_for_every_conversation():
    assert {*ROWS, "text"} == set(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_found_by_its_columns_and_read(name):
    assert detect(ROWS[name], "auto", {}, "here") == name
    assert conversation(ROWS[name]) == [USER, ASSISTANT]


@pytest.mark.parametrize("name", ROWS)
def test_other_columns_do_not_matter(name):
    assert conversation({"id": 7, **ROWS[name], "source": None}) == [USER, ASSISTANT]


def test_a_row_of_several_formats_is_read_as_the_first_or_as_the_one_asked_for():
    row = ROWS["question_answer"] | ROWS["prompt_response"]
    assert detect(row, "auto", {}, "here") == "prompt_response"
    assert detect(row, "question_answer", {}, "here") == "question_answer"


@pytest.mark.parametrize("context", ["I", [{"type": "text", "text": "I"}]])
def test_the_input_follows_the_instruction(context):
    assert conversation({**ROWS["instruction"], "input": context})[0]["content"] == "Q\n\nI"


@pytest.mark.parametrize("context", ["", None])
def test_an_empty_input_adds_nothing(context):
    assert conversation({**ROWS["instruction"], "input": context}) == [USER, ASSISTANT]


def test_a_prompt_may_be_a_conversation():
    assert conversation({"prompt": [SYSTEM, USER], "response": "A"}) == [SYSTEM, USER, ASSISTANT]


@pytest.mark.parametrize("key", ["text", "value"])
def test_typed_parts_are_joined(key):
    parts = [{"type": "text", key: "one "}, {"type": "text", key: "two"}]
    assert conversation({"messages": [{"role": "user", "content": parts}]})[0]["content"] == "one two"


@pytest.mark.parametrize("content", [["A"], [{"text": "A"}], [{"type": "text", "text": None, "value": "A"}]])
def test_parts_may_be_plain_or_untyped_or_padded_with_nulls(content):
    assert conversation({"prompt": "Q", "response": content}) == [USER, ASSISTANT]


def test_a_loss_weight_is_kept_and_other_keys_of_a_message_are_not():
    row = {"messages": [{**USER, "name": "Ann"}, {**ASSISTANT, "loss_weight": 0}]}
    assert conversation(row) == [USER, {**ASSISTANT, "loss_weight": 0.0}]


def test_columns_may_have_other_names():
    columns = {"prompt": "query", "response": "completion"}
    assert conversation({"query": "Q", "completion": "A"}, columns) == [USER, ASSISTANT]


def test_a_mapped_column_says_which_format_is_meant():
    row = {"context": "I", **ROWS["prompt_response"], **ROWS["instruction"]}
    assert conversation(row, {"input": "context"})[0]["content"] == "Q\n\nI"


def test_an_unknown_mapped_column_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'promt' is no column of ours.*prompt, question") as caught:
        detect(ROWS["prompt_response"], "auto", {"promt": "query"}, "here")
    assert caught.value.field == "columns"


@pytest.mark.parametrize(
    ("wanted", "columns", "expected"),
    [
        ("auto", {}, "(messages) or (prompt, response) or (instruction, output) or (question, answer)"),
        ("auto", {"prompt": "query"}, "expected (query, response)."),
        ("question_answer", {}, "expected (question, answer)."),
    ],
)
def test_a_row_of_no_known_format_names_what_it_has_and_what_is_expected(wanted, columns, expected):
    with pytest.raises(DataError) as caught:
        detect({"text": "...", "id": 1}, wanted, columns, "x.jsonl, line 1")
    message = str(caught.value)
    assert message.startswith("x.jsonl, line 1: the columns 'text', 'id'")
    assert expected in message


class TestDocuments:
    @pytest.mark.parametrize(
        ("wanted", "columns"), [("text", {}), ("text", {"text": "body"}), ("auto", {"text": "body"})]
    )
    def test_a_document_is_asked_for_or_its_column_is_mapped(self, wanted, columns):
        row = {"text": "T", "body": "T"}
        assert detect(row, wanted, columns, "here") == "text"
        assert to_text(row, columns) == "T"

    def test_a_column_named_text_alone_is_no_conversation(self):
        with pytest.raises(DataError, match=r"or train on documents with --data.format text$"):
            detect({"text": "T"}, "auto", {}, "here")

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({}, "no text"),
            ({"text": None}, "no text"),
            ({"text": 3}, "text is not text"),
            ({"text": "\n"}, "empty text"),
        ],
    )
    def test_an_unusable_document_says_why(self, row, reason):
        with pytest.raises(RowError, match=f"^{reason}$"):
            to_text(row, {})


@pytest.mark.parametrize(
    ("row_format", "row", "reason"),
    [
        ("messages", {}, "no messages"),
        ("messages", {"messages": "Q"}, "messages is not a list"),
        ("messages", {"messages": ["Q"]}, "a message without a role"),
        ("messages", {"messages": [{"content": "Q"}]}, "a message without a role"),
        ("messages", {"messages": [{"role": "user"}]}, "content is not text"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a content part of type image"),
        ("messages", {"messages": [{"role": "user", "content": [3]}]}, "a content part of type int"),
        ("prompt_response", {"prompt": None, "response": "A"}, "no prompt"),
        ("prompt_response", {"prompt": 3, "response": "A"}, "prompt is neither text nor a list of messages"),
        ("prompt_response", {"prompt": "Q"}, "no response"),
        ("prompt_response", {"prompt": "Q", "response": 4}, "response is not text"),
        ("question_answer", {"question": "Q", "answer": None}, "no answer"),
        ("question_answer", {"question": 4, "answer": "A"}, "question is not text"),
        ("instruction", {"output": "A"}, "no instruction"),
        ("instruction", {"instruction": "Q"}, "no output"),
        ("instruction", {"instruction": "Q", "input": 4, "output": "A"}, "input is not text"),
    ],
)
def test_an_unusable_row_says_why(row_format, row, reason):
    with pytest.raises(RowError, match=f"^{reason}$"):
        to_messages(row, row_format, {})


def test_a_reason_uses_the_name_of_the_column_in_the_source():
    with pytest.raises(RowError, match=r"^no completion$"):
        to_messages({"prompt": "Q"}, "prompt_response", {"response": "completion"})


@pytest.mark.parametrize(
    "row",
    [
        *ROWS.values(),
        {"prompt": "Q"},
        {"prompt": [USER]},
        {"question": "Q", "answer": None},
        {"instruction": "Q"},
        {"messages": [USER]},
        {"messages": [USER, ASSISTANT, ASSISTANT]},
    ],
)
def test_a_prompt_is_the_conversation_before_the_answer(row):
    assert to_prompt(row, {}) == [USER]


def test_a_prompt_keeps_earlier_answers():
    assert to_prompt({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, {}) == [USER, ASSISTANT, USER]


def test_a_prompt_may_have_an_input_and_mapped_columns():
    row = {"task": "Q", "context": "I"}
    columns = {"instruction": "task", "input": "context"}
    assert to_prompt(row, columns) == [{"role": "user", "content": "Q\n\nI"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "Q"}, "no messages, prompt, instruction or question"),
        ({"prompt": None}, "no prompt"),
        ({"messages": []}, "nothing to answer"),
        ({"messages": [ASSISTANT]}, "nothing to answer"),
    ],
)
def test_a_row_without_a_prompt_says_why(row, reason):
    with pytest.raises(RowError, match=f"^{reason}$"):
        to_prompt(row, {})
