"""Sources become shards, and shards yield every row once, in order, with its origin."""

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data import sources
from dllm_ray.data.builtin import digits
from dllm_ray.data.sources import head, resolve, snippet
from dllm_ray.errors import DataError

ROWS = [{"prompt": f"p{number}", "response": "é\n🙂"} for number in range(25)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def read(source) -> list[dict]:
    return [row for shard in resolve(source) for _, row in shard.read()]


def origins(source) -> list[str]:
    return [shard.where(number) for shard in resolve(source) for number, _ in shard.read()]


def write_parquet(path, row_group_size: int = 10):
    # uncompressed and plain, so that a test can damage a page without touching the footer
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, path, row_group_size=row_group_size, compression="none", use_dictionary=False)
    return path


def write_csv(path, encoding: str = "utf-8"):
    lines = ["prompt,response", *(f'{row["prompt"]},"{row["response"]}"' for row in ROWS)]
    path.write_text("\n".join(lines), encoding=encoding)
    return path


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("\n".join(LINES), encoding="utf-8"),
    "rows.ndjson": lambda path: path.write_text("\n".join(LINES) + "\n", encoding="utf-8"),
    "bom.jsonl": lambda path: path.write_text("\n".join(LINES), encoding="utf-8-sig"),
    "UPPER.JSONL": lambda path: path.write_text("\n".join(LINES), encoding="utf-8"),
    "odd [1]?.jsonl": lambda path: path.write_text("\n".join(LINES), encoding="utf-8"),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "object.json": lambda path: path.write_text(json.dumps({"version": 1, "tags": ["a"], "data": ROWS})),
    "lines.json": lambda path: path.write_text("\n".join(LINES), encoding="utf-8"),
    "rows.csv": write_csv,
    "bom.csv": lambda path: write_csv(path, "utf-8-sig"),
    "groups.parquet": write_parquet,
}


class TestFiles:
    @pytest.mark.parametrize("name", WRITERS)
    def test_every_kind_of_file_gives_its_rows(self, tmp_path, name):
        WRITERS[name](tmp_path / name)
        assert read(str(tmp_path / name)) == ROWS

    def test_line_ends_inside_a_csv_field_stay_as_they_are(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b'prompt,response\r\n"a\r\nb","c\nd"\r\n')
        assert read(str(tmp_path / "a.csv")) == [{"prompt": "a\r\nb", "response": "c\nd"}]

    def test_a_parquet_file_has_a_shard_for_each_row_group(self, tmp_path):
        shards = resolve(str(write_parquet(tmp_path / "a.parquet", row_group_size=10)))
        assert [len(list(shard.read())) for shard in shards] == [10, 10, 5]

    def test_a_file_url_is_a_file(self, tmp_path):
        WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
        assert read((tmp_path / "rows.jsonl").as_uri()) == ROWS

    @pytest.mark.parametrize("source", ["memory://bucket/rows.jsonl", "memory://bucket", "memory://bucket/*.jsonl"])
    def test_other_storage_is_read_by_its_url(self, source):
        fsspec.filesystem("memory").pipe("/bucket/rows.jsonl", "\n".join(LINES).encode())
        assert read(source) == ROWS

    def test_a_path_may_begin_in_the_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
        assert read("~/rows.jsonl") == ROWS


class TestSeveralFiles:
    @pytest.fixture
    def folder(self, write_jsonl, tmp_path):
        (tmp_path / "deeper").mkdir()
        for name in ["b.jsonl", "a.jsonl", "deeper/c.jsonl"]:
            write_jsonl([{"from": name}], name)
        (tmp_path / "README.md").write_text("not data")
        return tmp_path

    @pytest.mark.parametrize(
        ("source", "names"),
        [
            ("*.jsonl", ["a.jsonl", "b.jsonl"]),
            ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deeper/c.jsonl"]),
            (".", ["a.jsonl", "b.jsonl", "deeper/c.jsonl"]),
            (["b.jsonl", "deeper", "a.jsonl"], ["b.jsonl", "deeper/c.jsonl", "a.jsonl"]),
        ],
        ids=["glob", "deep glob", "folder", "list"],
    )
    def test_globs_and_folders_are_sorted_and_lists_keep_their_order(self, folder, monkeypatch, source, names):
        monkeypatch.chdir(folder)
        assert [row["from"] for row in read(source)] == names

    def test_a_file_of_unknown_type_is_refused_when_named_itself(self, folder):
        with pytest.raises(DataError, match=r"README\.md: unknown file type '\.md'; expected \.jsonl"):
            resolve(str(folder / "README.md"))

    def test_a_folder_without_data_files_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="no data files in this folder"):
            resolve(str(tmp_path))

    def test_head_goes_on_to_the_next_shard(self, folder):
        found = head(resolve(str(folder)), 2)
        assert [row["from"] for _, row in found] == ["a.jsonl", "b.jsonl"]
        assert found[1][0] == f"{folder}/b.jsonl, line 1"


class TestNothingThere:
    @pytest.mark.parametrize(
        "source", ["missing.jsonl", "./missing", "/no/such/folder", "*.nothing", "memory://missing.jsonl", "a/b/c"]
    )
    def test_a_missing_file_is_named(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError) as caught:
            resolve(source)
        assert str(caught.value) == f"no such file, folder or pattern: {source}"

    def test_an_unknown_kind_of_storage_is_named(self):
        with pytest.raises(DataError, match=r"nowhere://rows\.jsonl: can't be looked up"):
            resolve("nowhere://rows.jsonl")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
    def test_an_empty_file_is_named(self, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"{name}: the file is empty"):
            resolve(str(tmp_path / name))


class TestBrokenFiles:
    @pytest.mark.parametrize("shard_bytes", [1, 64, 100, 4 << 20])
    def test_a_broken_line_is_named_whatever_the_size_of_shards(self, tmp_path, monkeypatch, shard_bytes):
        monkeypatch.setattr(sources, "SHARD_BYTES", shard_bytes)
        lines = [*LINES[:16], '{"prompt": "p16", "resp', *LINES[17:]]
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(DataError, match=r"train\.jsonl, line 17: not valid JSON .*: {\"prompt\": \"p16\", \"resp$"):
            read(str(path))

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"[1, 2]", r"expected a JSON object, found: \[1, 2\]"),
            (b'"text"', 'expected a JSON object, found: "text"'),
            (b'{"a": "\xff"}', "not valid JSON .*utf-8"),
        ],
    )
    def test_a_line_that_is_no_object_of_text_is_named(self, tmp_path, line, reason):
        (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line)
        with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {reason}"):
            read(str(tmp_path / "a.jsonl"))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("[{", "not valid JSON"),
            ("[1, 2]", "expected a list of JSON objects, or an object that holds one"),
            ('{"a": 1}', "expected a list of JSON objects, or an object that holds one"),
            ('{"a": [{}], "b": [{}]}', "expected a list of JSON objects, or an object that holds one"),
        ],
    )
    def test_json_that_holds_no_list_of_rows_is_named(self, tmp_path, content, reason):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=rf"a\.json: {reason}"):
            read(str(tmp_path / "a.json"))

    def test_bytes_that_are_no_text_in_a_csv_file_are_named(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"prompt,response\n\xff,b\n")
        with pytest.raises(DataError, match=r"a\.csv, line \d+: not readable as CSV: .*utf-8"):
            read(str(tmp_path / "a.csv"))

    def test_a_file_that_is_no_parquet_is_named(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
        with pytest.raises(DataError, match=r"a\.parquet: not a parquet file"):
            resolve(str(tmp_path / "a.parquet"))

    def test_a_damaged_page_of_a_parquet_file_is_named(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet")
        content = bytearray(path.read_bytes())
        start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
        content[start : start + 20] = b"\xff" * 20  # a page's header; the footer, with the schema, stays whole
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet, row 10: not readable as parquet: "):
            read(str(path))


class TestOrigins:
    def test_jsonl_rows_are_numbered_by_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "SHARD_BYTES", 40)
        path = tmp_path / "a.jsonl"
        path.write_text(LINES[0] + "\n\n" + "\n".join(LINES[1:]), encoding="utf-8")
        assert origins(str(path)) == [f"{path}, line {number}" for number in [1, *range(3, 27)]]

    def test_csv_rows_are_numbered_by_line(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("prompt,response\na,b\n\nc,d\n")
        assert origins(str(path)) == [f"{path}, line 2", f"{path}, line 4"]

    def test_parquet_rows_are_numbered_through_all_row_groups(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet")
        assert origins(str(path)) == [f"{path}, row {number}" for number in range(25)]

    def test_generated_rows_name_their_split(self, monkeypatch):
        monkeypatch.setattr(sources, "SHARD_ROWS", 2)
        assert origins("builtin:digits[test:3]") == [f"builtin:digits[test], row {number}" for number in range(3)]

    def test_a_snippet_is_short(self):
        assert snippet({"a": "é"}) == '{"a": "é"}'
        assert len(snippet("x" * 1000)) < 250


BLANK = st.sampled_from(["", " ", "\t"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.just("long" * 40)
LINE = BLANK | TEXT.map(lambda text: json.dumps({"text": text}, ensure_ascii=False))


@given(
    lines=st.lists(LINE, min_size=1, max_size=12),
    newline=st.sampled_from(["\n", "\r\n"]),
    ends_with_newline=st.booleans(),
    shard_bytes=st.integers(1, 90),
)
def test_every_line_is_read_once_in_order_with_its_number(
    tmp_path_factory, lines, newline, ends_with_newline, shard_bytes
):
    content = newline.join(lines) + (newline if ends_with_newline else "")
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content.encode() or b"\n")
    expected = [(f"{path}, line {n}", json.loads(line)) for n, line in enumerate(lines, start=1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SHARD_BYTES", shard_bytes)
        shards = resolve(str(path))
        assert [(shard.where(number), row) for shard in shards for number, row in shard.read()] == expected


class TestBuiltin:
    def test_its_shards_laid_end_to_end_are_its_rows(self, monkeypatch):
        monkeypatch.setattr(sources, "SHARD_ROWS", 10)
        assert len(resolve("builtin:digits[train:25]")) == 3
        assert read("builtin:digits[train:25]") == list(digits.rows("train", 0, 25))

    def test_a_seed_may_be_given(self):
        assert read("builtin:digits?seed=4[test:5]") == list(digits.rows("test", 0, 5, seed=4))

    def test_it_is_the_training_split_unless_told_otherwise(self):
        assert head(resolve("builtin:digits"), 1)[0][1] == next(digits.rows("train", 0, 1))

    @pytest.mark.parametrize("source", ["builtin:letters", "builtin:digits[valid:3]", "builtin:digits[train:x]"])
    def test_another_name_or_split_is_refused(self, source):
        with pytest.raises(DataError, match="no such generated data set; expected builtin:digits"):
            resolve(source)

    def test_no_rows_are_refused(self):
        with pytest.raises(DataError, match="asks for no rows"):
            resolve("builtin:digits[train:0]")


class TestHub:
    """A local folder stands in for a hub data set: `datasets.load_dataset` opens both."""

    @pytest.fixture
    def name(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "name").mkdir()
        (tmp_path / "name" / "train.jsonl").write_text("\n".join(LINES), encoding="utf-8")
        return str(tmp_path / "name")

    @pytest.mark.parametrize(("limit", "count"), [("", 25), (":10", 10), (":99", 25)])
    def test_a_slice_takes_the_first_rows_of_a_split(self, name, monkeypatch, limit, count):
        monkeypatch.setattr(sources, "SHARD_ROWS", 4)
        assert read(f"{name}[train{limit}]") == ROWS[:count]
        assert origins(f"{name}[train{limit}]")[-1] == f"{name}[train], row {count - 1}"

    def test_an_unknown_split_is_named(self, name):
        with pytest.raises(DataError, match=r"name\[test\]: neither a file nor a data set.*test"):
            resolve(f"{name}[test]")

    def test_no_rows_are_refused(self, name):
        with pytest.raises(DataError, match=r"name\[train\]: the split is empty"):
            resolve(f"{name}[train:0]")

    @pytest.mark.parametrize("source", ["nobody/no-such-data", "no-such-data", "nobody/no-such-data[train:10]"])
    def test_a_data_set_that_cannot_be_reached_is_named(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=r"no-such-data\[train\]: neither a file nor a data set that can be loaded"):
            resolve(source)


@pytest.mark.parametrize("pattern", ["p*.jsonl", "p?.jsonl", "p[0-1].jsonl"])
def test_every_kind_of_pattern_finds_its_files(tmp_path, pattern):
    for name in ("p0", "p1", "q0"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"from": name}))
    assert [row["from"] for row in read(f"{tmp_path}/{pattern}")] == ["p0", "p1"]


def test_a_long_csv_field_is_read(tmp_path):
    (tmp_path / "long.csv").write_text("prompt,response\nq," + "x" * 200_000)
    assert len(read(str(tmp_path / "long.csv"))[0]["response"]) == 200_000


def test_json_nested_beyond_reason_is_named(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"deep\.jsonl, line 1: not valid JSON"):
        read(str(tmp_path / "deep.jsonl"))
