"""ModernBERT with edit heads, as dLLM publishes Edit Flow models: the heads read what enters the trunk's last norm."""

from typing import Any

from dllm_ray.models.families.base import Family, Fields
from dllm_ray.models.mapping import Rename

_FIELDS = (
    ("attention_bias", "attention_dropout", "bos_token_id", "classifier_activation", "classifier_bias")
    + ("classifier_dropout", "classifier_pooling", "cls_token_id", "decoder_bias", "embedding_dropout", "eos_token_id")
    + (
        "global_attn_every_n_layers",
        "global_rope_theta",
        "hidden_activation",
        "hidden_size",
        "initializer_cutoff_factor",
    )
    + ("initializer_range", "intermediate_size", "layer_types", "local_attention", "local_rope_theta")
    + ("max_position_embeddings", "mlp_bias", "mlp_dropout", "norm_bias", "norm_eps", "num_attention_heads")
    + ("num_hidden_layers", "pad_token_id", "rope_parameters", "sep_token_id", "tie_word_embeddings", "vocab_size")
)


def _config(fields: Fields) -> dict[str, Any]:
    return fields.take(*_FIELDS)


def _heads(original: str, native: str) -> tuple[Rename, Rename]:
    return tuple(Rename(f"{original}.{part}", f"edit_heads.{native}.{part}") for part in ("weight", "bias"))


FAMILY = Family(
    name="editflow-modernbert",
    native="modernbert",
    model_types=("editflow-modernbert",),
    architectures=("EditFlowModernBertModel",),
    config=_config,
    rules=(*_heads("rate_heads.0", "rates"), *_heads("sub_logits", "substitute"), *_heads("ins_logits", "insert")),
    mask_token="[MASK]",
    eot_text="[/Answer]",
    edit_heads={"time": False, "reads": "final_norm"},
)
