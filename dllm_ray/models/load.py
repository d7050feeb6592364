"""`load`: one entry for every checkpoint. Native transformers classes only; no remote code is ever run.

config.json says what a checkpoint is (`resolve`): one of the published families, whose config and tensors are mapped
onto an architecture of transformers, or a model of transformers itself.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_ray.errors import ModelError
from dllm_ray.models import families
from dllm_ray.models.adapters import ADAPTER_CONFIG, add_adapter, base_of, quantization_config
from dllm_ray.models.checkpoint import WEIGHTS, Assembled, Checkpoint, Stored, whole
from dllm_ray.models.config import ModelConfig, expand_home
from dllm_ray.models.families import Family
from dllm_ray.models.lm import DiffusionLM, LogitsModule, usable_positions
from dllm_ray.models.mapping import to_native
from dllm_ray.models.spec import CONFIG_KEY, ORIGINAL_KEY, DiffusionSpec
from dllm_ray.models.tokenizers import end_of_turn_id, first_line, load_tokenizer, mask_id, prepare

logger = logging.getLogger(__name__)

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

_BIDIRECTIONAL_LAYERS = {"full_attention", "attention"}


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint is, from its config.json alone."""

    path: str
    """Where it lies."""
    raw: dict[str, Any]
    """Its config.json."""
    family: Family | None
    """The published family it belongs, or belonged, to; None: an ordinary model of transformers."""
    config: Any
    """The config of the transformers architecture."""
    model_class: type
    """The transformers class that it loads into."""
    is_decoder: bool
    """Whether that is an autoregressive architecture, made bidirectional."""

    @property
    def is_published(self) -> bool:
        """Whether it is in a family's own layout, to be mapped; else transformers reads it as it is."""
        return self.family is not None and not self.family.is_native and CONFIG_KEY not in self.raw

    @property
    def max_length(self) -> int | None:
        """Longest sequence, in tokens; None when its config states no limit."""
        return usable_positions(self.config)

    def tokenizer(self):
        """Its tokenizer, as published.

        Raises:
            ModelError: there is none, or it can't be read.
        """
        return load_tokenizer(self.path, self.family.native if self.is_published else None)

    def prepare(self, tokenizer):
        """Adds to its tokenizer, in place, what it lacks; one that we saved has its final tokens and template."""
        published = self.is_published or (self.family is not None and self.family.is_native)
        return prepare(tokenizer, self.family if published else None, self.raw)

    def skeleton(self):
        """The model without weights, on the `meta` device."""
        with torch.device("meta"):
            return self.model_class(self.config)


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
    path = expand_home(str(path))
    adapter = None if adapter is None else expand_home(str(adapter))
    if adapter is None and is_adapter(path):
        path, adapter = base_of(path), path
    check_path(path)
    checkpoint = Checkpoint(path)
    blueprint = resolve(checkpoint)
    tokenizer = blueprint.tokenizer()
    known = rows_needed(tokenizer)
    tokenizer = blueprint.prepare(tokenizer)
    model = _load_model(checkpoint, blueprint, dtype, device_map or device, quantization)
    spec = spec_of(blueprint, tokenizer)
    _fit_vocabulary(model, tokenizer, known)
    _check_ids(path, spec, model.get_input_embeddings().num_embeddings)
    setattr(model.config, CONFIG_KEY, spec.to_dict())
    model.eval()
    lm = DiffusionLM(model, tokenizer, spec)
    if blueprint.is_decoder:
        check_bidirectional(lm)
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
        return load(config.path, config.dtype, device, config.quantization, config.adapter, config.device_map)
    from dllm_ray.models.scratch import build

    lm = build(config.scratch, tokenizer, seed)
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    lm.model.to(device=device, dtype=dtype)
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


def is_adapter(path: str) -> bool:
    """Whether a directory holds a PEFT adapter and no model."""
    return (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def open_tokenizer(path: str) -> tuple[Any, DiffusionSpec, Blueprint]:
    """The prepared tokenizer, the spec and the blueprint that `load` would use, without reading any weights.

    Raises:
        ModelError: config.json or the tokenizer can't be read, or the architecture can't be loaded.
    """
    path = base_of(path) if is_adapter(path) else path
    blueprint = resolve(Checkpoint(path))
    tokenizer = blueprint.prepare(blueprint.tokenizer())
    return tokenizer, spec_of(blueprint, tokenizer), blueprint


def resolve(checkpoint: Checkpoint) -> Blueprint:
    """Says what a checkpoint is, from its config.json.

    Raises:
        ModelError: an unknown architecture, or one that can't be mapped exactly or can't be made bidirectional.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    path, raw = checkpoint.path, checkpoint.config
    stored = raw.get(CONFIG_KEY)
    if stored is not None:  # saved by us: native, whatever it once was
        family = families.by_name(DiffusionSpec.from_dict(stored, f"{path}/config.json").family)
    else:
        family = families.find(raw, path)
    try:
        if stored is None and family is not None and not family.is_native:
            fields = families.Fields(raw, path, family.name)
            config = AutoConfig.for_model(family.native, **family.config(fields))
            setattr(config, ORIGINAL_KEY, raw)
            classes = _classes(path, family.native, [])
        else:
            kind = raw.get("model_type")
            classes = _classes(path, kind, raw.get("architectures") or [], raw.get("is_encoder_decoder"))
            config = CONFIG_MAPPING[kind].from_dict(raw)
        model_class = classes[type(config)]
    except ModelError:
        raise
    except Exception as error:  # a config with wrong fields raises many types
        raise ModelError(f"{path}: config.json can't be used: {first_line(error)}") from error
    is_decoder = classes is transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if is_decoder:
        config = as_bidirectional(config)
        _check_layers(path, config)
    return Blueprint(path, raw, family, config, model_class, is_decoder)


def spec_of(blueprint: Blueprint, tokenizer) -> DiffusionSpec:
    """The stored spec, or the one that follows from family, config.json and the prepared tokenizer."""
    stored = blueprint.raw.get(CONFIG_KEY)
    if stored is not None:
        return DiffusionSpec.from_dict(stored, f"{blueprint.path}/config.json")
    if blueprint.family is None:
        return describe(blueprint.raw["model_type"], tokenizer)
    return _family_spec(blueprint.family, blueprint.raw, tokenizer, blueprint.path)


def describe(architecture: str, tokenizer) -> DiffusionSpec:
    """The spec of a model of transformers that has none stored, from its prepared tokenizer."""
    return DiffusionSpec(
        family=architecture,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eot_token_id=end_of_turn_id(tokenizer),
    )


def _family_spec(family: Family, raw: Mapping[str, Any], tokenizer, path: str) -> DiffusionSpec:
    mask = mask_id(tokenizer, family, raw)
    if mask is None and not family.uniform_noise:
        raise ModelError(f"{path}: neither config.json nor the tokenizer names the mask token of this {family.name}")
    eot = tokenizer.get_vocab().get(family.eot_token) if family.eot_token else None
    uses_text = family.eot_text is not None and family.eot_text in (tokenizer.chat_template or "")
    return DiffusionSpec(
        family=family.name,
        mask_token_id=mask,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eot_token_id=end_of_turn_id(tokenizer) if eot is None else eot,
        eot_text=family.eot_text if uses_text else None,
        shift_logits=family.shift_logits,
        attention=family.attention,
        block_size=family.blocks(raw),
        padding=family.padding,
        sampler=family.sampler_for(raw),
    )


def check_bidirectional(lm: DiffusionLM) -> None:
    """Makes sure that the first position sees the last one.

    Raises:
        ModelError: the architecture ignores `is_causal = False`.
    """
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    module = LogitsModule(lm.model)  # without the pattern that masks put on top
    ids = torch.arange(1, 5, device=lm.device).remainder(vocabulary).unsqueeze(0)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    first = torch.zeros(1, dtype=torch.long, device=lm.device)
    with torch.no_grad():
        same = torch.equal(module(ids, positions=first), module(other, positions=first))
    if same:
        raise ModelError(
            f"{type(lm.model).__name__}: attention stays causal although config.is_causal is false, so the model "
            "can't denoise; choose an architecture with ordinary attention"
        )


def as_bidirectional(config):
    """Marks a decoder's config so that transformers builds bidirectional attention for it."""
    config.is_causal = False
    return config


def _check_layers(path: str, config) -> None:
    """Makes sure that every layer of a decoder can see a whole canvas.

    Raises:
        ModelError: it has sliding windows, or layers that are no attention.
    """
    config = config.get_text_config()
    window, limit = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = kinds & {"sliding_attention", "chunked_attention"} or (not kinds and window)
    if windowed and window and limit and window >= limit:  # never reached
        kinds -= {"sliding_attention"}
        windowed = False
    if windowed:
        raise ModelError(
            f"{path}: {config.model_type} has sliding-window attention (window {window}, context {limit}): a position "
            "would not see the whole canvas. Choose an architecture with full attention, or set sliding_window to null "
            "and layer_types to full_attention in config.json before you train it as a diffusion model"
        )
    other = sorted(kinds - _BIDIRECTIONAL_LAYERS)
    if other:
        raise ModelError(
            f"{path}: {config.model_type} has layers of the kind {', '.join(other)}, which read text in one direction "
            "only (linear attention, state-space or convolution layers): it can't denoise"
        )


def _classes(path: str, kind: str | None, names: list[str], is_encoder_decoder: bool | None = False) -> Mapping:
    """Config class -> model class: transformers' masked LMs for encoders, its causal LMs for decoders."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if is_encoder_decoder:
        raise ModelError(f"{path}: {kind} is an encoder-decoder; expected an encoder or a decoder")
    if kind == "diffusion_gemma":
        return {transformers.DiffusionGemmaConfig: transformers.DiffusionGemmaForBlockDiffusion}
    causal_named = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal_named:
        return transformers.MODEL_FOR_MASKED_LM_MAPPING
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    known = ", ".join(sorted({name for family in families.FAMILIES for name in family.model_types}))
    raise ModelError(
        f"{path}: model_type {kind!r} is neither a published diffusion family ({known}) nor one that transformers has "
        "as a masked or causal language model"
    )


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
    return to_native(blueprint.family.rules, tensors, shapes, blueprint.path, tied)


def _model_part(tensors: Mapping[str, Stored], names: Collection[str]) -> dict[str, Assembled]:
    """The model's tensors in a training checkpoint, which may hold those of the optimizer too, each under a prefix."""
    prefix = max(("", "model."), key=lambda prefix: sum(prefix + name in tensors for name in names))
    return {name: whole(tensors[prefix + name]) for name in names if prefix + name in tensors}


def _load_model(checkpoint: Checkpoint, blueprint: Blueprint, dtype: str, placement, quantization: str | None):
    path = blueprint.path
    state = state_for(checkpoint, blueprint)
    arguments: dict[str, Any] = {"dtype": _dtype(dtype, blueprint.raw, state)}
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, dtype)
    if quantization is not None or placement != "cpu":
        arguments["device_map"] = {"": placement} if _is_device(placement) else placement
    try:
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
    model.config._name_or_path = model.name_or_path = str(Path(path).resolve()) if Path(path).is_dir() else path
    _check_tensors(path, blueprint, model, report)
    return model


def _is_device(placement) -> bool:
    return isinstance(placement, str) and placement not in ("auto", "balanced", "balanced_low_0", "sequential")


def _dtype(dtype: str, raw: Mapping[str, Any], state: Mapping[str, Assembled]) -> torch.dtype:
    """`auto` is what config.json says, or else the type of most weights."""
    if dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ModelError(f"dtype {dtype!r} is unknown; expected float32, bfloat16, float16 or auto")
        return getattr(torch, dtype)
    stated = raw.get("dtype") or raw.get("torch_dtype")
    if stated is not None:
        return getattr(torch, str(stated).removeprefix("torch."))
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


def rows_needed(tokenizer) -> int:
    """Rows of the embeddings that the tokenizer's tokens take."""
    return max(tokenizer.get_vocab().values()) + 1


def mean_rows(weight: torch.Tensor, known: int, needed: int) -> None:
    """Sets the rows `known` to `needed` of embeddings, or of a head's weight or bias, to the mean of those before."""
    with torch.no_grad():
        weight[known:needed] = weight[:known].float().mean(dim=0).to(weight.dtype)


def vocabulary_tensors(model) -> list[str]:
    """Names of the tensors that have a row for each token, tied ones by the name they are stored under."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    places = {module: name for name, module in model.named_modules()}
    names = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            names += [f"{places[module]}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return list(dict.fromkeys(tied.get(name, name) for name in names))


def _fit_vocabulary(model, tokenizer, known: int) -> None:
    """Gives every token of the tokenizer a row in the embeddings; rows of new tokens start as the mean of the old.

    Args:
        model: its embeddings may have spare rows after the last known token.
        tokenizer: with the tokens that were added to it.
        known: rows of the tokens it had before.
    """
    rows, needed = model.get_input_embeddings().num_embeddings, rows_needed(tokenizer)
    old = min(known, rows)
    if needed <= old:
        return
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    for name in vocabulary_tensors(model):
        mean_rows(model.get_parameter(name), old, needed)


def _check_ids(path: str, spec: DiffusionSpec, rows: int) -> None:
    for name, value in spec.to_dict().items():
        if name.endswith("_token_id") and value is not None and not 0 <= value < rows:
            raise ModelError(f"{path}: {name} {value} is outside the vocabulary of {rows} tokens")
