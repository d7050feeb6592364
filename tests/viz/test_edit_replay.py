"""The replay page of a model that edits: sequences grow and shrink as they did, and what was deleted is seen to go."""

import importlib.util
from pathlib import Path

import pytest
from test_html import STAGE, data_of, needs_node, run_script

from dllm_ray.models import edit_heads
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit, Edit
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.viz.html import ReplayRow, replay
from dllm_ray.viz.spelling import Speller

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def sampled(make_lm):
    """A model that edits, rows that it sampled, and their sequences after each step."""
    lm = edit_heads.attach(make_lm("llama"))
    config = SamplerConfig(max_new_tokens=16, steps=24, temperature=1.0, seed=3, start_tokens=2, edit_prompt=True)
    sampler, prompts = Sampler(lm, config), [[1, 20, 21, 22], lm.tokenizer.encode("日本語 reverse 9")]
    output = sampler.sample(prompts, trace=True)
    rows = [
        ReplayRow(canvas, commits, len(prompt), tokens, f"row of {len(prompt)}")
        for canvas, commits, prompt, tokens in zip(
            sampler.canvases(prompts), output.commits, prompts, output.sequences, strict=True
        )
    ]
    states = [[[token for token in state if token >= 0] for state in found.tolist()] for found in output.history]
    return lm, rows, states


@pytest.fixture
def edited(sampled):
    """ "a" and a mask become "axyb", then "azb"; and then nothing happens."""
    tokenizer, mask = sampled[0].tokenizer, sampled[0].spec.mask_token_id
    a, b, x, y, z = (tokenizer.convert_tokens_to_ids(letter) for letter in "abxyz")
    commits = [
        Commit(
            0, 0, [1, 2, 3], [x, y, b], [0.9, 0.8, 0.7], False,
            [Edit("insert", 0, x), Edit("substitute", 1, y), Edit("insert", 1, b)],
        ),
        Commit(0, 2, [1], [z], [0.6], False, [Edit("delete", 1, None), Edit("substitute", 2, z)]),
        Commit(0, 4, [], [], [], True, []),
    ]  # fmt: skip
    return ReplayRow([a, mask], commits, 1, [a, z, b])


def test_the_data_hold_the_edits_in_turn(sampled, edited):
    lm, _, _ = sampled
    [row] = data_of(replay(None, lm.tokenizer, lm.spec, [edited]))["rows"]
    _, z, b = edited.tokens
    x, y, _ = edited.commits[0].tokens
    assert row["grows"] and row["given"] == [[0, 1]] and row["final"] == edited.tokens
    assert row["steps"][0]["changes"] == [
        {"kind": "insert", "positions": [1], "tokens": [x], "confidences": [0.9]},
        {"kind": "substitute", "positions": [2], "tokens": [y], "confidences": [0.8]},
        {"kind": "insert", "positions": [3], "tokens": [b], "confidences": [0.7]},
    ]
    assert row["steps"][0]["texts"] == {"1": "x", "2": "y", "3": "b"}
    assert row["steps"][1]["changes"] == [
        {"kind": "delete", "positions": [1], "tokens": [None], "confidences": [None]},
        {"kind": "substitute", "positions": [1], "tokens": [z], "confidences": [0.6]},
    ]
    assert row["steps"][1]["texts"] == {"1": "z"}
    assert row["steps"][2] == {"step": 4, "done": True}


@needs_node
def test_the_script_shows_every_state(sampled):
    lm, rows, histories = sampled
    program = """
      console.log(JSON.stringify(data.rows.map(row => [0, ...row.steps.filter(s => s.changes).map(s => s.step + 1)]
        .map(at => stateAt(row, data.mask, at)).map(({tokens, texts}) => [tokens, texts]))));
    """
    speller = Speller(lm.tokenizer, lm.spec)
    found = run_script(replay(None, lm.tokenizer, lm.spec, rows), program)
    kinds = {edit.kind for row in rows for commit in row.commits for edit in commit.edits}
    assert kinds == {"insert", "delete", "substitute"}
    for states, history in zip(found, histories, strict=True):
        assert states == [[tokens, speller.spell(tokens)] for tokens in history]


@needs_node
def test_the_page_draws_what_comes_and_what_goes(sampled, edited):
    lm, _, _ = sampled
    program = (
        STAGE
        + """
      const shown = () => at("rows").spans().filter(token => !token.hidden);
      const view = () => shown().map(token => [token.textContent, token.className, token["aria-label"]]);
      const count = () => at("rows").children[0].children[2].textContent;
      const seen = [];
      press("Home");
      for (let step = 0; step <= 5; step += 1) {
        shown()[1].focus();
        seen.push([view(), count(), at("info").textContent]);
        press("ArrowRight");
      }
      press("Home");
      seen.push([view()]);
      console.log(JSON.stringify(seen));
    """
    )
    begin, first, quiet, second, *_, end, again = run_script(replay(None, lm.tokenizer, lm.spec, [edited]), program)
    z = edited.tokens[1]
    x, y, _ = edited.commits[0].tokens
    assert begin[0] == again[0] == [["a", "given", "a, given"], ["░", "mask", "mask"]]
    assert begin[1] == "step 0 of 5, 2 tokens"
    assert [kind for _, kind, _ in first[0]] == ["given", "written fresh", "written fresh", "written fresh"]
    assert first[1] == "step 1 of 5, 4 tokens, 2 inserted, 1 substituted"
    assert first[2] == f"position 1, token {x} “x”, inserted in step 1, confidence 0.900"
    assert [text for text, _, _ in quiet[0]] == ["a", "x", "y", "b"] and quiet[1] == "step 2 of 5, 4 tokens"
    assert second[0] == [
        ["a", "given", "a, given"],
        ["x", "gone", "x, deleted"],
        ["z", "written edited fresh", "z, step 3, confidence 0.600"],
        ["b", "written", "b, step 1, confidence 0.700"],
    ]
    assert second[1] == "step 3 of 5, 3 tokens, 1 substituted, 1 deleted"
    assert second[2] == f"token {x} “x”, deleted in step 3"
    assert [text for text, _, _ in end[0]] == ["a", "z", "b"] and end[1] == "step 5 of 5, 3 tokens"
    assert end[2] == (
        f"position 1, token {z} “z”, written in step 3, confidence 0.600\nbefore: token {y} “y”, written in step 1"
    )


@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs the Python package playwright")
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")
def test_a_browser_plays_it(sampled, edited, tmp_path):
    from playwright.sync_api import sync_playwright

    lm, rows, _ = sampled
    path = tmp_path / "edits.html"
    replay(path, lm.tokenizer, lm.spec, [edited, *rows])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        text = "els => els.filter(e => e.checkVisibility()).map(e => e.textContent).join('')"
        assert page.eval_on_selector_all("section:first-child .canvas span", text) == "azb"
        page.keyboard.press("Home")
        assert page.eval_on_selector_all("section:first-child .canvas span", text) == "a░"
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.eval_on_selector_all("section:first-child .canvas span", text) == "axzb"
        assert page.eval_on_selector(".gone", "e => getComputedStyle(e).textDecorationLine") == "line-through"
        browser.close()
    assert errors == []
