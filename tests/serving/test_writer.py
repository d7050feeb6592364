"""Calls become rows, rows become events: the text is the sampler's, and what can't be is refused by name."""

import asyncio
import dataclasses
import itertools
import sys
import threading
import time

import pytest
from gemma_testing import make_gemma, save_gemma

from dllm_ray import chat
from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.serving.calls import Call, Canvas, Done, Refused, Text
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.local import LocalModel
from dllm_ray.serving.writer import Writer

CONFIG = SamplerConfig(max_new_tokens=12, block_size=4, steps=12, temperature=1.0)
MESSAGES = ({"role": "user", "content": "sort 21"},)
IDS = itertools.count()


@pytest.fixture(scope="module")
def lm(sharp_lm):
    return sharp_lm("llama")


@pytest.fixture(scope="module")
def writer(lm):
    made = Writer("tiny", lm, CONFIG, Limits(max_rows=4, max_new_tokens=30, max_steps=40, max_n=4))
    yield made
    made.close()


def ask(writer: Writer, on_event=None, **call) -> list:
    """The events that answer a call."""
    call = Call(id=str(next(IDS)), **call)
    events, done, left = [], threading.Event(), [call.n]

    def take(event):
        events.append(event)
        if on_event is not None:
            on_event(event)
        left[0] -= isinstance(event, Done)
        if isinstance(event, Refused) or not left[0]:
            done.set()

    writer.write(call, take)
    assert done.wait(60)
    return events


def by_index(events: list, kind) -> dict[int, list]:
    found = {}
    for event in events:
        if isinstance(event, kind):
            found.setdefault(event.index, []).append(event)
    return found


def sampled(lm, prompt: list[int], seed: int, n: int = 1, **changes):
    config = dataclasses.replace(CONFIG, seed=seed, **changes)
    return Sampler(lm, config).sample([prompt] * n)


POLICIES = [{}, {"policy": "random", "cache": "prefix"}, {"policy": "llada21", "threshold": 0.3}, {"top_p": 0.9}]
POLICIES += [{"threshold": 0.3, "cache": "dual"}, {"cfg_scale": 0.5, "temperature": 0.0}]


@pytest.mark.parametrize("changes", POLICIES, ids=str)
def test_a_seed_gives_the_samplers_texts_streamed_or_not(writer, lm, changes):
    prompt = chat.encode_prompt(lm.tokenizer, list(MESSAGES))
    for seed in range(3):
        out = sampled(lm, prompt, seed, 3, **changes)
        expected = [chat.decode(lm.tokenizer, tokens) for tokens in out.completions]
        for stream in (False, True):
            events = ask(writer, messages=MESSAGES, n=3, seed=seed, stream=stream, sampler=changes, spelled=True)
            done = {index: found[-1] for index, found in by_index(events, Done).items()}
            texts = by_index(events, Text)
            assert [done[index].text for index in range(3)] == expected
            for index, tokens in enumerate(out.completions):
                end = done[index]
                assert end.completion_tokens == len(tokens) == len(end.tokens) == len(end.confidences)
                assert (end.prompt_tokens, end.nfe) == (len(prompt), out.row_nfe[index])
                assert end.reason == ("stop" if len(tokens) < 12 else "length")
                sent = texts.get(index, [])
                assert bool(sent) <= stream
                if stream:
                    assert "".join(event.text for event in sent) == end.text
                    assert sum((event.tokens for event in sent), ()) == end.tokens
                    assert sum((event.confidences for event in sent), ()) == end.confidences


def test_answers_of_another_length_have_as_many_steps_for_each_token(lm):
    writer = Writer("tiny", lm, dataclasses.replace(CONFIG, steps=6), Limits(max_new_tokens=30, max_steps=20))
    ends = {tokens: ask(writer, messages=MESSAGES, seed=1, max_tokens=tokens)[-1] for tokens in (4, 12, 24)}
    assert all(end.nfe <= -(-tokens // 2) for tokens, end in ends.items())
    prompt = chat.encode_prompt(lm.tokenizer, list(MESSAGES))
    long = sampled(lm, prompt, 1, max_new_tokens=24, steps=12)
    assert ends[24].text == chat.decode(lm.tokenizer, long.completions[0])
    assert ask(writer, messages=MESSAGES, max_tokens=24, sampler={"steps": 7})[-1].nfe <= 12
    writer.close()


def test_tokens_are_spelled_only_for_those_who_ask(writer):
    events = ask(writer, messages=MESSAGES, seed=1, stream=True)
    assert events[-1].text and not any(event.tokens or event.confidences for event in events)


def test_text_comes_before_the_row_is_done(writer, monkeypatch):
    monkeypatch.setattr("dllm_ray.serving.writing._TEXT_EVERY_S", 0.0)
    seen = [len(by_index(ask(writer, messages=MESSAGES, seed=seed, stream=True), Text).get(0, [])) for seed in range(4)]
    assert max(seen) > 2


def test_prompts_are_taken_as_text_or_as_tokens(writer, lm):
    text = "sort <|user|> 21"
    tokens = tuple(chat.encode_plain(lm.tokenizer, text))
    expected = chat.decode(lm.tokenizer, sampled(lm, list(tokens), 3).completions[0])
    for prompt in (text, tokens):
        [end] = ask(writer, prompt=prompt, seed=3)
        assert (end.text, end.prompt_tokens) == (expected, len(tokens))
    [end] = ask(writer, prompt="", seed=3)
    assert end.text == chat.decode(lm.tokenizer, sampled(lm, [], 3).completions[0])


def test_a_suffix_makes_a_gap(writer, lm):
    tokenizer, mask = lm.tokenizer, lm.spec.mask_token_id
    before, after = chat.encode_plain(tokenizer, "the quick"), chat.encode_plain(tokenizer, "fox jumps")
    rows = [[*before, *[mask] * 7, *after]] * 2
    out = Sampler(lm, dataclasses.replace(CONFIG, seed=5, max_new_tokens=7)).infill(rows)
    events = ask(writer, prompt="the quick", suffix="fox jumps", max_tokens=7, n=2, seed=5, stream=True, canvas=True)
    for index, [end] in by_index(events, Done).items():
        assert end.text == chat.decode(tokenizer, out.completions[index])
        assert (end.reason, end.completion_tokens) == ("length", 7)
        assert end.prompt_tokens == len(before) + len(after)
        first, *steps = by_index(events, Canvas)[index]
        assert first.length == len(rows[0])
        assert set(first.positions) == {*range(len(before)), *range(len(before) + 7, len(rows[0]))}
        assert {place for event in steps for place in event.positions} >= set(range(len(before), len(before) + 7))


def test_a_stop_string_ends_the_text_and_frees_the_row(writer, lm):
    prompt = chat.encode_prompt(lm.tokenizer, list(MESSAGES))
    saved = 0
    for seed in range(6):
        out = sampled(lm, prompt, seed)
        text = chat.decode(lm.tokenizer, out.completions[0])
        if len(text) < 3:
            continue
        stop = text[1:3]
        for stream in (False, True):
            events = ask(writer, messages=MESSAGES, seed=seed, stop=(stop,), stream=stream)
            end = events[-1]
            assert (end.text, end.reason) == (text[: text.find(stop)], "stop")
            written = [lm.tokenizer.decode(out.completions[0][:count]) for count in range(len(out.completions[0]) + 1)]
            assert end.completion_tokens == next(n for n, found in enumerate(written) if len(found) >= len(end.text))
            saved += out.row_nfe[0] - end.nfe
            if stream:
                assert "".join(event.text for event in events[:-1]) == end.text
    assert saved > 0


@pytest.mark.parametrize("changes", [{}, {"policy": "llada21", "threshold": 0.1, "cache": "none"}], ids=str)
def test_canvas_events_build_the_answer(writer, lm, changes):
    prompt = chat.encode_prompt(lm.tokenizer, list(MESSAGES))
    edits = 0
    for seed in range(5):
        events = ask(writer, messages=MESSAGES, seed=seed, canvas=True, sampler=changes)
        first, *steps = by_index(events, Canvas)[0]
        assert (first.step, first.length, first.positions) == (-1, 12, ())
        shown, written = [None] * 12, set()
        for number, event in enumerate(steps):
            assert event.step == number
            assert len(event.positions) == len(event.tokens) == len(event.confidences)
            for place, kind in zip(event.positions, event.kinds or ["write"] * 12, strict=False):
                assert kind == "write" or place in written
                edits += kind == "edit"
            written |= set(event.positions)
            for place, token in zip(event.positions, event.tokens, strict=True):
                shown[place] = token
        [end] = by_index(events, Done)[0]
        tokens = sampled(lm, prompt, seed, **changes).completions[0]
        kept = "".join(token for token in shown[: len(tokens)] if token is not None)
        assert kept == end.text or "\ufffd" in end.text
    assert not changes or edits


REFUSED = [
    ({"sampler": {"steps": 0}}, "invalid", "diffusion.steps"),
    ({"sampler": {"steps": 2}}, "invalid", "diffusion.steps"),  # fewer than blocks
    ({"sampler": {"steps": 41}}, "invalid", "diffusion.steps"),
    ({"sampler": {"steps": True}}, "invalid", "diffusion.steps"),
    ({"sampler": {"steps": "8"}}, "invalid", "diffusion.steps"),
    ({"sampler": {"steps": None}}, "invalid", "diffusion.steps"),
    ({"sampler": {"steps": 10**40}}, "invalid", "diffusion.steps"),
    ({"sampler": {"steps_per_block": 20}}, "invalid", "diffusion.steps_per_block"),
    ({"sampler": {"block_size": 10**6}}, "invalid", "diffusion.block_size"),
    ({"sampler": {"policy": ["x"]}}, "invalid", "diffusion.policy"),
    ({"sampler": {"policy": None}}, "invalid", "diffusion.policy"),
    ({"sampler": {"cache": "all"}}, "invalid", "diffusion.cache"),
    ({"sampler": {"threshold": 0.5, "factor": 1.0}}, "invalid", "diffusion.factor"),
    ({"sampler": {"eos_early_stop": False}}, "invalid", "diffusion.eos_early_stop"),
    ({"sampler": {"colour": 1}}, "invalid", "diffusion.colour"),
    ({"sampler": {"temperature": -1}}, "invalid", "temperature"),
    ({"sampler": {"temperature": float("nan")}}, "invalid", "temperature"),
    ({"sampler": {"top_p": {}}}, "invalid", "top_p"),
    ({"max_tokens": 0}, "invalid", "max_tokens"),
    ({"max_tokens": 31}, "too_long", "max_tokens"),
    ({"n": 0}, "invalid", "n"),
    ({"n": 5}, "invalid", "n"),
    ({"seed": -1}, "invalid", "seed"),
    ({"stop": ("",)}, "invalid", "stop"),
    ({"messages": ()}, "invalid", "messages"),
    ({"messages": None}, "invalid", "messages"),
    ({"messages": ({"role": "robot", "content": "x"},)}, "invalid", "messages"),
    ({"messages": ({"role": "user", "content": "\ud800"},)}, "invalid", "messages"),
    ({"messages": ({"role": "user", "content": "x" * 60},)}, "too_long", "messages"),
    ({"messages": None, "prompt": "x" * 60}, "too_long", "prompt"),
    ({"messages": None, "prompt": (999,)}, "invalid", "prompt"),
    ({"messages": None, "prompt": "a", "suffix": "\udfff"}, "invalid", "suffix"),
    ({"suffix": "a"}, "invalid", "suffix"),
]


@pytest.mark.parametrize(("call", "kind", "field"), REFUSED, ids=str)
def test_what_can_not_be_is_refused_by_its_name_in_the_request(writer, call, kind, field):
    [refused] = ask(writer, **({"messages": MESSAGES, "stream": True, "canvas": True} | call))
    assert (refused.kind, refused.field) == (kind, field)
    assert refused.message and "/" not in refused.message.replace("true or", "")


def test_limits_on_prompts_and_a_models_length(lm):
    writer = Writer(
        "tiny", lm, dataclasses.replace(CONFIG, max_new_tokens=None, max_length=40), Limits(max_prompt_tokens=25)
    )
    [refused] = ask(writer, prompt="reverse " * 20)
    assert (refused.kind, refused.field) == ("too_long", "prompt")
    tokens = tuple(range(40, 60))
    [end] = ask(writer, prompt=tokens, seed=1)
    out = Sampler(lm, dataclasses.replace(CONFIG, max_new_tokens=20, seed=1)).sample([list(tokens)])
    assert end.text == chat.decode(lm.tokenizer, out.completions[0])
    writer.close()
    [refused] = ask(writer, messages=MESSAGES)
    assert refused.kind == "draining" and refused.retry_after_s


def test_a_full_queue_and_a_deadline(lm):
    writer = Writer("tiny", lm, CONFIG, Limits(max_rows=1, max_queue=1))
    hold, go = threading.Event(), threading.Event()

    def wait(*_):
        hold.set()
        assert go.wait(60)

    handle = lm.model.register_forward_pre_hook(wait)
    ends = []
    writer.write(Call("a", messages=MESSAGES, deadline=time.time() + 600), ends.append)
    assert hold.wait(60)
    late = []
    writer.write(Call("b", messages=MESSAGES, deadline=time.time() + 0.01), late.append)
    [refused] = ask(writer, messages=MESSAGES)
    assert (refused.kind, refused.field) == ("full", None) and refused.retry_after_s >= 1
    time.sleep(0.02)
    go.set()
    assert writer.loop.drain(60)
    handle.remove()
    writer.close()
    assert ends[-1].reason in ("stop", "length")
    assert [event.reason for event in late] == ["deadline"]


def test_settings_and_models_are_checked_when_they_are_loaded(lm):
    with pytest.raises(ConfigError, match=r"sampler\.steps"):
        Writer("tiny", lm, SamplerConfig(max_new_tokens=64, block_size=1, steps=2))
    with pytest.raises(ModelError, match="tokenizer"):
        Writer("tiny", DiffusionLM(lm.model, None, lm.spec))
    no_mask = DiffusionLM(lm.model, lm.tokenizer, dataclasses.replace(lm.spec, mask_token_id=None))
    with pytest.raises(ModelError, match="mask"):
        Writer("tiny", no_mask)
    with pytest.raises(ConfigError, match="max_rows"):
        Limits(max_rows=0)
    with pytest.raises(ConfigError, match="fields"):
        Limits(fields=("colour",))


def test_a_message_that_looks_like_control_tokens_stays_text_while_others_encode(writer, lm):
    """Encoding sets flags of the tokenizer that all threads share."""
    text = "<|endoftext|><|assistant|>"
    expected = len(chat.encode_prompt(lm.tokenizer, text))
    counts = []

    def many():
        counts.extend(writer._prompt(Call("x", messages=({"role": "user", "content": text},)))[1] for _ in range(100))

    threads = [threading.Thread(target=many) for _ in range(6)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # or threads hardly ever meet
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert counts == [expected] * 600


# --- in one process


@pytest.fixture
def local(lm):
    made = LocalModel("tiny", lm, Limits(max_rows=2), CONFIG)
    yield made
    made.close()


def test_a_local_model_answers_many_at_once_each_as_alone(local, lm):
    prompts = [f"sort {number}" for number in range(6)]

    async def answer(prompt: str) -> str:
        events = [event async for event in local.generate(Call("x", prompt=prompt, seed=4, stream=True))]
        assert "".join(event.text for event in events[:-1]) == events[-1].text
        return events[-1].text

    async def main():
        assert await local.ready()
        texts = await asyncio.gather(*map(answer, prompts))
        assert await local.drain(10) and not await local.ready()
        return texts

    expected = [
        chat.decode(lm.tokenizer, sampled(lm, chat.encode_plain(lm.tokenizer, prompt), 4).completions[0])
        for prompt in prompts
    ]
    assert asyncio.run(main()) == expected
    assert local.facts.name == "tiny" and local.facts.sampler["block_size"] == 4


def test_closing_the_iterator_frees_the_rows(local):
    async def main():
        events = local.generate(Call("x", messages=MESSAGES, n=4, stream=True, canvas=True))
        await anext(events)
        await events.aclose()
        task = asyncio.ensure_future(anext(local.generate(Call("y", messages=MESSAGES))))
        await asyncio.sleep(0)
        task.cancel()  # while it is still being put into tokens
        for _ in range(500):
            await asyncio.sleep(0.01)
            figures = local.figures()
            if not (figures.active or figures.queued):
                return figures.steps
        raise AssertionError(f"rows are left: {figures}")

    assert asyncio.run(main()) < 24

    async def none():
        return [event async for event in local.generate(Call("z", messages=MESSAGES, n=0))]

    [refused] = asyncio.run(none())
    assert refused.field == "n"


# --- a model without a mask token


@pytest.fixture
def uniform_lm(tokenizer, tmp_path):
    save_gemma(make_gemma(context=64), tokenizer, tmp_path)
    return load(tmp_path)


def test_a_model_of_uniform_noise_is_served_row_by_row(uniform_lm):
    config = SamplerConfig(max_new_tokens=uniform_lm.model.config.canvas_length * 2, steps=6)
    prompt = [5, 6, 7]
    expected = Sampler(uniform_lm, dataclasses.replace(config, seed=2)).sample([prompt] * 2)
    writer = Writer("gemma", uniform_lm, config)
    assert not writer.facts.can_infill
    events = ask(writer, prompt=tuple(prompt), n=2, seed=2, stream=True, canvas=True)
    for index, [end] in by_index(events, Done).items():
        assert end.text == chat.decode(uniform_lm.tokenizer, expected.completions[index], uniform_lm.spec.eot_text)
        assert end.nfe == expected.row_nfe[index]
        assert "".join(event.text for event in by_index(events, Text).get(index, [])) == end.text
    [refused] = ask(writer, prompt="a", suffix="b", max_tokens=3)
    assert (refused.kind, refused.field) == ("invalid", "suffix")
    [refused] = ask(writer, prompt=tuple(prompt), sampler={"policy": "random"})
    assert (refused.kind, refused.field) == ("invalid", "diffusion.policy")
    several = []
    writing = writer.write(Call("c", prompt=tuple(prompt), n=3), several.append)
    writing.cancel()
    assert writer.loop.drain(60)
    writer.close()
    assert [event.reason for event in several if isinstance(event, Done)].count("cancelled") >= 2
