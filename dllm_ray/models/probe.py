"""Proves, by numbers, what attention a decoder really has: who sees whom, on a small copy with random weights.

Configs promise much; a diffusion model needs that every position sees every other, that padding is invisible, and that
a mask is taken as it is given.
"""

import copy

import torch
from torch import Tensor

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models.lm import LogitsModule

_WIDTH = 12
_BLOCK = 4
_VOCABULARY = 64
_DIFFERENT = 1e-6
_SAME = 1e-4
_SAME_HALF = 0.1


def check_bidirectional(model) -> None:
    """The quick check of every load: the first position of a decoder sees the last one.

    Raises:
        ModelError: it doesn't: the architecture ignores `is_causal = False`.
    """
    module = LogitsModule(model)
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, 5, device=device).remainder(vocabulary).unsqueeze(0)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    first = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        same = torch.equal(module(ids, positions=first), module(other, positions=first))
    if same:
        raise _causal(model)


def check_architecture(model_class: type, config, where: str) -> None:
    """Checks the attention of an architecture on a copy with few layers, a small vocabulary and random weights.

    Args:
        model_class: a decoder of transformers.
        config: its config, marked bidirectional.
        where: the checkpoint, for messages.

    Raises:
        ModelError: one of the three properties doesn't hold, or the copy can't be run.
    """
    small = copy.deepcopy(config)
    small.vocab_size = _VOCABULARY
    small.pad_token_id = small.eos_token_id = small.bos_token_id = 0
    layers = min(small.num_hidden_layers, 2)
    small.num_hidden_layers = layers
    small.initializer_range = 0.02  # whatever the model's own: the copy's weights must make a difference
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(small).float().eval()
        check_attention(model)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    except Exception as error:  # an architecture that can't take such a mask fails at a place of its own
        raise ModelError(
            f"{where}: {model_class.__name__} can't be run as a diffusion model: {type(error).__name__} while its "
            f"attention was checked: {first_line(error)}"
        ) from error


def check_attention(model) -> None:
    """Checks a decoder that was made bidirectional.

    Raises:
        ModelError: a position doesn't see another, padding is seen, or a mask is not taken as given.
    """
    name = type(model).__name__
    module = LogitsModule(model)
    device = next(model.parameters()).device
    vocabulary = min(model.get_input_embeddings().num_embeddings, _VOCABULARY)
    ids = (torch.arange(_WIDTH, device=device) * 7 + 3).remainder(vocabulary).unsqueeze(0)
    if not bool(influence(module, ids, None).all()):
        raise _causal(model)
    padded = torch.cat([ids, ids[:, :_BLOCK]], dim=1)
    mask = (torch.arange(padded.shape[1], device=device) < _WIDTH).long().unsqueeze(0)
    with torch.no_grad():
        error = (module(padded, mask)[:, :_WIDTH] - module(ids)).abs().max().item()
    if not error < _SAME:
        raise ModelError(f"{name}: padding that is masked out changes the logits (by {error:.1g})")
    block = torch.arange(_WIDTH, device=device) // _BLOCK
    wanted = block.unsqueeze(1) >= block
    if not torch.equal(influence(module, ids, wanted[None, None]), wanted):
        raise ModelError(f"{name}: a block-causal mask is not taken as it is given")


def check_positions(model) -> None:
    """Checks that a sample behind another one in a row gives the logits that it gives alone, once it is told its
    positions and sees itself only. Packing and BD3LM rest on it.

    Raises:
        ModelError: it doesn't: the architecture goes by places in the row.
    """
    module = LogitsModule(model)
    device = next(model.parameters()).device
    vocabulary = min(model.get_input_embeddings().num_embeddings, _VOCABULARY)
    ids = (torch.arange(_WIDTH, device=device) * 7 + 3).remainder(vocabulary).unsqueeze(0)
    sample = torch.arange(_WIDTH, device=device) // _BLOCK
    alone = (sample.unsqueeze(1) == sample)[None, None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = module(ids, alone, (torch.arange(_WIDTH, device=device) % _BLOCK).unsqueeze(0))[:, -_BLOCK:]
            by_itself = module(ids[:, -_BLOCK:])
        problem = f"logits differ by {(packed - by_itself).abs().max().item():.1g}"
        same = torch.allclose(packed, by_itself, rtol=0, atol=_SAME if packed.dtype == torch.float32 else _SAME_HALF)
    except Exception as error:  # an architecture that can't take such a mask fails at a place of its own
        same, problem = False, f"{type(error).__name__}: {first_line(error)}"
    model.train(was_training)
    if not same:
        raise ModelError(
            f"{type(model).__name__} doesn't go by the mask and positions it is told ({problem}), which packing and "
            "bd3lm need: train it with objective.name mdlm and without data.packing"
        )


def influence(module: LogitsModule, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[T, T] bool: whether the logits of a row change with the token of a column.

    Args:
        module: the model.
        ids: [1, T] token ids.
        mask: its attention mask.
    """
    width = ids.shape[1]
    vocabulary = min(module.model.get_input_embeddings().num_embeddings, _VOCABULARY)
    changed = ids.repeat(width, 1)
    changed.fill_diagonal_(0)
    changed += torch.diag((ids[0] + 1).remainder(vocabulary))
    with torch.no_grad():
        difference = (module(changed, mask) - module(ids, mask)).abs().amax(dim=-1)  # [changed token, logits of]
    return difference.T > _DIFFERENT


def _causal(model) -> ModelError:
    return ModelError(
        f"{type(model).__name__}: attention stays causal (or misses positions) although config.is_causal is false, so "
        "the model can't denoise; choose an architecture with ordinary attention"
    )
