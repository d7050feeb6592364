"""Global batches are padded or packed, then dealt: what fills them up is or isn't trained, every worker gets as many
rows, and no row is lost or counted twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data.batches import PaddingRule, deal, pack, pad
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import ConfigError

EOS, FILLER, IGNORED = 1, 0, -100
ROWS = TokenRows.of([([5, 6, 7], [IGNORED, 6, 7]), ([8], [8])])
KINDS = ("eos", "ignore", "block", "eos_block")


def rule(kind: str, max_length: int = 8, block_size: int | None = 2) -> PaddingRule:
    return PaddingRule(kind, EOS, FILLER, max_length, block_size)


def samples(lengths) -> TokenRows:
    """Rows whose tokens say which row they are of (from 10 on)."""
    return TokenRows.of([([10 + number] * length, [10 + number] * length) for number, length in enumerate(lengths)])


RULES = st.builds(rule, st.sampled_from(KINDS), st.integers(4, 7), st.integers(1, 3))
BATCHES = st.builds(
    lambda lengths, rule: pad(samples(lengths), rule), st.lists(st.integers(1, 4), min_size=1, max_size=7), RULES
)


class TestPad:
    def test_end_of_text_is_attended_and_carries_loss(self):
        batch = pad(ROWS, rule("eos"))
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, EOS, EOS]]
        assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, EOS, EOS]]

    def test_padding_is_neither_seen_nor_trained(self):
        batch = pad(ROWS, rule("ignore"))
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, FILLER, FILLER]]
        assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]

    def test_a_row_may_be_completed_to_the_end_of_its_own_block(self):
        batch = pad(ROWS, rule("block"))
        assert batch["input_ids"].tolist() == [[5, 6, 7, EOS], [8, EOS, FILLER, FILLER]]
        assert batch["labels"].tolist() == [[IGNORED, 6, 7, EOS], [8, EOS, IGNORED, IGNORED]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]

    def test_or_to_the_end_of_the_longest_rows_last_block(self):
        batch = pad(ROWS, rule("eos_block"))
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].tolist() == [[5, 6, 7, EOS], [8, EOS, EOS, EOS]]
        assert batch["labels"].tolist() == [[IGNORED, 6, 7, EOS], [8, EOS, EOS, EOS]]

    @pytest.mark.parametrize("kind", ["block", "eos_block"])
    def test_a_row_that_was_cut_does_not_learn_to_end(self, kind):
        batch = pad(ROWS, rule(kind, max_length=3))
        assert batch["input_ids"][0].tolist() == [5, 6, 7, FILLER]
        assert batch["labels"][0].tolist() == [IGNORED, 6, 7, IGNORED]
        assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0]

    @pytest.mark.parametrize("kind", KINDS)
    def test_everything_is_int64(self, kind):
        assert {array.dtype for array in pad(ROWS, rule(kind)).values()} == {np.dtype(np.int64)}

    @given(st.lists(st.integers(1, 7), min_size=1, max_size=7), RULES)
    def test_filler_is_trained_where_it_is_end_of_text_and_seen_where_it_is_trained(self, lengths, rule):
        lengths = np.minimum(lengths, rule.max_length)
        batch = pad(samples(lengths), rule)
        filler = np.arange(batch["labels"].shape[1]) >= lengths[:, None]
        assert (batch["labels"] == np.where(filler & (batch["input_ids"] != EOS), IGNORED, batch["input_ids"])).all()
        seen = batch.get("attention_mask", np.ones_like(batch["labels"]))
        assert (seen == (batch["labels"] != IGNORED)).all()
        assert batch["labels"].shape[1] % rule.multiple == 0

    @pytest.mark.parametrize("kind", ["block", "eos_block"])
    def test_whole_blocks_need_a_block_size(self, kind):
        with pytest.raises(ConfigError, match=f"{kind} fills up blocks: it needs objective.name bd3lm") as caught:
            rule(kind, block_size=None)
        assert caught.value.field == "padding"


class TestPack:
    def test_samples_share_rows_and_begin_at_position_0(self):
        rows = TokenRows.join([ROWS, samples([2])])
        batch = pack(rows, np.array([0, 0, 1]), rule("ignore", max_length=6))
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8, FILLER, FILLER], [10, 10, *[FILLER] * 4]]
        assert batch["labels"].tolist() == [[IGNORED, 6, 7, 8, IGNORED, IGNORED], [10, 10, *[IGNORED] * 4]]
        assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 0, 0], [1, 1, 0, 0, 0, 0]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 0, 0, 0, 0]]

    def test_each_may_be_completed_to_whole_blocks(self):
        batch = pack(ROWS, np.array([0, 0]), rule("block", max_length=6))
        assert batch["input_ids"].tolist() == [[5, 6, 7, EOS, 8, EOS]]
        assert batch["labels"].tolist() == [[IGNORED, 6, 7, EOS, 8, EOS]]
        assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]

    def test_a_sample_that_was_cut_is_not(self):
        batch = pack(ROWS, np.array([0, 1]), rule("block", max_length=3))
        assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED], [8, EOS, IGNORED, IGNORED]]
        assert batch["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]

    @pytest.mark.parametrize(("kind", "inside"), [("eos", "ignore"), ("eos_block", "block")])
    def test_rows_are_never_filled_up_with_end_of_text(self, kind, inside):
        packs = np.array([0, 0])
        ours, theirs = (pack(ROWS, packs, rule(name)) for name in (kind, inside))
        assert all((ours[name] == theirs[name]).all() for name in theirs)

    @given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4), RULES)
    def test_a_segment_is_what_the_sample_is_when_padded_alone(self, rows, rule):
        lengths = [length for row in rows for length in row]
        packs = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        # room for four samples, completed to blocks, and none that counts as cut
        rule = PaddingRule(rule.kind, EOS, FILLER, 40, rule.block_size)
        batch = pack(samples(lengths), packs, rule)
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
        number = 0
        for row, own in enumerate(rows):
            assert batch["segment_ids"][row].max() == len(own)
            for segment in range(1, len(own) + 1):
                at = batch["segment_ids"][row] == segment
                alone = pad(samples(lengths).take(np.array([number])), rule.in_packs())
                assert batch["input_ids"][row][at].tolist() == alone["input_ids"][0].tolist()
                assert batch["labels"][row][at].tolist() == alone["labels"][0].tolist()
                assert batch["position_ids"][row][at].tolist() == list(range(at.sum()))
                assert np.flatnonzero(at).tolist() == list(range(at.argmax(), at.argmax() + at.sum()))
                number += 1
        nothing = batch["segment_ids"] == 0
        assert (batch["labels"][nothing] == IGNORED).all()
        assert (batch["position_ids"][nothing] == 0).all()


class TestDeal:
    @given(BATCHES, st.integers(1, 5))
    def test_the_parts_are_equal_and_together_the_batch_with_filler_without_labels(self, batch, workers):
        parts = deal(batch, workers)
        rows = len(batch["input_ids"])
        assert len(parts) == workers
        assert {len(array) for part in parts for array in part.values()} == {-(-rows // workers)}
        for name, array in batch.items():
            together = np.concatenate([part[name] for part in parts])
            assert (together[:rows] == array).all()
            if name == "labels":
                assert (together[rows:] == IGNORED).all()

    @given(BATCHES, st.integers(1, 5))
    def test_filler_is_as_long_and_as_attended_as_a_real_row(self, batch, workers):
        parts = deal(batch, workers)
        for name in batch.keys() - {"labels"}:
            filler = np.concatenate([part[name] for part in parts])[len(batch["input_ids"]) :]
            assert (filler == batch[name][0]).all()

    def test_packed_batches_are_dealt_with_all_they_have(self):
        parts = deal(pack(ROWS, np.array([0, 0]), rule("ignore")), 2)
        assert parts[0].keys() == parts[1].keys() == {"input_ids", "labels", "segment_ids", "position_ids"}
        assert (parts[1]["labels"] == IGNORED).all()
        assert (parts[1]["segment_ids"] == parts[0]["segment_ids"]).all()
