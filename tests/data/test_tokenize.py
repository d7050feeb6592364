"""Raw rows become token rows: what carries loss, what is cut or dropped, and what the account says of it."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.chat import encode_prompt
from dllm_ray.data import tokenize
from dllm_ray.data.sources import resolve
from dllm_ray.data.tokenize import Account, RowRules, TokenRows, texts, tokenize_shard

Q1, A1, Q2, A2 = (
    {"role": role, "content": text}
    for role, text in [("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "second")]
)
END = "<|endoftext|>"
FAR = 10_000


def rules(**changes) -> RowRules:
    settings = {
        "row_format": "messages",
        "columns": {},
        "loss_on": "last_answer",
        "truncation": "right",
        "max_length": FAR,
    }
    return RowRules(**(settings | changes))


def as_lists(rows: TokenRows) -> list[tuple[list[int], list[int]]]:
    stops = np.cumsum(rows.lengths)
    pairs = zip(stops - rows.lengths, stops, strict=True)
    return [(rows.ids[start:stop].tolist(), rows.labels[start:stop].tolist()) for start, stop in pairs]


@pytest.fixture
def run(tokenizer, write_jsonl):
    """Tokenizes conversations (or whole rows): `rows, account = run([[Q1, A1]], truncation="filter")`."""

    def call(conversations, tokenizer=tokenizer, name="rows.jsonl", **changes) -> tuple[TokenRows, Account]:
        raw = [row if isinstance(row, dict) else {"messages": row} for row in conversations]
        (shard,) = resolve(str(write_jsonl(raw, name)))
        return tokenize_shard(shard, tokenizer, [tokenizer.eos_token_id], rules(**changes))

    return call


@pytest.fixture
def targets(run, tokenizer):
    """The text that carries loss in one conversation."""

    def call(conversation, **changes) -> str:
        rows, _ = run([conversation], **changes)
        return tokenizer.decode(rows.labels[rows.labels != -100])

    return call


class TestLoss:
    def test_the_last_answer_carries_loss_with_the_token_that_closes_it(self, targets):
        assert targets([Q1, A1, Q2, A2]) == f"second{END}"

    def test_or_every_answer_does(self, targets):
        assert targets([Q1, A1, Q2, A2], loss_on="all_answers") == f"first{END}second{END}"

    def test_an_answer_of_weight_zero_carries_none(self, targets):
        silent = {**A1, "loss_weight": 0.0}
        assert targets([Q1, silent, Q2, A2], loss_on="all_answers") == f"second{END}"

    def test_a_weight_above_zero_and_the_weight_of_a_question_change_nothing(self, targets):
        assert targets([{**Q1, "loss_weight": 1.0}, {**A1, "loss_weight": 0.5}]) == f"first{END}"

    def test_a_question_after_the_last_answer_is_left_out(self, run):
        assert as_lists(run([[Q1, A1, Q2]])[0]) == as_lists(run([[Q1, A1]])[0])

    def test_labels_are_the_tokens_themselves_or_minus_100(self, run):
        ((ids, labels),) = as_lists(run([[Q1, A1, Q2, A2]])[0])
        assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))

    def test_what_comes_before_the_answer_is_the_prompt_of_generation(self, run, tokenizer):
        ((ids, labels),) = as_lists(run([[Q1, A1, Q2, A2]])[0])
        prompt = encode_prompt(tokenizer, [Q1, A1, Q2])
        assert ids[: len(prompt)] == prompt
        assert [label == -100 for label in labels] == [place < len(prompt) for place in range(len(ids))]

    def test_text_that_looks_like_a_stop_token_stays_text(self, run, targets, tokenizer):
        answer = {**A1, "content": f"a{END}b"}
        assert targets([Q1, answer]) == f"a{END}b{END}"
        rows, _ = run([[Q1, answer]])
        assert (rows.labels == tokenizer.eos_token_id).sum() == 1


class TestTemplateWithoutStopToken:
    @pytest.fixture
    def bare(self, tokenizer):
        bare = copy.deepcopy(tokenizer)
        bare.chat_template = (
            "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + ';' }}{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}"
        )
        return bare

    @pytest.mark.parametrize(
        ("loss_on", "text"), [("last_answer", f"second;{END}"), ("all_answers", f"first;second;{END}")]
    )
    def test_the_last_answer_gets_one(self, targets, bare, loss_on, text):
        assert targets([Q1, A1, Q2, A2], tokenizer=bare, loss_on=loss_on) == text

    def test_it_carries_no_loss_where_the_last_answer_carries_none(self, targets, bare):
        conversation = [Q1, A1, Q2, {**A2, "loss_weight": 0}]
        assert targets(conversation, tokenizer=bare, loss_on="all_answers") == "first;"

    def test_it_counts_towards_max_length(self, run, bare):
        (length,) = run([[Q1, A1]], tokenizer=bare)[0].lengths
        _, account = run([[Q1, A1]], tokenizer=bare, truncation="filter", max_length=int(length) - 1)
        assert account.dropped == {"longer than max_length": 1}


class TestLength:
    @pytest.fixture
    def whole(self, run) -> tuple[list[int], list[int]]:
        return as_lists(run([[Q1, A1]])[0])[0]

    @pytest.mark.parametrize("truncation", ["right", "filter"])
    def test_a_row_that_fits_exactly_stays_as_it_is(self, run, whole, truncation):
        rows, account = run([[Q1, A1]], truncation=truncation, max_length=len(whole[0]))
        assert as_lists(rows) == [whole]
        assert account.truncated == 0

    def test_a_longer_row_is_cut_at_its_end(self, run, whole):
        rows, account = run([[Q1, A1]], max_length=len(whole[0]) - 2)
        assert as_lists(rows) == [(whole[0][:-2], whole[1][:-2])]
        assert (account.truncated, account.usable) == (1, 1)

    def test_or_dropped(self, run, whole):
        rows, account = run([[Q1, A1]], truncation="filter", max_length=len(whole[0]) - 1)
        assert len(rows) == 0
        assert account.dropped == {"longer than max_length": 1}

    def test_a_row_without_room_for_an_answer_is_dropped(self, run, whole):
        prompt = whole[1].count(-100)
        assert run([[Q1, A1]], max_length=prompt)[1].dropped == {"prompt longer than max_length": 1}
        assert run([[Q1, A1]], max_length=prompt + 1)[1].targets == 1

    def test_with_all_answers_a_row_may_end_before_the_last(self, run, whole):
        rows, _ = run([[Q1, A1, Q2, A2]], loss_on="all_answers", max_length=len(whole[0]))
        assert as_lists(rows) == [whole]


class TestFilters:
    def test_conversations_may_be_chosen_by_a_column(self, run):
        rows, account = run(
            [{"messages": [Q1, A1], "level": level} for level in (1, 2, 3)] + [[Q2, A2]], where={"level": [1, 3]}
        )
        assert rows.numbers.tolist() == [0, 2]
        assert account.dropped == {"filtered out by level": 2}

    def test_and_by_their_length_before_they_are_cut(self, run):
        short, long = run([[Q1, A1], [Q1, A1, Q2, A2]])[0].lengths.tolist()
        limits = {"max_length": short, "loss_on": "all_answers"}
        assert run([[Q1, A1], [Q1, A1, Q2, A2]], max_tokens=long - 1, **limits)[1].dropped == {
            f"longer than {long - 1} tokens": 1
        }
        assert run([[Q1, A1], [Q1, A1, Q2, A2]], min_tokens=short + 1, **limits)[1].dropped == {
            f"shorter than {short + 1} tokens": 1
        }
        assert run([[Q1, A1], [Q1, A1, Q2, A2]], min_tokens=short, max_tokens=long, **limits)[1].usable == 2


class TestAccount:
    BAD = (
        ({"text": "?"}, "no messages"),
        ([Q1], "no assistant turn"),
        ([Q1, {**A1, "content": " \n"}], "empty answer"),
        ([Q1, {**A1, "loss_weight": 0}], "every answer has loss_weight 0"),
        ([Q1, {"role": "assistant"}], "content is not text"),
    )

    @pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
    def test_a_row_that_cannot_be_used_is_counted_and_the_first_is_shown(self, run, tmp_path, row, reason):
        rows, account = run([[Q1, A1], row, row])
        assert (account.read, account.usable, len(rows)) == (3, 1, 1)
        assert account.dropped == {reason: 2}
        assert account.examples[reason].startswith(f"{tmp_path}/rows.jsonl, line 2: {{")

    def test_a_conversation_that_the_template_refuses_is_counted(self, run, tokenizer):
        strict = copy.deepcopy(tokenizer)
        strict.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + tokenizer.chat_template
        )
        _, account = run([[Q1, A1], [{"role": "system", "content": "s"}, Q1, A1]], tokenizer=strict)
        assert account.usable == 1
        assert account.dropped == {"the chat template refuses the conversation: no system": 1}

    def test_tokens_and_targets_are_counted(self, run):
        rows, account = run([[Q1, A1], [Q2, A2]])
        assert account.tokens == len(rows.ids) == rows.lengths.sum()
        assert account.targets == (rows.labels != -100).sum()

    def test_adding_adds_everything_and_keeps_the_first_example(self, run):
        (length,) = run([[Q2, A2]])[0].lengths
        _, one = run([[Q1, A1], [Q1], {"id": 1}], name="one.jsonl")
        _, two = run([[Q1], [Q2, A2]], name="two.jsonl", max_length=int(length) - 1)
        both = one + two
        assert (both.read, both.usable, both.truncated) == (5, 2, 1)
        assert (both.tokens, both.targets) == (one.tokens + two.tokens, one.targets + two.targets)
        assert both.dropped == {"no assistant turn": 2, "no messages": 1}
        assert both.examples == {"no messages": one.examples["no messages"]} | {
            "no assistant turn": one.examples["no assistant turn"]
        }
        assert len({one.digest, two.digest, both.digest, (two + one).digest}) == 4

    def test_the_digest_depends_on_tokens_and_labels_and_not_on_the_file(self, run):
        def digest(rows, **changes):
            return run(rows, **changes)[1].digest

        same = digest([[Q1, A1, Q2, A2]])
        assert digest([[Q1], [Q1, A1, Q2, A2]], name="other.jsonl") == same
        assert digest([[Q1, A1, Q2, {**A2, "content": "other"}]]) != same
        assert digest([[Q1, A1, Q2, A2]], loss_on="all_answers") != same
        assert digest([[Q1, A1, Q2, A2]] * 2) != same


def test_rows_do_not_depend_on_how_many_the_tokenizer_sees_at_once(run, monkeypatch):
    conversations = [[Q1, A1], [Q1], [Q1, A1, Q2, A2], [Q2, A2], {"id": 1}, [Q2, A1]]
    whole, account = run(conversations)
    monkeypatch.setattr(tokenize, "_CHUNK", 2)
    chunked, chunked_account = run(conversations)
    assert as_lists(chunked) == as_lists(whole)
    assert chunked_account.examples == account.examples


def test_rows_say_which_raw_rows_they_are_of(run):
    rows, _ = run([[Q1], [Q1, A1], {"id": 1}, [Q2, A2]])
    assert rows.numbers.tolist() == [1, 3]
    assert rows.shards.tolist() == [0, 0]
    assert rows.in_shard(7).shards.tolist() == [7, 7]


def test_a_shard_without_usable_rows_gives_none(run):
    rows, account = run([[Q1]])
    assert as_lists(rows) == []
    assert (account.read, account.usable, account.tokens) == (1, 0, 0)


def test_texts_are_the_messages_of_the_first_usable_rows(write_jsonl):
    rows = [{"messages": "?"}, {"messages": [Q1, A1]}, {"messages": [Q2, A2]}, {"messages": [Q1]}]
    assert list(texts(resolve(str(write_jsonl(rows))), [rules()], limit=2)) == ["one?", "first", "two?", "second"]


ROW = st.lists(st.tuples(st.integers(0, 9), st.integers(-100, 9)), max_size=4).map(
    lambda pairs: ([token for token, _ in pairs], [label for _, label in pairs])
)
ROWS = st.lists(ROW, max_size=6)


class TestTokenRows:
    @given(ROWS)
    def test_they_hold_the_rows_they_are_made_of(self, rows):
        assert as_lists(TokenRows.of(rows)) == rows
        assert len(TokenRows.of(rows)) == len(rows)

    @given(ROWS.filter(len).flatmap(lambda rows: st.tuples(st.just(rows), st.lists(st.integers(0, len(rows) - 1)))))
    def test_take_is_indexing(self, rows_and_numbers):
        rows, numbers = rows_and_numbers
        taken = TokenRows.of(rows).in_shard(3).take(np.array(numbers, dtype=np.int64))
        assert as_lists(taken) == [rows[number] for number in numbers]
        assert taken.numbers.tolist() == numbers
        assert taken.shards.tolist() == [3] * len(numbers)

    @given(st.lists(ROWS, max_size=4))
    def test_join_is_concatenation(self, parts):
        joined = TokenRows.join([TokenRows.of(rows).in_shard(shard) for shard, rows in enumerate(parts)])
        assert as_lists(joined) == [row for rows in parts for row in rows]
        assert joined.numbers.tolist() == [number for rows in parts for number in range(len(rows))]
        assert joined.shards.tolist() == [shard for shard, rows in enumerate(parts) for _ in rows]
        assert {array.dtype for array in vars(joined).values()} == {np.dtype(np.int32)}
