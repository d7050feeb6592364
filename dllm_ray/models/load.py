"""`load`: one entry for every checkpoint. Native transformers classes only; no remote code is ever run."""

import json
import logging
from pathlib import Path

import torch

from dllm_ray.errors import ModelError
from dllm_ray.models.config import ModelConfig, expand_home
from dllm_ray.models.lm import DiffusionLM, is_decoder, usable_positions
from dllm_ray.models.spec import CONFIG_KEY, DiffusionSpec
from dllm_ray.models.tokenizers import end_of_turn_id, first_line, load_tokenizer, prepare

logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: str | None = None,
    adapter: str | Path | None = None,
) -> DiffusionLM:
    """Loads a checkpoint as a diffusion language model, in eval mode.

    BERT-style encoders are taken as they are; decoders become bidirectional through `config.is_causal = False`. A
    tokenizer without a mask token gets one, whose embedding starts as the mean of all embeddings.

    Args:
        path: a Hugging Face directory, or a hub id.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        device: where the weights go, e.g. `cpu` or `cuda:0`.
        quantization: None, `4bit` (NF4) or `8bit`, through bitsandbytes.
        adapter: a PEFT adapter directory to put on top.

    Raises:
        ModelError: what is missing or doesn't fit, with what was found and expected.
    """
    path = expand_home(str(path))
    check_path(path)
    raw = _read_config(path)
    tokenizer = load_tokenizer(path)
    known = _rows_needed(tokenizer)
    tokenizer = prepare(tokenizer)
    model = _load_model(path, raw, dtype, device, quantization)
    spec = _spec(path, raw, tokenizer)
    _fit_vocabulary(model, tokenizer, known)
    _check_ids(path, spec, model.get_input_embeddings().num_embeddings)
    setattr(model.config, CONFIG_KEY, spec.to_dict())
    if adapter is not None:
        model = _add_adapter(model, expand_home(str(adapter)))
    model.eval()
    lm = DiffusionLM(model, tokenizer, spec)
    if is_decoder(model.get_base_model() if adapter is not None else model):
        check_bidirectional(lm)
    return lm


def open_model(config: ModelConfig, tokenizer=None, seed: int = 0, device: str = "cpu") -> DiffusionLM:
    """The model that settings describe: loaded from `config.path`, or built from scratch around a tokenizer.

    Args:
        config: what to load or build.
        tokenizer: needed where `config.path` is null.
        seed: seeds the weights of a model from scratch.
        device: where the weights go.

    Raises:
        ModelError: the model can't be loaded or built.
    """
    if config.path is not None:
        return load(config.path, config.dtype, device, config.quantization, config.adapter)
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
        return  # a hub id
    if not folder.is_dir():
        raise ModelError(f"{path} is a file; expected a Hugging Face model directory or a hub id")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in it; expected a Hugging Face model directory")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ModelError(f"{path}: no weights in it; expected {' or '.join(_WEIGHTS[:2])} beside config.json")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{path}: no tokenizer in it; expected tokenizer.json (or vocab.txt, ...) beside config.json")


def load_spec(path: str, tokenizer) -> DiffusionSpec:
    """The spec that `load` would give, without loading weights.

    Raises:
        ModelError: no readable config.json, an architecture that can't be loaded, or a spec that can't be right.
    """
    raw = _read_config(path)
    _auto_class(path, raw)
    return _spec(path, raw, tokenizer)


def context_length(path: str) -> int | None:
    """Longest sequence of a checkpoint, without loading weights; None when its config states no limit.

    Raises:
        ModelError: transformers can't read the config.
    """
    from transformers import AutoConfig

    try:
        return usable_positions(AutoConfig.from_pretrained(path))
    except Exception as error:  # a config of unknown type or with wrong fields raises many types
        raise ModelError(f"{path}: config.json can't be used: {first_line(error)}") from error


def check_bidirectional(lm: DiffusionLM) -> None:
    """Makes sure that the first position sees the last one.

    Raises:
        ModelError: the architecture ignores `is_causal = False`.
    """
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, 5, device=lm.device).remainder(vocabulary).unsqueeze(0)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    first = torch.zeros(1, dtype=torch.long, device=lm.device)
    with torch.no_grad():
        same = torch.equal(lm.module(ids, positions=first), lm.module(other, positions=first))
    if same:
        raise ModelError(
            f"{type(lm.model).__name__}: attention stays causal although config.is_causal is false, so the model "
            "can't denoise; choose an architecture with ordinary attention"
        )


def as_bidirectional(config):
    """Marks a decoder's config so that transformers builds bidirectional attention for it."""
    config.is_causal = False
    return config


def _read_config(path: str) -> dict:
    from transformers.utils import cached_file

    try:
        raw = json.loads(Path(cached_file(path, "config.json")).read_text(encoding="utf-8"))
    except (OSError, TypeError) as error:
        raise ModelError(f"{path}: no config.json can be read or downloaded: {first_line(error)}") from error
    except ValueError as error:
        raise ModelError(f"{path}: config.json is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: config.json holds a {type(raw).__name__}; expected a mapping")
    return raw


def _auto_class(path: str, raw: dict):
    """The transformers entry that fits: masked LM for encoders, causal LM for decoders."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = raw.get("model_type")
    names = raw.get("architectures") or []
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{path}: {kind} is an encoder-decoder; expected an encoder or a decoder")
    causal_named = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal_named:
        return AutoModelForMaskedLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    raise ModelError(
        f"{path}: model_type {kind!r} is not one that transformers has as a masked or causal language model"
    )


def _load_model(path: str, raw: dict, dtype: str, device: str, quantization: str | None):
    from transformers import AutoConfig, AutoModelForCausalLM

    auto = _auto_class(path, raw)
    arguments = {"dtype": dtype}
    if quantization is not None:
        arguments |= {"quantization_config": _quantization(quantization, dtype), "device_map": {"": device}}
    try:
        config = AutoConfig.from_pretrained(path)
        if auto is AutoModelForCausalLM:
            config = as_bidirectional(config)
        model, report = auto.from_pretrained(path, config=config, output_loading_info=True, **arguments)
    except ModelError:
        raise
    except Exception as error:  # transformers and safetensors raise many types for a broken checkpoint
        raise ModelError(f"{path}: the checkpoint can't be loaded: {first_line(error)}") from error
    _check_tensors(path, model, report)
    return model if quantization is not None else model.to(device)


def _check_tensors(path: str, model, report: dict) -> None:
    """A missing tensor is an error, unless the checkpoint has no language-model head at all."""
    missing = sorted(report["missing_keys"])
    trunk = model.base_model_prefix + "."
    lost = [name for name in missing if name.startswith(trunk)]
    if lost:
        raise ModelError(
            f"{path}: {len(lost)} tensors of {type(model).__name__} are missing from the weights, first {lost[0]!r}"
        )
    if missing:
        logger.warning("%s has no language-model head: %s start random", path, ", ".join(missing))
    mismatched = report.get("mismatched_keys")
    if mismatched:
        raise ModelError(f"{path}: tensors of another shape than config.json says: {sorted(mismatched)[0]}")
    if report["unexpected_keys"]:
        logger.warning("%s: tensors without a place: %s", path, ", ".join(sorted(report["unexpected_keys"])))


def _spec(path: str, raw: dict, tokenizer) -> DiffusionSpec:
    stored = raw.get(CONFIG_KEY)
    if stored is not None:
        return DiffusionSpec.from_dict(stored, f"{path}/config.json")
    return describe(raw["model_type"], tokenizer)


def describe(family: str, tokenizer) -> DiffusionSpec:
    """The spec of a model that has none stored, from its prepared tokenizer."""
    return DiffusionSpec(
        family=family,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eot_token_id=end_of_turn_id(tokenizer),
    )


def _rows_needed(tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _fit_vocabulary(model, tokenizer, known: int) -> None:
    """Gives every token of the tokenizer a row in the embeddings; rows of new tokens start as the mean of the old.

    Args:
        model: its embeddings may have spare rows after the last known token.
        tokenizer: with the tokens that were added to it.
        known: rows of the tokens it had before.
    """
    rows, needed = model.get_input_embeddings().num_embeddings, _rows_needed(tokenizer)
    old = min(known, rows)
    if needed <= old:
        return
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    output = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight]
    if output is not None and output.weight is not tables[0]:
        tables.append(output.weight)
    with torch.no_grad():
        for weight in tables:
            weight[old:needed] = weight[:old].float().mean(dim=0).to(weight.dtype)
        bias = getattr(output, "bias", None)
        if bias is not None:
            bias[old:needed] = bias[:old].mean()


def _check_ids(path: str, spec: DiffusionSpec, rows: int) -> None:
    for name, value in spec.to_dict().items():
        if name.endswith("_token_id") and value is not None and not 0 <= value < rows:
            raise ModelError(f"{path}: {name} {value} is outside the vocabulary of {rows} tokens")


def _quantization(kind: str, dtype: str):
    from transformers import BitsAndBytesConfig

    if kind == "4bit":
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ModelError(f"quantization {kind!r} is unknown; expected 4bit or 8bit")


def _add_adapter(model, adapter: str):
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(f"{adapter}: no adapter_config.json in it; expected a PEFT adapter directory")
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{adapter}: the adapter doesn't fit {type(model).__name__}: {first_line(error)}") from error
