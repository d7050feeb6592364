"""How the tensors of a published layout become those of a transformers architecture, and back.

A family lists rules; here they are applied to names and shapes, in both directions. Nothing is read: the result says
which bytes of which stored tensor go where (`checkpoint.Assembled`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch

from dllm_ray.errors import ModelError
from dllm_ray.models.checkpoint import Assembled, Piece, Stored, whole

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name. `{i}` in a name stands for a whole number."""

    original: str
    native: str


@dataclass(frozen=True)
class Fused:
    """One published tensor holds the rows of several native ones, one after the other."""

    original: str
    native: tuple[str, ...]


@dataclass(frozen=True)
class Stacked:
    """Tensors of experts, `{e}`, that the architecture keeps in one.

    native[e] holds the rows of `original[0]` of expert e, then those of `original[1]`, ...
    """

    original: tuple[str, ...]
    native: str


Rule = Rename | Fused | Stacked


def experts(mlp: str) -> tuple[Stacked, Stacked]:
    """The experts of one MLP, as Qwen-MoE, OLMoE, GLM-4-MoE and their kin keep them: gate and up projections in one."""
    return (
        Stacked(
            (f"{mlp}.experts.{{e}}.gate_proj.weight", f"{mlp}.experts.{{e}}.up_proj.weight"),
            f"{mlp}.experts.gate_up_proj",
        ),
        Stacked((f"{mlp}.experts.{{e}}.down_proj.weight",), f"{mlp}.experts.down_proj"),
    )


def to_native(
    rules: Iterable[Rule],
    tensors: Mapping[str, Stored],
    shapes: Shapes,
    where: str,
    tied: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Assembled]:
    """Native name -> tensor, for every tensor of the architecture.

    Args:
        rules: the family's; tensors that none names keep their names.
        tensors: what the checkpoint holds.
        shapes: what the architecture wants.
        where: the checkpoint, for messages.
        tied: native tensor -> the one that it is another name of. It need not be there, and is left out.

    Raises:
        ModelError: a tensor is missing, left over, or of the wrong shape; named as published.
    """
    rules, left = tuple(rules), set(tensors)
    made: dict[str, Assembled] = {}
    missing: dict[str, None] = {}  # in order, each once: several native tensors may need the same published one
    for name, shape in shapes.items():
        rule, numbers = _match(rules, name)
        sources = _sources(rule, name, numbers, shape, tensors)
        absent = [source for source, _ in sources if source not in tensors]
        left -= {source for source, _ in sources}
        if absent:
            if name not in tied:
                missing |= dict.fromkeys(absent)
            continue
        made[name] = _assemble(rule, name, shape, sources, tensors, shapes, where)
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} tensors are missing from the weights, first {next(iter(missing))!r}; "
            f"found {len(tensors)}, expected {len(tensors) - len(left) + len(missing)}"
        )
    if left:
        first = min(left)
        raise ModelError(
            f"{where}: {len(left)} tensors have no place in the model, first {first!r} {list(tensors[first].shape)}: "
            "config.json describes another architecture than the weights"
        )
    for name, source in tied.items():
        if name in made and not torch.equal(made.pop(name).read(), made[source].read()):
            raise ModelError(
                f"{where}: config.json ties {name!r} to {source!r}, but the weights hold two different tensors"
            )
    return made


def to_original(rules: Iterable[Rule], tensors: Mapping[str, Stored]) -> dict[str, Assembled]:
    """Published name -> tensor: what `to_native` does, the other way round.

    Args:
        rules: the family's; tensors that none names keep their names.
        tensors: the tensors of a native checkpoint.

    Raises:
        ModelError: tensors that are to be joined have different types.
    """
    rules = tuple(rules)
    made: dict[str, Assembled] = {}
    for name, tensor in tensors.items():
        rule, numbers = _match(rules, name)
        if isinstance(rule, Rename):
            made[_fill(rule.original, numbers)] = whole(tensor)
        elif isinstance(rule, Stacked):
            made |= _unstacked(rule, numbers, tensor)
        elif isinstance(rule, Fused):
            original = _fill(rule.original, numbers)
            if original not in made:
                made[original] = _joined([tensors[_fill(part, numbers)] for part in rule.native], original)
        else:
            made[name] = whole(tensor)
    return made


def summary(rules: Iterable[Rule], native_names: Iterable[str]) -> list[tuple[str, str, int]]:
    """(published name, native name, number of native tensors) for each rule in use, and one line for kept names."""
    rules = tuple(rules)
    counts = Counter(_match(rules, name)[0] for name in native_names)
    lines = [
        (" + ".join(_tuple(rule.original)), " + ".join(_tuple(rule.native)), counts[rule])
        for rule in rules
        if counts[rule]
    ]
    return lines + ([("(any other name)", "(the same)", counts[None])] if counts[None] else [])


def _match(rules: tuple[Rule, ...], native: str) -> tuple[Rule | None, dict[str, str]]:
    """The rule that makes a native tensor, and the numbers in its name."""
    for rule in rules:
        for template in _tuple(rule.native):
            found = re.fullmatch(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template)), native)
            if found:
                return rule, found.groupdict()
    return None, {}


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"{(\w)}", lambda match: numbers[match[1]], template)


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _sources(
    rule: Rule | None, name: str, numbers: dict[str, str], shape: tuple[int, ...], tensors: Mapping[str, Stored]
) -> list[tuple[str, tuple]]:
    """(published name, index of its part in the native tensor) of everything a native tensor is made of."""
    if rule is None:
        return [(name, ())]
    if not isinstance(rule, Stacked):
        return [(_fill(rule.original, numbers), ())]
    if name in tensors:  # a checkpoint that keeps them as the architecture does
        return [(name, ())]
    parts = len(rule.original)
    rows = shape[1] // parts
    return [
        (_fill(template, numbers | {"e": str(expert)}), (expert, slice(part * rows, (part + 1) * rows)))
        for expert in range(shape[0])
        for part, template in enumerate(rule.original)
    ]


def _assemble(
    rule: Rule | None,
    name: str,
    shape: tuple[int, ...],
    sources: list[tuple[str, tuple]],
    tensors: Mapping[str, Stored],
    shapes: Shapes,
    where: str,
) -> Assembled:
    start, expected = 0, shape
    if isinstance(rule, Fused):
        numbers = _match((rule,), name)[1]
        parts = [_fill(part, numbers) for part in rule.native]
        before = sum(shapes[part][0] for part in parts[: parts.index(name)])
        start = before * prod(shape[1:])
        expected = (sum(shapes[part][0] for part in parts), *shape[1:])
    elif isinstance(rule, Stacked) and sources[0][1]:
        expected = (shape[1] // len(rule.original), *shape[2:])
    for source, _ in sources:
        if tuple(tensors[source].shape) != tuple(expected):
            raise ModelError(
                f"{where}: tensor {source!r} has the shape {list(tensors[source].shape)}; "
                f"config.json asks for {list(expected)}"
            )
    dtypes = {tensors[source].dtype for source, _ in sources}
    if len(dtypes) > 1:
        raise ModelError(f"{where}: the tensors of {name!r} have different types: {sorted(map(str, dtypes))}")
    pieces = tuple(Piece(tensors[source], start, part) for source, part in sources)
    return Assembled(tuple(shape), dtypes.pop(), pieces)


def _unstacked(rule: Stacked, numbers: Mapping[str, str], tensor: Stored) -> dict[str, Assembled]:
    count, rows = tensor.shape[0], tensor.shape[1] // len(rule.original)
    shape = (rows, *tensor.shape[2:])
    each = prod(shape)
    return {
        _fill(template, {**numbers, "e": str(expert)}): Assembled(
            shape, tensor.dtype, (Piece(tensor, (expert * len(rule.original) + part) * each),)
        )
        for expert in range(count)
        for part, template in enumerate(rule.original)
    }


def _joined(parts: list[Stored], name: str) -> Assembled:
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise ModelError(f"the parts of {name!r} have different types: {', '.join(sorted(map(str, dtypes)))}")
    rows = 0
    pieces = []
    for part in parts:
        pieces.append(Piece(part, 0, (slice(rows, rows + part.shape[0]),)))
        rows += part.shape[0]
    return Assembled((rows, *parts[0].shape[1:]), parts[0].dtype, tuple(pieces))
