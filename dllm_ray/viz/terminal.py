"""What jobs draw in the terminal: a live line of progress, tables, and a canvas while it is denoised.

On a terminal progress and a live canvas are drawn over; elsewhere (a log file, `ray job submit`) they are plain lines.
"""

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling.edits import after, in_turn
from dllm_ray.viz.spelling import LINE_BREAK, Speller

if TYPE_CHECKING:
    from dllm_ray.sampling.engine import Commit  # imports torch, which tables and progress do without

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

_PLAIN_EVERY_S = 5.0
_DRAWINGS_PER_S = 12
_NEW = " bold reverse"
_GONE = "dim strike"
_SIGNS = {"insert": "+", "edit": "~", "delete": "-"}
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
    A token that a step deletes stays until the next one, struck through; in a plain line it is counted.

    Args:
        given: positions at the beginning that are given and not shown; what is given after them is shown plain.
        colour: what is written by the step that wrote it (old blue, new orange), or by its confidence (low red, high
            green).
        grows: the canvas is a sequence that changes its length, which is told instead of the masks that are left.
    """

    def __init__(self, given: int = 0, colour: Literal["step", "confidence"] = "step", grows: bool = False):
        self._given = given
        self._colour = colour
        self._grows = grows
        self._written: dict[int, tuple[int, float]] = {}  # position -> the step that wrote it, and its confidence
        self._edited: set[int] = set()
        self._new: set[int] = set()
        self._gone: dict[int, list[str]] = {}  # position -> texts that the last step deleted in front of it
        self._lately: Counter[str] = Counter()  # kinds of the last step's changes
        self._kinds: Counter[str] = Counter()
        self._steps = self._forwards = 0
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

    def _begin(self, step: int) -> None:
        """A step's changes follow; those of step -1 are what is given, which `_change` isn't told."""
        self._new, self._gone, self._lately = set(), {}, Counter()
        self._steps = step + 1
        self._forwards += step >= 0
        self._latest = time.monotonic()

    def _change(self, kind: str, position: int, confidence: float = 0.0, text: str = "") -> None:
        """Remembers a change of the step that has begun.

        Args:
            kind: write, edit, insert (what follows moves on) or delete (what follows moves up).
            position: where, at the time of the change.
            confidence: in the new token.
            text: of the one that is deleted.
        """
        self._kinds[kind] += 1
        self._lately[kind] += 1
        if kind == "delete":
            self._gone.setdefault(position, []).append(text)  # before what is moved here
        if kind in ("insert", "delete"):
            self._move(position, kind == "insert")
        if kind == "delete":
            return
        if kind == "edit":
            self._edited.add(position)
        self._written[position] = (self._steps - 1, confidence)
        self._new.add(position)

    def _move(self, position: int, is_insert: bool) -> None:
        """Makes room in the books at a position, or closes it."""
        if not is_insert:
            self._written.pop(position, None)
            self._edited.discard(position)
            self._new.discard(position)
        by, first = (1, position) if is_insert else (-1, position + 1)

        def moved(old: int) -> int:
            return old + by if old >= first else old

        self._written = {moved(old): mark for old, mark in self._written.items()}
        self._edited, self._new = set(map(moved, self._edited)), set(map(moved, self._new))
        first = position + 1  # what was deleted in front of a new token stays in front of it
        gone, self._gone = self._gone, {}
        for old, texts in sorted(gone.items()):
            self._gone.setdefault(moved(old), []).extend(texts)

    def _print_line(self) -> None:
        text = "".join(self._texts()[self._given :]).replace("\n", LINE_BREAK)
        told = _signed(self._lately) if self._grows else ""
        console.print(Text(f"step {self._steps:>3}{told and f' ({told})'}  {text}"), soft_wrap=True)

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
        pieces = []
        for position in range(self._given, len(texts) + 1):
            if not final:
                pieces += [(_GONE, gone) for gone in self._gone.get(position, ())]
            if position < len(texts):
                pieces.append((self._style(position, mark_new=not final), texts[position]))
        text = Text()
        for style, alike in itertools.groupby(pieces, itemgetter(0)):
            text.append("".join(piece for _, piece in alike).replace("\n", LINE_BREAK + "\n"), style=style)
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
        parts = [f"step {self._steps}", f"{len(self) - self._given} tokens" if self._grows else f"{masks} masks left"]
        if self._forwards:
            parts += [f"{tokens / seconds:.0f} tokens/s", f"{tokens / self._forwards:.2f} tokens per forward"]
        if self._grows:
            parts.append(_signed(self._kinds))
        elif self._kinds["edit"]:
            parts.append(f"{self._kinds['edit']} edits")
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
        super().__init__(prompt_length, colour, grows=spec.edit_heads is not None)
        self._spec = spec
        self._speller = Speller(tokenizer, spec)
        self._tokens = list(canvas)

    def update(self, commit: "Commit") -> None:
        """Takes in what a step wrote."""
        with self._lock:
            self._begin(commit.step)
            if commit.edits:
                self._follow_edits(commit)
            else:
                self._follow_writes(commit)
            self._tokens = after(commit, self._tokens, commit.tokens)
            self._done = commit.done
        if self._live is None:
            self._print_line()

    def _follow_writes(self, commit: "Commit") -> None:
        for position, confidence in zip(commit.positions, commit.confidences, strict=True):
            is_edit = position in self._written and not self._is_mask(position)
            self._change("edit" if is_edit else "write", position, confidence)

    def _follow_edits(self, commit: "Commit") -> None:
        texts, confidences = self._texts(), iter(commit.confidences)
        for edit, turn in zip(commit.edits, in_turn(commit.edits), strict=True):
            if edit.kind == "delete":
                self._change("delete", turn.position, text=texts[edit.position])
            else:
                over = "write" if self._is_mask(edit.position) else "edit"
                self._change("insert" if edit.kind == "insert" else over, turn.position, next(confidences))

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


def _signed(kinds: Counter[str]) -> str:
    """Insertions, substitutions and deletions: `+3 ~1 -2`."""
    return " ".join(f"{sign}{kinds[kind]}" for kind, sign in _SIGNS.items() if kinds[kind])


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
