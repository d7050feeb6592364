"""Accuracy against speed as a picture for print: two panels on 180 mm, legible in grey too.

Settings on a front carry numbers and published curves letters, which the lines beneath the panels explain. Texts are
drawn as they are, never read as formulas; what the font lacks is spelled as its code.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dllm_ray.output import complete_file
from dllm_ray.viz import points as drawing
from dllm_ray.viz.points import AXES, Curve, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 200
_TEXT, _TITLE = 8, 10  # points
_WIDTH, _SIDE = 180, 4  # millimetres, as all lengths below
_PANELS = {"tpf": 17, "tokens_per_s": 102}  # axis -> left edge of its panel
_PANEL_WIDTH, _PANEL_HEIGHT = 73, 80
_LINE, _TITLE_LINE, _ROW = 3.9, 4.8, 5
_BELOW = 13  # for the numbers and the name of an axis
_ICON = 6
_MOST_LISTED = 24
_MOST_LINES = 3  # of one text
_MOST_BARS = 30  # points beyond which only the numbered ones have error bars
_MARKERS = dict(zip(drawing.SHAPES, ("o", "s", "^", "D", "v", "P", "p", "X"), strict=True))
_DIRECTIONS = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
_GAPS = (0, 7, 16, 28, 42)  # further and further from a mark, in points
_GREY = "#5f5f5f"


def picture(
    file: Path, title: str, points: Sequence[Point], curves: Sequence[Curve], score: str, confidence: float
) -> None:
    """Writes the picture as PNG, 180 mm wide at 200 dots per inch.

    Args:
        file: to write.
        title: above the panels.
        points: the settings; one without a finite score or speed is left out of the panel concerned.
        curves: published results, drawn behind the points over tokens per forward.
        score: name of the y axis, e.g. "digits exact_match, percent".
        confidence: of the points' intervals, between 0 and 1.

    Raises:
        OutputError: the file can't be written.
    """
    png = io.BytesIO()
    with _own_settings():
        figure(title, points, curves, score, confidence).savefig(png, format="png", metadata={"Software": None})
    with complete_file(Path(file)) as out:
        out.buffer.write(png.getvalue())


def figure(title: str, points: Sequence[Point], curves: Sequence[Curve], score: str, confidence: float) -> "Figure":
    """The picture before it is written; arguments as of `picture`. Labels in the panels have the gid "label"."""
    with _own_settings():
        pen = _Pen()
        curves = [curve for curve in curves if drawing.finite(curve)]
        numbers = _listed(points)
        heading = pen.wrapped(title, _WIDTH - 2 * _SIDE, _TITLE, "bold")
        legend = _flow(pen, _legend(points, curves, confidence))
        key = [
            (str(numbers[index]) if line == 0 else "", text)
            for index in numbers
            for line, text in enumerate(pen.wrapped(_told(points[index]), _WIDTH - 2 * _SIDE - _ICON))
        ]
        unlisted = len(drawing.numbers(points)) - len(numbers)
        if unlisted:
            key.append(("", f"and {unlisted} more on the fronts"))

        panels = 3 + len(heading) * _TITLE_LINE + 2
        below = panels + _PANEL_HEIGHT + _BELOW
        keys = below + len(legend) * _ROW + 1.5
        pen.resize(keys + len(key) * _LINE + 2)
        for row, text in enumerate(heading):
            pen.write(_SIDE, 3 + (row + 0.5) * _TITLE_LINE, text, fontsize=_TITLE, fontweight="bold")
        for row, entries in enumerate(legend):
            for x, draw, text in entries:
                y = below + (row + 0.5) * _ROW
                draw(pen.sheet, x + _ICON / 2 - 0.7, y)
                pen.write(x + _ICON, y, text)
        for row, (number, text) in enumerate(key):
            y = keys + (row + 0.5) * _LINE
            pen.write(_SIDE + _ICON - 1.5, y, number, ha="right", fontweight="bold")
            pen.write(_SIDE + _ICON, y, text)
        middle = panels + _PANEL_HEIGHT / 2
        for line in pen.wrapped(score, _PANEL_HEIGHT, most=1):
            pen.write(_SIDE, middle, line, rotation=90, ha="center", rotation_mode="anchor")
        for axis in AXES:
            _panel(pen, axis, panels, points, curves, numbers)
        return pen.figure


class _Box(NamedTuple):
    """A rectangle in pixels, from its lower left corner."""

    x: float
    y: float
    w: float
    h: float

    def meets(self, other: "_Box") -> bool:
        beside = self.x + self.w <= other.x or other.x + other.w <= self.x
        return not (beside or self.y + self.h <= other.y or other.y + other.h <= self.y)

    def holds(self, other: "_Box") -> bool:
        across = self.x <= other.x and other.x + other.w <= self.x + self.w
        return across and self.y <= other.y and other.y + other.h <= self.y + self.h


class _Pen:
    """Writes on a figure; `sheet` covers it and counts in millimetres from its upper left corner."""

    def __init__(self):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties, findfont
        from matplotlib.ft2font import FT2Font

        self.figure = Figure(figsize=(_inches(_WIDTH), _inches(_WIDTH)), dpi=_DPI)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self._properties = FontProperties
        self._glyphs = FT2Font(findfont(FontProperties())).get_charmap()
        self.height = float(_WIDTH)
        self.sheet = self.figure.add_axes((0, 0, 1, 1))
        self.sheet.set_axis_off()

    def resize(self, height: float) -> None:
        """Gives the figure a height in millimetres."""
        self.height = height
        self.figure.set_size_inches(_inches(_WIDTH), _inches(height))
        self.sheet.set_xlim(0, _WIDTH)
        self.sheet.set_ylim(height, 0)

    def panel(self, left: float, top: float) -> "Axes":
        """New axes at a place."""
        bottom = self.height - top - _PANEL_HEIGHT
        return self.figure.add_axes(
            (left / _WIDTH, bottom / self.height, _PANEL_WIDTH / _WIDTH, _PANEL_HEIGHT / self.height)
        )

    def spelled(self, text: str) -> str:
        """The text in one line, with codes in place of characters that the font lacks."""
        return "".join(
            character if ord(character) in self._glyphs else f"\\u{ord(character):04x}"
            for character in drawing.tidy(text)
        )

    def size(self, text: str, points: float = _TEXT, weight: str = "normal") -> tuple[float, float]:
        """Width and height of a spelled text in pixels."""
        properties = self._properties(size=points, weight=weight)
        width, height, _ = self._renderer.get_text_width_height_descent(text, properties, ismath=False)
        return width, height

    def wrapped(
        self, text: str, width: float, points: float = _TEXT, weight: str = "normal", most: int = _MOST_LINES
    ) -> list[str]:
        """Lines of at most a width in millimetres; an ellipsis ends the last one where so many don't hold the text."""
        text = self.spelled(text)
        pixels = _pixels(width)

        def fits(part: str) -> bool:
            return self.size(part, points, weight)[0] <= pixels

        lines: list[str] = []
        while text:
            length = len(text)
            while not fits(text[:length]):
                length = max(1, min(length - 1, int(length * pixels / self.size(text[:length], points, weight)[0]) + 1))
            if length == len(text):
                return [*lines, text]
            if len(lines) == most - 1:
                while not fits(text[:length] + "\u2026"):
                    length -= 1
                return [*lines, text[:length].rstrip() + "\u2026"]
            gap = max(text.rfind(" ", 0, length + 1), text.rfind(",", 0, length))
            length = gap + 1 if gap > length / 2 else length
            lines.append(text[:length].rstrip())
            text = text[length:].lstrip()
        return lines

    def write(self, x: float, y: float, text: str, **looks) -> None:
        """A spelled text on the sheet, with its middle at a height."""
        self.sheet.text(x, y, text, va="center_baseline", **({"fontsize": _TEXT} | looks))


def _panel(
    pen: _Pen,
    axis: str,
    top: float,
    points: Sequence[Point],
    curves: Sequence[Curve],
    numbers: dict[int, int],
) -> None:
    """One panel: score over one kind of speed."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes = pen.panel(_PANELS[axis], top)
    drawn = {index: point for index, point in enumerate(points) if drawing.is_drawn(point, axis)}
    behind = [drawing.finite(curve) for curve in curves]
    barred = {
        index
        for index, point in drawn.items()
        if drawing.has_interval(point) and (index in numbers or (point.complete and len(points) <= _MOST_BARS))
    }
    ends = [end for index in barred for end in (drawn[index].low, drawn[index].high)]
    # both panels have the same scores in the same places
    scores = [point.score for point in points if math.isfinite(point.score)] + ends
    speeds = [getattr(point, axis) for point in drawn.values()]
    if axis == "tpf":
        speeds += [x for pairs in behind for x, _ in pairs]
    axes.set_ylim(*_span(scores + [y for pairs in behind for _, y in pairs], from_zero=False))
    axes.set_xlim(*_span(speeds, from_zero=True))
    for scale, most in ((axes.xaxis, 5), (axes.yaxis, 7)):
        scale.set_major_locator(MaxNLocator(most, steps=(1, 2, 5, 10)))
        scale.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.tick_params(labelsize=_TEXT, length=2.5, width=0.6)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(AXES[axis], fontsize=_TEXT)
    if axis == "tpf":
        for pairs in behind:
            axes.plot([x for x, _ in pairs], [y for _, y in pairs], **_BEHIND)
    _steps(axes, drawing.staircase(points, axis))
    looks = drawing.looks(points)
    for index, point in sorted(drawn.items(), key=lambda item: (item[0] in numbers, item[1].complete)):
        x = getattr(point, axis)
        if index in barred:
            axes.vlines(x, point.low, point.high, color="black", linewidth=0.6, alpha=0.7 if index in numbers else 0.3)
        _mark(axes, x, point.score, *looks[point.family], point.marks, point.complete)
    _label(pen, axes, axis, drawn, behind if axis == "tpf" else [], numbers)


_BEHIND = {"color": "#8c8c8c", "linewidth": 0.8, "linestyle": (0, (4, 2)), "marker": ".", "markersize": 3}
_STEPS = {"color": "black", "linewidth": 1.1}


def _steps(axes: "Axes", corners: list[tuple[float, float]]) -> None:
    """The line of a front, and where it leaves the panel."""
    if not corners:
        return
    (first_x, first_y), (last_x, last_y) = corners[0], corners[-1]
    axes.plot(*zip(*corners, strict=True), **_STEPS, zorder=2)
    open_ends = {"color": "black", "linewidth": 0.7, "linestyle": ":", "zorder": 2}
    axes.plot([axes.get_xlim()[0], first_x], [first_y, first_y], **open_ends)
    axes.plot([last_x, last_x], [last_y, axes.get_ylim()[0]], **open_ends)


def _mark(
    axes: "Axes", x: float, y: float, colour: str, shape: str, marks: frozenset[str], complete: bool = True
) -> None:
    """A point, with a star around a recommended and a ring around an official one."""
    around = {"linewidths": 0.9, "edgecolors": "black", "clip_on": False}
    if "recommended" in marks:
        axes.scatter([x], [y], 260, marker="*", facecolors="white", zorder=3, **around)
    if "official" in marks:
        size = 300 if "recommended" in marks else 105
        axes.scatter([x], [y], size, marker="o", facecolors="none", zorder=3, **around)
    axes.scatter(
        [x],
        [y],
        26,
        marker=_MARKERS[shape],
        facecolors=colour,
        edgecolors="black",
        linewidths=0.5,
        alpha=1 if complete else 0.3,
        zorder=4 if complete else 2.5,
        clip_on=False,
    )


def _label(
    pen: _Pen,
    axes: "Axes",
    axis: str,
    drawn: dict[int, Point],
    behind: Sequence[Sequence[tuple[float, float]]],
    numbers: dict[int, int],
) -> None:
    """Puts numbers and letters beside what they stand for, where there is room, the marked points' first."""
    from matplotlib.patheffects import withStroke

    window = axes.get_window_extent(pen.figure.canvas.get_renderer())
    frame = _Box(window.x0, window.y0, window.width, window.height + _pixels(2))
    places = {
        index: axes.transData.transform((getattr(point, axis), point.score)).tolist() for index, point in drawn.items()
    }
    boxes = []
    for index, (x, y) in places.items():
        reach = _reach(drawn[index]) * _DPI / 72
        boxes.append(_Box(x - reach, y - reach, 2 * reach, 2 * reach))
    corners = axes.transData.transform(drawing.staircase(list(drawn.values()), axis) or [(0, 0)]).tolist()
    lines = [_Box(min(a, x), min(b, y), abs(a - x), abs(b - y)) for (a, b), (x, y) in pairwise(corners)]
    taken: list[_Box] = []

    def put(text: str, place: Sequence[float], reach: float, avoided: list[_Box], **looks) -> bool:
        width, height = pen.size(text, weight=looks.get("fontweight", "normal"))
        in_the_way = taken + boxes if avoided else []  # a label that must be may cross what it must
        found = _free(place, width + 12, height + 4, reach * _DPI / 72, frame, taken + avoided, in_the_way)
        if found is None:
            return False
        box, far = found
        taken.append(box)
        leader = {"arrowstyle": "-", "linewidth": 0.5, "color": _GREY, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            text,
            place,
            (box.x + box.w / 2, box.y + box.h / 2),
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=_TEXT,
            gid="label",
            annotation_clip=False,
            arrowprops=leader if far else None,
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            **looks,
        )
        return True

    def worth(index: int) -> tuple:
        point = drawn[index]
        return "recommended" not in point.marks, not point.marks, numbers.get(index, math.inf)

    named = [index for index, point in drawn.items() if axis in point.front or point.marks]
    together: dict[tuple[int, int], list[int]] = {}  # those at one place share a label
    for index in sorted(named, key=worth):
        x, y = places[index]
        together.setdefault((round(x / 3), round(y / 3)), []).append(index)
    for group in together.values():
        index, known = group[0], [numbers[index] for index in group if index in numbers]
        if not known:
            continue
        point, number = drawn[index], drawing.listed(known, len(group) - len(known))
        tries = [(number, boxes + lines), (number, boxes)]
        if point.marks:
            text = f"{number} {drawing.marked(point)}"
            tries = [(text, boxes + lines), (text, boxes), *tries, (text, []), (number, [])]
        reach = _reach(point) + 1
        any(put(text, places[index], reach, avoided, fontweight="bold") for text, avoided in tries)
    for order, pairs in enumerate(behind):
        ends = [axes.transData.transform(pair).tolist() for pair in reversed(pairs)]
        looks = {"color": _GREY, "fontstyle": "italic"}
        any(put(_letter(order), end, 3, avoided, **looks) for avoided in (boxes + lines, []) for end in ends)


def _reach(point: Point) -> float:
    """How far a point's mark reaches, in points of print."""
    return 9 if "recommended" in point.marks else 6 if "official" in point.marks else 3.5


def _free(
    place: Sequence[float],
    width: float,
    height: float,
    reach: float,
    frame: _Box,
    taken: Sequence[_Box],
    in_the_way: Sequence[_Box],
) -> tuple[_Box, bool] | None:
    """The first free box of a size around a place, near ones first, and whether it is far; None: there is none.

    Nothing in the way lies between a place and a far box, but what is at the place itself.
    """
    others = [box for box in in_the_way if not box.holds(_Box(*place, 0, 0))]
    for gap in _GAPS:
        for right, up in _DIRECTIONS:
            away = (reach + gap * _DPI / 72) * (0.75 if right and up else 1)
            x = place[0] + right * (away + width / 2) - width / 2
            y = place[1] + up * (away + height / 2) - height / 2
            box = _Box(x, y, width, height)
            if not frame.holds(box) or any(box.meets(other) for other in taken):
                continue
            way = [
                _Box(place[0] + (x + width / 2 - place[0]) * part, place[1] + (y + height / 2 - place[1]) * part, 0, 0)
                for part in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
            ]
            if gap == 0 or not any(other.holds(step) for other in others for step in way):
                return box, gap > 0
    return None


_Entry = tuple[Callable[["Axes", float, float], object], str]


def _legend(points: Sequence[Point], curves: Sequence[Curve], confidence: float) -> list[_Entry]:
    """What is drawn -> what it means."""

    def mark(colour: str, shape: str, complete: bool = True):
        return lambda sheet, x, y: _mark(sheet, x, y, colour, shape, frozenset(), complete)

    def around(marker: str, size: float):
        looks = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.9}
        return lambda sheet, x, y: sheet.scatter([x], [y], size, marker=marker, **looks)

    def line(**looks):
        return lambda sheet, x, y: sheet.plot([x - 2.2, x + 2.2], [y, y], **looks)

    entries: list[_Entry] = [
        (mark(colour, shape), drawing.shortened(drawing.tidy(family), 80))
        for family, (colour, shape) in drawing.looks(points).items()
    ]
    if any(not point.complete for point in points):
        entries.append((mark("#8c8c8c", "circle", False), "dropped early"))
    if any(point.front for point in points):
        entries.append((line(**_STEPS), "front: nothing is both better and faster"))
    if any("official" in point.marks for point in points):
        entries.append((around("o", 85), "official setting"))
    if any("recommended" in point.marks for point in points):
        entries.append((around("*", 130), "recommended setting"))
    if any(drawing.has_interval(point) for point in points):
        bar = {"color": "black", "linewidth": 0.6, "alpha": 0.7}
        entries.append(
            (lambda sheet, x, y: sheet.plot([x, x], [y - 1.7, y + 1.7], **bar), f"{confidence * 100:.4g} % interval")
        )
    for order, curve in enumerate(curves):
        entries.append((line(**_BEHIND), f"{_letter(order)}  {drawing.shortened(drawing.tidy(curve.name), 70)}"))
    return entries


def _flow(pen: _Pen, entries: Sequence[_Entry]) -> list[list[tuple[float, Callable, str]]]:
    """The entries in rows as wide as the picture, each with its left edge."""
    rows: list[list[tuple[float, Callable, str]]] = [[]]
    x = float(_SIDE)
    for draw, text in entries:
        text = pen.wrapped(text, _WIDTH - 2 * _SIDE - _ICON, most=1)[0]
        width = _ICON + pen.size(text)[0] / _pixels(1)
        if rows[-1] and x + width > _WIDTH - _SIDE:
            rows.append([])
            x = float(_SIDE)
        rows[-1].append((x, draw, text))
        x += width + 5
    return rows if rows[0] else []


def _listed(points: Sequence[Point]) -> dict[int, int]:
    """Index of each point that the picture explains -> its number, by number: the marked ones, and as many others as
    there is room for."""
    numbers = drawing.numbers(points)
    chosen = sorted(numbers, key=lambda index: not points[index].marks)[:_MOST_LISTED]
    return {index: number for index, number in numbers.items() if index in chosen}


def _told(point: Point) -> str:
    """A point in a line of the key."""
    special = f", {drawing.marked(point)}" if point.marks else ""
    return f"{drawing.scored(point)}, {drawing.speeds(point, short=True)}{special}: {point.name}"


def _letter(order: int) -> str:
    """a to z, then a2 to z2 and so on."""
    rounds, letter = divmod(order, 26)
    return chr(ord("a") + letter) + (str(rounds + 1) if rounds else "")


def _span(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """A little more than what the values span; from zero on where they reach into its neighbourhood."""
    if not values:
        return 0, 1
    low, high = min(values), max(values)
    if from_zero and 0 <= low <= high / 2:
        return 0, high * 1.06 or 1
    room = (high - low) * 0.06 if high > low else max(abs(high) * 0.1, 1e-9)
    return low - room, high + room


def _inches(millimetres: float) -> float:
    return millimetres / 25.4


def _pixels(millimetres: float) -> float:
    return _inches(millimetres) * _DPI


@contextmanager
def _own_settings() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's or the program's settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, "font.size": _TEXT, "axes.linewidth": 0.6})
        yield
