"""Several sources -> one stream of rows, by virtual time (weighted fair queueing).

Every row of a source has a time: how much the source has given by then, for its weight. Rows come in the order of their
times, so at any point each source has given its share to within a row. The order is a pure function of where each
source stands, so it can be taken up anywhere, and run on row lengths alone to see how long an epoch is. Knows plans and
lengths, not tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dllm_ray.data.plan import Plan, Window
from dllm_ray.errors import DataError


@dataclass(frozen=True)
class Share:
    """How a source takes part in a mixture."""

    weight: float | None = None
    """Its part of the rows or tokens; None (for all sources alike): it is spread evenly over the epoch."""
    by: Literal["rows", "tokens"] = "tokens"
    """What the weights share out."""
    repeat: float = 1.0
    """Passes in an epoch; with weights, the most."""


@dataclass(frozen=True)
class Place:
    """How far a source has been given."""

    epoch: int = 0
    """Its pass."""
    window: int = 0
    """Window of the pass."""
    row: int = 0
    """Row of the window that comes next."""
    rows: int = 0
    """Rows given since the beginning."""
    tokens: int = 0
    """Tokens given since the beginning."""


ROW = np.dtype(
    [
        ("source", np.int64),
        ("epoch", np.int64),  # pass of the source, window of the pass, and place in the window's order
        ("window", np.int64),
        ("row", np.int64),
        ("load", np.int64),  # which of `Drawn.loads`, and which row of it
        ("pick", np.int64),
        ("tokens", np.int64),
        ("time", np.float64),  # virtual time
        ("progress", np.float64),  # passes of the source up to and with the row, in units of `Share.repeat`
    ]
)
"""What is known of a row of the stream."""


@dataclass(frozen=True)
class Drawn:
    """Consecutive rows of the stream."""

    loads: list[Any]
    """The loaded windows that they come from."""
    rows: np.ndarray
    """[n] of type `ROW`."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | np.ndarray) -> "Drawn":
        return Drawn(self.loads, self.rows[which])

    def join(self, later: "Drawn") -> "Drawn":
        """Both, one after the other; windows that no row is left of are let go."""
        used = np.unique(self.rows["load"])
        rows = np.concatenate([self.rows, later.rows])
        rows["load"][: len(self)] = np.searchsorted(used, self.rows["load"])
        rows["load"][len(self) :] += len(used)
        return Drawn([*(self.loads[load] for load in used), *later.loads], rows)


class Blend:
    """The stream, from given places on.

    Args:
        plans: each source's order.
        shares: each source's share.
        places: where each source stands.
        read: loads a window of a source: an object whose `lengths` holds the tokens of each of its rows.
        names: what errors call the sources.

    Raises:
        DataError: a whole pass over a source gives no row.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        shares: Sequence[Share],
        places: Sequence[Place],
        read: Callable[[int, Window], Any],
        names: Sequence[str],
    ):
        self._lanes = [
            _Lane(source, plan, share, place, read, name)
            for source, (plan, share, place, name) in enumerate(zip(plans, shares, places, names, strict=True))
        ]

    def draw(self, most: int) -> Drawn:
        """The next rows: at least one, at most `most`."""
        for lane in self._lanes:
            lane.fill()
        # beyond the earliest end of a window, rows that are not loaded yet may come first
        horizon = min(lane.end for lane in self._lanes)
        ready = [lane.until(horizon, most) for lane in self._lanes]
        first = np.argsort(np.concatenate([rows["time"] for rows in ready]), kind="stable")[:most]
        rows = np.concatenate(ready)[first]  # ties went to the source that is named first
        for lane, taken in zip(self._lanes, np.bincount(rows["source"], minlength=len(ready)).tolist(), strict=True):
            lane.row += taken
        return Drawn([lane.loaded for lane in self._lanes], rows)


def advance(places: Sequence[Place], rows: np.ndarray) -> list[Place]:
    """Where sources stand after rows of the stream.

    Args:
        places: where they stood before.
        rows: [n] of type `ROW`: of each source those that come next, in any order.
    """
    after = list(places)
    for source in np.unique(rows["source"]).tolist():
        own = rows[rows["source"] == source]
        last = own[np.argmax(own["progress"])]
        before = places[source]
        after[source] = Place(
            int(last["epoch"]),
            int(last["window"]),
            int(last["row"]) + 1,
            before.rows + len(own),
            before.tokens + int(own["tokens"].sum()),
        )
    return after


def epoch_time(shares: Sequence[Share], rows: Sequence[int], tokens: Sequence[int]) -> float:
    """The virtual time at which an epoch ends.

    Args:
        shares: of the sources.
        rows: rows in one pass over each.
        tokens: the same in tokens.
    """
    if shares[0].weight is None:
        return 1.0
    amounts = rows if shares[0].by == "rows" else tokens
    return min(share.repeat * amount / share.weight for share, amount in zip(shares, amounts, strict=True))


class _Lane:
    """One source: its window at hand."""

    def __init__(
        self, source: int, plan: Plan, share: Share, place: Place, read: Callable[[int, Window], Any], name: str
    ):
        self._source, self._plan, self._share, self._read, self._name = source, plan, share, read, name
        self._windows = plan.windows(place.epoch, place.window)
        self.loaded: Any = None
        """The window's rows."""
        self.row = place.row
        """The row of its order that comes next."""
        self._rows = self._load(place.rows if share.by == "rows" else place.tokens)

    @property
    def end(self) -> float:
        """Virtual time of the window's last row."""
        return float(self._rows["time"][-1])

    def fill(self) -> None:
        """Makes sure that the window at hand has a row left."""
        empty_shards = 0
        while self.row >= len(self._rows):
            if empty_shards >= 2 * len(self._plan.shard_bytes):  # a whole pass is among them
                raise DataError(f"{self._name}: no row to train on: all are dropped or held out for validation")
            self.row = 0
            self._rows = self._load(self._given)
            empty_shards += 0 if len(self._rows) else len(self._window.shards)

    def until(self, time: float, most: int) -> np.ndarray:
        """The next rows up to and with a virtual time, at most so many."""
        stop = int(np.searchsorted(self._rows["time"], time, side="right"))
        return self._rows[self.row : min(stop, self.row + most)]

    def _load(self, given: int) -> np.ndarray:
        """The rows of the next window, in order, where `given` rows or tokens were given up to `row` of it."""
        self._window = window = next(self._windows)
        self.loaded = self._read(self._source, window)
        count = len(self.loaded.lengths)
        rows = np.zeros(count, dtype=ROW)
        rows["source"], rows["epoch"], rows["window"], rows["load"] = (
            self._source,
            window.epoch,
            window.number,
            self._source,
        )
        rows["row"] = np.arange(count)
        rows["pick"] = self._plan.order(window, count)
        rows["tokens"] = self.loaded.lengths[rows["pick"]]
        share_of_pass = window.begin + (window.end - window.begin) * (np.arange(1, count + 1) / max(count, 1))
        share_of_pass[-1:] = window.end  # exact: passes of different sources must end together
        rows["progress"] = (window.epoch + np.minimum(share_of_pass, window.end)) / self._share.repeat
        amounts = np.ones(count, dtype=np.int64) if self._share.by == "rows" else rows["tokens"]
        before = given - int(amounts[: self.row].sum())
        self._given = before + int(amounts.sum())  # after the window
        rows["time"] = (
            rows["progress"] if self._share.weight is None else (before + np.cumsum(amounts)) / self._share.weight
        )
        return rows
