"""Light-weight variants of a model through PEFT and bitsandbytes: LoRA adapters, and weights in 4 or 8 bits."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models import families
from dllm_ray.models.checkpoint import Checkpoint, read_json, whole
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.lm import DiffusionLM

logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # warns at import of kernels it does without

ADAPTER_CONFIG = "adapter_config.json"
_BASE = "diffusion_base.json"
"""Beside an adapter: which model it belongs to, beyond the name."""
_NUMBERS = ("embeddings", "head", "vectors", "matrices")


def quantization_config(kind: str, dtype: str):
    """bitsandbytes settings for `4bit` (NF4) or `8bit`.

    Raises:
        ModelError: another kind.
    """
    from transformers import BitsAndBytesConfig

    if kind == "4bit":
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ModelError(f"quantization {kind!r} is unknown; expected 4bit or 8bit")


def ready_for_cpu(model) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights at the first inference on a CPU.

    Its packed format takes only some widths, and its backward pass doesn't know it: gradients would be wrong.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def add_lora(lm: DiffusionLM, config: LoRAConfig, seed: int) -> DiffusionLM:
    """The model with a fresh LoRA adapter, whose weights are the only ones that train.

    Args:
        lm: a model without an adapter.
        config: what to adapt, and how; `rank` is set.
        seed: seeds the adapter's weights; torch's global generator is left as it was.

    Raises:
        ModelError: no module has such a name, or there is an adapter already.
    """
    from peft import LoraConfig, get_peft_model

    if has_adapter(lm.model):
        raise ModelError("the model has an adapter already; merge it into the weights first (jobs/convert.py)")

    family = families.by_name(lm.spec.family)
    targets = config.targets or (family.lora_targets if family is not None else "all-linear")
    if targets in (["all-linear"], ("all-linear",)):
        targets = "all-linear"
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    made_for = fingerprint(lm)
    try:
        with torch.random.fork_rng(), _literal_targets(lm.model):
            torch.manual_seed(seed)
            model = get_peft_model(lm.model, settings)
    except ValueError as error:
        raise ModelError(
            f"lora.targets {targets!r} fit no module of {type(lm.model).__name__}: {first_line(error)}"
        ) from None
    model.base_fingerprint = made_for
    return DiffusionLM(model, lm.tokenizer, lm.spec)


def base_of(adapter: str) -> str:
    """The model that an adapter directory names as its base.

    Raises:
        ModelError: no readable adapter, or it names none.
    """
    base = _settings(adapter).get("base_model_name_or_path")
    advice = f"name it yourself: --model.path BASE --model.adapter {adapter}"
    if not isinstance(base, str) or not base:
        raise ModelError(f"{adapter}: {ADAPTER_CONFIG} names no base model; {advice}")
    folder = Path(base)
    if not folder.exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise ModelError(f"{adapter}: its base model is not there: {base}; {advice}")
    if is_adapter(base):
        raise ModelError(f"{adapter}: its base {base} is an adapter itself; {advice}")
    return base


def is_adapter(path: str) -> bool:
    """Whether a directory holds a PEFT adapter and no model."""
    return (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def add_adapter(lm: DiffusionLM, adapter: str) -> DiffusionLM:
    """The model with a saved adapter on top.

    Raises:
        ModelError: no adapter there, or it belongs to another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    settings = _settings(adapter)
    here = fingerprint(lm)
    ours = (Path(adapter) / _BASE).is_file()
    if ours:
        _check_base(lm, adapter, here, read_json(adapter, _BASE), settings)
    try:
        with warnings.catch_warnings(), _literal_targets(lm.model) if ours else nullcontext():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that it has renamed
            model = PeftModel.from_pretrained(lm.model, adapter)
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
            absent = sorted(set(wanted) - set(load_peft_weights(adapter, device="cpu")))
    except Exception as error:  # PEFT, safetensors and torch raise many types for what doesn't fit or is broken
        raise ModelError(
            f"{adapter}: the adapter, made for {settings.get('base_model_name_or_path')}, doesn't fit "
            f"{lm.model.name_or_path} ({type(lm.model).__name__}): {_shapes(error)}"
        ) from error
    if absent:
        raise ModelError(f"{adapter}: {len(absent)} tensors are missing from the adapter, first {absent[0]!r}")
    model.base_fingerprint = here
    return DiffusionLM(model, lm.tokenizer, lm.spec)


def save_adapter(model, directory: str | Path) -> None:
    """Writes a PEFT adapter directory, with a note of which model it belongs to beyond the base's name."""
    model.save_pretrained(directory, save_embedding_layers=False)
    (Path(directory) / _BASE).write_text(json.dumps(model.base_fingerprint, indent=2), encoding="utf-8")


def restore(lm: DiffusionLM, directory: str | Path) -> None:
    """Overwrites the weights of a model, or of its adapter, with those that `DiffusionLM.save` wrote."""
    if has_adapter(lm.model):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(lm.model, load_peft_weights(str(directory), device="cpu"))
        return
    stored = Checkpoint(str(directory)).tensors
    tied = getattr(lm.model, "all_tied_weights_keys", None) or {}
    with torch.no_grad():
        for name, tensor in lm.model.state_dict().items():
            if name in stored or name not in tied:
                tensor.copy_(whole(stored[name]).read())


def has_adapter(model) -> bool:
    """Whether a model carries a PEFT adapter."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def fingerprint(lm: DiffusionLM) -> dict:
    """Family, architecture and sizes of a model, and a few numbers out of its weights.

    `matrices` is empty where they are quantized; the other weights never are.
    """
    embeddings, head = lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings()
    vectors = [parameter for parameter in lm.model.parameters() if parameter.ndim == 1]  # norms and biases
    matrices = [module.weight for module in lm.model.modules() if isinstance(module, torch.nn.Linear)]
    quantized = any(not weight.is_floating_point() for weight in matrices)
    config = lm.model.config.get_text_config()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return {
        "family": lm.spec.family,
        "architecture": type(lm.model).__name__,
        **{name: getattr(config, name, None) for name in sizes},
        "dtype": str(embeddings.dtype).removeprefix("torch."),
        "embeddings": _corner(embeddings),
        "head": [] if head is None else _corner(head.weight),
        "vectors": [value for vector in _some(vectors) for value in vector[:4].detach().float().tolist()],
        "matrices": [] if quantized else [value for matrix in _some(matrices) for value in matrix[0, :4].tolist()],
    }


def _some(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """A few of them, from the first to the last."""
    return [weights[index] for index in torch.linspace(0, len(weights) - 1, min(len(weights), 16)).long()]


def _corner(table: torch.Tensor) -> list[float]:
    """A few numbers out of rows that every size of vocabulary has."""
    rows = torch.linspace(0, min(len(table), 256) - 1, 16, device=table.device).long()
    return table[rows, :2].detach().float().flatten().tolist()


def merge(lm: DiffusionLM) -> DiffusionLM:
    """The model with its adapter's updates added to the weights."""
    return DiffusionLM(lm.model.merge_and_unload(), lm.tokenizer, lm.spec)


def _settings(adapter: str) -> dict:
    file = Path(adapter) / ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(f"{adapter}: no {ADAPTER_CONFIG} in it; expected a PEFT adapter directory")
    return read_json(adapter, ADAPTER_CONFIG)


@contextmanager
def _literal_targets(model) -> Iterator[None]:
    """Keeps PEFT from rewriting targets.

    For adapters of older versions of transformers it takes `gate_proj`, `up_proj` and `down_proj` of a mixture for the
    stacks of routed experts, and would adapt those in place of the dense and shared MLPs. It goes by `model_type`.
    """
    model.config.model_type = "literal"
    try:
        yield
    finally:
        del model.config.model_type  # the class's own shows again


def _check_base(lm: DiffusionLM, adapter: str, here: dict, made_for: dict, settings: dict) -> None:
    differing = [name for name in here if name not in ("dtype", *_NUMBERS) and here[name] != made_for.get(name)]
    # another type rounds: bfloat16 by up to 0.4 percent
    tolerance = 1e-5 if here["dtype"] == made_for.get("dtype") else 1e-2
    same = all(
        _close(here[name], made_for.get(name, []), tolerance)
        for name in _NUMBERS
        if name != "matrices" or (here[name] and made_for.get(name))
    )
    if differing or not same:
        found = ", ".join(f"{name} {here[name]!r}, expected {made_for.get(name)!r}" for name in differing)
        raise ModelError(
            f"{adapter}: the adapter was made for another base model, {settings.get('base_model_name_or_path')}; "
            f"{lm.model.name_or_path} has {found or 'other weights'}"
        )


def _close(ours: list[float], theirs: list[float], tolerance: float) -> bool:
    if len(ours) != len(theirs):
        return False
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    size = theirs.square().mean().sqrt() if len(theirs) else 0.0
    return bool(((ours - theirs).abs() <= tolerance * (theirs.abs() + size)).all())


def _shapes(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return lines[0] if lines else first_line(error)
