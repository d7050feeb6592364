"""Sequences that grow and shrink, in the terminal: what is inserted, substituted and deleted is seen."""

import io
import re

import pytest
from rich.console import Console

from dllm_ray.models import edit_heads
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit, Edit
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.viz import terminal
from dllm_ray.viz.live import denoise
from dllm_ray.viz.live_texts import LiveTexts
from dllm_ray.viz.spelling import Speller
from dllm_ray.viz.terminal import LiveCanvas


@pytest.fixture(scope="module")
def lm(make_lm):
    return edit_heads.attach(make_lm("llama"))


@pytest.fixture
def log(monkeypatch):
    """A file in the place of a terminal: a line for each step."""
    log = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", log)
    return log.file


@pytest.fixture
def page(monkeypatch):
    """A terminal that keeps what is written to it."""
    page = Console(file=io.StringIO(), width=80, height=10, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(terminal, "console", page)
    return page


def letters(tokenizer, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(letter) for letter in text]


def steps(tokenizer) -> list[Commit]:
    """On "a" and a mask: "xyb", then "zb" (x is deleted, y substituted), then nothing."""
    x, y, z, b = letters(tokenizer, "xyzb")
    return [
        Commit(
            0, 0, [1, 2, 3], [x, y, b], [0.9, 0.8, 0.7], False,
            [Edit("insert", 0, x), Edit("substitute", 1, y), Edit("insert", 1, b)],
        ),
        Commit(0, 4, [1], [z], [0.6], False, [Edit("delete", 1, None), Edit("substitute", 2, z)]),
        Commit(0, 9, [], [], [], True, []),
    ]  # fmt: skip


def test_every_step_is_a_line_that_counts_its_edits(log, lm):
    mask, [a] = lm.spec.mask_token_id, letters(lm.tokenizer, "a")
    with LiveCanvas(lm.tokenizer, lm.spec, [a, mask], prompt_length=1) as live:
        for commit in steps(lm.tokenizer):
            live.update(commit)
    assert log.getvalue().splitlines() == ["step   0  ░", "step   1 (+2)  xyb", "step   5 (~1 -1)  zb", "step  10  zb"]


@pytest.mark.parametrize("prompt", [1, 0])
def test_on_a_terminal_a_deleted_token_is_struck_through_until_the_next_step(page, lm, prompt):
    mask, [a] = lm.spec.mask_token_id, letters(lm.tokenizer, "a")
    first, second, last = steps(lm.tokenizer)
    shown = "" if prompt else "a"
    with LiveCanvas(lm.tokenizer, lm.spec, [a, mask], prompt_length=prompt) as live:
        live.update(first)
        assert live._window().plain.startswith(f"{shown}xyb\nstep 1  {3 + len(shown)} tokens")
        live.update(second)
        text = live._text()
        assert text.plain == f"{shown}xzb"
        struck = [text.plain[span.start : span.end] for span in text.spans if "strike" in str(span.style)]
        new = [text.plain[span.start : span.end] for span in text.spans if "reverse" in str(span.style)]
        assert struck == ["x"] and new == ["z"]
        live.update(last)
        assert live._text().plain == f"{shown}zb"
    final = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", page.file.getvalue().rpartition("\x1b[2K")[2])
    assert final.startswith(f"{shown}zb\nstep 10  {2 + len(shown)} tokens")
    assert "0.67 tokens per forward  +2 ~1 -1" in final
    assert "\x1b[4;38;2;" in page.file.getvalue().rpartition("\x1b[2K")[2]  # what was substituted is underlined


@pytest.mark.parametrize(
    "changes", [{}, {"start_tokens": 3}, {"edit_prompt": True}, {"edit_probability": 0.3}], ids=str
)
def test_a_watched_prompt_gets_the_samplers_answer(log, lm, changes):
    config = SamplerConfig(max_new_tokens=12, steps=16, temperature=1.0, seed=4, **changes)
    sampler, prompt = Sampler(lm, config), [1, *letters(lm.tokenizer, "sort")]
    [canvas] = sampler.canvases([prompt])
    found, expected = denoise(sampler, prompt, canvas), sampler.sample([prompt])
    assert (found.sequences, found.completions) == (expected.sequences, expected.completions)
    *_, last = log.getvalue().splitlines()
    given = 0 if "edit_prompt" in changes else len(prompt)
    mask = lm.spec.mask_token_id
    texts = Speller(lm.tokenizer, lm.spec).spell(found.sequences[0])
    text = "".join(text for text, token in zip(texts[given:], found.sequences[0][given:], strict=True) if token != mask)
    assert last.endswith("  " + text.replace("\n", "⏎"))
    assert len(log.getvalue().splitlines()) == found.nfe + 1


def test_a_gap_and_a_draft_are_drawn_too(log, lm):
    mask = lm.spec.mask_token_id
    sampler = Sampler(lm, SamplerConfig(max_new_tokens=12, steps=16, seed=4))
    gapped = [1, *letters(lm.tokenizer, "ab"), mask, mask, mask, *letters(lm.tokenizer, "yz")]
    [canvas] = sampler.canvases([gapped], infill=True)
    assert denoise(sampler, gapped, canvas, infill=True).sequences == sampler.infill([gapped]).sequences
    prompt, draft = [1, 20], letters(lm.tokenizer, "draft")
    found = denoise(sampler, prompt, prompt + draft, draft=draft)
    assert found.sequences == sampler.edit([prompt], [draft]).sequences
    assert "  draft\n" in log.getvalue()


def test_texts_of_a_server_are_drawn_alike(page):
    with LiveTexts(grows=True) as drawing:
        drawing.update(-1, 0, (), (), ())
        drawing.update(0, 2, (0, 1), ("a", "b"), (0.9, 0.8), ("insert", "insert"))
        drawing.update(3, 2, (0, 1, 0), ("", "c", "B"), (0.0, 0.5, 0.8), ("delete", "insert", "write"))
        text = drawing._text()
        assert text.plain == "aBc" and drawing._written == {0: (0, 0.8), 1: (3, 0.5)} and drawing._new == {1}
        assert [text.plain[span.start : span.end] for span in text.spans if "strike" in str(span.style)] == ["a"]
        drawing.update(5, 2, (1,), ("d",), (0.5,), ("edit",))
        assert drawing._text().plain == "Bd" and drawing._edited == {1}
        drawing.finish()
    assert "step 6  2 tokens" in page.file.getvalue()
