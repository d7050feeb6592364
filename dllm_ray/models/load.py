"""`load`: one entry for every checkpoint. Native transformers classes only; no remote code is ever run.

The published families are mapped onto an architecture of transformers tensor by tensor (`blueprint`, `mapping`); what
the tensors of a checkpoint are is known before any of them is read.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models import edit_heads
from dllm_ray.models.adapters import add_adapter, base_of, is_adapter, quantization_config, ready_for_cpu
from dllm_ray.models.blueprint import Blueprint, resolve, spec_of
from dllm_ray.models.checkpoint import WEIGHTS, Assembled, Checkpoint, Stored, find, read_json, whole
from dllm_ray.models.config import ModelConfig, place
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.mapping import to_native
from dllm_ray.models.probe import check_bidirectional
from dllm_ray.models.spec import CONFIG_KEY, DiffusionSpec
from dllm_ray.models.vocabulary import check_ids, fit, rows_needed

logger = logging.getLogger(__name__)

_HEADS = f"{edit_heads.NAME}."

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)

_HARMLESS = ("position_ids", "rotary_emb.inv_freq", "pooler.", "cls.seq_relationship.", "attn.bias", "masked_bias")
"""Parts of names of tensors that older checkpoints hold and that no diffusion model needs."""


def load(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: str | None = None,
    adapter: str | Path | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> DiffusionLM:
    """Loads a checkpoint as a diffusion language model, in eval mode.

    Published families are mapped onto the transformers architecture they equal, tensor by tensor. BERT-style encoders
    are taken as they are; decoders become bidirectional through `config.is_causal = False`. A tokenizer without a mask
    token gets one, whose embedding starts as the mean of all embeddings.

    Args:
        path: a Hugging Face directory, a hub id, or a PEFT adapter directory, which names its base.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        device: where the weights go, e.g. `cpu` or `cuda:0`.
        quantization: None, `4bit` (NF4) or `8bit`, through bitsandbytes.
        adapter: a PEFT adapter directory to put on top.
        device_map: spreads the layers over devices, as in transformers (`auto`, or module -> device); replaces
            `device`.

    Raises:
        ModelError: what is missing or doesn't fit, with what was found and expected.
    """
    dtype = str(dtype).removeprefix("torch.")
    path = place(str(path))
    adapter = None if adapter is None else place(str(adapter))
    if adapter is None and is_adapter(path):
        path, adapter = base_of(path), path
    check_path(path)
    checkpoint = Checkpoint(path)
    blueprint = resolve(checkpoint)
    tokenizer = blueprint.tokenizer()
    known = rows_needed(tokenizer)
    tokenizer = blueprint.prepare(tokenizer)
    model, heads = _load_model(checkpoint, blueprint, dtype, device_map or device, quantization)
    spec = spec_of(blueprint, tokenizer)
    fit(model, tokenizer, known)
    if spec.edit_heads is not None:
        edit_heads.put(model, spec.edit_heads, heads)
    elif heads:
        raise ModelError(f"{path}: the weights hold edit heads, of which config.json says nothing")
    check_ids(path, spec, model.get_input_embeddings().num_embeddings)
    setattr(model.config, CONFIG_KEY, spec.to_dict())
    model.eval()
    lm = DiffusionLM(model, tokenizer, spec)
    if blueprint.is_decoder:
        check_bidirectional(model)
    return lm if adapter is None else add_adapter(lm, adapter)


def open_model(config: ModelConfig, tokenizer=None, seed: int = 0, device: str = "cpu") -> DiffusionLM:
    """The model that settings describe: loaded from `config.path`, or built from scratch around a tokenizer.

    Args:
        config: what to load or build.
        tokenizer: needed where `config.path` is null.
        seed: seeds the weights of a model from scratch.
        device: where the weights go, unless `config.device_map` says it.

    Raises:
        ModelError: the model can't be loaded or built.
    """
    if config.path is not None:
        lm = load(config.path, config.dtype, device, config.quantization, config.adapter, config.device_map)
    else:
        from dllm_ray.models.scratch import build

        lm = build(config.scratch, tokenizer, seed)
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        lm.model.to(device=device, dtype=dtype)
    if config.compile is not None:
        lm.compile(config.compile)
    return lm


def check_path(path: str) -> None:
    """Cheap checks of a local model directory, before anything heavy is imported or started.

    Raises:
        ModelError: no such directory, or it lacks config.json, weights or a tokenizer.
    """
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ModelError(f"no such model directory: {path}")
        return None  # a hub id
    if not folder.is_dir():
        raise ModelError(f"{path} is a file; expected a Hugging Face model directory or a hub id")
    if is_adapter(path):
        return check_path(base_of(path))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in it; expected a Hugging Face model directory")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(f"{path}: no weights in it; expected {' or '.join(WEIGHTS[:2])} beside config.json")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{path}: no tokenizer in it; expected tokenizer.json (or vocab.txt, ...) beside config.json")
    return None


def open_tokenizer(path: str) -> tuple[Any, DiffusionSpec, Blueprint]:
    """The prepared tokenizer, the spec and the blueprint that `load` would use, without reading any weights.

    Raises:
        ModelError: config.json or the tokenizer can't be read, or the architecture can't be loaded.
    """
    path = base_of(path) if is_adapter(path) else path
    blueprint = resolve(Checkpoint(path))
    tokenizer = blueprint.prepare(blueprint.tokenizer())
    return tokenizer, spec_of(blueprint, tokenizer), blueprint


def state_for(checkpoint: Checkpoint, blueprint: Blueprint) -> dict[str, Assembled]:
    """The tensors that `transformers` is to load, none of them read yet.

    Raises:
        ModelError: tensors of a published family are missing, left over, or of the wrong shape.
    """
    tensors = checkpoint.tensors
    if not blueprint.is_published and not checkpoint.is_distributed:
        return {name: whole(tensor) for name, tensor in tensors.items()}
    model = blueprint.skeleton()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not blueprint.is_published:
        return _model_part(tensors, shapes)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    return to_native(blueprint.family.rules, tensors, shapes, blueprint.path, tied)


def _model_part(tensors: Mapping[str, Stored], names: Collection[str]) -> dict[str, Assembled]:
    """The model's tensors in a training checkpoint, which may hold those of the optimizer too, each under a prefix."""
    prefix = max(("", "model."), key=lambda prefix: sum(prefix + name in tensors for name in names))
    return {name: whole(tensors[prefix + name]) for name in names if prefix + name in tensors}


def _load_model(
    checkpoint: Checkpoint, blueprint: Blueprint, dtype: str, placement, quantization: str | None
) -> tuple[Any, dict[str, Tensor]]:
    """The model of transformers, and the tensors of its edit heads, if it has any."""
    path = blueprint.path
    state = state_for(checkpoint, blueprint)
    heads = {name.removeprefix(_HEADS): state.pop(name) for name in list(state) if name.startswith(_HEADS)}
    arguments: dict[str, Any] = {"dtype": _dtype(dtype, blueprint.raw, state)}
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, dtype)
    if quantization is not None or placement != "cpu":
        arguments["device_map"] = {"": placement} if _is_device(placement) else placement
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # a head that the checkpoint lacks starts the same every time
            model, report = blueprint.model_class.from_pretrained(
                None,
                config=blueprint.config,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in the report, with both shapes
                **arguments,
            )
    except ModelError:
        raise
    except Exception as error:  # transformers and safetensors raise many types for a broken checkpoint
        raise ModelError(f"{path}: the checkpoint can't be loaded: {first_line(error)}") from error
    ready_for_cpu(model)
    family = blueprint.family
    if family is not None and family.uniform_noise and find(path, "generation_config.json") is not None:
        # sampled by transformers' own generation, whose settings lie beside the weights
        settings = read_json(path, "generation_config.json")
        model.generation_config = type(model.generation_config).from_dict(settings)
    model.config._name_or_path = model.name_or_path = path
    _check_tensors(path, blueprint, model, report)
    return model, {name: tensor.read() for name, tensor in heads.items()}


def _is_device(placement) -> bool:
    return isinstance(placement, str) and placement not in ("auto", "balanced", "balanced_low_0", "sequential")


def _dtype(dtype: str, raw: Mapping[str, Any], state: Mapping[str, Assembled]) -> torch.dtype:
    """`auto` is what config.json says, or else the type of most weights."""
    if dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ModelError(f"dtype {dtype!r} is unknown; expected float32, bfloat16, float16 or auto")
        return getattr(torch, dtype)
    stated = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."), None)
    if isinstance(stated, torch.dtype):
        return stated
    counts: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] += tensor.nbytes
    return counts.most_common(1)[0][0] if counts else torch.float32


def _check_tensors(path: str, blueprint: Blueprint, model, report: dict) -> None:
    """Every tensor must have its place; only a head that the checkpoint never had may start random."""
    mismatched = sorted(report.get("mismatched_keys") or ())
    if mismatched:
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{path}: {len(mismatched)} tensors have another shape than config.json asks for, first {name!r}: "
            f"found {list(found)}, expected {list(expected)}"
        )
    missing = sorted(report["missing_keys"])
    trunk = model.base_model_prefix + "."
    has_head = any(
        name.endswith(("LM", "LMHeadModel", "ForPreTraining")) for name in blueprint.raw.get("architectures") or ["LM"]
    )
    lost = [name for name in missing if has_head or name.startswith(trunk)]
    if lost:
        raise ModelError(
            f"{path}: {len(lost)} tensors of {type(model).__name__} are missing from the weights, first {lost[0]!r}"
        )
    if missing:
        logger.warning("%s has no language-model head: %s start random", path, ", ".join(missing))
    unexpected = sorted(report["unexpected_keys"])
    foreign = [name for name in unexpected if not any(part in name for part in _HARMLESS)]
    if foreign:
        raise ModelError(
            f"{path}: {len(foreign)} tensors have no place in {type(model).__name__}, first {foreign[0]!r}: "
            "config.json describes another architecture than the weights"
        )
    if unexpected:
        logger.info("%s: tensors that a diffusion model doesn't need: %s", path, ", ".join(unexpected))
