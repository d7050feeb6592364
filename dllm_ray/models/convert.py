"""Turns one model directory into another, tensor by tensor: published layouts to native ones and back, autoregressive
models to diffusion models, training checkpoints to plain directories, adapters into their base.

Holds one tensor at a time, except where a model has to go through PEFT or gets a new head; and, at the beginning, two
layers with random weights, to check what attention a decoder really has.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from dllm_ray.errors import ModelError
from dllm_ray.models import edit_heads, families, mapping, probe
from dllm_ray.models.adapters import base_of, is_adapter, merge
from dllm_ray.models.blueprint import Blueprint, resolve, spec_of
from dllm_ray.models.checkpoint import INDEX, Assembled, Checkpoint, Readable, Stored, write_safetensors
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load, state_for
from dllm_ray.models.spec import CONFIG_KEY, ORIGINAL_KEY, DiffusionSpec
from dllm_ray.models.vocabulary import check_ids, mean_rows, rows_needed, vocabulary_tensors

OnProgress = Callable[[int, int], None]
"""Called with the bytes written so far, and all of them."""


@dataclass(frozen=True)
class Target:
    """What a native directory is to be."""

    objective: str = "native"
    """native: as the checkpoint was trained; mdlm: full attention; bd3lm: block-causal attention; editflow: full
    attention, and edit heads that start from the vocabulary head."""
    block_size: int = 32
    """Block size of bd3lm."""
    shift_logits: bool | None = None
    """Whether logits predict the token to their right; None: as the checkpoint says."""
    edit_time: bool = False
    """Of editflow: whether the heads are told the time."""

    def apply(self, lm: DiffusionLM) -> DiffusionLM:
        """A loaded model as it is to be; raises as `edit_heads.attach`."""
        lm = DiffusionLM(lm.model, lm.tokenizer, self.spec(lm.spec))
        return edit_heads.attach(lm, self.edit_time) if self.objective == "editflow" else lm

    def spec(self, spec: DiffusionSpec) -> DiffusionSpec:
        """The spec of a converted model, but for new edit heads.

        Raises:
            ModelError: it has edit heads, which only that objective trains.
        """
        if spec.edit_heads is not None and self.objective in ("mdlm", "bd3lm"):
            raise ModelError(
                f"a model with edit heads can't be converted to {self.objective}: begin with the one before"
            )
        changes: dict[str, Any] = {}
        if self.shift_logits is not None:
            changes["shift_logits"] = self.shift_logits
        if self.objective == "mdlm" and spec.attention != "full":
            kept = {name: value for name, value in spec.sampler.items() if name not in ("block_size", "cache")}
            changes |= {"attention": "full", "block_size": None, "sampler": kept}
        if self.objective == "bd3lm":
            changes |= {
                "attention": "block_causal",
                "block_size": self.block_size,
                "sampler": dict(spec.sampler) | {"block_size": self.block_size},
            }
        return dataclasses.replace(spec, **changes)


def to_native(
    path: str,
    directory: Path,
    target: Target,
    dtype: str = "auto",
    shard_bytes: int = 4 << 30,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes any checkpoint that `load` takes as a native directory.

    Args:
        path: a model directory, hub id, or training checkpoint (whole, or in the pieces of several workers).
        directory: an empty directory to fill.
        target: what the result is to be.
        dtype: type of the written weights; `auto` keeps the checkpoint's.
        shard_bytes: most bytes in a weight file.
        on_progress: told of progress.

    Raises:
        ModelError: the checkpoint can't be converted.
    """
    checkpoint = Checkpoint(path)
    blueprint = resolve(checkpoint)
    if blueprint.is_decoder:
        probe.check_architecture(blueprint.model_class, blueprint.config, path)
    tokenizer = blueprint.tokenizer()
    known = rows_needed(tokenizer)
    tokenizer = blueprint.prepare(tokenizer)
    spec = target.spec(spec_of(blueprint, tokenizer))
    skeleton = blueprint.skeleton()
    state = None if target.objective == "editflow" else _direct(checkpoint, blueprint, skeleton)
    if state is None:  # new heads, or names or a head that only transformers can sort out: load it, and save it
        target.apply(load(path, dtype=dtype)).save(directory)
        return
    tensors: dict[str, Readable] = dict(state)
    rows = _grow(tensors, skeleton, known, rows_needed(tokenizer))
    check_ids(path, spec, rows)
    if dtype != "auto":
        tensors = {name: _Cast(tensor, getattr(torch, dtype)) for name, tensor in tensors.items()}
    config = blueprint.config
    config.get_text_config().vocab_size = rows
    config.architectures = [blueprint.model_class.__name__]
    config.dtype = _main_dtype(tensors)
    setattr(config, CONFIG_KEY, spec.to_dict())
    for name, tensor in blueprint.skeleton().state_dict().items():  # with the vocabulary as it is now
        if name in tensors and tensors[name].shape != tuple(tensor.shape):
            made, wanted = list(tensors[name].shape), list(tensor.shape)
            raise ModelError(f"{path}: {name!r} would have the shape {made}, where {rows} tokens need {wanted}")
    _write_weights(directory, tensors, shard_bytes, on_progress)
    tokenizer.save_pretrained(directory)
    config.save_pretrained(directory)


def to_original(path: str, directory: Path, shard_bytes: int = 4 << 30, on_progress: OnProgress | None = None) -> None:
    """Writes a native directory in its family's published layout.

    Args:
        path: a directory that `DiffusionLM.save` or `to_native` wrote.
        directory: an empty directory to fill.
        shard_bytes: most bytes in a weight file.
        on_progress: told of progress.

    Raises:
        ModelError: the directory didn't begin as a published checkpoint, or its tensors are not complete.
    """
    checkpoint = Checkpoint(path)
    blueprint = resolve(checkpoint)
    family, original = blueprint.family, checkpoint.config.get(ORIGINAL_KEY)
    if blueprint.is_published:
        raise ModelError(f"{path}: is in the published layout of {family.name} already")
    if family is None or family.is_native or not isinstance(original, dict):
        kind = blueprint.config.model_type
        raise ModelError(
            f"{path}: is no converted checkpoint of a published family: its own layout, that of transformers' {kind}, "
            "is the only one it has"
        )
    if blueprint.edit_heads is not None and family.edit_heads is None:
        raise ModelError(f"{path}: has edit heads, for which the published layout of {family.name} has no place")
    _check_can_be_said(path, blueprint, original)
    skeleton = blueprint.skeleton()
    state = _direct(checkpoint, blueprint, skeleton)
    if state is None:
        found, wanted = set(state_for(checkpoint, blueprint)), set(skeleton.state_dict())
        named = ", ".join(sorted(wanted - found)[:1] + sorted(found - wanted)[:1])
        raise ModelError(f"{path}: its tensors are not those of {blueprint.model_class.__name__}: {named}")
    tensors = mapping.to_original(family.rules, {name: _source(tensor) for name, tensor in state.items()})
    rows = state[vocabulary_tensors(skeleton)[0]].shape[0]
    config = dict(original)
    if rows != family.config(families.Fields(original, path, family.name))["vocab_size"]:  # it has grown
        config |= {name: rows for name in family.vocabulary if name in original}
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = str(_main_dtype(tensors)).removeprefix("torch.")
    _write_weights(directory, tensors, shard_bytes, on_progress)
    blueprint.tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_can_be_said(path: str, blueprint: Blueprint, original: Mapping[str, Any]) -> None:
    """Makes sure that the published config.json would still tell the truth: it can't state another attention."""
    family = blueprint.family
    spec = DiffusionSpec.from_dict(blueprint.raw[CONFIG_KEY], path)
    changed = []
    if family.block_name is None and spec.grid != family.blocks(original, path):
        changed.append(f"attention {spec.attention}" + (f" with blocks of {spec.grid}" if spec.grid else ""))
    if spec.shift_logits != family.shift_logits:
        changed.append(f"shift_logits {spec.shift_logits}")
    if changed:
        raise ModelError(
            f"{path}: was converted to {' and '.join(changed)}, which the published layout of {family.name} can't say; "
            "convert it back first (--to mdlm, or --to bd3lm with its --block_size)"
        )


def merge_adapter(path: str, adapter: str, directory: Path, target: Target, dtype: str = "auto") -> None:
    """Writes a native directory of a model with its adapter's updates added to the weights.

    Raises:
        ModelError: the adapter doesn't fit.
    """
    lm = merge(load(path, dtype=dtype, adapter=adapter))
    target.apply(lm).save(directory)


def description(path: str) -> str:
    """What a checkpoint is, what it would become, and how its tensors map: lines for people.

    Raises:
        ModelError: it can't be loaded.
    """
    adapter = None
    if is_adapter(path):
        path, adapter = base_of(path), path
    checkpoint = Checkpoint(path)
    blueprint = resolve(checkpoint)
    tokenizer = blueprint.prepare(blueprint.tokenizer())
    spec = spec_of(blueprint, tokenizer)
    skeleton = blueprint.skeleton()
    check_ids(path, spec, max(skeleton.get_input_embeddings().num_embeddings, rows_needed(tokenizer)))
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    family = blueprint.family.name if blueprint.family is not None else "none of the published diffusion families"
    layout = "published layout, mapped while loading" if blueprint.is_published else "native layout"
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    text = blueprint.config.get_text_config()
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    lines = [] if adapter is None else [f"adapter       {adapter}", f"its base      {path}"]
    lines += [
        f"family        {family} ({layout})",
        f"architecture  {blueprint.model_class.__name__}",
        f"parameters    {parameters:,}",
        f"weights       {len(checkpoint.tensors):,} tensors, {checkpoint.nbytes:,} bytes, {', '.join(stored)}",
        *(f"{name:<20}{getattr(text, name)}" for name in sizes if getattr(text, name, None) is not None),
        f"{'context':<20}{blueprint.max_length}",
        "spec",
        *(f"  {name:<18}{value}" for name, value in spec.to_dict().items()),
    ]
    state = state_for(checkpoint, blueprint)
    if blueprint.is_published:
        lines.append("tensors (published -> native, native tensors)")
        for original, native, count in mapping.summary(blueprint.family.rules, state):
            lines.append(f"  {original} -> {native} ({count})")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Cast:
    """A tensor in another floating-point type."""

    tensor: Readable
    to: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.to if self.tensor.dtype.is_floating_point else self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.read().to(self.dtype)


@dataclass(frozen=True)
class _Grown:
    """Embeddings with rows for new tokens, which start as the mean of the known ones."""

    tensor: Readable
    known: int
    needed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(self.tensor.shape[0], self.needed), *self.tensor.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        old = self.tensor.read()
        new = torch.zeros(self.shape, dtype=self.dtype)
        new[: len(old)] = old
        mean_rows(new, min(self.known, len(old)), self.needed)
        return new


def _direct(checkpoint: Checkpoint, blueprint: Blueprint, skeleton) -> dict[str, Assembled] | None:
    """The tensors under native names, where renaming, splitting and stacking is all that takes; else None."""
    state = state_for(checkpoint, blueprint)
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    if set(state) != set(wanted) and not blueprint.is_published:
        try:  # experts one by one, as transformers itself publishes them
            state = mapping.to_native(mapping.experts("model.layers.{i}.mlp"), state, wanted, blueprint.path, tied)
        except ModelError:
            return None
    same = set(wanted) - set(tied) <= set(state) and all(state[name].shape == wanted[name] for name in state)
    return state if same else None


def _source(tensor: Assembled) -> Stored:
    """What a tensor is read from, where it is one stored tensor, so that parts of it can be read by themselves."""
    (first, *others) = tensor.pieces
    return tensor if others or first.start or first.source.shape != tensor.shape else first.source


def _grow(tensors: dict[str, Readable], skeleton, known: int, needed: int) -> int:
    """Makes room, in place, for tokens that the tokenizer gained; returns the rows of the embeddings."""
    names = vocabulary_tensors(skeleton)
    rows = tensors[names[0]].shape[0]
    if needed > min(known, rows):
        for name in names:
            tensors[name] = _Grown(tensors[name], known, needed)
    return max(rows, needed)


def _main_dtype(tensors: Mapping[str, Readable]) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += prod(tensor.shape)
    return counts.most_common(1)[0][0]


def _write_weights(
    directory: Path, tensors: Mapping[str, Readable], shard_bytes: int, on_progress: OnProgress | None
) -> None:
    sizes = {name: prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: prod(tensor.shape) * tensor.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    done, total = 0, sum(sizes.values())
    for file, names in shards.filename_to_tensors.items():
        for name in write_safetensors(directory / file, {name: tensors[name] for name in names}):
            done += sizes[name]
            if on_progress is not None:
                on_progress(done, total)
    if shards.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": shards.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
