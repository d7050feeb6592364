"""From settings to everything training must know: what is held out, what is planned, and why data is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from dllm_ray.data import prepare, sources
from dllm_ray.data.config import DataConfig
from dllm_ray.data.tokenize import RowRules, TokenRows, texts
from dllm_ray.errors import DataError
from dllm_ray.models.tokenizers import train_bpe


def numbered(count: int, start: int = 0) -> list[dict]:
    """Rows that are told apart by their numbers, of different lengths."""
    return [{"prompt": f"{n}", "response": "0" * (n % 5) + f"{n}"} for n in range(start, start + count)]


def as_set(rows: TokenRows) -> set[tuple[int, ...]]:
    found = [tuple(row) for row in np.split(rows.ids, np.cumsum(rows.lengths)[:-1])]
    assert len(set(found)) == len(found)
    return set(found)


def training_rows(prepared) -> TokenRows:
    return TokenRows.join([prepared.read(window) for window in prepared.plan.windows(0, prepared.plan.rows)])


@pytest.fixture
def many_shards(write_jsonl, monkeypatch) -> str:
    """200 rows in some ten shards."""
    monkeypatch.setattr(sources, "SHARD_BYTES", 700)
    path = str(write_jsonl(numbered(200)))
    assert len(sources.resolve(path)) > 8
    return path


class TestHoldOut:
    def test_held_out_and_training_rows_are_the_usable_rows_in_two(self, many_shards, prepare_data):
        prepared = prepare_data(many_shards, valid_rows=20)
        everything = as_set(training_rows(prepare_data(many_shards, valid_rows=0)))
        train, valid = as_set(training_rows(prepared)), as_set(prepared.valid)
        assert (len(train), len(valid)) == (180, 20) == (prepared.plan.rows, len(prepared.valid))
        assert train | valid == everything

    def test_they_come_from_all_over_the_data(self, many_shards, prepare_data):
        prepared = prepare_data(many_shards, valid_rows=20)
        assert sum(len(numbers) > 0 for numbers in prepared.held_out) > 5

    def test_they_do_not_depend_on_the_order_in_which_shards_are_read_nor_on_the_shuffle(
        self, many_shards, prepare_data
    ):
        def backwards(function, items):
            return [function(item) for item in reversed(list(items))][::-1]

        one = prepare_data(many_shards, valid_rows=20)
        two = prepare_data(many_shards, valid_rows=20, mapper=backwards, shuffle_window=7)
        assert one.valid.ids.tolist() == two.valid.ids.tolist()
        assert one.account == two.account

    def test_fewer_are_some_of_more(self, many_shards, prepare_data):
        few, more = (prepare_data(many_shards, valid_rows=count).valid for count in (5, 20))
        assert as_set(few) < as_set(more)

    def test_another_seed_holds_out_others(self, many_shards, prepare_data):
        one, two = (as_set(prepare_data(many_shards, valid_rows=20, seed=seed).valid) for seed in (0, 1))
        assert one != two

    @pytest.mark.parametrize(("rows", "held_out"), [(200, 20), (35, 3), (9, 0)])
    def test_never_more_than_a_tenth(self, write_jsonl, prepare_data, rows, held_out):
        prepared = prepare_data(str(write_jsonl(numbered(rows))), valid_rows=1000)
        assert (len(prepared.valid), prepared.plan.rows) == (held_out, rows - held_out)

    def test_none_when_validation_is_off(self, many_shards, prepare_data):
        prepared = prepare_data(many_shards, valid_rows=0)
        assert (len(prepared.valid), prepared.plan.rows) == (0, 200)


class TestOwnValidationSource:
    @pytest.fixture
    def valid_path(self, write_jsonl) -> str:
        return str(write_jsonl([{"prompt": "no answer", "response": ""}, *numbered(50, start=1000)], "valid.jsonl"))

    def test_its_first_rows_are_taken(self, many_shards, valid_path, prepare_data, tokenizer):
        valid = prepare_data(many_shards, valid_path=valid_path, valid_rows=30).valid
        text = tokenizer.decode(valid.ids, skip_special_tokens=True)
        assert text == "".join(row["prompt"] + row["response"] for row in numbered(30, start=1000))

    def test_training_keeps_all_of_its_own(self, many_shards, valid_path, prepare_data):
        assert prepare_data(many_shards, valid_path=valid_path, valid_rows=30).plan.rows == 200

    def test_it_may_hold_fewer_rows_than_asked_for(self, many_shards, valid_path, prepare_data):
        prepared = prepare_data(many_shards, valid_path=valid_path, valid_rows=99)
        assert len(prepared.valid) == 50
        assert prepared.valid_account.dropped == {"empty answer": 1}

    def test_it_is_not_read_when_validation_is_off(self, many_shards, valid_path, prepare_data):
        prepared = prepare_data(many_shards, valid_path=valid_path, valid_rows=0)
        assert (len(prepared.valid), prepared.valid_account) == (0, None)

    def test_it_must_hold_a_usable_row(self, many_shards, write_jsonl, prepare_data):
        bad = str(write_jsonl([{"prompt": "q", "response": ""}], "bad.jsonl"))
        with pytest.raises(DataError, match=r"bad\.jsonl: none of its 1 rows can be used: empty answer \(1\)"):
            prepare_data(many_shards, valid_path=bad)


class TestRefusedData:
    def test_no_usable_row_shows_the_first_of_the_commonest_reason(self, write_jsonl, prepare_data, tmp_path):
        path = str(write_jsonl([{"prompt": 1, "response": "a"}] + [{"prompt": "q", "response": " "}] * 2))
        with pytest.raises(DataError) as caught:
            prepare_data(path)
        assert str(caught.value) == (
            f"{path}: none of its 3 rows can be used: empty answer (2), prompt is neither text nor a list of messages "
            f'(1); the first: {path}, line 2: {{"prompt": "q", "response": " "}}'
        )

    def test_prompts_that_leave_no_room_for_an_answer(self, write_jsonl, prepare_data):
        path = str(write_jsonl([{"prompt": "12345678", "response": "1"}] * 3))
        with pytest.raises(DataError, match=r"prompt longer than max_length \(3\); the first: .*rows.jsonl, line 1: {"):
            prepare_data(path, max_length=8)

    @pytest.mark.parametrize(
        ("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "prompt,response\n")]
    )
    def test_a_file_without_rows(self, tmp_path, prepare_data, name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}: holds no rows"):
            prepare_data(str(tmp_path / name))

    def test_columns_of_no_known_format(self, write_jsonl, prepare_data):
        with pytest.raises(DataError, match=r"rows\.jsonl, line 1: the columns 'q', 'a' are of no known format"):
            prepare_data(str(write_jsonl([{"q": "1", "a": "2"}])))

    def test_a_broken_line_far_into_the_data(self, many_shards, prepare_data):
        with Path(many_shards).open("a") as file:
            file.write('{"prompt": ')
        with pytest.raises(DataError, match=r"rows\.jsonl, line 201: not valid JSON"):
            prepare_data(many_shards)


class TestGlobalBatches:
    def test_they_are_the_rows_in_the_order_of_the_plan(self, many_shards, prepare_data):
        prepared = prepare_data(many_shards, valid_rows=20, shuffle_window=50)
        ordered = TokenRows.join([prepared.read(window) for window in prepared.plan.windows(0, 400)])
        batches = list(prepared.global_batches(16, 400))
        assert [len(batch) for batch in batches] == [16] * 25
        assert TokenRows.join(batches).ids.tolist() == ordered.take(np.arange(400)).ids.tolist()

    def test_every_pass_holds_every_training_row_once(self, many_shards, prepare_data):
        prepared = prepare_data(many_shards, valid_rows=20, shuffle_window=50)
        one, two = prepared.global_batches(180, 360)
        assert as_set(one) == as_set(two) == as_set(training_rows(prepared))
        assert one.ids.tolist() != two.ids.tolist()

    @pytest.mark.parametrize("step", [0, 1, 7, 12])
    def test_they_may_begin_in_the_middle(self, many_shards, prepare_data, step):
        prepared = prepare_data(many_shards, valid_rows=20, shuffle_window=50)
        whole = list(prepared.global_batches(16, 200))
        rest = list(prepared.global_batches(16, 200, start=16 * step))
        assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in whole[step:]]

    def test_the_last_may_be_smaller(self, many_shards, prepare_data):
        sizes = [len(batch) for batch in prepare_data(many_shards).global_batches(64, 150)]
        assert sizes == [64, 64, 22]


def test_padding_is_the_end_of_text_that_is_learnt_or_a_filler_that_is_not(many_shards, prepare_data, tokenizer):
    eos, ignore = (prepare_data(many_shards, padding=padding).padding for padding in ("eos", "ignore"))
    assert (eos.token_id, eos.supervised) == (tokenizer.eos_token_id, True)
    assert (ignore.token_id, ignore.supervised) == (tokenizer.pad_token_id, False)


class TestRealData:
    """Data sets as they were published, without a change of code or columns."""

    @pytest.mark.parametrize(
        ("name", "row_format", "rows"),
        [
            ("instruct/alpaca_en_demo.json", "instruction", 999),
            ("instruct/multiturn_demo.jsonl", "messages", 500),
        ],
    )
    def test_instructions_and_conversations(self, real_data, prepare_data, name, row_format, rows):
        prepared = prepare_data(str(real_data / name), max_length=20_000)
        assert {rules.row_format for rules in prepared.source.corpus.rules} == {row_format}
        assert prepared.account.read == rows
        assert prepared.account.usable + prepared.account.dropped.total() == rows
        assert prepared.account.usable > 0.99 * rows

    @pytest.mark.slow
    def test_gsm8k_with_a_tokenizer_of_its_own(self, real_data, prepare_data):
        path = str(real_data / "gsm8k/train.jsonl")
        shards = sources.resolve(path)
        rules = [RowRules("question_answer", {}, "last_answer", "right", 512)] * len(shards)
        first = texts(shards, rules, limit=1000)
        prepared = prepare_data(path, max_length=512, tokenizer=train_bpe(first, 2000))
        assert (prepared.account.read, prepared.account.usable, len(prepared.valid)) == (7473, 7473, 256)

    @pytest.mark.parametrize("name", ["countdown/cd3_test.jsonl", "sudoku/sudoku_4x4_4.jsonl"])
    def test_other_columns_are_named_in_the_settings(self, real_data, prepare_data, name):
        path = str(real_data / name)
        with pytest.raises(DataError, match="are of no known format"):
            prepare_data(path)
        columns = {"prompt": "input", "response": "output"}
        assert prepare_data(path, max_length=512, columns=columns).account.dropped == {}


def test_sources_of_different_formats_go_together(tmp_path, tokenizer):
    paths = []
    for name, row in (("a", {"prompt": "q", "response": "12"}), ("b", {"question": "q", "answer": "12"})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join([json.dumps(row)] * 5))
        paths.append(str(path))
    config = DataConfig(path=paths, valid_rows=0)
    corpus = prepare.resolve(config, config.path, 64)
    prepared = prepare.prepare(config, corpus, None, tokenizer, [1], 0, seed=0)
    assert (prepared.account.usable, prepared.plan.rows) == (10, 10)
