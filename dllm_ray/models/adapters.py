"""Light-weight variants of a model through PEFT and bitsandbytes: LoRA adapters, and weights in 4 or 8 bits."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models import edit_heads, families
from dllm_ray.models.checkpoint import Checkpoint, read_json, whole
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.lm import DiffusionLM

logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # warns at import of kernels it does without

ADAPTER_CONFIG = "adapter_config.json"
_BASE = "diffusion_base.json"
"""Beside an adapter: which model it belongs to, beyond the name."""
_NUMBERS = ("embeddings", "head", "vectors", "matrices")


def quantization_config(kind: str, dtype: str):
    """bitsandbytes settings for `4bit` (NF4 with quantized constants, as in QLoRA, arXiv 2305.14314) or `8bit`.

    Raises:
        ModelError: another kind.
    """
    from transformers import BitsAndBytesConfig

    if kind == "4bit":
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
        )
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
    """The model with a fresh LoRA adapter. Its weights and those of `trained_modules` are the only ones that train.

    On quantized weights this is QLoRA: they stay as they are, and the update is held in float32 beside them.

    Args:
        lm: a model without an adapter.
        config: what to adapt, and how; `rank` is set.
        seed: seeds the adapter's weights; torch's global generator is left as it was.

    Raises:
        ModelError: no module has such a name, it can't be trained, or there is an adapter already.
    """
    from peft import LoraConfig, get_peft_model

    if has_adapter(lm.model):
        raise ModelError("the model has an adapter already; merge it into the weights first (jobs/convert.py)")
    if config.dora:
        _check_dora(lm.model)

    family = families.by_name(lm.spec.family)
    targets = config.targets or (family.lora_targets if family is not None else "all-linear")
    if targets in (["all-linear"], ("all-linear",)):
        targets = "all-linear"
    heads = [] if lm.spec.edit_heads is None else [edit_heads.NAME]  # always trained whole
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        modules_to_save=_trained_modules(lm.model, [*config.trained_modules, *heads]) or None,
        exclude_modules=rf"(.*\.)?{edit_heads.NAME}\..*" if heads else None,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    made_for = fingerprint(lm)
    try:
        with torch.random.fork_rng(), _literal_targets(lm.model), _quiet():
            torch.manual_seed(seed)
            model = get_peft_model(lm.model, settings)
    except ValueError as error:
        raise ModelError(
            f"lora.targets {targets!r} fit no module of {type(lm.model).__name__}: {first_line(error)}"
        ) from None
    _tie_copies(model)
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
    if settings.get("use_dora"):
        _check_dora(lm.model)
    here = fingerprint(lm)
    ours = (Path(adapter) / _BASE).is_file()
    if ours:
        _check_base(lm, adapter, here, read_json(adapter, _BASE), settings)
    try:
        with _quiet(), _literal_targets(lm.model) if ours else nullcontext():
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
    _tie_copies(model)
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


def count_parameters(model) -> tuple[int, int]:
    """All weights of a model, and those that train."""
    if has_adapter(model):
        trainable, total = model.get_nb_trainable_parameters()  # knows what 4-bit weights stand for
        return total, trainable
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


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
    with _quiet():
        model = lm.model.merge_and_unload()
    with torch.no_grad():
        for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            # the bias of a trained head, of which the model keeps a second name
            if model.get_parameter(tied) is not model.get_parameter(source):
                model.get_parameter(source).copy_(model.get_parameter(tied))
    model.tie_weights()
    return DiffusionLM(model, lm.tokenizer, lm.spec)


def _settings(adapter: str) -> dict:
    file = Path(adapter) / ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(f"{adapter}: no {ADAPTER_CONFIG} in it; expected a PEFT adapter directory")
    return read_json(adapter, ADAPTER_CONFIG)


def _trained_modules(model, names: list[str]) -> list[str]:
    """Full names of the modules to train whole. Tied embeddings and head come together.

    Raises:
        ModelError: there is none of that name, it is quantized, or it holds tied weights among others.
    """
    modules = dict(model.named_modules())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [key for key, module in modules.items() if module is embeddings or module is head]
    tied = head is not None and head.weight is embeddings.weight
    found: set[str] = set()
    for name in names:
        keys = {key for key in modules if key and f".{key}".endswith(f".{name}")}
        if not keys:
            raise ModelError(
                f"lora.trained_modules: {type(model).__name__} has no module {name!r}; "
                f"expected a name, or the end of one, such as {' or '.join(tables)}"
            )
        found |= keys
    if tied and found & set(tables):
        found |= set(tables)
    found = {key for key in found if not any(key.startswith(f"{other}.") for other in found)}
    for key in sorted(found):
        if not all(parameter.is_floating_point() for parameter in modules[key].parameters()):
            raise ModelError(
                f"lora.trained_modules: the weights of {key} are quantized, and only an adapter trains on those; "
                "leave it out, or the quantization"
            )
        inside = [table for table in tables if table.startswith(f"{key}.")]
        if tied and inside:
            raise ModelError(
                f"lora.trained_modules: {key} holds weights tied to those of another module; name {inside[0]} itself"
            )
    return sorted(found)


def _tie_copies(model) -> None:
    """Lets the trained copies of tied embeddings and head share one weight, as the originals do."""
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not (isinstance(embeddings, ModulesToSaveWrapper) and isinstance(head, ModulesToSaveWrapper)):
        return
    if embeddings.original_module.weight is head.original_module.weight:
        head.modules_to_save["default"].weight = embeddings.modules_to_save["default"].weight


def _check_dora(model) -> None:
    if getattr(model, "is_loaded_in_8bit", False):
        raise ModelError("lora.dora: DoRA works on full or 4-bit weights, not on model.quantization 8bit")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences PEFT where it is wrong: it asks transformers for a name that has changed, and can't know of
    `_tie_copies`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


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
