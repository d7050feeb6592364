"""A DiffusionGemma of some 50,000 weights; its class can't do without a vision part."""

import json

import torch

_TEXT = """{
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32,
    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3
}"""
_VISION = """{
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4,
    "position_embedding_size": 16, "max_position_embeddings": 64
}"""


def make_gemma(context: int):
    """The model, with the same random weights each time and canvases of 8 tokens."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = json.loads(_TEXT) | {"max_position_embeddings": context}
    ids = {"image_token_id": 299, "boi_token_id": 298, "eoi_token_id": 297}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DiffusionGemmaConfig(text_config=text, vision_config=json.loads(_VISION), canvas_length=8, **ids)
        return DiffusionGemmaForBlockDiffusion(config).eval()


def save_gemma(model, tokenizer, folder) -> None:
    """Writes the model and a tokenizer with the tokens that it needs."""
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "bos_token": "<|system|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names).save_pretrained(folder)
