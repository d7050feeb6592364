"""Documents are laid end to end and cut into rows: no token is lost, and all of them carry loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.chat import encode_plain
from dllm_ray.data import documents, sources
from dllm_ray.data.documents import pieces, row_lengths
from dllm_ray.data.sources import resolve
from dllm_ray.data.tokenize import RowRules, TokenRows, texts, tokenize_shard
from dllm_ray.errors import DataError

TEXTS = ["the quick brown fox", "reverse 123", "lazy dog <|endoftext|> 日本語"]


def rules(**changes) -> RowRules:
    return RowRules("text", {}, "last_answer", "right", **({"max_length": 8} | changes))


@pytest.fixture
def run(tokenizer, write_jsonl):
    """Tokenizes documents (or whole rows): `rows, account = run(["one", "two"], max_length=4)`."""

    def call(documents, **changes):
        (shard,) = resolve(str(write_jsonl([{"text": text} if isinstance(text, str) else text for text in documents])))
        return tokenize_shard(shard, tokenizer, [tokenizer.eos_token_id], rules(**changes))

    return call


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """What documents are as one stream."""

    def call(documents, eos: bool = True) -> list[int]:
        end = [tokenizer.eos_token_id] if eos else []
        return [token for text in documents for token in [*encode_plain(tokenizer, text), *end]]

    return call


class TestRows:
    @pytest.mark.parametrize("eos", [True, False])
    def test_rows_are_the_stream_of_documents_cut(self, run, tokens, eos):
        rows, account = run(TEXTS, document_eos=eos)
        stream = tokens(TEXTS, eos)
        assert rows.ids.tolist() == rows.labels.tolist() == stream
        assert rows.lengths.tolist() == [min(8, len(stream) - start) for start in range(0, len(stream), 8)]
        assert (account.read, account.usable) == (len(TEXTS), len(rows))
        assert account.tokens == account.targets == len(stream)

    def test_what_looks_like_a_control_token_is_text(self, run, tokenizer):
        rows, _ = run(TEXTS)
        assert (rows.ids == tokenizer.eos_token_id).sum() == len(TEXTS)

    def test_a_row_comes_from_where_its_first_token_lies(self, run, tokens):
        rows, _ = run(["", *TEXTS, {"id": 1}, TEXTS[0]], max_length=5)
        lengths = [len(tokens([text])) for text in [*TEXTS, TEXTS[0]]]
        origins = np.repeat([1, 2, 3, 5], lengths)
        assert rows.numbers.tolist() == origins[::5].tolist()

    def test_the_tail_may_be_dropped(self, run, tokens, tmp_path):
        stream = tokens(TEXTS)
        length = next(length for length in range(5, 20) if len(stream) % length)
        rows, account = run(TEXTS, max_length=length, drop_tail=True)
        assert set(rows.lengths) == {length}
        assert rows.ids.tolist() == stream[: len(stream) // length * length]
        assert account.dropped == {"too few tokens for a row": 1}
        (example,) = account.examples.values()
        assert example == f"{tmp_path}/rows.jsonl, line 3: {len(stream) % length} tokens at the end"

    def test_some_rows_are_cut_at_random_and_nothing_is_lost(self, run, tokens):
        def cut(seed: int) -> TokenRows:
            return run(TEXTS * 20, random_length=0.5, seed=seed)[0]

        rows = cut(0)
        assert rows.ids.tolist() == tokens(TEXTS * 20)
        assert 0.2 < (rows.lengths < 8).mean() < 0.7
        assert rows.lengths.tolist() == cut(0).lengths.tolist() != cut(1).lengths.tolist()

    @pytest.mark.parametrize(
        ("row", "changes", "reason"),
        [
            ({"id": 1}, {}, "no text"),
            ({"text": 3}, {}, "text is not text"),
            ({"text": " \n"}, {}, "empty text"),
            ("a", {"min_tokens": 3}, "shorter than 3 tokens"),
            ("reverse " * 9, {"max_tokens": 20}, "longer than 20 tokens"),
            (
                {"text": "the lazy fox", "language": "en"},
                {"where": {"language": [None, "de"]}},
                "filtered out by language",
            ),
        ],
    )
    def test_an_unusable_document_is_counted(self, run, tokens, row, changes, reason):
        rows, account = run([TEXTS[0], row, TEXTS[1]], **changes)
        assert account.dropped == {reason: 1}
        assert rows.ids.tolist() == tokens([TEXTS[0], TEXTS[1]])

    def test_no_usable_document_makes_no_row(self, run):
        rows, account = run([""])
        assert (len(rows), account.read, account.usable) == (0, 1, 0)

    def test_a_long_document_is_tokenized_in_pieces(self, run, monkeypatch, tokens):
        text = "the quick brown fox\njumps over the lazy dog\n" * 10
        whole = tokens([text])
        monkeypatch.setattr(documents, "PIECE_CHARACTERS", 50)
        rows, _ = run([text])
        assert rows.ids.tolist() == whole

    def test_texts_are_the_documents(self, write_jsonl):
        shards = resolve(str(write_jsonl([{"text": text} for text in ["", *TEXTS]])))
        assert list(texts(shards, [rules()], limit=2)) == TEXTS[:2]


class TestTextFile:
    TEXT = "\n".join(f"line {number}, and the quick brown fox" for number in range(40)) + "\n"

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "book.txt"
        path.write_text(self.TEXT, encoding="utf-8")
        return path

    @pytest.mark.parametrize("size", [10, 100, 10_000])
    def test_it_is_one_document_however_many_shards_it_is_read_in(self, path, size, monkeypatch, tokenizer, tokens):
        monkeypatch.setattr(sources, "SHARD_BYTES", size)
        shards = resolve(str(path))
        assert len(shards) == -(-len(self.TEXT) // size)
        parts = [tokenize_shard(shard, tokenizer, [tokenizer.eos_token_id], rules())[0] for shard in shards]
        assert np.concatenate([part.ids for part in parts]).tolist() == tokens([self.TEXT])

    def test_shards_name_their_lines(self, path, monkeypatch):
        monkeypatch.setattr(sources, "SHARD_BYTES", 100)
        shard = resolve(str(path))[1]
        ((number, row),) = shard.read()
        line = int(row["text"].split()[1].rstrip(",")) + 1
        assert shard.where(number) == f"{path}, line {line}"

    def test_other_bytes_are_refused_with_their_line(self, path):
        path.write_bytes(b"one\ntwo\n\xff\xfe\n")
        with pytest.raises(DataError, match=r"book.txt, line 3: not UTF-8"):
            list(resolve(str(path))[0].read())

    def test_a_byte_order_mark_is_no_text(self, path):
        path.write_bytes("\ufeffone".encode())
        assert [row["text"] for _, row in resolve(str(path))[0].read()] == ["one"]

    def test_text_beside_data_in_a_folder_is_not_data(self, path):
        assert [shard.name for shard in resolve(str(path.parent))] == [str(path)]
        (path.parent / "rows.jsonl").write_text("{}\n")
        assert [shard.name for shard in resolve(str(path.parent))] == [str(path.parent / "rows.jsonl")]


class TestPieces:
    @given(st.lists(st.sampled_from(["a", "bc", " ", "\n", "é" * 7]), max_size=80).map("".join))
    def test_they_are_the_text_and_no_longer_than_the_limit(self, text):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "PIECE_CHARACTERS", 10)
            found = list(pieces(text))
        assert "".join(found) == text
        assert all(0 < len(piece) <= 10 for piece in found)

    def test_they_end_with_a_line_or_before_a_space(self, monkeypatch):
        monkeypatch.setattr(documents, "PIECE_CHARACTERS", 8)
        assert list(pieces("one\ntwo three fourteen")) == ["one\n", "two", " three", " fourteen"[:8], "n"]


@given(st.integers(0, 500), st.integers(1, 20), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.integers(0, 3))
def test_row_lengths_add_up(total, max_length, random_length, drop_tail, seed):
    lengths = row_lengths(total, max_length, random_length, drop_tail, np.random.default_rng(seed))
    assert lengths.dtype == np.int32
    assert ((lengths > 0) & (lengths <= max_length)).all()
    assert total - max_length < lengths.sum() <= total if drop_tail else lengths.sum() == total
    if not random_length:
        assert (lengths[:-1] == max_length).all()
