"""Settings that say which model a job uses: a directory or hub id, or a small one built from scratch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dllm_ray.errors import ConfigError


@dataclass
class ScratchConfig:
    """A new model with random weights and a byte-level BPE tokenizer trained on the training data."""

    architecture: str = "bert"
    """`model_type` of any BERT-style encoder or decoder of transformers: bert, modernbert, llama, qwen3, ..."""
    vocab_size: int = 4096
    """Most tokens in the tokenizer: 256 bytes, the special tokens, and BPE merges learned from the data."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_hidden_layers: int = 4
    """Number of layers."""
    num_attention_heads: int = 4
    """Attention heads in each layer."""
    intermediate_size: int | None = None
    """Width of the MLP; null: four times `hidden_size`."""
    max_position_embeddings: int = 1024
    """Longest sequence, in tokens."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the architecture's transformers config, e.g. `{num_key_value_heads: 2}`."""

    def __post_init__(self):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, got {getattr(self, name)}", name)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"must be a multiple of num_attention_heads ({self.num_attention_heads}), got {self.hidden_size}",
                "hidden_size",
            )
        if self.vocab_size < 257:
            raise ConfigError(f"must exceed the 256 byte tokens, got {self.vocab_size}", "vocab_size")


@dataclass
class ModelConfig:
    """The model of a job."""

    path: str | None = None
    """A Hugging Face directory or hub id; null builds the model described by `scratch`, where the job trains one."""
    adapter: str | None = None
    """A PEFT adapter directory to put on top of `path`."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type the weights are held in; `auto` keeps the checkpoint's."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the linear layers through bitsandbytes in 4-bit NF4 or in 8 bits. Only an adapter trains on them (QLoRA,
    arXiv 2305.14314); one that was trained so goes on the full weights as well."""
    device_map: str | None = None
    """Spread the layers over a worker's devices: `auto`, `balanced` or `sequential`; null: all on its own device."""
    compile: Literal["default", "reduce-overhead"] | None = None
    """Compile the model's forward with `torch.compile`, for sampling and for training: minutes at first, then less time
    between kernels; `reduce-overhead` uses CUDA graphs where shapes repeat. null: as it is."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """The model to build when `path` is null."""

    def __post_init__(self):
        self.path, self.adapter = (path and place(path) for path in (self.path, self.adapter))
        if self.path is None and (self.adapter or self.quantization):
            raise ConfigError("an adapter or quantization needs a model to load: set model.path", "path")


@dataclass
class LoRAConfig:
    """Low-rank adaptation (LoRA, arXiv 2106.09685) in place of training every weight."""

    rank: int | None = None
    """Rank of the update of each adapted matrix; null trains every weight of the model instead."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout in front of the update."""
    targets: list[str] | None = None
    """Names (or ends of names) of the linear modules to adapt; [all-linear]: all but the head. null: those that the
    family's own recipe adapts."""
    dora: bool = False
    """Train the length of each row of an adapted matrix apart from its direction (DoRA, arXiv 2402.09353): slower, and
    often better at low ranks."""
    trained_modules: list[str] = field(default_factory=list)
    """Names (or ends of names) of modules to train whole, in `model.dtype`, and to save with the adapter: e.g. the
    embeddings and the head where the mask token is new. Tied embeddings and head come together."""

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"must be at least 1, got {self.rank}", "rank")
        if not self.alpha > 0:
            raise ConfigError(f"must be above 0, got {self.alpha}", "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"must lie in [0, 1), got {self.dropout}", "dropout")


def place(path: str) -> str:
    """A local directory by its absolute path, as workers run elsewhere; a hub id as it is."""
    local = Path(path).expanduser() if path.startswith("~") else Path(path)
    return str(local.absolute()) if local.exists() or path.startswith("~") else path
