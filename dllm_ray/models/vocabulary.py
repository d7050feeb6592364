"""Room for every token of the tokenizer in the tensors that have a row for each: embeddings and head."""

import torch

from dllm_ray.errors import ModelError
from dllm_ray.models.spec import DiffusionSpec


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
    heads = getattr(model, "edit_heads", None)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for module in tables if heads is None else [*tables, heads.substitute, heads.insert]:
        if module is not None:
            names += [f"{places[module]}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return list(dict.fromkeys(tied.get(name, name) for name in names))


def fit(model, tokenizer, known: int) -> None:
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


def check_ids(path: str, spec: DiffusionSpec, rows: int) -> None:
    """Makes sure that the spec's tokens have embeddings.

    Raises:
        ModelError: one has none.
    """
    for name, value in spec.to_dict().items():
        if name.endswith("_token_id") and value is not None and not 0 <= value < rows:
            raise ModelError(f"{path}: {name} {value} is outside the vocabulary of {rows} tokens")
