"""The chat page while a model edits: texts grow and shrink in place, and what is deleted is seen to go."""

import dataclasses
import re
import threading

from serving_testing import FakeBackend
from test_page import CHAT, ask, browser, calculate, canvas, finished, pytestmark, visit  # noqa: F401  fixtures

from dllm_ray.models import edit_heads
from dllm_ray.sampling.config import KAPPAS, SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.serving.calls import Canvas, Done, Text
from dllm_ray.serving.local import LocalModel

SAMPLER = {"max_new_tokens": 8, "steps": 8, "temperature": 0.0, "kappa": "linear", "start_tokens": 1}
FACTS = dataclasses.replace(CHAT, sampler=SAMPLER, edits=True)


class Play:
    """Two words come, one goes and one is replaced; then it waits to be let on."""

    def __init__(self):
        self.on = threading.Event()

    def __call__(self, call):
        yield Canvas(0, -1, 1, (), (), ())
        yield Canvas(0, 0, 3, (0, 1, 2), ("Hello", " bad", " friend"), (0.99, 0.3, 0.7), ("insert", "write", "insert"))
        yield Canvas(
            0, 5, 3, (1, 1, 2), ("", " world", "!"), (0.0, 0.6, 0.95), ("delete", "edit", "insert")
        )  # " bad" goes, " friend" becomes " world"
        while not self.on.is_set():
            yield 0.01
        yield Canvas(0, 7, 3, (), (), ())
        yield Text(0, "Hello world!")
        yield Done(0, "Hello world!", "stop", 5, 3, 3, 0.5, 11)


def test_insertions_substitutions_and_deletions_are_drawn_as_they_come(visit):  # noqa: F811
    play = Play()
    with visit(FakeBackend(play, facts=FACTS)) as (page, seen):
        ask(page)
        page.wait_for_selector(".canvas .gone")
        assert canvas(page) == [
            ["Hello", "written sure tint-10"],
            [" bad", "gone"],
            [" world", "written middling tint-6 edited fresh"],
            ["!", "written sure tint-10 fresh"],
        ]
        assert [page.get_attribute(f".canvas span:nth-child({place})", "title") for place in (1, 2, 3, 4)] == [
            "“Hello”, inserted in step 1, confidence 0.990",
            "“ bad”, deleted in step 6",
            "“ world”, written in step 6, confidence 0.600, before “ friend” from step 1",
            "“!”, inserted in step 6, confidence 0.950",
        ]
        assert page.eval_on_selector(".canvas .gone", "e => getComputedStyle(e).textDecorationLine") == "line-through"
        assert page.is_visible(".legend .gone")
        assert re.fullmatch(r"3 tokens · \d+(\.\d)? tokens/s · 1\.5 TPF · 2 forwards", page.inner_text(".figures"))
        assert page.inner_text(".answer .text") == ""
        play.on.set()
        finished(page)
        assert page.inner_text(".answer .text") == "Hello world!" and not page.is_visible(".canvas")
        page.click(".steps")
        assert page.inner_text(".step") == "step 3 of 3"
        assert [text for text, _ in canvas(page)] == ["Hello", " world", "!"]
        page.focus(".slider")
        page.keyboard.press("ArrowLeft")
        assert [text for text, _ in canvas(page)] == ["Hello", " bad", " world", "!"]
        page.focus(".canvas span:nth-child(1)")
        page.keyboard.press("ArrowRight")
        assert page.inner_text(".about") == "“ bad”, deleted in step 6"
        page.focus(".slider")
        page.keyboard.press("Home")
        assert canvas(page) == [["░", "mask"]] and not page.is_visible(".legend .gone")
    assert seen.bodies[0]["diffusion"] == {"stream_canvas": True}


def test_neighbours_that_go_together_keep_their_order(visit):  # noqa: F811
    events = [
        {"step": -1, "length": 0},
        {"step": 0, "length": 4, "positions": [0, 1, 2, 3], "tokens": list("abcd"), "confidences": [1] * 4,
         "kinds": ["insert"] * 4},
        {"step": 1, "length": 3, "positions": [1, 1, 1], "tokens": ["", "", "x"], "confidences": [0, 0, 1],
         "kinds": ["delete", "delete", "insert"]},
        {"step": 2, "length": 1, "positions": [1, 0, 0], "tokens": ["", "", "y"], "confidences": [0, 0, 1],
         "kinds": ["delete", "delete", "edit"]},
    ]  # fmt: skip
    program = """
      return data.map((_, last) => {
        const state = canvas.canvasAt(data, last + 1);
        return state.items.map(({position, gone}) => gone ? `-${gone.text}` : state.cells[position].text).join(" ");
      });
    """
    with visit(FakeBackend(facts=FACTS)) as (page, _):
        states = calculate(page, program, events)
    assert states == ["", "a b c d", "a -b -c x d", "-a -x y"]


def test_the_settings_of_such_a_model_are_offered(visit):  # noqa: F811
    other = FakeBackend(facts=dataclasses.replace(CHAT, name="other"))
    with visit(FakeBackend(Play(), facts=FACTS), other) as (page, _):
        page.click("#open-settings")
        labels = "els => els.filter(e => e.checkVisibility()).map(e => e.textContent)"
        offered = page.eval_on_selector_all("#fields label", labels)
        assert {"Start tokens", "Schedule of edits", "Steps"} <= set(offered)
        assert not {"Policy", "Block size", "Cache", "Threshold"} & set(offered)
        page.select_option("#model", "other")
        offered = page.eval_on_selector_all("#fields label", labels)
        assert {"Policy", "Block size"} <= set(offered) and "Start tokens" not in offered
        found = calculate(page, "return settings.FIELDS.find(f => f.name === 'kappa').choices")
        assert tuple(found) == KAPPAS


def test_a_model_edits_in_the_page(visit, make_lm, tokenizer):  # noqa: F811
    lm = edit_heads.attach(make_lm("llama", max_position_embeddings=128))
    config = SamplerConfig(max_new_tokens=12, steps=24, temperature=1.0, seed=7)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "sort 21"}], add_generation_prompt=True)
    out = Sampler(lm, config).sample([prompt["input_ids"] if hasattr(prompt, "keys") else prompt])
    model = LocalModel("tiny", lm, sampler=config)
    with visit(model) as (page, _):
        ask(page, "sort 21")
        finished(page)
        assert page.evaluate("document.querySelector('.answer .text').textContent") == tokenizer.decode(
            out.completions[0], skip_special_tokens=True
        )
        page.click(".steps")
        assert page.inner_text(".step") == f"step {out.nfe} of {out.nfe}"
    model.close()
