"""The replay page: safe whatever tokens it holds, true to what was denoised, and usable by mouse, keys and touch."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dllm_ray.errors import OutputError
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.viz.html import ReplayRow, replay
from dllm_ray.viz.spelling import Speller

CHROMIUM = Path("/usr/bin/chromium")
NODE = shutil.which("node")


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text inside each kind of them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def data_of(page: str) -> dict:
    return json.loads(Elements(page).texts["script"][0])


@pytest.fixture(scope="module")
def sampled(make_lm):
    """A sampler, the rows that it denoised, and their histories."""
    lm = make_lm("bert", seed=3)
    sampler = Sampler(lm, SamplerConfig(max_new_tokens=16, block_size=8, steps=8, temperature=1.0, seed=2))
    prompts = [lm.tokenizer.encode(text, add_special_tokens=False) for text in ("sort 21", "日本語 reverse 9")]
    output = sampler.sample(prompts, trace=True)
    rows = [
        ReplayRow(canvas, commits, len(prompt), tokens, f"row of {len(prompt)}")
        for canvas, commits, prompt, tokens in zip(
            sampler.canvases(prompts), output.commits, prompts, output.sequences, strict=True
        )
    ]
    return lm, rows, [history.tolist() for history in output.history]


@pytest.fixture
def edited(make_lm, tokenizer):
    """A row with an edit, an empty step, an early end and text that is anything but harmless."""
    spec = make_lm("bert").spec
    mask, end = spec.mask_token_id, spec.eos_token_id
    attack = tokenizer.encode("</script><script>alert(1)</script><!--\u2028<img src=x onerror=alert(2)>&lt;\n")
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    size = len(attack)
    commits = [
        Commit(0, 0, list(range(1, size + 1)), attack, [0.5] * size, False),
        Commit(0, 1, [], [], [], False),
        Commit(0, 2, [1, size + 1], [b, end], [0.25, float("nan")], True),
    ]
    final = [a, b, *attack[1:], end, end, end]
    return spec, ReplayRow([a] + [mask] * (size + 3), commits, 1, final)


# --- the file


def test_no_token_title_label_or_setting_can_leave_its_place(edited, tokenizer):
    spec, row = edited
    attack = "</script></title><script>alert(1)</script>\u2028<!--'\"&\udc80"
    row.label = attack
    page = replay(None, tokenizer, spec, [row], attack, {attack: attack, "path": Path("a")})
    found = Elements(page)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 2 and "img" not in tags and tags.count("title") == 1
    assert page.isascii() and "<!--" not in page
    data = data_of(page)
    assert data["rows"][0]["label"] == attack and data["settings"] == {attack: attack, "path": "a"}
    assert "".join(found.texts["title"]) == attack.replace("\udc80", "\ufffd")


def test_the_page_asks_nothing_of_a_network(sampled):
    lm, rows, _ = sampled
    page = replay(None, lm.tokenizer, lm.spec, rows)
    attributes = [name for _, found in Elements(page).tags for name in found]
    assert "src" not in attributes and "href" not in attributes and "://" not in page and "@import" not in page
    policy = next(found["content"] for _, found in Elements(page).tags if "http-equiv" in found)
    assert policy.startswith("default-src 'none'")
    script = Elements(page).texts["script"][1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", script)


def test_a_file_is_written_whole_and_a_wrong_place_is_one_message(sampled, tmp_path):
    lm, rows, _ = sampled
    page = replay(tmp_path / "page.html", lm.tokenizer, lm.spec, rows)
    assert (tmp_path / "page.html").read_text() == page
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OutputError, match=r"gone/page\.html can't be written: No such file"):
        replay(tmp_path / "gone" / "page.html", lm.tokenizer, lm.spec, rows)


# --- the data


def canvases(row: dict) -> list[tuple[list[int], list[str]]]:
    """Tokens and texts before the first step and after each."""
    tokens, texts = list(row["canvas"]), list(row["texts"])
    states = [(list(tokens), list(texts))]
    for step in row["steps"]:
        for change in step.get("changes", []):
            assert change["kind"] == "write"
            for position, token in zip(change["positions"], change["tokens"], strict=True):
                tokens[position] = token
        for position, text in step.get("texts", {}).items():
            texts[int(position)] = text
        states.append((list(tokens), list(texts)))
    return states


def test_the_steps_applied_to_the_canvas_give_every_state_of_the_denoising(sampled):
    lm, rows, histories = sampled
    data = data_of(replay(None, lm.tokenizer, lm.spec, rows))
    assert data["mask"] == lm.spec.mask_token_id
    speller = Speller(lm.tokenizer, lm.spec)
    for described, row, history in zip(data["rows"], rows, histories, strict=True):
        states = canvases(described)
        assert [tokens for tokens, _ in states] == history
        assert [texts for _, texts in states] == [speller.spell(tokens) for tokens in history]
        filled = [row.tokens[i] if t == data["mask"] else t for i, t in enumerate(states[-1][0])]
        assert filled == described["final"] == row.tokens
        assert described["given"] == [[0, row.prompt_length]]


def test_given_text_between_gaps_is_named(make_lm, tokenizer):
    spec = make_lm("bert").spec
    mask = spec.mask_token_id
    data = data_of(replay(None, tokenizer, spec, [ReplayRow([9, mask, 9, 9, mask, mask], [])]))
    assert data["rows"][0]["given"] == [[0, 1], [2, 4]]


def test_without_a_mask_token_only_the_prompt_is_given(make_lm, tokenizer):
    spec = dataclasses.replace(make_lm("bert").spec, mask_token_id=None)
    data = data_of(replay(None, tokenizer, spec, [ReplayRow([9, 9, 8, 8], [], 2)]))
    assert data["mask"] is None and data["rows"][0]["given"] == [[0, 2]]


def test_confidences_that_are_no_numbers_are_null(edited, tokenizer):
    spec, row = edited
    steps = data_of(replay(None, tokenizer, spec, [row]))["rows"][0]["steps"]
    assert steps[2]["changes"][0]["confidences"] == [0.25, None]
    assert steps[1] == {"step": 1} and steps[2]["done"] is True


# --- the script, without a browser


def run_script(page: str, program: str) -> list:
    """Runs the page's script and then `program`, which prints JSON, with the page's data as `data`."""
    data, script = Elements(page).texts["script"]
    source = f"{script}\nconst data = {data};\n{program}"
    done = subprocess.run([NODE, "-"], input=source, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(NODE is None, reason="needs node to run the page's script")


@needs_node
def test_the_script_shows_every_state_in_any_order(sampled):
    lm, rows, histories = sampled
    program = """
      const shown = [...Array(stepsOf(data.rows) + 1).keys()].reverse();
      console.log(JSON.stringify(data.rows.map(row =>
        shown.map(at => stateAt(row, data.mask, at)).reverse().map(({tokens, texts}) => [tokens, texts]))));
    """
    speller = Speller(lm.tokenizer, lm.spec)
    for states, history in zip(run_script(replay(None, lm.tokenizer, lm.spec, rows), program), histories, strict=True):
        longer = history + [history[-1]] * (len(states) - len(history))  # a row that is done waits for the others
        assert states == [[tokens, speller.spell(tokens)] for tokens in longer]


@needs_node
def test_the_script_tells_all_about_a_token(edited, tokenizer):
    spec, row = edited
    last = len(row.canvas) - 1
    program = f"""
      const [row] = data.rows;
      const tell = (at, position) => describe(row, data.mask, stateAt(row, data.mask, at), position);
      console.log(JSON.stringify([tell(0, 0), tell(0, 1), tell(3, 1), tell(3, {last - 1}), tell(3, 2)]));
    """
    given, unwritten, edit, behind, other = run_script(replay(None, tokenizer, spec, [row]), program)
    a, b = row.canvas[0], row.commits[2].tokens[0]
    old = row.commits[0].tokens[0]
    assert given == f"position 0, token {a} “a”, given"
    assert unwritten == "position 1, not yet written"
    assert edit == (
        f"position 1, token {b} “b”, written in step 3, confidence 0.250\nbefore: token {old} “<”, written in step 1"
    )
    assert behind == f"position {last - 1}, behind the end of the text, token {spec.eos_token_id}"
    assert other.endswith("written in step 1, confidence 0.500")


@needs_node
def test_every_token_has_a_role_and_is_named_in_words(edited, tokenizer):
    spec, row = edited
    program = (
        STAGE
        + """
      const names = step => { press("Home"); for (let n = 0; n < step; n += 1) press("ArrowRight");
        return tokens.map(token => token["aria-label"]); };
      console.log(JSON.stringify([tokens.map(token => token.role), names(0), names(1), names(3)]));
    """
    )
    roles, begin, first, end = run_script(replay(None, tokenizer, spec, [row]), program)
    assert set(roles) == {"img"}
    assert begin == ["a, given"] + ["mask"] * (len(row.canvas) - 1)
    assert first[1] == "<, step 1, confidence 0.500" and first[-1] == "mask"
    assert end[1] == "b, step 3, confidence 0.250"
    assert end[-4] == "line break, step 1, confidence 0.500"
    assert end[-2:] == ["empty, behind the end of the text"] * 2
    assert all(name.strip() for name in end)


STAGE = """
  class Element {
    constructor(name) {
      Object.assign(this, {tagName: name.toUpperCase(), children: [], dataset: {}, listeners: {}, textContent: ""});
      this.style = {setProperty(name, value) { this[name] = value; }, removeProperty(name) { delete this[name]; }};
    }
    append(...children) { this.children.push(...children); }
    setAttribute(name, value) { this[name] = value; }
    addEventListener(kind, act) { this.listeners[kind] = act; }
    focus() { stage.getElementById("rows").listeners.focusin({target: this}); stage.focused = this; }
    spans() { return this.tagName === "SPAN" ? [this] : this.children.flatMap(child => child.spans()); }
  }
  const elements = {};
  const stage = {
    getElementById: id => elements[id] ||= new Element("div"),
    createElement: name => new Element(name),
    addEventListener: (kind, act) => { stage.key = act; },
  };
  const at = stage.getElementById;
  at("colour").value = "step";
  at("speed").value = "1000";
  start(stage, data);
  const tokens = at("rows").spans();
  const press = (key, target = new Element("body"), shiftKey = false) =>
    stage.key({key, target, shiftKey, preventDefault() {}});
  const look = () => ({step: at("step").textContent, texts: tokens.map(token => token.textContent),
    kinds: tokens.map(token => token.className), hues: tokens.map(token => token.style["--hue"] ?? null),
    info: at("info").textContent});
"""
"""A document of the few parts that the script uses, and the page on it."""


@needs_node
def test_the_page_goes_step_by_step_and_plays(edited, tokenizer):
    spec, row = edited
    program = (
        STAGE
        + """
      const seen = {end: look()};
      press("Home"); seen.begin = look();
      press("ArrowRight"); seen.first = look();
      at("colour").value = "confidence"; at("colour").listeners.change(); seen.sure = look();
      press("End"); tokens[0].focus(); press("ArrowRight", tokens[0], true); seen.told = look();
      at("play").listeners.click();
      seen.button = at("play").textContent;
      setTimeout(() => {
        seen.played = look();
        seen.after = at("play").textContent;
        console.log(JSON.stringify(seen));
      }, 500);
    """
    )
    seen = run_script(replay(None, tokenizer, spec, [row], "", {"steps": 3}), program)
    assert [seen[name]["step"] for name in ("begin", "first", "end", "played")] == ["0 / 3", "1 / 3", "3 / 3", "3 / 3"]
    assert seen["begin"]["kinds"] == ["given"] + ["mask"] * (len(row.canvas) - 1)
    assert seen["first"]["kinds"][1:-3] == ["written fresh"] * (len(row.canvas) - 4)
    assert seen["first"]["kinds"][-3:] == ["mask"] * 3
    assert seen["end"]["kinds"][:3] == ["given", "written edited fresh", "written"]
    assert seen["end"]["kinds"][-3:] == ["written fresh", "ended", "ended"]
    assert seen["end"]["texts"][-4:] == ["⏎\n", "∎", "", ""]
    assert seen["end"]["hues"][:3] == [None, "390", "225"] and seen["sure"]["hues"][1] == "63"
    assert seen["told"]["info"].startswith("position 1, token") and "before: token" in seen["told"]["info"]
    assert seen["button"] == "Pause" and seen["after"] == "Play" and seen["played"] == seen["told"]


# --- in a browser


@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs the Python package playwright")
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")
def test_a_browser_plays_it(edited, tokenizer, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    spec, row = edited
    path = tmp_path / "page.html"
    replay(path, tokenizer, spec, [row], "A <b>title</b>", {"steps": 3})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 640})
        errors, requests = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert page.text_content("h1") == "A <b>title</b>"
        assert page.text_content("#step") == "3 / 3"
        text = page.text_content(".canvas")
        assert "script><script>alert(1)" in text and "░" not in text
        page.keyboard.press("Home")
        assert page.text_content("#step") == "0 / 3" and page.text_content(".canvas").count("░") == len(row.canvas) - 1
        page.keyboard.press("ArrowRight")
        assert page.text_content("#step") == "1 / 3"
        page.keyboard.press("End")
        page.focus('[data-position="0"]')
        page.keyboard.press("Shift+ArrowRight")
        assert "before: token" in page.text_content("#info")
        page.select_option("#colour", "confidence")
        page.click("#play")
        expect(page.locator("#step")).to_have_text("3 / 3")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert errors == [] and requests == [path.as_uri()]
