"""Settings: where a value comes from, what is refused and how the message reads."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dllm_ray.config import flatten, instantiate, leaf_types, load_yaml, merge, parse, to_dict, to_yaml
from dllm_ray.errors import ConfigError


@dataclass
class Inner:
    depth: int = 2
    """How deep."""

    def __post_init__(self):
        if self.depth < 1:
            raise ConfigError(f"must be at least 1, got {self.depth}", "depth")


@dataclass
class Part:
    rows: int = 8
    """How many."""
    rate: float | None = None
    """How fast."""
    kind: Literal["plain", "fancy"] = "plain"
    """Which."""
    sizes: tuple[int, ...] = (1, 2)
    """How large."""
    names: dict[str, str] = field(default_factory=dict)
    """Other names."""
    inner: Inner = field(default_factory=Inner)
    """Inside."""


@dataclass
class Job:
    seed: int = 0
    """Seeds."""
    fresh: bool = False
    """Start over."""
    title: str | None = None
    """Title."""
    part: Part = field(default_factory=Part)
    """A part."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything."""

    def __post_init__(self):
        if self.part.kind == "fancy" and self.part.rate is None:
            raise ConfigError("fancy needs a rate", "part.rate")


@dataclass
class DeepPart:
    row_count: int = 8
    """How many."""
    row_names: list[str] = field(default_factory=lambda: ["a"])
    """Which."""
    data_files: dict[str, str] = field(default_factory=dict)
    """From where."""


@dataclass
class Hyphens:
    """Settings of several words."""

    dry_run: bool = False
    """Do nothing."""
    data_files: dict[str, str] = field(default_factory=dict)
    """From where."""
    deep_part: DeepPart = field(default_factory=DeepPart)
    """A part."""


def read(*argv: str) -> Job:
    return parse(Job, list(argv), "job", "A job.")


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "settings.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- where a value comes from


def test_without_files_and_options_the_defaults_count():
    assert read() == Job()


def test_a_file_wins_over_defaults_a_later_file_over_it_and_options_over_all(write):
    first = write("seed: 1\npart: {rows: 10, rate: 0.1, inner: {depth: 3}}", "first.yaml")
    second = write("part: {rows: 20, rate: 0.2}", "second.yaml")
    job = read("--part.rows", "30", "--config", first, "--config", second)
    assert (job.seed, job.part.rows, job.part.rate, job.part.inner.depth) == (1, 30, 0.2, 3)
    assert read("--config", second, "--config", first).part.rows == 10


def test_an_included_file_is_the_base_of_the_one_that_includes_it(write):
    write("seed: 1\npart: {rows: 10, rate: 0.1}", "base/a.yaml")
    write("part: {rate: 0.2}", "base/b.yaml")
    path = write("include: [base/a.yaml, base/b.yaml]\nseed: 2\npart: {kind: fancy}")
    assert read("--config", path) == Job(seed=2, part=Part(rows=10, rate=0.2, kind="fancy"))


def test_includes_are_relative_to_the_file_that_names_them(write):
    write("seed: 7", "base/deep/c.yaml")
    write("include: deep/c.yaml", "base/b.yaml")
    assert read("--config", write("include: base/b.yaml")).seed == 7


@pytest.mark.parametrize("argv", [("--fresh",), ("--fresh", "--seed", "1"), ("--fresh", "true"), ("--fresh=true",)])
def test_a_switch_needs_no_value(argv):
    assert read(*argv).fresh is True


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (("--part.rate", "2e-3"), 0.002),
        (("--part.rate=1",), 1.0),
        (("--part.rate", "null"), None),
        (("--part.rate", "-3"), -3.0),
    ],
)
def test_numbers_are_read_as_people_write_them(argv, value):
    assert read(*argv).part.rate == value


def test_lists_and_mappings_on_the_command_line():
    job = read("--part.sizes", "[3, 4]", "--part.names", "{a: b}", "--extra.depth", "5")
    assert (job.part.sizes, job.part.names, job.extra) == ((3, 4), {"a": "b"}, {"depth": 5})


def test_an_option_inside_a_mapping_keeps_the_other_keys(write):
    path = write("part: {names: {a: x, b: y}}")
    assert read("--config", path, "--part.names.b", "z").part.names == {"a": "x", "b": "z"}


@pytest.mark.parametrize("word", ["--dry-run", "--dry_run"])
def test_hyphens_in_an_option_may_stand_for_underscores(word):
    assert parse(Hyphens, [word], "job", "A job.").dry_run is True


def test_hyphens_in_the_name_of_a_nested_option_may_stand_for_underscores():
    job = parse(Hyphens, ["--deep-part.row-count", "3", "--deep-part.row-names+=b"], "job", "A job.")
    assert (job.deep_part.row_count, job.deep_part.row_names) == (3, ["a", "b"])


def test_hyphens_in_a_key_of_a_mapping_stay(write):
    job = parse(Hyphens, ["--deep-part.data-files.my-task", "x", "--data_files.a-b", "y"], "job", "A job.")
    assert (job.deep_part.data_files, job.data_files) == ({"my-task": "x"}, {"a-b": "y"})


def test_settings_are_printed_by_the_name_with_hyphens_too(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--print-config", "--seed", "3")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 3


def test_text_stays_text_whatever_it_looks_like():
    assert [read("--title", text).title for text in ("2024", "true", "[a]", "1e3")] == ["2024", "true", "[a]", "1e3"]


# --- what is refused


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--part.row", "3"), "unknown option --part.row; did you mean part.rows?"),
        (("--part.ro-ws", "3"), "unknown option --part.ro-ws; did you mean part.rows?"),
        (("--prat.rows", "3"), "unknown option --prat.rows; did you mean part.rows?"),
        (("--rows", "3"), "did you mean part.rows?"),
        (("--zzzzz", "3"), "--help lists every setting"),
        (("--part", "3"), "--part is a section"),
        (("--part.rows",), "--part.rows: a value is missing"),
        (("--part.rows", "--seed", "1"), "--part.rows: a value is missing"),
        (("--config",), "--config: a value is missing"),
        (("rows=3",), "unexpected argument 'rows=3'"),
        (("-s", "3"), "unexpected argument '-s'"),
        (("--extra.a.b", "5"), "unknown option --extra.a.b"),
        (("--part.rows", "many"), "part.rows: expected int, got many"),
        (("--part.rows", "1.5"), "part.rows: expected int, got 1.5"),
        (("--part.rows", "null"), "part.rows: expected int, got None"),
        (("--part.rate", "fast"), "part.rate: expected float or null, got fast"),
        (("--part.kind", "odd"), "part.kind: expected one of 'plain', 'fancy', got odd"),
        (("--part.sizes", "3"), "part.sizes: expected list of int, got 3"),
        (("--part.names", "[a]"), "part.names: expected mapping of str to str"),
        (("--fresh", "perhaps"), "fresh: expected bool, got perhaps"),
        (("--part.inner.depth", "0"), "part.inner.depth: must be at least 1, got 0"),
        (("--part.kind", "fancy"), "part.rate: fancy needs a rate"),
        (("--config", "no/such.yaml"), "no such settings file: no/such.yaml"),
    ],
)
def test_a_bad_command_line_is_refused_by_name(argv, said):
    with pytest.raises(ConfigError) as refused:
        read(*argv)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("part: {row: 3}", "unknown key 'part.row'; did you mean part.rows?"),
        ("prat: {rows: 3}", "unknown key 'prat'; did you mean part?"),
        ("part: {iner: {depth: 3}}", "unknown key 'part.iner'; did you mean part.inner?"),
        ("zzzzz: 3", "unknown key 'zzzzz'; --help lists every setting"),
        ("1: 2", "unknown key '1'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("part.inner.depth: 3", "part.inner.depth: dots are for the command line, write `part: {inner: {depth: ...}}`"),
        ("part: 3", "part: expected a section with keys, got 3"),
        ("part: [1]", "part: expected a section with keys"),
        ("part: {rows: many}", "part.rows: expected int, got many"),
        ("part: {rows: null}", "part.rows: expected int, got null"),
        ("part: {sizes: null}", "part.sizes: expected list of int, got null"),
        ("part: {names: null}", "part.names: expected mapping of str to str, got null"),
        ("fresh: null", "fresh: expected bool, got null"),
        ("seed: true", "seed: expected int, got True"),
        ("part: {sizes: [1, x]}", "part.sizes: expected list of int, got x"),
        ("part: {inner: {depth: 0}}", "part.inner.depth: must be at least 1, got 0"),
        ("- seed", "expected a mapping of settings at the top, found a list"),
        ("part: [", "broken YAML"),
        ("\tseed: 1", "broken YAML"),
        ("seed: !!python/object:os.system x", "broken YAML"),
        ("include: other.yaml", "no such settings file"),
        ("include: 3", "include: expected a file or a list of files, got 3"),
        ("include: null", "include: expected a file or a list of files, got None"),
        ("include: [3]", "include: expected a file or a list of files, got [3]"),
        ("include: {a: b}", "include: expected a file or a list of files"),
    ],
)
def test_a_bad_file_is_refused_by_name(write, text, said):
    with pytest.raises(ConfigError) as refused:
        read("--config", write(text))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_includes_itself_is_refused(write):
    write("include: b.yaml", "a.yaml")
    path = write("include: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match="includes itself"):
        read("--config", path)


def test_two_files_may_include_the_same_third(write):
    write("seed: 3", "base.yaml")
    write("include: base.yaml", "a.yaml")
    write("include: base.yaml", "b.yaml")
    assert read("--config", write("include: [a.yaml, b.yaml]")).seed == 3


def test_a_misspelt_file_name_gets_a_suggestion(write):
    path = write("seed: 3", "digits.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*digits\.yaml\?"):
        load_yaml(path.replace("digits", "digit"))


def test_a_folder_and_a_file_of_bytes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match="can't be read"):
        load_yaml(tmp_path / "bytes.yaml")


def test_an_empty_file_sets_nothing(write):
    assert read("--config", write("# nothing yet\n")) == Job()


# --- printing and the pieces


def test_print_config_prints_the_resolved_settings_and_stops(write, capsys):
    with pytest.raises(SystemExit) as stop:
        read("--config", write("seed: 3"), "--print_config", "--part.rate", "2e-3")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == to_dict(Job(seed=3, part=Part(rate=0.002)))


@pytest.mark.parametrize("title", ["# a heading", "~", "{not: yaml}", "1", "a: b", "[1"])
def test_text_is_taken_as_it_is(write, title):
    assert read("--title", title).title == title
    assert read("--config", write(yaml.safe_dump({"title": title}))).title == title


def test_null_on_the_command_line_is_null(write):
    assert read("--config", write("title: x"), "--title", "null").title is None


@example(Job(title="null"))
@given(
    st.builds(
        Job,
        seed=st.integers(),
        fresh=st.booleans(),
        title=st.none() | st.text(st.characters(categories=["L", "P", "S", "Zs"])),
        part=st.builds(
            Part,
            rows=st.integers(),
            rate=st.floats(allow_nan=False),
            sizes=st.lists(st.integers(), max_size=3).map(tuple),
            names=st.dictionaries(st.text("abc", min_size=1), st.text("abc123 ")),
        ),
    )
)
def test_printed_settings_read_back_to_the_same(tmp_path_factory, job):
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_text(to_yaml(job), encoding="utf-8")
    assert read("--config", str(path)) == job


def test_instantiate_puts_the_section_before_a_field_once():
    with pytest.raises(ConfigError) as refused:
        instantiate(Job, {"part": {"inner": {"depth": 0}}})
    assert refused.value.field == "part.inner.depth"


def test_leaf_types_names_every_setting_that_is_no_section():
    assert list(leaf_types(Job)) == [
        *("seed", "fresh", "title"),
        *(f"part.{name}" for name in ("rows", "rate", "kind", "sizes", "names", "inner.depth")),
        "extra",
    ]


def test_flatten_joins_keys_with_dots_and_keeps_empty_mappings():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_merge_leaves_what_it_is_given_alone():
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}
    assert merge(base, over) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert (base, over) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})


def test_to_dict_holds_plain_values_only():
    values = to_dict(dataclasses.replace(Job(), extra={"a": ({"b": (1, 2)},)}))
    assert values["part"]["sizes"] == [1, 2]
    assert values["extra"] == {"a": [{"b": [1, 2]}]}
