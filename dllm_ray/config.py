"""Typed job settings: dataclass defaults <- YAML files <- dotted overrides on the command line.

A job's settings are one dataclass made of the components' own dataclasses, each field with a docstring. This module
knows nothing about any particular job, and imports nothing heavy, so `--help` and bad input answer at once.
"""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dllm_ray.errors import ConfigError

T = TypeVar("T")

_CREDENTIALS = re.compile(r"(\w://)[^/@\s]+@")  # user:password@ of a URL


class Cluster(typing.Protocol):
    """What a file that `--cluster` names says."""

    def settings(self, names: Collection[str]) -> dict[str, Any]:
        """Values for some of a job's settings, whose dotted names are given."""
        ...

    def places(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Other values for those of a job's settings that name a place; both by dotted name."""
        ...


def parse(
    job: type[T],
    argv: list[str],
    prog: str,
    description: str,
    defaults: Mapping[str, Callable[[Mapping[str, Any]], Mapping]] | None = None,
    cluster: Callable[[str | None], Cluster | None] | None = None,
) -> T:
    """Reads the settings of one job.

    Args:
        job: the job's dataclass; nested dataclass fields become dotted options.
        argv: the command line without the program's name. `--config FILE` may be repeated, later files win;
            `--section.field value` wins over every file; `--print_config` prints the resolved settings as YAML.
            Names may have hyphens for underscores.
        prog: how the program is called, for the help text.
        description: first lines of the help text.
        defaults: section -> a function that, given what files and command line set (dotted name -> value), returns
            values for it that both of them override, e.g. those that come with the chosen model. Sections that the job
            doesn't have are left alone.
        cluster: reads the file that `--cluster FILE` names, which wins over other files; called with None where the
            option is missing. None: the option is without effect.

    Returns:
        An instance of `job`, validated by the `__post_init__` of its parts.

    Raises:
        ConfigError: unknown key (the nearest valid one is named), wrong type, impossible combination, bad file.
        SystemExit: after `--help` or `--print_config`.
    """
    parser = _build_parser(job, prog, description)
    keys = leaf_types(job)
    words = _split_argv(argv, keys)
    overrides, tree = words.overrides, {}
    for file in words.files:
        loaded = load_yaml(Path(file))
        _check_keys(loaded, job, where=file)
        tree = merge(tree, loaded)
    placed = None if cluster is None else cluster(words.cluster)
    if placed is not None:
        tree = merge(tree, placed.settings(keys))
        places = placed.places(_plain_defaults(job) | _given(tree, overrides))
        overrides = [*overrides, *(f"--{name}={place}" for name, place in places.items())]
    given = _given(tree, overrides)
    sections = typing.get_type_hints(job)
    tree = merge({name: find(given) for name, find in (defaults or {}).items() if name in sections}, tree)
    try:
        namespace = parser.parse_args(overrides, namespace=parser.parse_object(tree)) if tree else None
        namespace = namespace or parser.parse_args(overrides)
    except SystemExit:
        raise
    except Exception as error:  # jsonargparse raises several unrelated types for a value that doesn't fit
        raise ConfigError(_readable(error, keys)) from None
    for key, value in given.items():
        if keys.get(key) == (str | None) and isinstance(value, str):
            namespace[key] = value  # as it was given: the parser would read `# title` or `~` as null
    settings = instantiate(job, namespace)
    if words.print_config:
        print(to_yaml(settings), end="")
        raise SystemExit(0)
    return settings


def read(cls: type[T], tree: Mapping[str, Any], where: str) -> T:
    """Builds one dataclass from plain values, with the checks that `parse` makes.

    Args:
        cls: the dataclass.
        tree: field -> value; missing fields get their defaults.
        where: the origin of the values, for messages.

    Raises:
        ConfigError: unknown key, wrong type, impossible combination.
    """
    try:
        _check_keys(tree, cls, where)
        return instantiate(cls, _reader(cls).parse_object(dict(tree)))
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None
    except Exception as error:  # as in `parse`
        raise ConfigError(f"{where}: {_readable(error, leaf_types(cls))}") from None


@cache
def _reader(cls: type):
    return _build_parser(cls, "", "")


def instantiate(cls: type[T], values: Any, prefix: str = "") -> T:
    """Builds nested dataclasses from a (nested) mapping or namespace; validation errors name the dotted field.

    Args:
        cls: the dataclass to build.
        values: one attribute or key for each field.
        prefix: the dotted path of `cls` inside the job, with its trailing dot.

    Raises:
        ConfigError: what a part's `__post_init__` raised, with the section in front.
    """
    given = vars(values) if not isinstance(values, Mapping) else values
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        if field.name not in given:
            continue
        arguments[field.name] = _build(hints[field.name], given[field.name], prefix + field.name)
    try:
        return cls(**arguments)
    except ConfigError as error:
        if error.field is None or (prefix and error.field.startswith(prefix)):
            raise
        raise ConfigError(error.message, prefix + error.field) from None


def _build(hint: Any, value: Any, name: str) -> Any:
    """A field's value, with dataclasses in place of the namespaces that stand for them."""
    nested = _dataclass_in(hint)
    if nested is None:
        return value
    if isinstance(value, list):
        return [_build(nested, item, f"{name}.{number}") for number, item in enumerate(value)]
    if isinstance(value, Mapping | argparse.Namespace):
        return instantiate(nested, value, f"{name}.")
    return value


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field holds, alone, in a list, or as an alternative to something else."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next(filter(None, map(_dataclass_in, typing.get_args(hint))), None)


@contextmanager
def section(name: str) -> Iterator[None]:
    """Puts a section's name in front of the field that a check inside the `with` block complains of."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.message, name if error.field is None else f"{name}.{error.field}") from None


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain nested dictionaries, ready for YAML or JSON (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(settings))


def to_yaml(settings: Any) -> str:
    """The resolved settings as YAML that `--config` reads back to the same settings."""
    tree = settings if isinstance(settings, Mapping) else to_dict(settings)
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys; empty dictionaries are kept as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def load_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads one YAML file. Its key `include` (a path or a list, relative to the file) names files it builds on.

    Raises:
        ConfigError: a missing or unreadable file, broken YAML, no mapping at the top, or a circle of includes.
    """
    path = Path(path)
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: includes itself, through {' -> '.join(str(item) for item in _seen)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [item.name for item in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no such settings file: {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found a {type(tree).__name__}")
    includes = tree.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include: expected a file or a list of files, got {includes!r}")
    merged: dict[str, Any] = {}
    for name in includes:
        merged = merge(merged, load_yaml(path.parent / name, (*_seen, path.resolve())))
    return merge(merged, tree)


def without_secrets(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings fit to be recorded and passed on: keys and passwords are left out, in fields and in URLs."""

    def clean(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: clean(str(name), item) for name, item in value.items()}
        if any(word in key for word in ("api_key", "password", "secret", "token_file")) and value:
            return "(hidden)"
        if isinstance(value, list | tuple):
            return [clean(key, item) for item in value]
        return without_credentials(value) if isinstance(value, str) else value

    return {key: clean(str(key), value) for key, value in tree.items()}


def without_credentials(text: str) -> str:
    """The text with `user:password@` taken out of its URLs."""
    return _CREDENTIALS.sub(r"\1", text)


def check_seed(seed: int) -> None:
    """Makes sure that every library takes a seed.

    Raises:
        ConfigError: it is negative, or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"must lie between 0 and 2^32 - 1, got {seed}", "seed")


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> annotated type of every field that isn't itself a section."""
    leaves: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            leaves |= leaf_types(hint, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = hint
    return leaves


def _given(tree: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Dotted name -> value of everything that files and command line set; the command line's are texts."""
    given = flatten(tree)
    for word in overrides:
        name, _, value = word[2:].partition("=")
        given[name] = None if value == "null" else value
    return given


def _plain_defaults(job: type) -> dict[str, Any]:
    """Dotted name -> default of the fields that the job itself has."""
    return {field.name: field.default for field in dataclasses.fields(job) if isinstance(field.default, str)}


def _build_parser(job: type, prog: str, description: str):
    import jsonargparse

    class Formatter(jsonargparse.DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text  # descriptions hold command lines, which must not be reflowed

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=Formatter,
        usage=f"{prog} [--config FILE.yaml ...] [--section.field VALUE ...] [--print_config]",
        exit_on_error=False,
    )
    parser.add_argument("--config", help="YAML file of settings; may be repeated, later files win.")
    parser.add_argument("--cluster", help="YAML file of a cluster's resources and storage; wins over --config.")
    parser.add_argument("--print_config", help="Print the resolved settings as YAML, and stop.", action="store_true")
    parser.add_class_arguments(job, as_group=False)
    keys = {*leaf_types(job), "config", "cluster", "print_config", "help"}
    for action in parser._actions:
        if action.dest not in keys:  # jsonargparse's own option for a whole section; ours are `include` and --config
            action.help = argparse.SUPPRESS
    return parser


@dataclasses.dataclass
class _Words:
    """A command line."""

    files: list[str] = dataclasses.field(default_factory=list)
    """Of `--config`."""
    cluster: str | None = None
    """Of `--cluster`."""
    overrides: list[str] = dataclasses.field(default_factory=list)
    """`--name=value`, of names that there are."""
    print_config: bool = False


def _split_argv(argv: list[str], keys: Mapping[str, Any]) -> _Words:
    """Splits the command line; unknown options are refused."""
    found = _Words()
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word in ("-h", "--help"):
            found.overrides.append(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; settings are given as --section.field VALUE")
        name, has_value, value = word[2:].partition("=")
        name = _with_underscores(name, keys)
        if name == "print_config":
            found.print_config = True
            continue
        plain = name.removesuffix("+")
        if not _is_option(name, keys):
            if any(key.startswith(f"{plain}.") for key in keys):
                raise ConfigError(f"--{name} is a section: set its fields one by one, as --{name}.FIELD VALUE")
            raise ConfigError(f"unknown option --{name}{nearest(plain, keys)}")
        if not has_value:
            following = argv[position] if position < len(argv) else None
            if following is None or following.startswith("--"):
                if keys.get(name) is not bool:
                    raise ConfigError(f"--{name}: a value is missing")
                value = "true"  # a switch such as --fresh
            else:
                value = following
                position += 1
        if name == "config":
            found.files.append(value)
        elif name == "cluster":
            found.cluster = value
        else:
            found.overrides.append(f"--{name}={value}")
    return found


def _check_keys(tree: Mapping[str, Any], cls: type, where: str, prefix: str = "") -> None:
    keys = leaf_types(cls)
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key in keys and key not in hints:
            nested = str(key).replace(".", ": {") + ": ..." + "}" * str(key).count(".")
            raise ConfigError(f"{where}: {prefix}{key}: dots are for the command line, write `{nested}`")
        if key not in hints:
            near = nearest(str(key), [*hints, *keys], prefix)
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}{near}")
        if value is None and key in keys and type(None) not in typing.get_args(hints[key]):
            raise ConfigError(f"expected {_describe(hints[key])}, got null", prefix + str(key))
        nested = _dataclass_in(hints[key])
        if dataclasses.is_dataclass(hints[key]) and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {prefix}{key}: expected a section with keys, got {value!r}")
        if nested is not None:
            items = value if isinstance(value, list) else [value]
            for number, item in enumerate(items):
                if isinstance(item, Mapping):
                    inside = f"{prefix}{key}.{number}." if isinstance(value, list) else f"{prefix}{key}."
                    _check_keys(item, nested, where, inside)


def _is_option(name: str, keys: Mapping[str, Any]) -> bool:
    plain = name.removesuffix("+")
    return name in ("config", "cluster", "print_config") or plain in keys or _inside_mapping(plain, keys)


def _with_underscores(name: str, keys: Mapping[str, Any]) -> str:
    """The option that is meant by a name with hyphens in place of underscores; a key of a mapping keeps its own."""
    parent, dot, last = name.rpartition(".")
    spellings = (name, parent.replace("-", "_") + dot + last, name.replace("-", "_"))
    return next((spelling for spelling in spellings if _is_option(spelling, keys)), name)


def _inside_mapping(name: str, keys: Mapping[str, Any]) -> bool:
    return typing.get_origin(keys.get(name.rpartition(".")[0])) is dict


def nearest(name: str, keys: Iterable[str], prefix: str = "") -> str:
    """'; did you mean ...?' with the valid key nearest in spelling, by whole name or by its last part."""
    keys = list(keys)
    whole = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    by_tail = {key.rpartition(".")[2]: key for key in keys}
    tail = difflib.get_close_matches(name.rpartition(".")[2], by_tail, n=1, cutoff=0.6)
    best = max(
        [*whole, *(by_tail[item] for item in tail)],
        key=lambda key: difflib.SequenceMatcher(None, name, key).ratio(),
        default=None,
    )
    return f"; did you mean {prefix}{best}?" if best else "; --help lists every setting"


def _readable(error: Exception, keys: Mapping[str, Any]) -> str:
    """One line out of the parser's message: `section.field: expected int, got 'x'`."""
    text = " ".join(str(error).split())
    key = re.search(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Got value|Given value): (.*?)(?: Given value type:.*| - Expected .*)?$", text)
    if key and value and key[1] in keys:
        return f"{key[1]}: expected {_describe(keys[key[1]])}, got {value[1]}"
    return text


def _describe(hint: Any) -> str:
    """A type annotation in words: `int or null`, `one of 'a', 'b'`, `list of str`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(item) for item in arguments)
    if origin in (list, tuple):
        return f"list of {_describe(arguments[0])}"
    if origin is dict:
        return f"mapping of {_describe(arguments[0])} to {_describe(arguments[1])}"
    return getattr(hint, "__name__", str(hint))
