"""Accuracy against speed: true to the settings, usable by mouse, keys and touch, harmless whatever they are called, and
legible as a picture."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import OutputError
from dllm_ray.viz import front_picture
from dllm_ray.viz.front import page
from dllm_ray.viz.points import COLOURS, SHAPES, Curve, Point, described, looks, numbers, shortened, staircase

CHROMIUM = Path("/usr/bin/chromium")
EVIL = (
    "</script></title><script>alert(1)</script><img src=x onerror=alert(2)> $x_1^2$ _a_ \u202e\u65e5\u672c\udc80<!--&"
    "\"'"
)
BOTH = frozenset({"tpf", "tokens_per_s"})

SLOW = Point(
    name="steps=64",
    family="none cache, low_confidence",
    score=90.0,
    low=86.0,
    high=93.0,
    tpf=1.0,
    tokens_per_s=1000.0,
    nfe=64.0,
    documents=250,
    front=BOTH,
    marks=frozenset({"official", "best"}),
)
MIDDLE = replace(SLOW, name="threshold=0.9", score=88.0, low=84.0, high=91.0, tpf=2.5, tokens_per_s=3000.0, nfe=25.6)
MIDDLE = replace(MIDDLE, marks=frozenset({"recommended"}))
FAST = replace(SLOW, name="threshold=0.5", family="dual cache, low_confidence", score=70.0, low=64.0, high=75.0)
FAST = replace(FAST, tpf=6.0, tokens_per_s=9000.0, nfe=10.7, marks=frozenset())
BEHIND = replace(
    FAST, name="steps=16", score=60.0, low=54.0, high=66.0, tpf=2.0, front=frozenset(), tokens_per_s=2000.0
)
DROPPED = replace(BEHIND, name="steps=2", score=10.0, low=3.0, high=29.0, tpf=5.0, documents=20, complete=False)
POINTS = [MIDDLE, SLOW, FAST, BEHIND, DROPPED]
CURVES = [Curve("D2F", ((2.0, 81.0), (5.0, 70.0))), Curve("one", ((3.0, 84.0),))]
TABLE = [{"setting": point.name, "score": f"{point.score:.1f}"} for point in POINTS]


def made(points=POINTS, curves=CURVES, title="A sweep", facts=("facts of it",), table=TABLE, score="accuracy, percent"):
    return page(title, points, curves, facts, table, score, 0.95)


def hard_cases() -> dict[str, list[Point]]:
    """What a sweep may come to, beside the ordinary."""
    nan = math.nan
    return {
        "none": [],
        "one": [replace(SLOW, marks=frozenset({"official", "recommended", "best"}))],
        "equal": [SLOW] * 30,
        "many": [
            replace(
                BEHIND,
                name=f"temperature={index / 7},threshold={index / 200}," + "block_size=16," * 8,
                family=f"family {index % 9}",
                score=100 - index / 3 - index % 17,
                tpf=0.5 + index / 30,
                front=BOTH if index % 17 == 0 else frozenset(),
                marks=frozenset({"official"}) if index == 40 else frozenset(),
            )
            for index in range(200)
        ],
        "unknown": [
            replace(SLOW, tpf=0.0, tokens_per_s=0.0),
            replace(FAST, low=nan, high=nan),
            replace(FAST, score=nan, low=nan, high=nan, documents=0, complete=False),
            replace(MIDDLE, tpf=nan, tokens_per_s=math.inf, nfe=nan),
        ],
        "evil": [
            replace(SLOW, name=EVIL * 3, family=EVIL),
            replace(FAST, name="c" * 400, family="_hidden"),
            replace(MIDDLE, name=""),
        ],
    }


HARD = hard_cases()

# --- what both pictures agree on


def test_the_staircase_goes_down_from_the_slowest_to_the_fastest():
    assert staircase(POINTS, "tpf") == [(1.0, 90.0), (1.0, 88.0), (2.5, 88.0), (2.5, 70.0), (6.0, 70.0)]
    assert staircase([BEHIND], "tpf") == [] and staircase([SLOW, SLOW], "tpf") == [(1.0, 90.0)]
    assert staircase([replace(SLOW, score=math.nan), replace(SLOW, tpf=math.nan)], "tpf") == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_the_staircase_is_the_best_score_at_each_speed(pairs):
    front = [(x, y) for x, y in pairs if not any((u, v) != (x, y) and u >= x and v >= y for u, v in pairs)]
    corners = staircase([replace(SLOW, tpf=float(x), score=float(y)) for x, y in front], "tpf")
    ends, turns = corners[::2], corners[1::2]
    for speed in range(max(x for x, _ in pairs) + 1):
        assert next(y for x, y in ends if x >= speed) == max(y for x, y in pairs if x >= speed)
    assert turns == [(before[0], after[1]) for before, after in pairwise(ends)]


def test_numbers_go_by_speed_and_only_to_what_is_noted():
    assert numbers(POINTS) == {1: 1, 0: 2, 2: 3}
    assert numbers([replace(BEHIND, marks=frozenset({"official"})), replace(SLOW, tpf=math.nan)]) == {1: 1, 0: 2}


def test_no_two_families_look_alike():
    families = [replace(SLOW, family=str(index)) for index in range(len(COLOURS) * len(SHAPES))]
    assert len(set(looks(families).values())) == len(families) == 56


def test_a_point_is_described_with_units_and_interval():
    assert described(MIDDLE, 0.95) == [
        "none cache, low_confidence",
        "88.0 % (95 % interval 84.0 to 91.0) over 250 documents",
        "2.50 tokens per forward, 3,000 tokens per second, 25.6 forwards per document",
        "recommended; on the front by tokens per forward (TPF) and by tokens per second",
    ]
    told = described(replace(DROPPED, documents=1, low=math.nan, tpf=math.nan), 0.95)
    assert told[1] == "10.0 % (no interval) over 1 document"
    assert told[2].startswith("unknown tokens per forward") and told[3] == "dropped early"


@given(st.text(max_size=60), st.integers(2, 30))
def test_a_shortened_text_is_short_and_begins_as_the_whole(text, length):
    short = shortened(text, length)
    assert len(short) <= length and text.startswith(short.removesuffix("\u2026"))
    assert (short == text) == (len(text) <= length) or short.endswith("\u2026")


# --- the page as text


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text inside each kind of them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "br", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def test_no_text_can_leave_its_place():
    points = [replace(SLOW, name=EVIL, family=EVIL)]
    text = page(EVIL, points, [Curve(EVIL, ((1.0, 2.0),))], [EVIL], [{EVIL: EVIL}], EVIL, 0.95)
    found = Elements(text)
    tags = [tag for tag, _ in found.tags]
    assert text.isascii() and "<!--" not in text
    assert tags.count("script") == 2 and tags.count("title") == 1 and "img" not in tags
    assert "<img src=x" in json.loads(found.texts["script"][0])["points"][0]["name"]
    assert "&#8238;" not in text and "\\u202e" not in text  # turns the rest of a line around


@pytest.mark.parametrize("case", HARD)
def test_the_page_asks_nothing_of_a_network_and_its_data_are_json(case):
    found = Elements(made(HARD[case], [Curve("empty", ()), Curve("nan", ((math.nan, 1.0),))]))
    attributes = [name for _, attributes in found.tags for name in attributes]
    assert "src" not in attributes and "href" not in attributes
    policy = next(attributes["content"] for _, attributes in found.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    data, script = found.texts["script"]
    assert len(json.loads(data)["points"]) == len(HARD[case])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(", script)


def test_without_scripts_lists_and_table_tell_everything():
    found = Elements(made())
    assert [attributes["value"] for tag, attributes in found.tags if tag == "li" and "value" in attributes] == list(
        "123"
    )
    assert found.texts["b"][:3] == ["steps=64", "threshold=0.9", "threshold=0.5"]
    assert "88.0 % (95 % interval 84.0 to 91.0) over 250 documents" in found.texts["span"]
    assert "steps=2" in found.texts["td"] and "facts of it" in found.texts["li"]
    assert ": 2 TPF, 81 %; 5 TPF, 70 %" in found.texts["li"]
    section = next(attributes for tag, attributes in found.tags if attributes.get("id") == "plot")
    assert "hidden" in section


def test_without_a_table_curves_or_facts_their_places_are_left_out():
    text = made([BEHIND], [], facts=(), table=())
    assert "<h2>" not in text and "<table" not in text


# --- the page in a browser

needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or not CHROMIUM.exists(),
    reason=f"needs {CHROMIUM} and the Python package playwright",
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page's text in a window; afterwards it must have caused no error, dialog or request."""
    troubles, pages = [], []

    def open_page(text: str, width: int = 1200, height: int = 900, **context):
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(text)
        window = browser.new_page(viewport={"width": width, "height": height}, **context)
        window.on("pageerror", lambda error: troubles.append(str(error)))
        window.on("console", lambda message: troubles.append(message.text))
        window.on("dialog", lambda dialog: troubles.append(dialog.message))
        window.on("request", lambda request: troubles.append(request.url) if request.url != path.as_uri() else None)
        window.goto(path.as_uri())
        pages.append(window)
        return window

    yield open_page
    for window in pages:
        window.close()
    assert troubles == []


def centre(window, name: str) -> tuple[float, float]:
    """Where a point's mark is on the screen."""
    box = window.locator(f'#svg .mark[aria-label^="{name},"] > path:last-child').bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@needs_browser
def test_points_stand_where_their_figures_are_and_the_axis_can_be_switched(opened):
    window = opened(made())

    def across(field: str) -> None:
        """Positions are a straight line of the figures, in both directions."""
        places = [centre(window, point.name) for point in (SLOW, MIDDLE, FAST)]
        for axis, figures in enumerate([[getattr(p, field) for p in (SLOW, MIDDLE, FAST)], [90.0, 88.0, 70.0]]):
            (a, b, c), (x, y, z) = [place[axis] for place in places], figures
            assert (b - a) / (c - a) == pytest.approx((y - x) / (z - x), abs=0.01)

    across("tpf")
    # and they agree with the ticks
    ticks = window.evaluate("""[...document.querySelectorAll("#svg .tick[text-anchor=end]")]
        .map(tick => [Number(tick.textContent), Number(tick.getAttribute("y")) - 4]).filter(([value]) => value)""")
    (low, at_low), (high, at_high) = ticks[0], ticks[-1]
    top = window.locator("#svg").bounding_box()["y"]
    expected = at_low + (at_high - at_low) * (90 - low) / (high - low)
    assert centre(window, SLOW.name)[1] - top == pytest.approx(expected, abs=1)
    assert window.locator(".curve").count() == 3  # one of them in the legend
    window.check("[value=tokens_per_s]")
    across("tokens_per_s")
    assert window.locator("#svg .curve").count() == 0
    assert "tokens per second" in window.get_attribute("#svg", "aria-label")
    window.check("#log")
    a, b, c = (centre(window, point.name)[0] for point in (SLOW, MIDDLE, FAST))
    assert (b - a) / (c - a) == pytest.approx(0.5, abs=0.01)  # 1000, 3000, 9000


@needs_browser
def test_mouse_and_keys_tell_all_about_a_point(opened):
    window = opened(made())
    window.mouse.move(*centre(window, BEHIND.name))
    for line in [BEHIND.name, *described(BEHIND, 0.95)]:
        assert line in window.text_content("#info")
    window.keyboard.press("Tab")  # from the page's beginning: the switches first
    for _ in range(20):
        if window.evaluate("document.activeElement.classList.contains('mark')"):
            break
        window.keyboard.press("Tab")
    assert "At the same place" not in window.text_content("#info")
    window.keyboard.press("Home")
    told = []
    for _ in range(len(POINTS)):
        assert window.evaluate("document.activeElement.getAttribute('aria-label').split(', ')[0]") in [
            point.name for point in POINTS
        ]
        told.append(window.text_content("#info b").split()[-1])
        window.keyboard.press("ArrowRight")
    assert told == [point.name for point in sorted(POINTS, key=lambda point: point.tpf)]
    window.keyboard.press("Home")
    window.keyboard.press("ArrowDown")
    assert window.text_content("#info b").endswith(MIDDLE.name)
    assert window.locator('#svg [tabindex="0"]').count() == 1


@needs_browser
def test_a_window_that_changes_its_size_keeps_what_is_read(opened):
    window = opened(made())
    window.focus('#svg .mark[tabindex="0"]')
    window.keyboard.press("End")
    window.set_viewport_size({"width": 500, "height": 900})
    window.wait_for_function("document.getElementById('svg').viewBox.baseVal.width < 500")
    assert window.evaluate("document.activeElement.getAttribute('aria-label')").startswith(FAST.name)
    assert window.locator("#svg .chosen").count() == 1


@needs_browser
def test_a_tap_tells_and_a_curve_is_named(opened):
    window = opened(made(), 360, 740, has_touch=True)
    window.touchscreen.tap(*centre(window, FAST.name))
    assert FAST.name in window.text_content("#info")
    dot = window.locator("#svg .dot").last.bounding_box()
    window.mouse.move(dot["x"] + 2, dot["y"] + 2)
    assert window.text_content("#info") == "published: one3 tokens per forward, 84 %"
    assert window.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@needs_browser
def test_families_dropped_settings_and_curves_can_be_put_away(opened):
    window = opened(made())
    assert window.locator("#svg .mark").count() == 5 and window.locator("#svg .dropped").count() == 1
    window.uncheck("text=dual cache, low_confidence (3)")
    assert window.locator("#svg .mark").count() == 2
    window.check("text=dual cache, low_confidence (3)")
    window.uncheck("text=dropped early")
    assert window.locator("#svg .mark").count() == 4
    window.uncheck("text=published results")
    assert window.locator("#svg .curve").count() == 0 and window.locator("#svg .error").count() == 4
    window.uncheck("#bars")
    assert window.locator("#svg .error").count() == 3  # of the numbered ones


@needs_browser
def test_marked_points_and_the_front_are_labelled(opened):
    window = opened(made())
    assert {text.split(" ", 1)[1] for text in window.locator("#svg .label").all_text_contents()} == {
        "official, best score",
        "recommended",
        "threshold=0.5",
    }
    assert window.locator("#svg .ring").count() == 1 and window.locator("#svg .around").count() == 1
    corners = re.findall(r"[\d.]+ [\d.]+", window.get_attribute("#svg .front:not(.open)", "d"))
    assert len(corners) == 5


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("case", HARD)
def test_labels_lie_apart_and_inside_whatever_the_points(opened, case, width):
    window = opened(made(HARD[case], CURVES, EVIL, [EVIL], score=EVIL), width)
    window.check("[value=tokens_per_s]")
    window.check("#log")
    window.uncheck("#log")
    window.check("[value=tpf]")
    assert window.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not any("NaN" in window.inner_html(f"#{part}") for part in ("svg", "info"))
    boxes = window.evaluate("""[...document.querySelectorAll("#svg .label, #svg .behind")].map(text => text.getBBox())
        .map(({x, y, width, height}) => [x, y, x + width, y + height])""")
    right, bottom = (float(size) for size in window.get_attribute("#svg", "viewBox").split()[2:])
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        assert x0 >= 0 and y0 >= 0 and x1 <= right and y1 <= bottom
        assert not any(x0 < u1 and u0 < x1 and y0 < v1 and v0 < y1 for u0, v0, u1, v1 in boxes[:index])


@needs_browser
def test_what_has_no_place_is_said(opened):
    window = opened(made(HARD["unknown"], []))
    assert window.text_content("#left").startswith("2 settings have no place on this plot")
    window.check("#log")
    assert window.text_content("#left").startswith("3 settings have no place on this plot")
    assert opened(made([], [])).text_content("#left") == "There are no settings to draw."


@needs_browser
def test_settings_at_one_place_are_told_together(opened):
    window = opened(made([replace(SLOW, name=f"seed={index}") for index in range(9)], []))
    assert window.text_content("#svg .label") == "1, 2, 3 and 6 more official, best score"
    window.mouse.move(*centre(window, "seed=3"))
    assert "At the same place: " in window.text_content("#info") and "and 3 more" in window.text_content("#info")


@needs_browser
def test_the_table_can_be_sorted(opened):
    window = opened(made())

    def column(number: int) -> list[str]:
        return window.locator(f"tbody td:nth-child({number})").all_text_contents()

    window.click("th >> text=score")
    assert column(2) == ["90.0", "88.0", "70.0", "60.0", "10.0"]
    window.click("th >> text=score")
    assert column(2) == ["10.0", "60.0", "70.0", "88.0", "90.0"]
    window.click("th >> text=setting")
    assert column(1) == sorted(point.name for point in POINTS) and window.locator("th[aria-sort]").count() == 1


@needs_browser
def test_on_paper_the_plot_fits_and_the_switches_are_gone(opened):
    window = opened(made(), color_scheme="dark")
    window.emulate_media(media="print")
    window.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert window.get_attribute("#svg", "viewBox").startswith("0 0 680 ")
    assert not window.is_visible(".bar") and not window.is_visible("#info") and window.is_visible("#svg")
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


# --- the picture


@pytest.mark.parametrize("case", [*HARD, "ordinary"])
def test_the_picture_is_as_wide_as_a_page_and_its_labels_lie_apart_and_inside(case, tmp_path, recwarn):
    import numpy as np
    from matplotlib.image import imread
    from matplotlib.text import Text

    points = HARD.get(case, POINTS)
    curves = [*CURVES, Curve(EVIL, ((math.nan, 1.0),)), Curve("empty", ())]
    title = EVIL * 9 if case == "evil" else "A sweep"
    front_picture.picture(tmp_path / "front.png", title, points, curves, EVIL * 3, 0.95)
    pixels = imread(tmp_path / "front.png")
    height, width = pixels.shape[:2]
    assert abs(width - 180 / 25.4 * 200) < 2 and height > 850
    edge = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()])
    assert (edge == 1).all()  # nothing is cut off
    assert [str(warning.message) for warning in recwarn] == []

    drawn = front_picture.figure(title, points, curves, EVIL * 3, 0.95)
    drawn.canvas.draw()
    renderer = drawn.canvas.get_renderer()
    texts = [text for text in drawn.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 8
    assert not any(text.get_parse_math() for text in texts if text.get_text().count("$") > 1)
    labels = [text for text in texts if text.get_gid() == "label"]
    boxes = [Text.get_window_extent(text, renderer) for text in labels]
    for index, box in enumerate(boxes):
        assert drawn.bbox.x0 <= box.x0 and box.x1 <= drawn.bbox.x1
        assert drawn.bbox.y0 <= box.y0 and box.y1 <= drawn.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])
    sheet = [Text.get_window_extent(text, renderer) for text in texts if text.axes is drawn.axes[0]]
    for index, box in enumerate(sheet):
        assert box.x0 >= 0 and box.x1 <= width
        assert not any(
            box.overlaps(other) and min(box.y1, other.y1) - max(box.y0, other.y0) > 4 for other in sheet[:index]
        )


def test_the_picture_says_what_the_numbers_mean():
    drawn = front_picture.figure("A sweep", POINTS, CURVES, "accuracy, percent", 0.95)
    sheet, by_forward, by_second = drawn.axes
    said = [text.get_text() for text in sheet.texts]
    assert "A sweep" in said and "95 % interval" in said and "a D2F" in said and "dropped early" in said
    assert "88.0 % (84.0 to 91.0), 2.50 TPF, 3,000 tokens/s, recommended: threshold=0.9" in said
    assert by_forward.get_xlabel() == "tokens per forward (TPF)" and by_second.get_xlabel() == "tokens per second"
    assert by_forward.get_ylim() == by_second.get_ylim() and "accuracy, percent" in said
    labels = {text.get_text() for text in by_forward.texts}
    assert labels == {"1 official, best score", "2 recommended", "3", "a", "b"}
    assert {text.get_text() for text in by_second.texts} == {"1 official, best score", "2 recommended", "3"}


def test_only_as_many_settings_are_explained_as_there_is_room_for_marked_ones_first():
    points = [replace(SLOW, name=f"n{index}", tpf=float(index), marks=frozenset()) for index in range(60)]
    points[50] = replace(points[50], marks=frozenset({"recommended"}))
    drawn = front_picture.figure("t", points, [], "accuracy", 0.95)
    said = [text.get_text() for text in drawn.axes[0].texts]
    assert "and 36 more on the fronts" in said and any(text.endswith("recommended: n50") for text in said)
    assert "60" not in {text.get_text() for text in drawn.axes[1].texts}


def test_every_curve_has_its_letter_and_every_marked_setting_its_label_in_a_crowd():
    curves = [Curve(f"method {order}", ((1.0 + order / 50, 60.0), (1.1, 61.0))) for order in range(9)]
    drawn = front_picture.figure("t", HARD["many"], curves, "accuracy", 0.95)
    labels = [text.get_text() for text in drawn.axes[1].texts]
    assert set("abcdefghi") <= set(labels) and sum(label.endswith(" official") for label in labels) == 1


def test_settings_at_one_place_share_a_label_in_the_picture():
    drawn = front_picture.figure("t", HARD["equal"], [], "accuracy", 0.95)
    for panel in drawn.axes[1:]:
        assert [text.get_text() for text in panel.texts] == ["1, 2, 3 and 27 more official, best score"]


def test_the_program_s_own_settings_of_matplotlib_neither_matter_nor_change(tmp_path):
    import matplotlib

    front_picture.picture(tmp_path / "a.png", "t", POINTS, CURVES, "accuracy", 0.95)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 30, "text.usetex": True}):
        front_picture.picture(tmp_path / "b.png", "t", POINTS, CURVES, "accuracy", 0.95)
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_wrong_place_for_the_picture_is_one_message(tmp_path):
    with pytest.raises(OutputError, match=r"gone/a\.png can't be written"):
        front_picture.picture(tmp_path / "gone" / "a.png", "t", POINTS, [], "accuracy", 0.95)
