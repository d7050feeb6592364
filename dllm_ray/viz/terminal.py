"""What jobs draw in the terminal: a live line of progress, tables, and a canvas while it is denoised.

On a terminal progress and a live canvas are drawn over; elsewhere (a log file, `ray job submit`) they are plain lines.
"""

import itertools
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.viz.spelling import LINE_BREAK, Speller

if TYPE_CHECKING:
    from dllm_ray.sampling.engine import Commit  # imports torch, which tables and progress do without

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

_PLAIN_EVERY_S = 5.0
_DRAWINGS_PER_S = 12
_NEW = " bold reverse"
# readable on a light and on a dark terminal
_STEP_COLOURS = ((70, 110, 230), (190, 70, 190), (225, 115, 30))
_CONFIDENCE_COLOURS = ((220, 60, 60), (195, 145, 30), (40, 150, 80))


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


class LiveCanvas:
    """A canvas that is drawn while it is denoised: a context manager, told of every step with `update`.

    Masks are drawn as ░, ends of text as ∎. On a terminal it is drawn over, and its last state stays; elsewhere every
    step is a plain line. What is still masked after the last step lies behind the end of the text, and is left blank.

    Args:
        tokenizer: to spell tokens.
        spec: knows the mask token and the tokens that end a text.
        canvas: the canvas before the first step (`Sampler.canvases`).
        prompt_length: tokens at the beginning that are given and not shown; given tokens after them are shown plain.
        colour: written tokens by the step that wrote them (old blue, new orange), or by their confidence (low red,
            high green).
    """

    def __init__(
        self,
        tokenizer,
        spec: DiffusionSpec,
        canvas: Sequence[int],
        prompt_length: int = 0,
        colour: Literal["step", "confidence"] = "step",
    ):
        self._spec = spec
        self._speller = Speller(tokenizer, spec)
        self._tokens = list(canvas)
        self._prompt_length = prompt_length
        self._colour = colour
        self._written: dict[int, tuple[int, float]] = {}  # position -> the step that wrote it, and its confidence
        self._edited: set[int] = set()
        self._new: set[int] = set()
        self._steps = 0
        self._edits = 0
        self._done = False
        self._began = self._latest = time.monotonic()
        self._lock = threading.Lock()  # rich draws in a thread of its own
        self._live: Live | None = None

    def __enter__(self) -> "LiveCanvas":
        self._began = self._latest = time.monotonic()
        if console.is_terminal:
            self._live = Live(
                get_renderable=self._window, console=console, refresh_per_second=_DRAWINGS_PER_S, transient=True
            )
            self._live.start()
        else:
            self._print_line()
        return self

    def __exit__(self, *_exception) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            console.print(self._text(final=True), self._status(), sep="\n")

    def update(self, commit: "Commit") -> None:
        """Takes in what a step wrote."""
        mask = self._spec.mask_token_id
        with self._lock:
            for position, token, confidence in zip(commit.positions, commit.tokens, commit.confidences, strict=True):
                if position in self._written and self._tokens[position] != mask:
                    self._edits += 1
                    self._edited.add(position)
                self._tokens[position] = token
                self._written[position] = (commit.step, confidence)
            self._new = set(commit.positions)
            self._steps = commit.step + 1
            self._done = commit.done
            self._latest = time.monotonic()
        if self._live is None:
            self._print_line()

    def _print_line(self) -> None:
        text = "".join(self._texts()[self._prompt_length :]).replace("\n", LINE_BREAK)
        console.print(Text(f"step {self._steps:>3}  {text}"), soft_wrap=True)

    def _window(self) -> Text:
        """What fits on the terminal, around what was written last, with the status below it."""
        with self._lock:
            text, status = self._text(), self._status()
        lines = text.wrap(console, console.width)
        room = max(console.height - 3, 1)
        newest = max((index for index, line in enumerate(lines) if _is_marked(line)), default=0)
        first = min(max(newest + 2 - room, 0), max(len(lines) - room, 0))
        return Text("\n").join([*lines[first : first + room], status])

    def _text(self, final: bool = False) -> Text:
        """The whole canvas after the prompt; at last without the marks of what is new, and with one end of text."""
        texts = self._texts()
        if final:
            texts = _without_tail(texts, [token in self._spec.stop_token_ids for token in self._tokens])
        text = Text()
        shown = range(self._prompt_length, len(texts))
        for style, positions in itertools.groupby(shown, lambda position: self._style(position, mark_new=not final)):
            piece = "".join(texts[position] for position in positions)
            text.append(piece.replace("\n", LINE_BREAK + "\n"), style=style)
        return text

    def _texts(self) -> list[str]:
        """The text of each token."""
        texts = self._speller.spell(self._tokens)
        if not self._done:
            return texts
        mask = self._spec.mask_token_id
        return ["" if token == mask else text for text, token in zip(texts, self._tokens, strict=True)]

    def _style(self, position: int, mark_new: bool) -> str:
        style = self._colours(position)
        return f"{style}{_NEW}".strip() if mark_new and position in self._new else style

    def _colours(self, position: int) -> str:
        token = self._tokens[position]
        if token == self._spec.mask_token_id or token in self._spec.stop_token_ids:
            return "dim"
        if position not in self._written:
            return ""
        step, confidence = self._written[position]
        if self._colour == "step":
            colour = _shade(_STEP_COLOURS, step / max(self._steps - 1, 1))
        else:
            colour = _shade(_CONFIDENCE_COLOURS, confidence)
        return f"{colour} underline" if position in self._edited else colour

    def _status(self) -> Text:
        masks = 0 if self._done else self._tokens.count(self._spec.mask_token_id)
        tokens = self._text_tokens()
        seconds = max(self._latest - self._began, 1e-9)
        parts = [f"step {self._steps}", f"{masks} masks left"]
        if self._steps:
            parts += [f"{tokens / seconds:.0f} tokens/s", f"{tokens / self._steps:.2f} tokens per forward"]
        if self._edits:
            parts.append(f"{self._edits} edits")
        status = Text("  ".join(parts), style="dim")
        status.truncate(console.width, overflow="ellipsis")
        return status

    def _text_tokens(self) -> int:
        """Written tokens before the end of the text, as `SampleOutput` counts them."""
        stops = self._spec.stop_token_ids
        end = min((position for position in self._written if self._tokens[position] in stops), default=None)
        return sum(
            self._tokens[position] != self._spec.mask_token_id and (end is None or position < end)
            for position in self._written
        )


def _without_tail(texts: list[str], ends: Sequence[bool]) -> list[str]:
    """One end of text stands for those that fill the canvas behind it."""
    last = max((index for index, text in enumerate(texts) if text and not ends[index]), default=-1)
    return texts[: last + 1] + [text for text in texts[last + 1 :] if text][:1]


def _is_marked(line: Text) -> bool:
    return any("reverse" in str(span.style) for span in line.spans)


def _shade(colours: Sequence[tuple[int, int, int]], fraction: float) -> str:
    """The colour at a fraction of the way along a scale, as `#rrggbb`."""
    place = min(max(0.0, fraction), 1.0) * (len(colours) - 1)
    index = min(int(place), len(colours) - 2)
    part = place - index
    mixed = [round(a + (b - a) * part) for a, b in zip(colours[index], colours[index + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
