"""`DiffusionLM`: a transformers model, its tokenizer and its spec, with logits or their cross-entropy at chosen
positions only.

Shapes: B rows, T positions, H hidden size, V vocabulary, N chosen positions.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_ray.models.attention import Pattern, additive, can_keep_keys, dense, flex, keep_keys, near, visible
from dllm_ray.models.cross_entropy import cross_entropy, through_head
from dllm_ray.models.spec import CONFIG_KEY, DiffusionSpec

# Families that count positions from padding_idx + 1 and would skip padding tokens, which a DLM may attend.
_OFFSET_POSITIONS = frozenset(
    ("camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm")
    + ("xlm-roberta", "xlm-roberta-xl", "xmod")
)


class LogitsModule(nn.Module):
    """A transformers LM whose vocabulary head runs over chosen positions only.

    The hidden states that leave the trunk are gathered before the head sees them. This works for every architecture
    whose head acts on each position by itself, keeps soft caps and scales of the head's own forward, and never makes
    a [B, T, V] tensor.

    Args:
        model: a masked LM, or a decoder whose attention was made bidirectional.
        block_size: the block size of a model with block-causal attention; None: every position sees every other.
    """

    def __init__(self, model: nn.Module, block_size: int | None = None):
        super().__init__()
        self.model = model
        self.collective_head = False
        """Whether a run of the head is a meeting of all workers (ZeRO-3 gathers its weights for each): then all run it
        equally often, however many positions each has."""
        self._block_size = block_size
        base = without_adapter(model)
        self._trunk = [base.base_model]  # in a list: it is part of `model` and must not be registered twice
        self._is_decoder = is_decoder(base)
        config = base.config.get_text_config()
        self._position_offset = position_offset(config.model_type, config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | Pattern | None = None,  # [B, T] of positions that may be seen, or who sees whom
        position_ids: Tensor | None = None,  # [B, T]; None: 0, 1, 2, ...
        positions: Tensor | None = None,  # [N], indices into the flattened [B * T] grid; None: all
        past_key_values=None,  # a cache of transformers' kind that knows which positions these are
        targets: Tensor | None = None,  # [N] tokens; then the result is their cross-entropy
        at_once: int | None = None,  # with targets: positions whose logits are held at a time; None: all
        most: int | None = None,  # with targets: positions that there may be, the same number on all workers
    ) -> Tensor:  # [N, V], or [B, T, V] when positions is None, or [N] with targets
        arguments = self.arguments(input_ids, attention_mask, position_ids, past_key_values)
        if positions is None:
            return self.model(**arguments).logits

        count = len(positions) if most is None or not self.collective_head else most
        parts = 1 if targets is None or at_once is None else max(1, -(-count // at_once))
        hidden: list[Tensor] = []  # [N, H], in parts
        kind = None

        def gather(_module, _inputs, output):
            nonlocal kind
            if not hasattr(output, "last_hidden_state"):  # a decoder that doesn't name its trunk (Llama 4)
                return output
            kind = type(output)
            hidden.extend(output.last_hidden_state.flatten(0, 1).index_select(0, positions).tensor_split(parts))
            output.last_hidden_state = hidden[0].unsqueeze(0)
            return output

        hook = self._trunk[0].register_forward_hook(gather)
        try:
            logits = self.model(**arguments).logits  # [1, N, V]
        finally:
            hook.remove()
        # A few architectures call into their trunk past its forward (OPT), or name none: the head saw every position.
        logits = logits.squeeze(0) if hidden else logits.flatten(0, 1).index_select(0, positions)
        if targets is None:
            return logits
        if len(hidden) < 2:
            return cross_entropy(logits, targets)
        first, *others = targets.tensor_split(parts)
        base, trunk = without_adapter(self.model), self._trunk[0]
        rest = [through_head(base, trunk, kind, *part) for part in zip(hidden[1:], others, strict=True)]
        return torch.cat([cross_entropy(logits, first), *rest])

    def arguments(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Pattern | None,
        position_ids: Tensor | None = None,
        past_key_values=None,
    ) -> dict[str, Any]:
        """What the model of transformers is called with; arguments as of `forward`."""
        if past_key_values is None:
            attention_mask = self._attention(input_ids, attention_mask, position_ids)
        else:
            attention_mask = self._over_keys(attention_mask, position_ids, past_key_values)
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._position_offset:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            position_ids = position_ids + self._position_offset
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        if self._is_decoder:
            arguments["use_cache"] = past_key_values is not None
        if past_key_values is not None:
            arguments["past_key_values" if self._is_decoder else "key_cache"] = past_key_values
        return arguments

    def _attention(self, input_ids: Tensor, mask: Tensor | Pattern | None, position_ids: Tensor | None):
        """The mask of a forward over all its keys, in the form that the attention takes."""
        explicit = isinstance(mask, Tensor) and mask.dim() == 4
        spec_alone = not explicit and not isinstance(mask, Pattern)
        if (explicit and mask.is_floating_point()) or (spec_alone and self._block_size is None):
            return mask
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        if explicit:
            return self._for_each_layer(lambda window: _within(mask, position_ids, position_ids, window))
        pattern = visible(position_ids, mask) if spec_alone else mask
        if pattern.block is None and self._block_size is not None:
            pattern = replace(pattern, block=pattern.position // self._block_size)
        make = flex if self._trunk[0].config._attn_implementation == "flex_attention" else dense
        return self._for_each_layer(lambda window: make(pattern, window))

    def _over_keys(self, mask: Tensor | None, position_ids: Tensor, cache):
        """The mask of a forward that sees the keys of a cache."""
        count = cache.layers[0].get_mask_sizes(position_ids.shape[1])[0]
        keys = torch.arange(count, device=position_ids.device).unsqueeze(0)
        return self._for_each_layer(lambda window: _within(mask, position_ids, keys, window))

    def _for_each_layer(self, mask_of):
        """A mask, or one for each kind of layer: those with a window of their own see no further than that."""
        if self._window is None:
            return self._explicit(mask_of(None))
        return {
            "full_attention": self._explicit(mask_of(None)),
            "sliding_attention": self._explicit(mask_of(self._window)),
        }

    def _explicit(self, mask):
        """A 4-D mask in the form that the attention takes."""
        if not isinstance(mask, Tensor) or mask.is_floating_point():
            return mask
        mask = mask.bool()
        # "eager" adds a mask to the scores, and would take true for 1.0
        return additive(mask, self._trunk[0].dtype) if _is_eager(self._trunk[0].config) else mask

    @property
    def _window(self) -> int | None:
        """How far the local layers of an encoder see to each side; decoders with windows are refused at loading."""
        config = self._trunk[0].config
        local = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        return config.sliding_window if local and not self._is_decoder else None


def _within(mask: Tensor | None, queries: Tensor, keys: Tensor, window: int | None) -> Tensor | None:
    """A mask, or none, cut down to a window around each query."""
    if window is None:
        return mask
    local = near(queries, keys, window)
    return local if mask is None else mask.bool() & local


class DiffusionLM:
    """What everything else works with: `model`, `tokenizer` and `spec`.

    Args:
        model: a masked LM, or a causal LM whose attention was made bidirectional (`dllm_ray.models.load`).
        tokenizer: its tokenizer; None where only token ids are handled.
        spec: the facts a denoiser needs.
        module: what computes logits, or edits; strategies put their wrapper (DDP, an engine) here. Default: as
            `module_for` says.
    """

    def __init__(self, model, tokenizer, spec: DiffusionSpec, module: nn.Module | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self.module = module if module is not None else module_for(model, spec)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def architecture(self) -> str:
        """The transformers class of the model, whatever is wrapped around it."""
        return type(without_adapter(self.model)).__name__

    @property
    def is_decoder(self) -> bool:
        """Whether the architecture is an autoregressive one, made bidirectional; else it is an encoder."""
        return is_decoder(without_adapter(self.model))

    @property
    def layers(self) -> int | None:
        """Layers whose keys and values can be kept; None for architectures that keep none."""
        base = without_adapter(self.model)
        if not self.is_decoder and not can_keep_keys(base):
            return None
        return base.config.get_text_config().num_hidden_layers

    def keep_keys(self) -> None:
        """Makes an encoder ready for `past_key_values`; decoders are."""
        if not self.is_decoder:
            keep_keys(without_adapter(self.model))

    @property
    def max_length(self) -> int | None:
        """Most positions the model can tell apart, or None when its config states no limit."""
        config = without_adapter(self.model).config
        return usable_positions(config)

    def logits(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Tensor | None = None,  # [N] indices into the flattened grid
        shift: bool | None = None,
        past_key_values=None,
    ) -> Tensor:  # [N, V], or [B, T, V] when positions is None
        """Logits that predict the token AT each position, whatever way round the model was trained.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 1 for positions that may be seen, on top of the spec's attention pattern; None when
                all may. A 4-D mask [B or 1, 1, T, T], true where a query sees a key, or a `Pattern` stands in place of
                the spec's. Layers with a window of their own (ModernBERT) see no further than that in any case.
            position_ids: [B, T]; None counts from 0.
            positions: [N] positions of interest, as indices into the flattened [B * T] grid; None for all.
            shift: read the logits one position to the left (position 0 reads its own); None: as the spec says.
            past_key_values: a cache that holds the keys and values of other positions (`sampling.kv_cache`). Then
                `position_ids` say where the tokens stand, and a mask is 4-D, [B, 1, T or 1, keys], or None: all keys
                are seen.
        """
        shift = self.spec.shift_logits if shift is None else shift
        cache = () if past_key_values is None else (past_key_values,)
        if not shift:
            return self.module(input_ids, attention_mask, position_ids, positions, *cache)
        width = input_ids.shape[1]
        if positions is not None:
            source = positions - (positions % width > 0).long()
            return self.module(input_ids, attention_mask, position_ids, source, *cache)
        logits_BTV = self.module(input_ids, attention_mask, position_ids, None, *cache)
        return torch.cat([logits_BTV[:, :1], logits_BTV[:, :-1]], dim=1)

    def nll(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | Pattern | None,
        position_ids: Tensor | None,
        positions: Tensor,  # [N]
        targets: Tensor,  # [N]
        shift: bool | None = None,
        at_once: int | None = None,
        most: int | None = None,
    ) -> Tensor:  # [N] float32
        """Cross-entropy of tokens at positions, without ever holding the vocabulary logits of all of them.

        Args:
            input_ids, attention_mask, position_ids, positions, shift: as of `logits`.
            targets: the tokens.
            at_once: positions whose logits are held at a time; those of the others are made again in the backward
                pass. None: all.
            most: how many positions there may be, the same number on all workers; None: as many as there are.
        """
        shift = self.spec.shift_logits if shift is None else shift
        if shift:
            positions = positions - (positions % input_ids.shape[1] > 0).long()
        arguments = {"targets": targets, "at_once": at_once, "most": most}
        return self.module(input_ids, attention_mask, position_ids, positions, **arguments)

    def edits(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | None,  # [B, T]
        t: Tensor,  # [B]
        substitutions: Tensor,  # [S] indices into the flattened grid
        substitutes: Tensor,  # [S]
        insertions: Tensor,  # [I]
        inserts: Tensor,  # [I]
        at_once: int | None = None,
        most: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, 3], [S], [I], float32
        """What a model with edit heads says of edits.

        Args:
            input_ids, attention_mask: sequences on their way, and which positions are tokens of theirs.
            t: their times; of use where the heads depend on it.
            substitutions, substitutes: tokens that may be replaced, and by which.
            insertions, inserts: tokens behind which another may be put, and which.
            at_once, most: as of `nll`, for each of the two kinds.

        Returns:
            Rates of substitution, deletion and insertion at each position; log-probabilities of the tokens.
        """
        arguments = {"substitutions": substitutions, "substitutes": substitutes, "insertions": insertions}
        sizes = {"at_once": at_once, "most": most}
        return self.module(input_ids, attention_mask, t=t, inserts=inserts, **arguments, **sizes)

    def compile(self, mode: str = "default") -> None:
        """Compiles the model's forward with `torch.compile`; `reduce-overhead` uses CUDA graphs where shapes repeat."""
        from dllm_ray.models.compiled import compile_trunk

        compile_trunk(without_adapter(self.model).base_model, mode)

    def save(self, directory: str | Path) -> None:
        """Writes a plain Hugging Face directory, with the spec under `"diffusion"` in `config.json`; of a model with a
        PEFT adapter, the adapter's directory, which names its base."""
        if hasattr(self.model, "get_base_model"):
            from dllm_ray.models.adapters import save_adapter

            save_adapter(self.model, directory)
        else:
            self._save_model(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def _save_model(self, directory: str | Path) -> None:
        setattr(self.model.config, CONFIG_KEY, self.spec.to_dict())
        # the published layout that a model was loaded from is written by jobs/convert.py, together with its config
        self.model.save_pretrained(directory, save_original_format=False)


def module_for(model: nn.Module, spec: DiffusionSpec) -> LogitsModule:
    """What reads a model: its logits, or the edit heads that it has."""
    if spec.edit_heads is None:
        return LogitsModule(model, spec.grid)
    from dllm_ray.models.edit_heads import EditModule

    return EditModule(model, spec)


def is_decoder(model: nn.Module) -> bool:
    """Whether the model is an autoregressive architecture (made bidirectional), not a masked LM."""
    return not type(model).__name__.endswith("ForMaskedLM")


def usable_positions(config) -> int | None:
    """Longest sequence that a transformers config allows, in tokens; None when it states no limit."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    return limit - position_offset(config.model_type, config.pad_token_id)


def position_offset(model_type: str, pad_token_id: int | None) -> int:
    """Position embeddings that a family leaves unused before the first token's."""
    return (pad_token_id or 0) + 1 if model_type in _OFFSET_POSITIONS else 0


def _is_eager(config) -> bool:
    return getattr(config, "_attn_implementation", None) == "eager"


def without_adapter(model: nn.Module) -> nn.Module:
    """The model of transformers inside one with a PEFT adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
