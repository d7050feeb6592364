"""What jobs draw in the terminal: a live line of progress, tables, and a canvas while it is denoised.

On a terminal progress and a live canvas are drawn over; elsewhere (a log file, `ray job submit`) they are plain lines.
"""

import itertools
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

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


class Drawing:
    """A canvas that is drawn while it is denoised: a context manager.

    Masks are drawn as ░, ends of text as ∎. On a terminal it is drawn over, and its last state stays; elsewhere every
    step is a plain line. What is still masked after the last step lies behind the end of the text, and is left blank.

    Args:
        given: positions at the beginning that are given and not shown; what is given after them is shown plain.
        colour: what is written by the step that wrote it (old blue, new orange), or by its confidence (low red, high
            green).
    """

    def __init__(self, given: int = 0, colour: Literal["step", "confidence"] = "step"):
        self._given = given
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

    def __len__(self) -> int:
        """Positions of the canvas."""
        raise NotImplementedError

    def _texts(self) -> list[str]:
        """What is drawn at each position."""
        raise NotImplementedError

    def _is_mask(self, position: int) -> bool:
        raise NotImplementedError

    def _is_end(self, position: int) -> bool:
        """Whether it ends the text."""
        raise NotImplementedError

    def __enter__(self) -> Self:
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

    def _wrote(self, step: int, position: int, confidence: float, is_edit: bool) -> None:
        """Remembers that a step wrote a position."""
        if is_edit:
            self._edits += 1
            self._edited.add(position)
        self._written[position] = (step, confidence)

    def _drew(self, step: int, positions: Iterable[int]) -> None:
        """Remembers what is new."""
        self._new = set(positions)
        self._steps = step + 1
        self._latest = time.monotonic()

    def _print_line(self) -> None:
        text = "".join(self._texts()[self._given :]).replace("\n", LINE_BREAK)
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
        """The whole canvas after what is given; at last without the marks of what is new, and with one end of text."""
        texts = self._texts()
        if final:
            texts = _without_tail(texts, [self._is_end(position) for position in range(len(texts))])
        text = Text()
        shown = range(self._given, len(texts))
        for style, positions in itertools.groupby(shown, lambda position: self._style(position, mark_new=not final)):
            piece = "".join(texts[position] for position in positions)
            text.append(piece.replace("\n", LINE_BREAK + "\n"), style=style)
        return text

    def _style(self, position: int, mark_new: bool) -> str:
        style = self._colours(position)
        return f"{style}{_NEW}".strip() if mark_new and position in self._new else style

    def _colours(self, position: int) -> str:
        if self._is_mask(position) or self._is_end(position):
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
        masks = 0 if self._done else sum(map(self._is_mask, range(len(self))))
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
        end = min(filter(self._is_end, self._written), default=None)
        return sum(not self._is_mask(position) and (end is None or position < end) for position in self._written)


class LiveCanvas(Drawing):
    """The drawing of a model's canvas, told of every step with `update`.

    Args:
        tokenizer: to spell tokens.
        spec: knows the mask token and the tokens that end a text.
        canvas: the canvas before the first step (`Sampler.canvases`).
        prompt_length: tokens at the beginning that are given and not shown; given tokens after them are shown plain.
        colour: as in `Drawing`.
    """

    def __init__(
        self,
        tokenizer,
        spec: DiffusionSpec,
        canvas: Sequence[int],
        prompt_length: int = 0,
        colour: Literal["step", "confidence"] = "step",
    ):
        super().__init__(prompt_length, colour)
        self._spec = spec
        self._speller = Speller(tokenizer, spec)
        self._tokens = list(canvas)

    def update(self, commit: "Commit") -> None:
        """Takes in what a step wrote."""
        with self._lock:
            for position, token, confidence in zip(commit.positions, commit.tokens, commit.confidences, strict=True):
                is_edit = position in self._written and not self._is_mask(position)
                self._tokens[position] = token
                self._wrote(commit.step, position, confidence, is_edit)
            self._done = commit.done
            self._drew(commit.step, commit.positions)
        if self._live is None:
            self._print_line()

    def __len__(self) -> int:
        return len(self._tokens)

    def _texts(self) -> list[str]:
        texts = self._speller.spell(self._tokens)
        if not self._done:
            return texts
        return ["" if self._is_mask(position) else text for position, text in enumerate(texts)]

    def _is_mask(self, position: int) -> bool:
        return self._tokens[position] == self._spec.mask_token_id

    def _is_end(self, position: int) -> bool:
        return self._tokens[position] in self._spec.stop_token_ids


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
