"""A sweep on the terminal while it runs: a live table of the best settings so far, or a line for each where the output
is a file."""

from types import TracebackType
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dllm_ray.tuning.answered import Answered
from dllm_ray.tuning.search import Told
from dllm_ray.tuning.tried import Tried
from dllm_ray.viz.terminal import console

_SHOWN = 12


class Watch:
    """Shows results as they come; a context manager.

    Args:
        trials: settings that will be tried.
        documents: of the search.
    """

    def __init__(self, trials: int, documents: int):
        self._trials, self._documents = trials, documents
        self._rows: dict[str, dict[str, Any]] = {}
        self._over = 0
        self._live: Live | None = None

    def __enter__(self) -> "Watch":
        if console.is_terminal:
            self._live = Live(get_renderable=self._table, console=console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, official: Tried) -> None:
        """Takes in what the official setting gave."""
        print(
            f"official  {official.name}  score {official.score:.4f}  docs {len(official.scores)}  tok/forward "
            f"{official.tpf:.2f}  tok/s {official.tokens_per_s:.0f}",
            flush=True,
        )

    def tell(self, told: Told, answered: Answered | None) -> None:
        """Takes in a trial's result."""
        if told.over:
            self._over += 1
        ended = _ended(told)
        figures: dict[str, Any] = {}
        if answered is not None:
            figures = {
                "score": f"{answered.score:.4f}",
                "docs": len(answered.scores),
                "tok/forward": f"{answered.tpf:.2f}",
                "tok/s": f"{answered.tokens_per_s:.0f}",
            }
        self._rows[told.name] = {**figures, "state": ended}
        if self._live is None and told.over:
            parts = [f"setting {self._over}/{self._trials}", told.name or "without a name"]
            parts += [f"{name} {value}" for name, value in figures.items()]
            print("  ".join([*parts, *([ended] if ended != "done" else [])]), flush=True)

    def _table(self) -> Table:
        drawn = Table(title=f"{self._over} of {self._trials} settings", title_justify="left", title_style="bold")
        drawn.add_column("setting", overflow="fold")
        for name in ("score", "docs", "tok/forward", "tok/s"):
            drawn.add_column(name, justify="right")
        drawn.add_column("")
        ordered = sorted(self._rows.items(), key=lambda item: -float(item[1].get("score", "-inf")))
        for name, row in ordered[:_SHOWN]:
            cells = [str(row.get(key, "")) for key in ("score", "docs", "tok/forward", "tok/s", "state")]
            drawn.add_row(escape(name), *cells)
        if len(ordered) > _SHOWN:
            drawn.caption = f"and {len(ordered) - _SHOWN} more"
        return drawn


def _ended(told: Told) -> str:
    if told.error is not None:
        return f"failed: {told.error}"
    if not told.over:
        return "under way"
    if told.result.get("ended") == "impossible":
        return f"can't be: {told.impossible}"
    words = {"complete": "done", "budget": "out of budget"}
    return words.get(str(told.result.get("ended")), "dropped")
