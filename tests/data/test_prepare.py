"""From settings to everything training must know: what is held out, what is planned, and why data is refused."""

import json
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from dllm_ray.data import prepare, sources
from dllm_ray.data.config import DataConfig, FilterConfig, SourceConfig
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
    """The rows of one pass over each source."""
    return TokenRows.join(
        [
            prepared.feed.read(source, window)
            for source, plan in enumerate(prepared.feed.plans)
            for window in takewhile(lambda window: window.epoch == 0, plan.windows())
        ]
    )


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
        assert (len(train), len(valid)) == (180, 20) == (prepared.rows, prepared.held_out)
        assert train | valid == everything

    def test_they_come_from_all_over_the_data(self, many_shards, prepare_data):
        prepared = prepare_data(many_shards, valid_rows=20)
        assert len(prepared.feed.left_out[0]) > 5

    def test_they_do_not_depend_on_the_order_in_which_shards_are_read_nor_on_the_shuffle(
        self, many_shards, prepare_data
    ):
        def backwards(function, items):
            return [function(item) for item in reversed(list(items))][::-1]

        one = prepare_data(many_shards, valid_rows=20)
        two = prepare_data(many_shards, valid_rows=20, mapper=backwards, shuffle_mb=0.001)
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
        assert (len(prepared.valid), prepared.rows) == (held_out, rows - held_out)

    def test_none_when_validation_is_off(self, many_shards, prepare_data):
        prepared = prepare_data(many_shards, valid_rows=0)
        assert (len(prepared.valid), prepared.rows) == (0, 200)


class TestOwnValidationSource:
    @pytest.fixture
    def valid_path(self, write_jsonl) -> str:
        return str(write_jsonl([{"prompt": "no answer", "response": ""}, *numbered(50, start=1000)], "valid.jsonl"))

    def test_its_first_rows_are_taken(self, many_shards, valid_path, prepare_data, tokenizer):
        valid = prepare_data(many_shards, valid_path=valid_path, valid_rows=30).valid
        text = tokenizer.decode(valid.ids, skip_special_tokens=True)
        assert text == "".join(row["prompt"] + row["response"] for row in numbered(30, start=1000))

    def test_training_keeps_all_of_its_own(self, many_shards, valid_path, prepare_data):
        assert prepare_data(many_shards, valid_path=valid_path, valid_rows=30).rows == 200

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


def test_padding_is_the_settings_else_the_models_own(many_shards, prepare_data):
    assert prepare_data(many_shards).padding.kind == "eos"
    assert prepare_data(many_shards, padding="ignore").padding.kind == "ignore"
    assert prepare_data(many_shards, packing=True).padding.kind == "ignore"
    assert prepare_data(many_shards, packing=True, padding="block").padding.kind == "block"


def test_documents_are_not_taught_to_end_where_they_were_cut(write_jsonl, prepare_data):
    path = str(write_jsonl([{"text": "hello world"}] * 30))
    prepared = prepare_data(path, format="text", max_length=16)
    assert prepared.padding.kind == "ignore"
    assert (prepared.valid.labels == prepared.valid.ids).all()


class TestSources:
    @pytest.fixture
    def two(self, write_jsonl) -> list[str]:
        one = [row | {"kind": "even" if n % 2 == 0 else "odd"} for n, row in enumerate(numbered(60))]
        return [str(write_jsonl(one, "one.jsonl")), str(write_jsonl(numbered(40, start=1000), "two.jsonl"))]

    def test_each_has_an_account_of_its_own(self, two, prepare_data):
        prepared = prepare_data(sources=[SourceConfig(two[0], name="first"), SourceConfig(two[1])])
        assert {name: account.usable for name, account in prepared.accounts.items()} == {"first": 60, two[1]: 40}
        assert prepared.account.usable == 100

    def test_a_filter_keeps_some_rows_and_counts_the_others(self, two, prepare_data):
        usual = int(np.median(prepare_data(two[0], valid_rows=0).lengths[0][0]))
        chosen = FilterConfig(where={"kind": "even"}, min_tokens=usual)
        prepared = prepare_data(sources=[SourceConfig(two[0], filter=chosen)], valid_rows=0)
        account = prepared.account
        assert 0 < prepared.rows < 30
        assert account.usable == prepared.rows
        assert account.dropped.total() == 60 - prepared.rows
        assert len(account.dropped) == 2

    def test_a_filter_that_leaves_nothing_is_refused(self, two, prepare_data):
        nothing = SourceConfig(two[0], name="first", filter=FilterConfig(where={"kind": "none"}))
        with pytest.raises(DataError, match="first: none of its 60 rows can be used"):
            prepare_data(sources=[nothing])

    @pytest.mark.parametrize("max_steps", [None, 10])
    @pytest.mark.parametrize("limit", [1, 37, 200, 1000])
    def test_a_limit_takes_the_first_rows(self, many_shards, prepare_data, limit, max_steps, monkeypatch):
        everything = prepare_data(many_shards, valid_rows=0)
        in_order = [everything.feed.kept[0, shard][0] for shard in range(len(everything.feed.plans[0].shard_bytes))]
        monkeypatch.setattr(prepare, "LOCAL_BYTES", 0)
        prepared = prepare_data(sources=[SourceConfig(many_shards, rows=limit)], valid_rows=5, max_steps=max_steps)
        own = as_set(training_rows(prepared)) | (as_set(prepared.valid) if prepared.held_out else set())
        first = TokenRows.join(in_order)
        assert own == as_set(first.take(np.arange(min(limit, len(first)))))
        assert prepared.held_out == min(5, min(limit, 200) // 10)

    def test_orders_of_sources_follow_from_the_seed_or_their_own(self, two, prepare_data):
        def orders(seed, own):
            config = [SourceConfig(two[0], name="a", seed=own), SourceConfig(two[0], name="b")]
            prepared = prepare_data(sources=config, seed=seed, valid_rows=0)
            windows = [next(plan.windows()) for plan in prepared.feed.plans]
            return [plan.order(window, 60).tolist() for plan, window in zip(prepared.feed.plans, windows, strict=True)]

        (a, b), (c, d) = orders(0, None), orders(1, None)
        assert len({tuple(order) for order in (a, b, c, d)}) == 4
        (e, f), (g, h) = orders(0, 5), orders(1, 5)
        assert e == g
        assert f == b != h == d

    def test_the_beginning_of_all_sources_comes_first(self, two, many_shards):
        corpus = prepare.resolve(DataConfig(path=[*two, many_shards]), 64)
        assert len({shard.name for shard in corpus.shards[:3]}) == 3
        assert len(corpus.shards) == len(corpus.rules) == sum(len(source.shards) for source in corpus.sources)


class TestWithoutSurvey:
    """A run told by steps, over data that is not small."""

    @pytest.fixture
    def streamed(self, prepare_data, monkeypatch):
        monkeypatch.setattr(prepare, "LOCAL_BYTES", 0)
        return partial(prepare_data, max_steps=20)

    def test_only_the_beginning_is_read(self, streamed, many_shards):
        with Path(many_shards).open("a") as file:
            file.write("broken")
        prepared = streamed(many_shards)
        assert not prepared.surveyed
        assert (prepared.rows, prepared.lengths) == (None, None)
        assert 0 < prepared.account.read < 40

    def test_the_beginning_is_kept_and_comes_first(self, streamed, many_shards):
        prepared = streamed(many_shards)
        assert list(prepared.feed.kept) == [(0, 0)]
        first = next(prepared.feed.plans[0].windows())
        assert first.shards == (0,)
        assert len(prepared.feed.read(0, first)) == prepared.account.usable - prepared.held_out

    def test_what_is_held_out_is_not_trained_on(self, streamed, many_shards, prepare_data):
        prepared = streamed(many_shards, valid_rows=2)
        train, valid = as_set(training_rows(prepared)), as_set(prepared.valid)
        assert len(valid) == prepared.held_out > 0
        assert (len(train), train & valid) == (200 - len(valid), set())

    def test_its_fingerprint_tells_data_apart(self, streamed, many_shards, write_jsonl):
        one = streamed(many_shards).fingerprint
        assert one == streamed(many_shards).fingerprint
        with Path(many_shards).open("a") as file:
            file.write("\n")
        assert one != streamed(many_shards).fingerprint
        assert len(one) == 64

    def test_a_broken_file_is_named_when_it_is_met(self, streamed, many_shards):
        with Path(many_shards).open("a") as file:
            file.write('{"prompt": ')
        prepared = streamed(many_shards)
        with pytest.raises(DataError, match=r"rows\.jsonl, line 201: not valid JSON"):
            list(prepared.batches(prepared.run(1.0, 20)))

    @pytest.mark.parametrize(("steps", "size", "wanted"), [(None, 1, True), (None, -1, False), (5, 1, False)])
    def test_ray_is_needed_for_a_whole_survey_of_much_data(self, many_shards, monkeypatch, steps, size, wanted):
        corpus = prepare.resolve(DataConfig(path=many_shards), 64)
        monkeypatch.setattr(prepare, "LOCAL_BYTES", corpus.size - size)
        assert prepare.needs_ray(corpus, steps) is wanted


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
        assert {rules.row_format for rules in prepared.feed.tokenized.corpus.rules} == {row_format}
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


def test_sources_of_different_formats_go_together(tmp_path, prepare_data):
    paths = []
    for name, row in (("a", {"prompt": "q", "response": "12"}), ("b", {"question": "q", "answer": "12"})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join([json.dumps(row)] * 5))
        paths.append(str(path))
    prepared = prepare_data(paths, valid_rows=0)
    assert (prepared.account.usable, prepared.rows) == (10, 10)


def test_a_small_source_of_a_mixture_keeps_a_row_to_train_on(tmp_path, tokenizer):
    for name, count in (("many", 50), ("one", 1)):
        rows = [json.dumps({"prompt": f"{name} {number}", "response": "1"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = [SourceConfig(str(tmp_path / f"{name}.jsonl"), name) for name in ("many", "one")]
    config = DataConfig(sources=sources)
    for seed in range(40):
        corpus = prepare.resolve(config, 64, seed)
        prepared = prepare.prepare(config, corpus, None, tokenizer, [1], 0, seed, batch_size=4, max_length=64)
        assert prepared.rows + len(prepared.valid) == 51
        assert prepared.run(1.0, None).rows == prepared.rows
