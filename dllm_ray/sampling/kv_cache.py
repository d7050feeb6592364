"""Keys and values of whole canvases, allocated once and written in place.

A denoiser computes some positions of each row (its window) while the others keep the keys and values of an earlier
forward. Which positions, and which of the kept ones may be seen, is the caller's choice: prefix, dual and block caches
are different choices. Works with every decoder of transformers, as a `past_key_values`.

Shapes: S slots, C positions of a slot, B rows of a forward, Q positions of a window, K keys that are seen, H heads,
D head size.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dllm_ray.models.lm import DiffusionLM, LogitsModule


@dataclass
class Window:
    """What a forward computes, and what it sees."""

    slots: Tensor | None
    """[B] slot of each row; None: rows are slots 0 to B - 1."""
    rows: int
    """B."""
    places: Tensor
    """[B * Q] where each computed position is written: slot * C + position. Filler goes to a slot's last place, which
    is never seen."""
    keys: int
    """K: positions 0 to K - 1 are seen, as far as the mask allows."""
    everything: bool
    """Whether the window is the whole of what is seen: then nothing is read back."""


class CanvasCache(Cache):
    """A slot for each row.

    Args:
        layers: layers of the model.
    """

    def __init__(self, layers: int):
        super().__init__(layers=[_Layer() for _ in range(layers)])
        self.slots = self._width = 0

    def reserve(self, slots: int, width: int) -> None:
        """Makes room for so many slots of so many positions; what is stored stays."""
        if slots > self.slots or width > self._width:
            self.slots, self._width = max(slots, self.slots), max(width, self._width)
            for layer in self.layers:
                layer.reserve(self.slots, self._width)

    def window(
        self, slots: Tensor, positions: Tensor, filler: Tensor, keys: int, everything: bool, first: bool
    ) -> None:
        """Sets what the next forward computes.

        Args:
            slots: [B].
            positions: [B, Q] canvas positions of the window.
            filler: [B, Q] true where a row's window is shorter than the longest.
            keys: positions that are seen.
            everything: the window is all of them, in order.
            first: the slots are 0 to B - 1.
        """
        spare = self._width  # one place more than positions
        places = slots.unsqueeze(1) * (self._width + 1) + torch.where(filler, spare, positions)
        window = Window(None if first else slots, len(slots), places.flatten(), keys, everything)
        for layer in self.layers:
            layer.current = window

    def move(self, source: Tensor, target: Tensor) -> None:
        """Rows change their slots: what is in `source` [n] goes to `target` [n]."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [S, C + 1, H, D]."""

    is_compileable = True

    def __init__(self):
        super().__init__()
        self.current: Window | None = None
        self._room = (0, 0)

    def reserve(self, slots: int, width: int) -> None:
        self._room = (slots, width + 1)
        if self.is_initialized:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros((*self._room, *old.shape[2:]))
        new[: old.shape[0], : old.shape[1] - 1] = old[:, :-1]
        return new

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros((*self._room, states.shape[1], states.shape[3])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        """Writes the window's keys and values [B, H, Q, D]; returns those that are seen, [B, H, K, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, store: Tensor, states: Tensor) -> Tensor:
        window = self.current
        store.view(-1, *store.shape[2:]).index_copy_(0, window.places, states.transpose(1, 2).flatten(0, 1))
        if window.everything:
            return states
        seen = store[:, : window.keys]
        seen = seen[: window.rows] if window.slots is None else seen.index_select(0, window.slots)
        return seen.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.current.keys, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._room[1] - 1

    def get_max_cache_shape(self) -> int:
        return self._room[1] - 1


_PROBED: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
_WIDTH, _SHORTER, _WINDOW = 12, 9, slice(4, 8)  # of the probe: two rows, and the part that is computed again


def keeps(lm: DiffusionLM) -> bool:
    """Whether a model computes with kept keys and values what it computes without; measured once for each model.

    Most architectures of transformers do. A few count positions by themselves, build their own masks, or attend in a
    way of their own.
    """
    if lm.model not in _PROBED:
        _PROBED[lm.model] = lm.layers is not None and _agrees(lm)
    return _PROBED[lm.model]


@torch.inference_mode()
def _agrees(lm: DiffusionLM) -> bool:
    lm.keep_keys()
    module, device = LogitsModule(lm.model), lm.device
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    ids = (torch.arange(2 * _WIDTH, device=device) * 7 % vocabulary).view(2, _WIDTH)
    columns = torch.arange(_WIDTH, device=device).expand(2, -1)
    slots, filler = torch.arange(2, device=device), torch.zeros_like(ids, dtype=torch.bool)
    shorter = columns < torch.tensor([[_WIDTH], [_SHORTER]], device=device)
    part = ids[:, _WINDOW].contiguous(), columns[:, _WINDOW].contiguous(), filler[:, _WINDOW]
    tolerance = 0.01 if next(lm.model.parameters()).dtype == torch.float32 else 0.1
    try:
        for mask in (None, shorter):
            expected = module(ids, None if mask is None else mask.long())
            keys_mask = None if mask is None else mask[:, None, None]
            cache = CanvasCache(lm.layers)
            cache.reserve(2, _WIDTH)
            for these, places, nothing in ((ids, columns, filler), part):
                cache.window(slots, places, nothing, _WIDTH, everything=these is ids, first=True)
                found = module(these, keys_mask, places, past_key_values=cache)
                difference = (found - expected.gather(1, places.unsqueeze(2).expand_as(found))).float().abs()
                if mask is not None:
                    difference = difference[shorter.gather(1, places)]
                if not bool(difference.mean() <= tolerance * expected.float().std()):
                    return False
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError):
        return False  # whatever else an architecture does with a mask and positions given to it
    return True
