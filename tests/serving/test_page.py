"""The chat page in a real browser: answers appear in place, are kept, stopped and mended, by mouse, keys and touch."""

import dataclasses
import importlib.util
import re
import threading
from contextlib import contextmanager
from hashlib import sha256
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving_testing import FACTS, FakeBackend, served, wait_for

from dllm_ray import chat
from dllm_ray.sampling.config import CACHES, POLICIES, SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.serving.app import AppSettings, create_app
from dllm_ray.serving.calls import Canvas, Done, Refused, Text
from dllm_ray.serving.local import LocalModel

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs the Python package playwright"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}"),
]

SAMPLER = {
    "policy": "low_confidence",
    "max_new_tokens": 8,
    "steps": 8,
    "block_size": 8,
    "threshold": None,
    "temperature": 0.0,
    "cache": "none",
}
CHAT = dataclasses.replace(FACTS, name="chat", sampler=SAMPLER)
ATTACK = "</div><img src=x onerror=alert(1)><script>alert(2)</script>"


class Play:
    """A script for `FakeBackend`: two words are written out of order, one is edited, and then it waits to be let on."""

    def __init__(self, end: str = "finish", words: tuple[str, str, str] = ("Hello", " there", "!")):
        self.end = end
        self.words = words
        self.on = threading.Event()

    def __call__(self, call):
        first, second, third = self.words
        yield Canvas(0, -1, 6, (), (), ())
        yield Canvas(0, 0, 6, (1,), (" dear",), (0.25,), ("write",))
        yield Canvas(0, 1, 6, (0, 1), (first, second), (0.99, 0.7), ("write", "edit"))
        yield Text(0, first + second)
        while not self.on.is_set():
            yield 0.01
        if self.end == "fail":
            yield RuntimeError("boom")
        yield Canvas(0, 2, 6, (2,), (third,), (0.6,), ("write",))
        text = first + second + third
        yield Text(0, third)
        yield Done(0, text, "stop", 5, 3, 3, 0.5, 11)


def at_once(**more):
    """A play that waits for nothing."""
    play = Play(**more)
    play.on.set()
    return play


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens the page of an app: `with visit(backend) as (page, seen)`. Nothing may have gone wrong unseen."""

    @contextmanager
    def open_page(*backends, expected: str = "^$", ready: bool = True, settings=None, **options):
        app = create_app({backend.facts.name: backend for backend in backends}, settings)
        with served(app) as url:
            context = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | options))
            context.set_default_timeout(10_000)
            page = context.new_page()
            seen = SimpleNamespace(url=url, errors=[], requests=[], bodies=[])
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.on("console", lambda line: seen.errors.append(line.text) if line.type != "log" else None)
            page.on("dialog", lambda dialog: seen.errors.append(dialog.message))
            page.on("request", lambda request: seen.requests.append(request.url))
            page.on(
                "request", lambda request: seen.bodies.append(request.post_data_json) if request.post_data else None
            )
            page.goto(url)
            if ready:
                page.wait_for_selector("#model:enabled")
            yield page, seen
            context.close()
        assert [text for text in seen.errors if not re.search(expected, text)] == []
        assert all(request.startswith(f"{url}/") for request in seen.requests)

    return open_page


def ask(page, question: str = "Who is there?") -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def finished(page) -> None:
    page.wait_for_selector("#send:visible")


def canvas(page) -> list[tuple[str, str]]:
    """Text and classes of each place of the last answer's canvas."""
    return page.eval_on_selector_all(
        "#exchanges li:last-child .canvas span", "all => all.map(s => [s.textContent, s.className])"
    )


def calculate(page, program: str, data=None):
    """Runs a program with the page's modules, `api`, `canvas`, `conversation` and `settings`, and with `data`."""
    names = ("api", "canvas", "conversation", "settings")
    imports = "".join(f"const {name} = await import('/page/{name}.js');" for name in names)
    return page.evaluate(f"async data => {{ {imports} {program} }}", data)


# --- the files


class Elements(HTMLParser):
    """The attributes of every element, and the text of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.inline = ""
        self._tag = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self._tag = tag
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data):
        if self._tag in ("script", "style"):
            self.inline += data.strip()


def test_the_files_hold_nothing_inline_and_name_no_other_place():
    folder = files("dllm_ray.serving") / "page"
    texts = {file.name: file.read_text() for file in folder.iterdir()}
    elements = Elements(texts["index.html"])
    assert elements.inline == ""
    for name, value in elements.attributes:
        assert name != "style" and not name.startswith("on")
        if name in ("src", "href") and not value.startswith("#"):
            assert value.removeprefix("page/") in texts  # relative, so that the page also works below a prefix
    for name, text in texts.items():
        assert "://" not in text.replace("http://www.w3.org/2000/svg", ""), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|@import", text
        )


# --- answers


def test_tokens_appear_in_place_before_the_end_and_become_plain_text(visit):
    play = Play()
    backend = FakeBackend(play, facts=CHAT)
    with visit(backend) as (page, seen):
        ask(page)
        page.wait_for_selector(".canvas .edited")
        assert canvas(page) == [
            ["Hello", "written sure tint-10 fresh"],
            [" there", "written middling tint-7 edited fresh"],
            *[["░", "mask"]] * 4,
        ]
        about = page.get_attribute(".canvas span:nth-child(2)", "title")
        assert about == "“ there”, written in step 2, confidence 0.700, before “ dear” from step 1"
        assert page.is_visible(".legend") and page.is_visible("#stop") and not page.is_visible("#send")
        assert page.get_attribute(".canvas", "aria-hidden") == "true"
        assert page.get_attribute(".answer", "aria-busy") == "true"
        assert re.fullmatch(r"2 of 6 tokens · \d+(\.\d)? tokens/s · 1\.0 TPF · 2 forwards", page.inner_text(".figures"))
        assert page.text_content("#announcement") == ""  # only what is finished is told
        play.on.set()
        finished(page)
        assert page.inner_text(".answer .text") == "Hello there!" and not page.is_visible(".canvas")
        assert page.inner_text(".figures").startswith("3 tokens · 6.0 tokens/s · 1.0 TPF · 3 forwards · ")
        assert page.text_content("#announcement") == "Answer: Hello there!"
        assert page.get_attribute(".answer", "aria-busy") == "false"
        assert page.evaluate("document.activeElement.id") == "question"
    assert seen.bodies == [
        {
            "model": "chat",
            "stream": True,
            "stream_options": {"include_usage": True},
            "diffusion": {"stream_canvas": True},
            "messages": [{"role": "user", "content": "Who is there?"}],
        }
    ]


def test_the_last_questions_and_answers_are_sent_and_kept_over_a_reload(visit):
    with visit(FakeBackend(at_once(), facts=CHAT)) as (page, seen):
        ask(page, "One")
        finished(page)
        page.fill("#question", "Two")
        page.press("#question", "Shift+Enter")
        page.keyboard.type("lines")
        page.press("#question", "Enter")
        finished(page)
        page.reload()
        page.wait_for_selector("#model:enabled")
        assert page.eval_on_selector_all(".text", "all => all.map(e => e.textContent)") == [
            "One", "Hello there!", "Two\nlines", "Hello there!",
        ]  # fmt: skip
        assert page.locator(".figures").nth(1).inner_text().startswith("3 tokens · 6.0 tokens/s")
        ask(page, "Three")
        finished(page)
        answer = {"role": "assistant", "content": "Hello there!"}
        one, two, three = ({"role": "user", "content": text} for text in ("One", "Two\nlines", "Three"))
        assert [body["messages"] for body in seen.bodies] == [
            [one], [one, answer, two], [one, answer, two, answer, three],
        ]  # fmt: skip
        page.click("#clear")
        assert page.locator("#exchanges li").count() == 0 and page.is_visible("#empty")
        page.click("#notice button")
        assert page.locator("#exchanges li").count() == 3
        page.click("#clear")
        ask(page, "Four")
        finished(page)
        assert len(seen.bodies[-1]["messages"]) == 1 and not page.is_visible("#notice")
        page.click("#clear")
        page.reload()
        page.wait_for_selector("#model:enabled")
        assert page.locator("#exchanges li").count() == 0


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_ends_the_call_and_leaves_what_was_final(visit, how):
    backend = FakeBackend(Play(), facts=CHAT)
    with visit(backend) as (page, seen):
        ask(page)
        page.wait_for_selector(".canvas .edited")
        if how == "button":
            page.click("#stop")
        else:
            page.keyboard.press("Escape")
        finished(page)
        wait_for(lambda: len(backend.closed) == 1)
        assert page.inner_text(".answer .text") == "Hello there"
        assert page.inner_text(".note") == "Stopped." and page.text_content("#announcement") == "Stopped."
        assert page.evaluate("document.activeElement.id") == "question"
        backend.script = at_once()
        ask(page, "Go on")
        finished(page)
        assert [message["content"] for message in seen.bodies[1]["messages"]] == [
            "Who is there?", "Hello there", "Go on",
        ]  # fmt: skip


def test_leaving_the_page_ends_the_call_and_keeps_what_was_final(visit):
    backend = FakeBackend(Play(), facts=CHAT)
    with visit(backend) as (page, _):
        ask(page)
        page.wait_for_selector(".canvas .edited")
        page.reload()
        wait_for(lambda: len(backend.closed) == 1)
        page.wait_for_selector("#model:enabled")
        assert page.inner_text(".answer .text") == "Hello there" and page.inner_text(".note") == "Stopped."


def test_what_models_and_users_write_is_only_text(visit):
    with visit(FakeBackend(at_once(words=(ATTACK, "\n", "<b>")), facts=CHAT)) as (page, _):
        ask(page, ATTACK)
        finished(page)
        assert page.locator(".text").all_text_contents() == [ATTACK, f"{ATTACK}\n<b>"]
        page.click(".steps")
        assert [text for text, _ in canvas(page)] == [ATTACK, "⏎\n", "<b>", "", "", ""]
        assert page.locator("main img, main script, main b").count() == 0


def test_regenerating_answers_the_last_question_anew(visit):
    backend = FakeBackend(at_once(), facts=CHAT)
    with visit(backend) as (page, seen):
        ask(page, "One")
        finished(page)
        ask(page, "Two")
        finished(page)
        assert page.locator(".again:visible").count() == 1
        backend.script = at_once(words=("New", " answer", "."))
        page.click(".again:visible")
        finished(page)
        assert page.locator(".answer .text").all_text_contents() == ["Hello there!", "New answer."]
        assert seen.bodies[2] == seen.bodies[1]


def test_an_answer_is_copied(visit):
    with visit(FakeBackend(at_once(), facts=CHAT), permissions=["clipboard-read", "clipboard-write"]) as (page, _):
        ask(page)
        finished(page)
        page.click(".copy")
        page.wait_for_selector(".copy:has-text('Copied')")
        assert page.evaluate("navigator.clipboard.readText()") == "Hello there!"


def test_the_steps_are_replayed(visit):
    with visit(FakeBackend(at_once(), facts=CHAT)) as (page, _):
        ask(page)
        finished(page)
        page.click(".steps")
        assert page.inner_text(".step") == "step 3 of 3" and not page.is_visible(".answer .text")
        assert [text for text, _ in canvas(page)] == ["Hello", " there", "!", "", "", ""]
        page.focus(".slider")
        page.keyboard.press("Home")
        assert canvas(page) == [["░", "mask"]] * 6
        page.keyboard.press("ArrowRight")
        assert canvas(page)[1] == [" dear", "written unsure tint-3 fresh"]
        assert page.get_attribute(".slider", "aria-valuetext") == "step 1 of 3, 1 token written"
        page.focus(".canvas span")
        page.keyboard.press("ArrowRight")
        assert page.inner_text(".about") == "“ dear”, written in step 1, confidence 0.250"
        assert page.get_attribute(".canvas span:nth-child(2)", "aria-label") == page.inner_text(".about")
        page.click(".play")
        page.wait_for_selector(".step:has-text('step 3 of 3')")
        page.wait_for_selector(".play:has-text('Play')")
        page.click(".steps")
        assert page.is_visible(".answer .text") and not page.is_visible(".canvas")


def test_a_model_is_denoised_in_the_page(visit, make_lm, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    lm = make_lm("bert", seed=3)
    config = SamplerConfig(max_new_tokens=16, block_size=8, steps=8, temperature=1.0)
    prompt = chat.encode_prompt(lm.tokenizer, "sort 21")
    expected = Sampler(lm, dataclasses.replace(config, seed=5)).sample([prompt])
    model = LocalModel("tiny", lm, sampler=config)
    try:
        with visit(model) as (page, _):
            page.click("#open-settings")
            page.fill("#setting-seed", "5")
            ask(page, "sort 21")
            finished(page)
            assert page.text_content(".answer .text") == chat.decode(lm.tokenizer, expected.completions[0])
            page.click(".steps")
            drawn = canvas(page)
            assert len(drawn) == 16 and all(text != "░" for text, _ in drawn)
            assert f"{expected.nfe} forwards" in page.inner_text(".figures")
    finally:
        model.close()


# --- settings and models


def test_settings_are_sent_only_when_changed(visit):
    with visit(FakeBackend(at_once(), facts=CHAT)) as (page, seen):
        page.click("#open-settings")
        assert page.get_attribute("#setting-steps", "placeholder") == "8"
        assert page.get_attribute("#setting-threshold", "placeholder") == "none"
        assert page.inner_text("#setting-cache option:first-child") == "none (default)"
        texts = {"temperature": "0.7", "max_tokens": "64", "steps": "16", "block_size": "none", "threshold": "0.9"}
        for name, text in texts.items():
            page.fill(f"#setting-{name}", text)
        page.fill("#setting-seed", "5")
        page.select_option("#setting-cache", "dual")
        page.select_option("#setting-policy", "maskgit_plus")
        page.fill("#system", "Be brief.")
        assert page.get_attribute("#open-settings", "aria-label") == "Settings, 9 changed"
        page.reload()
        page.wait_for_selector("#model:enabled")
        ask(page)
        finished(page)
        page.click("#open-settings")
        assert page.input_value("#setting-steps") == "16"
        page.click("#reset")
        ask(page)
        finished(page)
    changed, plain = seen.bodies
    assert {name: changed[name] for name in ("temperature", "max_tokens", "seed")} == {
        "temperature": 0.7, "max_tokens": 64, "seed": 5,
    }  # fmt: skip
    assert changed["diffusion"] == {
        "steps": 16, "block_size": None, "threshold": 0.9, "cache": "dual", "policy": "maskgit_plus",
        "stream_canvas": True,
    }  # fmt: skip
    assert changed["messages"][0] == {"role": "system", "content": "Be brief."}
    assert plain["diffusion"] == {"stream_canvas": True} and plain["messages"][0]["role"] == "user"
    assert not {"temperature", "max_tokens", "seed"} & plain.keys()


def test_a_setting_that_cannot_be_is_told_where_it_stands(visit):
    refused = [Refused("invalid", "steps: 1 step is fewer than the 4 blocks", "diffusion.steps")]
    backend = FakeBackend(lambda call: refused, facts=CHAT)
    with visit(backend, expected="status of 422") as (page, seen):
        page.click("#open-settings")
        page.fill("#setting-threshold", "1.5")
        problem = "#setting-threshold-problem"
        assert page.inner_text(problem) == "Expected a number above 0 and at most 1, or none."
        ask(page)
        assert seen.bodies == [] and page.input_value("#question") == "Who is there?"
        assert page.evaluate("document.activeElement.id") == "setting-threshold"
        page.fill("#setting-threshold", "")
        assert not page.is_visible(problem)
        page.fill("#setting-steps", "1")
        page.press("#question", "Enter")
        finished(page)
        assert page.inner_text(".answer .problem") == "steps: 1 step is fewer than the 4 blocks"
        assert page.get_attribute("#setting-steps", "aria-invalid") == "true"
        assert "fewer than the 4 blocks" in page.inner_text("#setting-steps-problem")


def test_only_what_a_model_lets_requests_change_is_offered(visit):
    other = dataclasses.replace(CHAT, name="other", can_chat=False, sampler={"steps": 4})
    backends = [FakeBackend(at_once(), facts=facts) for facts in (CHAT, other)]
    with visit(*backends) as (page, seen):
        page.click("#open-settings")
        page.select_option("#setting-cache", "dual")
        page.select_option("#model", "other")
        assert page.get_attribute("#setting-steps", "placeholder") == "4"
        assert page.is_visible("#setting-seed") and not page.is_visible("#setting-cache")
        assert page.get_attribute("#open-settings", "aria-label") == "Settings"
        assert not page.is_visible("#system")
        page.reload()
        page.wait_for_selector("#model:enabled")
        assert page.input_value("#model") == "other"
        ask(page, "Once upon")  # without a chat template a text is continued
        finished(page)
        assert page.inner_text(".answer .text") == "Hello there!" and page.inner_text(".model") == "other"
    assert seen.requests[-1].endswith("/v1/completions")
    assert seen.bodies[0]["prompt"] == "Once upon" and seen.bodies[0]["diffusion"] == {"stream_canvas": True}


def test_the_page_knows_the_policies_and_caches_that_there_are(visit):
    with visit(FakeBackend(facts=CHAT)) as (page, _):
        found = calculate(page, "return Object.fromEntries(settings.FIELDS.map(f => [f.name, f.choices]))")
    assert (tuple(found["policy"]), tuple(found["cache"])) == (POLICIES, CACHES)


# --- when things go wrong


def test_an_answer_that_fails_can_be_asked_for_again(visit):
    play = Play(end="fail")
    backend = FakeBackend(play, facts=CHAT)
    with visit(backend) as (page, _):
        ask(page)
        page.wait_for_selector(".canvas .edited")
        play.on.set()
        finished(page)
        problem = page.inner_text(".answer .problem")
        assert problem and "boom" not in problem and "Traceback" not in problem
        assert page.text_content("#announcement") == f"The answer failed: {problem}"
        assert page.inner_text(".answer .text") == "Hello there"  # what was final stays
        backend.script = at_once()
        page.click(".again:has-text('Retry')")
        finished(page)
        assert page.inner_text(".answer .text") == "Hello there!" and not page.is_visible(".answer .problem")
        assert page.inner_text(".again") == "Regenerate"


def test_a_question_without_an_answer_is_left_out_of_later_ones(visit):
    full = [Refused("full", "the queue is full", retry_after_s=3)]
    backend = FakeBackend(lambda call: full, facts=CHAT)
    with visit(backend, expected="status of 429") as (page, seen):
        ask(page, "One")
        finished(page)
        assert page.inner_text(".problem:visible") == "the queue is full Try again in 3 seconds."
        assert page.inner_text(".note") == "Later questions are asked without this one."
        backend.script = at_once()
        ask(page, "Two")
        finished(page)
        assert [message["content"] for message in seen.bodies[1]["messages"]] == ["Two"]


def test_an_api_key_is_asked_for_once_and_kept_in_the_tab_only(visit):
    settings = AppSettings(api_keys=(sha256(b"secret").hexdigest(),))
    backend = FakeBackend(at_once(), facts=CHAT)
    with visit(backend, settings=settings, expected="status of 401", ready=False) as (page, _):
        page.wait_for_selector("#key:visible")
        assert page.evaluate("document.activeElement.id") == "key" and page.get_attribute("#key", "type") == "password"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector('#key-form:has-text("doesn\'t know this key")')
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:enabled")
        assert not page.is_visible("#key-form")
        ask(page)
        finished(page)
        assert page.inner_text(".answer .text") == "Hello there!"
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        page.route(  # as if another key were wanted now
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=401, json={"error": {"message": "that key is not known"}}),
            times=1,
        )
        ask(page, "Again?")
        page.wait_for_selector("#key:visible")
        assert page.inner_text(".problem:visible") == "that key is not known"
        page.keyboard.type("secret")
        page.keyboard.press("Enter")  # and the question is asked once more
        page.wait_for_selector("li:last-child .text:has-text('Hello there!')")
        assert page.locator("#exchanges li").count() == 2
        page.evaluate("sessionStorage.setItem('dllm_ray.key', 'old')")  # as if it had been withdrawn
        page.reload()
        page.wait_for_selector("#key:visible")
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:enabled")


def test_a_server_that_is_gone_is_told_in_words(visit):
    backend = FakeBackend(at_once(), facts=CHAT)
    with visit(backend, expected="ERR_|status of 502") as (page, _):
        page.route("**/v1/chat/completions", lambda route: route.abort())
        ask(page)
        finished(page)
        assert page.inner_text(".answer .problem") == "The server can't be reached."
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<html>bad gateway"))
        page.click(".again")
        finished(page)
        assert page.inner_text(".answer .problem") == "The server answered 502."
        page.unroute("**/v1/chat/completions")
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body='data: {"choices": []}\n\n', content_type="text/event-stream"),
        )
        page.click(".again")
        finished(page)
        assert page.inner_text(".answer .problem") == "The connection ended before the answer did."
        page.route("**/v1/models", lambda route: route.abort())
        page.reload()
        page.wait_for_selector('#notice:has-text("can\'t be reached")')
        page.unroute("**/v1/models")
        page.click("#notice button")
        page.wait_for_selector("#model:enabled")
        assert not page.is_visible("#notice")


# --- how it looks and is reached


def test_the_theme_follows_the_system_until_it_is_switched(visit):
    with visit(FakeBackend(facts=CHAT), color_scheme="dark") as (page, _):
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(ground)
        page.emulate_media(color_scheme="light")
        light = page.evaluate(ground)
        assert dark != light
        page.click("#theme")
        page.click("#theme")
        assert "dark" in page.inner_text("#theme") and page.evaluate(ground) == dark
        page.reload()
        page.wait_for_selector("#model:enabled")
        assert page.evaluate(ground) == dark
        page.click("#theme")
        assert "auto" in page.inner_text("#theme") and page.evaluate(ground) == light


LUMINANCE = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = colour => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = element => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" && element.parentElement ? behind(element.parentElement) : colour;
  };
  const place = document.querySelector(".canvas");
  for (let tint = 0; tint <= 10; tint += 1) {
    const token = document.createElement("span");
    token.className = "written tint-" + tint;
    token.textContent = "token";
    place.append(token);
  }
  const texts = [...document.querySelectorAll("body *")].filter(element => element.checkVisibility() &&
    [...element.childNodes].some(child => child.nodeType === 3 && child.data.trim()));
  return texts.map(element => {
    const pair = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    const [dim, bright] = pair.sort((a, b) => a - b);
    return [(bright + 0.05) / (dim + 0.05), element.tagName + "." + element.className];
  });
}"""
"""The contrast of each text with what is behind it, by WCAG 2."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(visit, scheme):
    backend = FakeBackend(lambda call: [Refused("failed", "no")], facts=CHAT)
    options = {"color_scheme": scheme, "reduced_motion": "reduce", "expected": "status of 503"}
    with visit(backend, **options) as (page, _):
        ask(page)
        finished(page)
        backend.script = at_once()
        ask(page)
        finished(page)
        page.click("li:last-child .steps")
        page.click("#open-settings")
        page.fill("#setting-steps", "x")
        found = page.evaluate(LUMINANCE.replace('querySelector(".canvas")', 'querySelector("li:last-child .canvas")'))
    assert len(found) > 50 and [pair for pair in found if pair[0] < 4.5] == []


def test_it_fits_a_phone(visit):
    words = ("Incomprehensibilities" * 4, " there", "!")
    options = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
    with visit(FakeBackend(at_once(words=words), facts=CHAT), **options) as (page, _):
        wide = "Math.max(document.documentElement.scrollWidth, document.querySelector('main').scrollWidth) - innerWidth"
        page.fill("#question", "word" * 40)
        page.tap("#send")
        finished(page)
        page.fill("#question", "word" * 40)
        page.tap("#send")
        finished(page)
        last = page.locator(".again:visible").bounding_box()
        assert last["y"] + last["height"] < page.locator("footer").bounding_box()["y"]
        page.locator(".steps").last.tap()
        page.tap("li:last-child .canvas span")
        assert page.inner_text("li:last-child .about").startswith("“Incomp")
        assert page.evaluate(wide) <= 0
        page.tap("#open-settings")
        assert page.evaluate("document.getElementById('settings').matches(':modal')")
        assert page.locator("#settings").bounding_box() == {"x": 0, "y": 0, "width": 360, "height": 640}
        assert page.evaluate("document.getElementById('settings').scrollWidth") <= 360
        page.tap("#close-settings")
        assert not page.is_visible("#settings")
        small = page.eval_on_selector_all(
            "button, select, input, textarea",
            "all => all.filter(e => e.checkVisibility() && e.offsetHeight < 35).map(e => e.className)",
        )
        assert small == []


def test_where_a_long_answer_is_written_stays_in_sight_unless_the_user_looks_elsewhere(visit):
    turns = [threading.Event() for _ in range(2)]

    def script(call):
        yield Canvas(0, -1, 900, (), (), ())
        for step, turn in enumerate(turns):
            while not turn.is_set():
                yield 0.01
            places = tuple(range(step * 400, step * 400 + 400))
            yield Canvas(0, step, 900, places, (" word",) * 400, (0.9,) * 400)
        yield 60

    below = """document.querySelector(".mask").getBoundingClientRect().bottom
      - document.querySelector("main").getBoundingClientRect().bottom"""
    with visit(FakeBackend(script, facts=CHAT), viewport={"width": 360, "height": 640}) as (page, _):
        ask(page)
        page.wait_for_selector(".mask >> nth=899")
        turns[0].set()
        page.wait_for_selector(".written >> nth=399")
        assert page.evaluate(below) < 0 and page.evaluate("document.querySelector('main').scrollTop") > 0
        page.hover("main")
        page.mouse.wheel(0, -10_000)
        wait_for(lambda: page.evaluate("document.querySelector('main').scrollTop") == 0)
        turns[1].set()
        page.wait_for_selector(".written >> nth=799")
        assert page.evaluate(below) > 0 and page.evaluate("document.querySelector('main').scrollTop") == 0
        page.keyboard.press("Escape")
        finished(page)


def test_everything_is_reached_by_keyboard_and_has_a_name(visit):
    with visit(FakeBackend(at_once(), facts=CHAT)) as (page, _):
        ask(page)
        finished(page)
        page.focus(".skip")
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        expected = ["model", "open-settings", "clear", "theme", "copy", "steps", "again", "question"]
        assert [name for name in reached if name in expected][: len(expected)] == expected
        page.focus("#open-settings")
        page.keyboard.press("Enter")
        assert page.get_attribute("#open-settings", "aria-expanded") == "true"
        page.keyboard.press("Escape")
        page.wait_for_selector("#open-settings[aria-expanded=false]")
        assert page.evaluate("document.activeElement.id") == "open-settings"
        page.keyboard.press("Enter")
        nameless = page.eval_on_selector_all(
            "button, input, select, textarea, [role=group]",
            "all => all.filter(e => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length))"
            ".map(e => e.outerHTML)",
        )
        assert nameless == []
        ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
        assert len(ids) == len(set(ids))


# --- the parts that calculate


def test_events_are_read_however_the_stream_is_cut(visit):
    stream = 'data: {"a": 1}\r\n\r\n: still here\n\ndata: x\ndata:y\n\nevent: z\ndata: [DONE]\r\r'
    program = f"""
      const stream = {stream!r};
      const read = parts => {{ const s = new api.EventSplitter(); return parts.flatMap(part => [...s.feed(part)]); }};
      const cuts = [...Array(stream.length + 1).keys()].map(at => read([stream.slice(0, at), stream.slice(at), "\\n"]));
      return [...cuts, read([...stream, "\\n"])];
    """
    with visit(FakeBackend(facts=CHAT)) as (page, _):
        found = calculate(page, program)
    assert len(found) == len(stream) + 2
    assert all(events == ['{"a": 1}', "x\ny", "[DONE]"] for events in found)


def test_insertions_deletions_edits_and_new_spellings_are_told_apart(visit):
    events = [
        {"step": -1, "length": 3, "positions": [0], "tokens": ["a"], "confidences": [None]},
        {"step": 0, "length": 3, "positions": [1, 2], "tokens": ["b", "\ufffd"], "confidences": [0.5, None]},
        {"step": 1, "length": 4, "positions": [1], "tokens": ["x"], "confidences": [0.9], "kinds": ["insert"]},
        {"step": 2, "length": 4, "positions": [2, 3], "tokens": ["y", "é"], "confidences": [1, None],
         "kinds": ["edit", "write"]},
        {"step": 3, "length": 3, "positions": [1], "tokens": [""], "confidences": [0.9], "kinds": ["delete"]},
    ]  # fmt: skip
    program = """
      return data.map((_, last) => {
        const state = canvas.canvasAt(data, last + 1, "low_confidence");
        return state.cells.map((_, position) => state.look(position));
      });
    """
    with visit(FakeBackend(facts=CHAT)) as (page, _):
        states = calculate(page, program, events)
        shares = calculate(page, "return [NaN, null, -0.05, -3].map(value => canvas.certainty(value, 'entropy'))")
    assert ["".join(text for text, _ in state) for state in states] == ["a░░", "ab\ufffd", "axb\ufffd", "axyé", "ayé"]
    assert states[0][0] == states[3][0] == ["a", "given"] and states[1][2] == ["\ufffd", "written unknown fresh"]
    assert states[2][1] == ["x", "written sure tint-9 fresh"]
    assert states[3][2:] == [["y", "written sure tint-10 edited fresh"], ["é", "written unknown"]]
    assert shares[:2] == [None, None] and shares[2:] == pytest.approx([0.951, 0.0498], abs=1e-3)


def test_a_store_that_holds_something_else_or_nothing_does_no_harm(visit):
    with visit(FakeBackend(at_once(), facts=CHAT)) as (page, _):
        for kept in ("not json", "[]", "null", '{"exchanges": [1, {}, {"question": "q", "answer": "a"}]}'):
            page.evaluate("kept => sessionStorage.setItem('dllm_ray.conversation', kept)", kept)
            assert isinstance(calculate(page, "return conversation.load().exchanges.length"), int)
        page.add_init_script(
            "for (const name of ['localStorage', 'sessionStorage'])"
            "  Object.defineProperty(window, name, {get() { throw new Error('forbidden'); }});"
        )
        page.reload()
        page.wait_for_selector("#model:enabled")
        ask(page)
        finished(page)
        page.click("#theme")
        assert page.inner_text(".answer .text") == "Hello there!"
