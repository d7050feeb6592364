"""The global batches of a run, one after the other, from any point of it on.

Sources are blended (`blend`), the blend is cut into chunks and these into batches (`batching`), batches become arrays
(`batches`). A cursor says where all this stands after a batch: the stream that begins there is the rest of the stream
that was left. Knows nothing of Ray: who reads a window, and where, is the caller's affair.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from dllm_ray.data.batches import PaddingRule, pack, pad
from dllm_ray.data.batching import Batching
from dllm_ray.data.blend import ROW, Blend, Drawn, Place, advance, epoch_time
from dllm_ray.data.feed import Feed
from dllm_ray.data.plan import Window
from dllm_ray.data.tokenize import TokenRows

_DRAWN_ROWS = 2048  # rows taken from the blend at once

Cursor = dict[str, Any]
"""Where a stream stands. Fit for JSON, to be kept in a checkpoint:

`step` batches given so far; `epoch` passes given so far, of the source that is furthest, in units of its `repeat`;
`given` source name -> [rows, tokens]; `chunk`, `batches` number of the chunk, and batches of it given; `sources` the
`Place` of each source at the chunk's beginning."""


@dataclass(frozen=True)
class Run:
    """How long a run is."""

    steps: int
    """Global batches."""
    rows: int | None
    """Rows of the blend; None: as many as the steps take."""
    until: float = float("inf")
    """Virtual time of the last row, where it is known."""


@dataclass(frozen=True)
class GlobalBatch:
    """What a step trains on, over all workers."""

    arrays: dict[str, np.ndarray]
    """As `batches.pad` or `batches.pack` gives them."""
    tokens: int
    """Tokens without padding."""
    origins: np.ndarray
    """[samples, 4] int64: row of the batch, source, shard, and raw row of the shard, of each sample."""
    cursor: Cursor
    """Where the stream stands after it."""

    @property
    def total(self) -> int:
        """Rows of the arrays."""
        return len(self.arrays["input_ids"])


def batches(
    feed: Feed,
    batching: Batching,
    padding: PaddingRule,
    run: Run,
    cursor: Cursor | None = None,
    read: Callable[[int, Window], TokenRows] | None = None,
) -> Iterator[GlobalBatch]:
    """The global batches of a run.

    Args:
        feed: the sources.
        batching: how rows become batches.
        padding: how batches are filled up.
        run: where the stream ends.
        cursor: of the last batch that was given; None: from the beginning.
        read: reads a window in place of `feed.read`.
    """
    cursor = cursor or {"step": 0, "epoch": 0.0, "chunk": 0, "batches": 0, "sources": [[]] * len(feed.plans)}
    if cursor["step"] >= run.steps:
        return
    places = [Place(*place) for place in cursor["sources"]]
    step, epoch, skip = cursor["step"], cursor["epoch"], cursor["batches"]
    for number, drawn, layouts in _chunks(feed, batching, run, read or feed.read, places, cursor["chunk"]):
        after = advance(places, drawn.rows)
        seen = np.zeros(len(drawn), dtype=bool)
        progress = np.sort(drawn.rows["progress"])
        for count, layout in enumerate(layouts, start=1):
            seen[layout.rows] = True
            if count <= skip:
                continue
            own = drawn[layout.rows]
            rows = _gather(own)
            # the batches of a chunk may take its rows in any order, so they share out its progress evenly
            epoch = max(epoch, float(progress[-(-len(progress) * count // len(layouts)) - 1]))
            step, last = step + 1, count == len(layouts)
            given = after if last else advance(places, drawn.rows[seen])
            places_in_batch = np.arange(len(own)) if layout.packs is None else layout.packs
            yield GlobalBatch(
                arrays=pad(rows, padding) if layout.packs is None else pack(rows, layout.packs, padding),
                tokens=len(rows.ids),
                origins=np.stack([places_in_batch, own.rows["source"], rows.shards, rows.numbers], axis=1),
                cursor={
                    "step": step,
                    "epoch": epoch,
                    "given": {name: [place.rows, place.tokens] for name, place in zip(feed.names, given, strict=True)},
                    "chunk": number + 1 if last else number,
                    "batches": 0 if last else count,
                    "sources": [list(astuple(place)) for place in (after if last else places)],
                },
            )
            if step == run.steps:
                return
        places, skip = after, 0


def plan_run(feed: Feed, batching: Batching, lengths: Sequence[Sequence[np.ndarray]], epochs: float) -> Run:
    """How long a run over known rows is.

    Args:
        feed: the sources.
        batching: how rows become batches.
        lengths: [sources][shards] tokens of the training rows of each shard.
        epochs: how often the data is gone through.
    """

    def read(source: int, window: Window) -> _Lengths:
        return _Lengths(np.concatenate([lengths[source][shard] for shard in window.shards]))

    rows = [sum(map(len, shards)) for shards in lengths]
    tokens = [sum(int(shard.sum(dtype=np.int64)) for shard in shards) for shards in lengths]
    until = epochs * epoch_time(feed.shares, rows, tokens)
    blend = Blend(feed.plans, feed.shares, [Place()] * len(rows), read, feed.names)
    count = 0
    while True:
        times = blend.draw(1 << 20).rows["time"]
        inside = int(np.searchsorted(times, until * (1 + 1e-12), side="right"))
        count += inside
        if inside < len(times):
            break
    count = max(count, 1)
    if batching.rule == "fixed":
        return Run(-(-count // batching.batch_size), count, until)
    run = Run(0, count, until)
    places = [Place()] * len(rows)
    steps = sum(len(layouts) for _, _, layouts in _chunks(feed, batching, run, read, places, 0))
    return Run(steps, count, until)


@dataclass(frozen=True)
class _Lengths:
    lengths: np.ndarray


def _chunks(
    feed: Feed,
    batching: Batching,
    run: Run,
    read: Callable[[int, Window], Any],
    places: Sequence[Place],
    number: int,
) -> Iterator[tuple[int, Drawn, list]]:
    """The chunks of the stream from `places` on: number, rows, layouts of its batches."""
    blend = Blend(feed.plans, feed.shares, places, read, feed.names)
    left = None if run.rows is None else run.rows - sum(place.rows for place in places)
    buffer = Drawn([], np.zeros(0, dtype=ROW))
    front = 0
    while True:
        at_hand = buffer[front:]
        chunk = batching.chunk(at_hand.rows["tokens"], number, ended=left == 0)
        if chunk is None:
            # as many as are at hand already, so that a long chunk is not tried again and again
            most = max(_DRAWN_ROWS, len(at_hand))
            drawn = blend.draw(most if left is None else min(most, left))
            left = None if left is None else left - len(drawn)
            buffer, front = at_hand.join(drawn), 0
        elif not chunk.rows:
            return
        else:
            yield number, at_hand[: chunk.rows], chunk.batches
            front += chunk.rows
            number += 1


def _gather(drawn: Drawn) -> TokenRows:
    """The tokens of the rows."""
    by_load = np.argsort(drawn.rows["load"], kind="stable")
    loads, starts = np.unique(drawn.rows["load"][by_load], return_index=True)
    picks = np.split(drawn.rows["pick"][by_load], starts[1:])
    joined = TokenRows.join([drawn.loads[load].take(own) for load, own in zip(loads, picks, strict=True)])
    return joined.take(np.argsort(by_load))
