"""The rows of a batch: where their blocks lie, what is open, which candidates win. Host arithmetic in numpy, no model.

Shapes: R rows, T canvas width, N candidates (positions that may be written now) in ascending order of (row, column), C
those of them that are written.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling import unmasking
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.noise import ORDER, uniform
from dllm_ray.sampling.plan import Plan


@dataclass
class Row:
    """One canvas to denoise."""

    tokens: list[int]
    """The canvas: given tokens, and any token where `open` is true."""
    open: list[bool]
    """Which positions are to be written."""
    config: SamplerConfig
    """The row's settings."""
    block_start: int
    """Where the first block begins."""
    block_size: int
    """Tokens in a block."""
    steps_per_block: int
    """Most denoising steps for a block."""
    seed: int
    """Seeds the row's own draws."""
    early_stop: bool
    """Whether the row is finished once its text can't change any more."""
    key: int = 0
    """The caller's name for the row."""
    longest: int | None = None
    """Most tokens that the row may come to have, where the model edits; None: it keeps its length."""
    gates: tuple[tuple[int, int], ...] = ()
    """Where a model that edits may begin to write: positions of tokens that are never deleted, from left to right, each
    with the most tokens that may come to stand behind it before the next token that stays."""


@dataclass
class Item:
    """A row in the batch, with what isn't a number."""

    row: Row
    plan: Plan
    history: list[np.ndarray] = field(default_factory=list)
    """Canvases before the first and after every step, where they are kept."""


@dataclass
class Windows:
    """[R] each: what the rows compute in a step."""

    start: np.ndarray
    """First position that is computed."""
    stop: np.ndarray
    """The one after the last."""
    keys: np.ndarray
    """Positions that are seen, from the first on."""
    block: np.ndarray
    """Where the current block of attention begins; 0 where attention is full."""


_NEVER = np.iinfo(np.int64).max
_GRIDS = {"canvas": np.int64, "open": np.bool_, "given": np.bool_, "written": np.bool_}
"""[R, T] arrays. given: what classifier-free guidance hides; written: what was to be written when the row came."""


class Batch:
    """Rows that are denoised together.

    Args:
        spec: the model's facts.
        vocabulary: tokens the model knows.

    Attributes:
        items: the rows.
        state: name -> array with a row for each of `items`; `_numbers` says what each is.
        plans: the distinct plans of the rows; `state["plan"]` are places in it.
    """

    def __init__(self, spec: DiffusionSpec, vocabulary: int):
        self.items: list[Item] = []
        self.state: dict[str, np.ndarray] = {}
        self.plans: list[Plan] = []
        self._spec = spec
        self._vocabulary = vocabulary
        self._stops = np.array(spec.stop_token_ids)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def width(self) -> int:
        """Positions of the longest canvas."""
        return self.state["canvas"].shape[1]

    def join(self, new: list[Item]) -> None:
        """Adds rows at the end."""
        self.items += new
        width = max(len(item.row.tokens) for item in self.items)
        fresh = self._numbers(new) | self._grids([item.row for item in new], width)
        self.state = {name: self._joined(name, fresh[name]) for name in fresh}
        self._number_plans()

    def keep(self, order: np.ndarray) -> None:
        """Leaves the rows with these places, in this order."""
        self.items = [self.items[place] for place in order]
        width = max((len(item.row.tokens) for item in self.items), default=0)
        self.state = {
            name: np.ascontiguousarray(array[order, :width] if name in _GRIDS else array[order])
            for name, array in self.state.items()
        }
        self._number_plans()

    def opened(self, row: Row) -> np.ndarray:
        """A row's canvas before its first step."""
        return np.where(row.open, self._spec.mask_token_id, row.tokens)

    def begin_blocks(self) -> None:
        """Rows whose block is done move to the block of their first open position, with a new commit schedule."""
        state = self.state
        moved = np.flatnonzero((state["left"] == 0) & state["settled"])
        if not len(moved):
            return
        first = state["open"][moved].argmax(axis=1)
        start, size = state["block_start"][moved], state["block_size"][moved]
        begin = start + (first - start) // size * size
        end = np.minimum(begin + size, state["length"][moved])
        column_T = np.arange(state["open"].shape[1])
        inside = (column_T >= begin[:, None]) & (column_T < end[:, None])
        left = (state["open"][moved] & inside).sum(axis=1)
        counts = [
            self.items[index].plan.counts(int(masks), self.items[index].row, int(state["step"][index]))
            for index, masks in zip(moved, left, strict=True)
        ]
        longest = max(map(len, counts))
        if longest > state["quota"].shape[1]:
            state["quota"] = self._widened(state["quota"], longest, 0)
        for index, values in zip(moved, counts, strict=True):
            state["quota"][index, : len(values)] = values
        state["quotas"][moved] = [len(values) for values in counts]
        state["begin"][moved], state["end"][moved], state["left"][moved] = begin, end, left
        state["block_step"][moved] = state["post_steps"][moved] = 0
        state["fresh"][moved] = True
        state["settled"][moved] = ~state["edits"][moved]

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the positions that may be written now, in ascending order."""
        state = self.state
        low, high = int(state["begin"].min()), int(state["end"].max())
        column_T = np.arange(low, high)
        inside = (column_T >= state["begin"][:, None]) & (column_T < state["end"][:, None])
        chosen = state["open"][:, low:high] & inside
        for number, plan in enumerate(self.plans):
            members = state["plan"] == number
            if plan.edits:
                chosen |= state["written"][:, low:high] & inside & members[:, None]
            if plan.rules_by_quota:  # a step that commits nothing needs no forward
                chosen &= ~(members & (self._quota() == 0))[:, None]
            if plan.first_alone:
                first = state["open"][np.arange(len(members)), state["begin"]]
                alone = members & state["fresh"] & first
                chosen &= ~alone[:, None] | (column_T == state["begin"][:, None])
        row_N, column_N = chosen.nonzero()
        return row_N, column_N + low

    def windows(self) -> Windows:
        """What the next forward computes of each row."""
        state = self.state
        length, begin, size = state["length"], state["begin"], state["grid_size"]
        causal, fresh, before = size > 0, state["fresh"], state["reads_before"]
        block = begin - (begin - state["grid_start"]) % np.maximum(size, 1)
        keys = np.where(causal, np.minimum(block + size, length), length)
        block = np.where(causal, np.maximum(block, 0), 0)
        stop = np.where(state["dual"] & ~fresh, state["end"], keys)
        start = np.where(causal, np.minimum(state["final"], block - before), np.where(fresh, 0, begin - before))
        return Windows(np.where(state["cached"], np.maximum(start, 0), 0), stop, keys, block)

    def computed(self, took_part_R: np.ndarray, block_R: np.ndarray) -> None:
        """Notes which rows took part in a forward; what lies before their block of attention is final then."""
        state = self.state
        state["final"] = np.where(took_part_R, np.maximum(state["final"], block_R), state["final"])
        state["fresh"] &= ~took_part_R
        state["nfe"] += took_part_R

    def alike(self, rows: np.ndarray, width_R: np.ndarray) -> list[np.ndarray]:
        """Parts of the rows that share a forward: of one kind of attention, and with windows of a similar width."""
        state = self.state
        kind_R = state["cached"] * 2 + (state["grid_size"] > 0)
        parts = []
        while len(rows):
            widest = rows[width_R[rows].argmax()]
            near = (kind_R[rows] == kind_R[widest]) & (width_R[rows] * 2 > width_R[widest])
            parts.append(rows[near])
            rows = rows[~near]
        return parts

    def draws(self, row_N: np.ndarray, column_N: np.ndarray, stream: int) -> np.ndarray:
        """[N] uniform random numbers of the rows' own."""
        seed, step = (torch.from_numpy(self.state[name][row_N]) for name in ("seed", "step"))
        return uniform(seed, step, torch.from_numpy(column_N), stream).numpy()

    def choose(self, row_N: np.ndarray, column_N: np.ndarray, confidence_N: np.ndarray) -> np.ndarray:
        """[N] which open candidates are committed."""
        state = self.state
        plan_N, order_N = state["plan"][row_N], confidence_N
        for number, plan in enumerate(self.plans):
            if plan.is_random or plan.config.alg_temperature:
                members = plan_N == number
                draws = self.draws(row_N[members], column_N[members], ORDER)
                order_N = order_N.copy()
                order_N[members] = plan.order(order_N[members], draws)
        rank_N = unmasking.rank_in_row(row_N, order_N)
        quota_R = self._quota()
        chosen_N = rank_N < quota_R[row_N]
        for number, plan in enumerate(self.plans):
            if plan.rules_by_quota:
                continue
            members = plan_N == number
            row, confidence, rank = row_N[members], confidence_N[members], rank_N[members]
            if plan.by_certainty:
                picked = unmasking.by_certainty(row, confidence, rank, quota_R[row], plan.threshold)
            elif plan.config.factor is not None:
                picked = unmasking.by_factor(row, confidence, rank, plan.config.factor)
            else:
                picked = unmasking.by_threshold(confidence, rank, plan.threshold)
                if plan.threshold_within_quota:
                    steps = np.arange(state["quota"].shape[1])
                    later = steps > state["block_step"][:, None]
                    later &= steps < state["quotas"][:, None]
                    still_due = state["left"] - (state["quota"] * later).sum(axis=1)
                    picked &= rank < still_due[row]
            chosen_N[members] = picked
        return chosen_N

    def revised(self, open_N, row_N, column_N, tokens_N, confidence_N) -> np.ndarray:
        """[N] which written tokens give way to a more probable one."""
        state = self.state
        bound = np.array([plan.editing_threshold for plan in self.plans], np.float32)[state["plan"][row_N]]
        differs = tokens_N != state["canvas"][row_N, column_N]
        return ~open_N & differs & (confidence_N > bound)

    def write(self, row_C: np.ndarray, column_C: np.ndarray, token_C: np.ndarray, open_C: np.ndarray) -> None:
        """Puts committed tokens onto the canvases."""
        state, rows = self.state, len(self.items)
        was_full = state["left"] == 0
        state["canvas"][row_C, column_C] = token_C
        state["open"][row_C, column_C] = False
        filled = np.bincount(row_C[open_C], minlength=rows)
        state["left"] -= filled
        state["todo"] -= filled
        state["block_step"] += ~state["edits"]
        state["step"] += 1
        stops = np.isin(token_C, self._stops)
        np.minimum.at(state["first_stop"], row_C[stops], column_C[stops])
        revising = ~state["settled"] & was_full
        if revising.any():
            state["post_steps"] += revising
            bound = np.array([plan.config.max_post_steps for plan in self.plans])[state["plan"]]
            revised = np.bincount(row_C[~open_C], minlength=rows) > 0
            state["settled"] |= revising & (~revised | (state["post_steps"] >= bound))
            for row in np.flatnonzero(revising & state["settled"]):  # an end of text may have been revised away
                found = np.isin(state["canvas"][row], self._stops) & state["written"][row] & ~state["open"][row]
                state["first_stop"][row] = found.argmax() if found.any() else _NEVER

    def done(self) -> np.ndarray:
        """[R] bool: nothing left to write, or an end of text with nothing open before it."""
        state = self.state
        done_R = state["todo"] == 0
        ended = np.flatnonzero(state["early_stop"] & (state["first_stop"] < _NEVER) & ~done_R)
        if len(ended):
            first_open = state["open"][ended].argmax(axis=1)
            done_R[ended] = state["first_stop"][ended] < first_open
        # where tokens are revised, the text may change until its block is done
        return done_R & state["settled"] & ~(state["edits"] & (state["left"] > 0))

    def text(self, place: int) -> list[int]:
        """A row's canvas; what early stop left open holds the end-of-text token."""
        length = len(self.items[place].row.tokens)
        canvas, is_open = self.state["canvas"][place, :length], self.state["open"][place, :length]
        return np.where(is_open, self._spec.eos_token_id, canvas).tolist()

    def _grids(self, rows: list[Row], width: int) -> dict[str, np.ndarray]:
        grids = {name: np.zeros((len(rows), width), dtype) for name, dtype in _GRIDS.items()}
        grids["canvas"][:] = self._spec.eos_token_id
        for index, row in enumerate(rows):
            length, canvas = len(row.tokens), self.opened(row)
            is_open = np.array(row.open)
            grids["canvas"][index, :length] = canvas
            grids["open"][index, :length] = grids["written"][index, :length] = is_open
            grids["given"][index, :length] = ~is_open & ~np.isin(canvas, row.config.cfg_keep_tokens)
        return grids

    def _numbers(self, items: list[Item]) -> dict[str, np.ndarray]:
        rows, plans = [item.row for item in items], [item.plan for item in items]
        configs = [row.config for row in rows]
        grids = [plan.attention_grid(row.block_start) for plan, row in zip(plans, rows, strict=True)]
        nothing = np.zeros(len(rows), np.int64)
        filters = [plan.filters for plan in plans]
        return {
            "length": np.array([len(row.tokens) for row in rows]),
            "block_start": np.array([row.block_start for row in rows]),
            "block_size": np.array([row.block_size for row in rows]),
            "grid_start": np.array([start for start, _ in grids]),
            "grid_size": np.array([size for _, size in grids]),  # 0: full attention
            "seed": np.array([row.seed for row in rows], np.int64),
            "early_stop": np.array([row.early_stop for row in rows]),
            "temperature": np.array([config.temperature for config in configs], np.float32),
            "top_p": np.array([top_p or 1.0 for top_p, _ in filters], np.float32),
            "top_k": np.array([min(top_k or self._vocabulary, self._vocabulary) for _, top_k in filters]),
            "cfg_scale": np.array([config.cfg_scale for config in configs], np.float32),
            "cached": np.array([plan.cached for plan in plans]),
            "dual": np.array([config.cache == "dual" for config in configs]),
            "shift": np.array([int(plan.shift) for plan in plans]),
            "reads_before": np.array([int(plan.reads_before) for plan in plans]),
            "edits": np.array([plan.edits for plan in plans]),
            "plan": nothing.copy(),  # number of the row's plan
            "step": nothing.copy(),
            "nfe": nothing.copy(),
            "todo": np.array([sum(row.open) for row in rows]),  # open positions
            "begin": nothing.copy(),  # the current block
            "end": nothing.copy(),
            "left": nothing.copy(),  # open positions in it
            "block_step": nothing.copy(),
            "quota": np.zeros((len(rows), 1), np.int64),  # tokens that each step of the block commits
            "quotas": nothing.copy(),  # how many steps that are
            "fresh": np.ones(len(rows), np.bool_),  # the block's first forward is still to come
            "final": nothing.copy(),  # block cache: keys and values before here are final
            "settled": np.ones(len(rows), np.bool_),  # no more revisions in the block
            "post_steps": nothing.copy(),  # steps in the block after its last mask
            "first_stop": np.full(len(rows), _NEVER),  # position of the first written token that ends a text
        }

    def _joined(self, name: str, new: np.ndarray) -> np.ndarray:
        if not self.state:
            return new
        old = self.state[name]
        if new.ndim == 2:
            width = max(old.shape[1], new.shape[1])
            fill = self._spec.eos_token_id if name == "canvas" else 0
            old, new = (self._widened(array, width, fill) for array in (old, new))
        return np.concatenate([old, new])

    @staticmethod
    def _widened(array: np.ndarray, width: int, fill: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

    def _number_plans(self) -> None:
        """Numbers the distinct plans of the active rows; called when rows come or go."""
        self.plans = list({id(item.plan): item.plan for item in self.items}.values())
        numbers = {id(plan): number for number, plan in enumerate(self.plans)}
        self.state["plan"] = np.array([numbers[id(item.plan)] for item in self.items])

    def _quota(self) -> np.ndarray:
        """[R] tokens that this step commits by the schedule; after its end, all that are left."""
        state = self.state
        step = np.minimum(state["block_step"], state["quota"].shape[1] - 1)
        quota = state["quota"][np.arange(len(step)), step]
        return np.where(state["block_step"] < state["quotas"], quota, state["left"])
