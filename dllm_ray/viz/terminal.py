"""What jobs draw in the terminal: a live line of progress, tables, and the steps of a denoising.

On a terminal progress is one line that is drawn over; elsewhere (a log file, `ray job submit`) it is plain lines.
"""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm_ray.models.spec import DiffusionSpec

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

_PLAIN_EVERY_S = 5.0
_MASK, _STOP = "░", "∎"


class Progress:
    """Progress of a long piece of work.

    Args:
        label: what is going on.
        total: units of work in all.
        unit: name of a unit, e.g. `step`.
        done: units done before.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self._label, self._total, self._unit = label, total, unit
        self._first: int | None = None  # where the measurement of the time left begins: at the first update
        self._done = done
        self._began = self._shown = time.monotonic()
        self._live = sys.stdout.isatty()
        self._width = 0

    def update(self, done: int, **figures: str) -> None:
        """Shows that `done` units are done; the figures are shown as `name value`."""
        if self._first is None or done < self._done:  # the work begins, or went back after a restart
            self._first, self._began = done, time.monotonic()
        self._done = done
        now = time.monotonic()
        if not self._live and done < self._total and now - self._shown < _PLAIN_EVERY_S:
            return
        self._shown = now
        advanced = done - self._first
        parts = [f"{self._label}: {self._unit} {done}/{self._total}", *(f"{k} {v}" for k, v in figures.items())]
        if advanced > 0 and done < self._total:
            left = (now - self._began) / advanced * (self._total - done)
            parts.append(f"{duration(left)} left")
        self._write("  ".join(parts))

    def note(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._live:
            sys.stdout.write("\r" + " " * self._width + "\r")
            self._width = 0
        print(text, flush=True)

    def close(self) -> None:
        """Leaves the live line standing."""
        if self._live and self._width:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._width = 0

    def _write(self, line: str) -> None:
        if self._live:
            line = line[: max(console.width - 1, 20)]
            sys.stdout.write("\r" + line.ljust(self._width))
            sys.stdout.flush()
            self._width = len(line)
        else:
            print(line, flush=True)


def duration(seconds: float) -> str:
    """`42s`, `3m10s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Prints rows under all their keys; a row may lack some. Numbers are right-aligned."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        is_text = all(isinstance(row.get(key, ""), str) for row in rows)
        drawn.add_column(str(key), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(_cell(row.get(key, "")) for key in keys))
    console.print(drawn)


def denoising(tokenizer, spec: DiffusionSpec, history: Sequence[Sequence[int]], prompt_length: int) -> None:
    """Prints a canvas after each step, one line a step: masks as ░, ends of text as ∎, newly written tokens marked.

    Args:
        tokenizer: to spell tokens.
        spec: knows the mask token and the tokens that end a text.
        history: canvases, the one before the first step first.
        prompt_length: tokens at the beginning that are given and not shown.
    """
    before: Sequence[int] = history[0]
    for step, canvas in enumerate(history):
        line = Text(f"step {step:>3}  ")
        for position in range(prompt_length, len(canvas)):
            token = canvas[position]
            if token == spec.mask_token_id:
                line.append(_MASK, style="dim")
                continue
            text = _STOP if token in spec.stop_token_ids else _spell(tokenizer, token)
            line.append(text, style="bold reverse" if step and token != before[position] else "")
        console.print(line)
        before = canvas


def _spell(tokenizer, token: int) -> str:
    text = tokenizer.decode([token])
    return "⏎" if text == "\n" else text.replace("\n", "⏎")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
