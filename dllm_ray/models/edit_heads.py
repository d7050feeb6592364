"""Edit heads on any model: how fast each token is replaced, deleted or followed by another, and by which token
(Edit Flows, Havasi et al., arXiv 2506.09018).

Shapes: B rows, T positions, H hidden size, V vocabulary, N chosen positions.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm_ray.errors import ModelError
from dllm_ray.models.cross_entropy import cross_entropy
from dllm_ray.models.lm import DiffusionLM, LogitsModule, without_adapter
from dllm_ray.models.spec import CONFIG_KEY, DiffusionSpec
from dllm_ray.models.vocabulary import mean_rows

NAME = "edit_heads"
"""The heads' place in a model, and the beginning of their tensors' names."""
TIME, READS = "time", "reads"
"""Keys of `DiffusionSpec.edit_heads`: whether the heads are told the time; the module of the trunk whose input they
read in place of the trunk's output, or null."""

_WAVES = 128  # numbers that a time is spelled with, half of them sines


class EditFlowHeads(nn.Module):
    """Rates and tokens of edits, out of what the model's own vocabulary matrix would read.

    Args:
        hidden_size, vocabulary: H and V.
        bias: whether the token heads have one, as the model's own head.
        time: whether rates and tokens depend on the time beside the sequence.
    """

    def __init__(self, hidden_size: int, vocabulary: int, bias: bool, time: bool = False):
        super().__init__()
        self.rates = nn.Linear(hidden_size, 3)
        """Of substitution, deletion and insertion behind the position, before the softplus."""
        self.substitute = nn.Linear(hidden_size, vocabulary, bias=bias)
        self.insert = nn.Linear(hidden_size, vocabulary, bias=bias)
        self.time: nn.Module | None = None
        if time:
            self.time = nn.Sequential(
                nn.Linear(_WAVES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size, bias=False)
            )

    def start_from(self, head: nn.Module) -> None:
        """Makes both token heads copies of a vocabulary matrix, and the time without effect."""
        with torch.no_grad():
            for copy in (self.substitute, self.insert):
                copy.weight.copy_(head.weight)
                if copy.bias is not None:
                    copy.bias.copy_(head.bias)
            if self.time is not None:
                self.time[2].weight.zero_()

    def at_time(self, hidden_BTH: Tensor, t_B: Tensor | None) -> Tensor:
        """Hidden states that know the time, [B, T, H].

        Raises:
            ModelError: the heads depend on the time, and none is given.
        """
        if self.time is None:
            return hidden_BTH
        if t_B is None:
            raise ModelError("these edit heads depend on the time: give t")
        steps = torch.arange(_WAVES // 2, device=t_B.device)
        angle = t_B.float().unsqueeze(1) * 1000 * torch.exp(-math.log(10_000.0) * steps / (_WAVES // 2))
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.time[0].weight.dtype)
        return hidden_BTH + self.time(waves).unsqueeze(1).to(hidden_BTH.dtype)

    def rates_of(self, hidden_BTH: Tensor, shift: bool) -> Tensor:
        """[B, T, 3] float32 rates of substitution, deletion and insertion.

        Args:
            hidden_BTH: from `at_time`.
            shift: what is said of the token AT a position is read one to the left; nothing is said of the first.
        """
        rates = F.softplus(self.rates(hidden_BTH).float())
        if not shift:
            return rates
        own = F.pad(rates[:, :-1, :2], (0, 0, 1, 0))
        return torch.cat([own, rates[:, :, 2:]], dim=2)


class EditModule(LogitsModule):
    """A model with edit heads, read for them: it runs up to its vocabulary matrix, which stays unused.

    Args:
        model: a model with heads (`attach`), with or without an adapter.
        spec: its facts.
    """

    def __init__(self, model: nn.Module, spec: DiffusionSpec):
        super().__init__(model)
        self._shift = spec.shift_logits
        self._reads = spec.edit_heads[READS]

    def forward(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | None,  # [B, T]
        t: Tensor,  # [B]
        substitutions: Tensor,  # [S], indices into the flattened [B * T] grid
        substitutes: Tensor,  # [S] tokens
        insertions: Tensor,  # [I]
        inserts: Tensor,  # [I]
        at_once: int | None = None,
        most: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rates [B, T, 3], and the log-probabilities [S] and [I] of the tokens of edits; see `DiffusionLM.edits`."""
        heads, hidden_BTH = self.heads, self.hidden(input_ids, attention_mask)
        hidden_BTH = heads.at_time(hidden_BTH, t)
        flat, width = hidden_BTH.flatten(0, 1), input_ids.shape[1]
        if most is None or not self.collective_head:
            most = max(len(substitutions), len(insertions))
        parts = 1 if at_once is None else max(1, -(-most // at_once))
        source = substitutions - (substitutions % width > 0).long() if self._shift else substitutions
        substituted = _log_probability(heads.substitute, flat.index_select(0, source), substitutes, parts)
        if self._shift:  # nothing is said of the first token: all are as likely
            even = -math.log(heads.substitute.out_features)
            substituted = torch.where(substitutions % width > 0, substituted, even)
        inserted = _log_probability(heads.insert, flat.index_select(0, insertions), inserts, parts)
        return heads.rates_of(hidden_BTH, self._shift), substituted, inserted

    @property
    def heads(self) -> EditFlowHeads:
        """The heads in use: an adapter trains a copy of them."""
        found = getattr(without_adapter(self.model), NAME)
        return found.modules_to_save[found.active_adapters[0]] if hasattr(found, "modules_to_save") else found

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, H] what the vocabulary matrix would read at each position."""
        base, found = without_adapter(self.model), []

        def take(_module, inputs):
            found.append(inputs[0])
            return (inputs[0][:, :0],)  # and let the matrix read nothing

        hooks = [base.get_output_embeddings().register_forward_pre_hook(take), *self._read_earlier(base.base_model)]
        try:
            self.model(**self.arguments(input_ids, attention_mask))
        finally:
            for hook in hooks:
                hook.remove()
        return found[0]

    def tokens(self, hidden_NH: Tensor, inserted_N: Tensor) -> Tensor:
        """[N, V] logits of the tokens of edits.

        Args:
            hidden_NH: out of `EditFlowHeads.at_time`, at the positions that `source` names.
            inserted_N: bool, which are insertions; the others are substitutions.
        """
        logits_NV = hidden_NH.new_empty((len(hidden_NH), self.heads.insert.out_features))
        logits_NV[inserted_N] = self.heads.insert(hidden_NH[inserted_N])
        logits_NV[~inserted_N] = self.heads.substitute(hidden_NH[~inserted_N])
        return logits_NV

    def source(self, position_N: Tensor, inserted_N: Tensor) -> Tensor:
        """[N] where it is read what is inserted behind, or put in place of, the token at a position of a row."""
        return position_N - (~inserted_N & (position_N > 0)).long() if self._shift else position_N

    def _read_earlier(self, trunk: nn.Module) -> list[Any]:
        """Hooks that let the trunk give the input of one of its modules."""
        if self._reads is None:
            return []
        earlier = []

        def keep(_module, inputs):
            earlier.append(inputs[0])

        def give(_module, _inputs, output):
            output.last_hidden_state = earlier.pop()
            return output

        return [
            trunk.get_submodule(self._reads).register_forward_pre_hook(keep),
            trunk.register_forward_hook(give),
        ]


def attach(lm: DiffusionLM, time: bool = False, seed: int = 0) -> DiffusionLM:
    """The same model with new edit heads: rates start random, and the token heads as copies of the model's own.

    Args:
        lm: a model without an adapter; it is changed.
        time: tell the heads the time.
        seed: seeds the rates; torch's global generator is left as it was.

    Raises:
        ModelError: it has heads already, an adapter, quantized weights in its head, or no vocabulary matrix.
    """
    if lm.spec.edit_heads is not None:
        raise ModelError("the model has edit heads already")
    if without_adapter(lm.model) is not lm.model:
        raise ModelError("edit heads go onto a model without an adapter: merge it first (jobs/convert.py)")
    settings = {TIME: time, READS: None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = _build(lm.model, settings)
    head = lm.model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise ModelError("the model's vocabulary head is quantized: load it without model.quantization")
    heads.start_from(head)
    lm.model.add_module(NAME, heads.to(head.weight.device, head.weight.dtype).train(lm.model.training))
    spec = dataclasses.replace(
        lm.spec, edit_heads=settings, attention="full", block_size=None, sampler=edit_sampler(lm.spec.sampler)
    )
    setattr(lm.model.config, CONFIG_KEY, spec.to_dict())
    return DiffusionLM(lm.model, lm.tokenizer, spec)


def put(model: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Gives a model its stored heads, where its vocabulary head is. Tokens it gained since start as the mean.

    Args:
        model: as transformers loaded it.
        settings: `DiffusionSpec.edit_heads`.
        tensors: the heads' tensors, without `NAME`.

    Raises:
        ModelError: there is one too many or too few, or of another shape.
    """
    heads, weight = _build(model, settings), model.get_output_embeddings().weight
    state = heads.state_dict()
    if wrong := sorted(set(state) ^ set(tensors)):
        raise ModelError(f"the edit heads have {wrong[0]!r} too much, or lack it: expected {', '.join(state)}")
    for name, tensor in tensors.items():
        if tensor.shape[1:] != state[name].shape[1:] or len(tensor) > len(state[name]):
            raise ModelError(f"{NAME}.{name} has the shape {list(tensor.shape)}; expected {list(state[name].shape)}")
        state[name][: len(tensor)] = tensor
        if len(tensor) < len(state[name]):
            mean_rows(state[name], len(tensor), len(state[name]))
    model.add_module(NAME, heads.to(weight.device, weight.dtype if weight.is_floating_point() else model.dtype))


def add(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Gives a model heads with random weights; raises as `attach`."""
    model.add_module(NAME, _build(model, settings))


def _build(model: nn.Module, settings: Mapping[str, Any]) -> EditFlowHeads:
    """Heads of the right sizes for a model, with random weights.

    Raises:
        ModelError: the model has no vocabulary matrix.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no vocabulary head that edit heads could start from")
    bias = getattr(head, "bias", None) is not None
    return EditFlowHeads(head.in_features, head.out_features, bias, settings[TIME])


def edit_sampler(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Default sampler settings that still mean something when a model edits."""
    return {name: value for name, value in settings.items() if name in ("max_new_tokens", "steps", "temperature")}


def _log_probability(head: nn.Linear, hidden_NH: Tensor, tokens_N: Tensor, parts: int) -> Tensor:
    """[N] of tokens. Logits of the parts but the first are made again in the backward pass, never held."""

    def run(hidden_NH: Tensor, tokens_N: Tensor) -> Tensor:
        return -cross_entropy(head(hidden_NH), tokens_N)

    first, *rest = zip(hidden_NH.tensor_split(parts), tokens_N.tensor_split(parts), strict=True)
    # sharded weights don't have the same shape whenever they are saved, which the check would mistake for a difference
    again = [checkpoint(run, *part, use_reentrant=False, determinism_check="none") for part in rest]
    return torch.cat([run(*first), *again])
