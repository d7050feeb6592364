"""Proves, by numbers, what attention a decoder really has: who sees whom, on a small copy with random weights.

Configs promise much; a diffusion model needs that every position sees every other, that padding is invisible, and that
a mask is taken as it is given.
"""

import copy

import torch
from torch import Tensor

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models.edit_heads import NAME, EditModule
from dllm_ray.models.lm import LogitsModule
from dllm_ray.models.spec import CONFIG_KEY, DiffusionSpec

_WIDTH = 12
_BLOCK = 4
_VOCABULARY = 64
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_DIFFERENT = 1e-6  # of the largest logit
_SAME = 1e-4
_SAME_PLACES = 1e-5


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
    try:
        check_attention(_small_copy(model_class, config))
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    except Exception as error:  # an architecture that can't take such a mask fails at a place of its own
        raise ModelError(
            f"{where}: {model_class.__name__} can't be run as a diffusion model: {type(error).__name__} while its "
            f"attention was checked: {first_line(error)}"
        ) from error


def _small_copy(model_class: type, config):
    """A model with the architecture of a config, few layers, a small vocabulary and random weights."""
    small = copy.deepcopy(config)
    small.vocab_size = _VOCABULARY
    small.pad_token_id = small.eos_token_id = small.bos_token_id = 0
    layers = min(small.num_hidden_layers, 2)
    small.num_hidden_layers = layers
    small.initializer_range = 0.02  # whatever the model's own: the copy's weights must make a difference
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(small).float().eval()


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
    with torch.no_grad():
        error = _padding_error(module, ids)
    if not error < _SAME:
        raise ModelError(f"{name}: padding that is masked out changes the logits (by {error:.1g})")
    block = torch.arange(_WIDTH, device=device) // _BLOCK
    wanted = block.unsqueeze(1) >= block
    if not torch.equal(influence(module, ids, wanted[None, None]), wanted):
        raise ModelError(f"{name}: a block-causal mask is not taken as it is given")


def check_training(model, padded: bool, positions: bool) -> None:
    """Checks, on a small copy with random weights, what training asks of an architecture.

    Args:
        model: of transformers, without an adapter.
        padded: padding is masked out: it must change nothing.
        positions: tokens are told their positions (packing, BD3LM): places in the row must not matter beside them.

    Raises:
        ModelError: a property doesn't hold, or the copy can't be run so.
    """
    if not (padded or positions):
        return
    name = type(model).__name__
    try:
        module = LogitsModule(_small_copy(type(model), model.config))
        ids = (torch.arange(_WIDTH) * 7 + 3).remainder(_VOCABULARY).unsqueeze(0)
        with torch.no_grad():
            padding = _padding_error(module, ids) if padded else 0.0
            places = _places_error(module, ids) if positions else 0.0
    except Exception as error:  # an architecture that can't take such a mask fails at a place of its own
        raise ModelError(
            f"{name} takes no masks as training needs them: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not padding < _SAME:
        raise ModelError(
            f"{name} sees padding that is masked out (logits change by {padding:.1g}): train it with data.padding eos"
        )
    if not places < _SAME_PLACES:
        raise ModelError(
            f"{name} goes by places in the row beside the positions it is told (logits change by {places:.1g}), and "
            "packing and bd3lm move tokens: train it with objective.name mdlm and without data.packing"
        )


def _padding_error(module: LogitsModule, ids: Tensor) -> float:
    """How much logits [1, T] change when masked padding follows."""
    padded = torch.cat([ids, ids[:, :_BLOCK]], dim=1)
    mask = (torch.arange(padded.shape[1], device=ids.device) < ids.shape[1]).long().unsqueeze(0)
    return (module(padded, mask)[:, : ids.shape[1]] - module(ids)).abs().max().item()


def _places_error(module: LogitsModule, ids: Tensor) -> float:
    """How much logits [1, T] change when tokens change places but not positions, under a mask that shows them all."""
    width = ids.shape[1]
    order = (torch.arange(width) * 5 + 2).remainder(width)  # 5 and the width have no common factor
    everything = torch.ones((1, 1, width, width), dtype=torch.bool)
    moved = module(ids[:, order], everything, order.unsqueeze(0))
    return (moved - module(ids)[:, order]).abs().max().item()


def unused_parameters(model) -> list[str]:
    """Names of the parameters that no logits come from, such as a pooler's; of a model with edit heads, that no edits
    come from, such as its vocabulary head's. Found in the graph of one small forward; no gradient is computed. Experts
    are never among them: a few tokens don't reach every one."""
    ids = torch.arange(1, 5, device=next(model.parameters()).device).unsqueeze(0)
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        outputs = _outputs(model, ids)
    seen, reached, waiting = set(), set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        waiting += [following for following, _ in node.next_functions]
    experts = any(getattr(model.config.get_text_config(), name, None) for name in _EXPERTS)
    head = (
        [] if not hasattr(model, NAME) else [id(parameter) for parameter in model.get_output_embeddings().parameters()]
    )
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached and (not experts or id(parameter) in head)
    ]


def _outputs(model, ids: Tensor) -> tuple[Tensor, ...]:
    """All that a model says of token ids [1, T]."""
    if not hasattr(model, NAME):
        return (LogitsModule(model)(ids),)
    some = torch.zeros(1, dtype=torch.long, device=ids.device)
    spec = DiffusionSpec.from_dict(getattr(model.config, CONFIG_KEY))
    return EditModule(model, spec)(ids, None, torch.zeros(1, device=ids.device), some, some, some, some)


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
        logits = module(ids.repeat(width, 1), mask)  # batches of another shape may be rounded in another way
        difference = (module(changed, mask) - logits).abs().amax(dim=-1)  # [changed token, logits of]
        least = _DIFFERENT * logits.abs().max()
    return least < difference.T


def _causal(model) -> ModelError:
    return ModelError(
        f"{type(model).__name__}: attention stays causal (or misses positions) although config.is_causal is false, so "
        "the model can't denoise; choose an architecture with ordinary attention"
    )
