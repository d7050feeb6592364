"""Models that edit behind the API: the text is the sampler's, and viewers can follow every edit."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_testing import served

from dllm_ray import chat
from dllm_ray.errors import ConfigError
from dllm_ray.models import edit_heads
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling.config import EDIT_FIELDS
from dllm_ray.sampling.edit_flow import EditEngine
from dllm_ray.sampling.sampler import row_seeds
from dllm_ray.serving import speed
from dllm_ray.serving.app import create_app
from dllm_ray.serving.calls import Call, Canvas, Done, Refused, Text
from dllm_ray.serving.config import ServedModel
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.load import Question
from dllm_ray.serving.local import LocalModel
from dllm_ray.serving.loop import _Room
from dllm_ray.serving.partner import ServedPartner
from dllm_ray.serving.writer import Writer

CONFIG = SamplerConfig(max_new_tokens=12, steps=24, temperature=1.0)
MESSAGES = ({"role": "user", "content": "sort 21"},)
IDS = itertools.count()


@pytest.fixture(scope="module")
def lm(sharp_lm):
    return edit_heads.attach(sharp_lm("llama", seed=5, max_position_embeddings=128))


@pytest.fixture(scope="module")
def writer(lm):
    made = Writer("tiny", lm, CONFIG, Limits(max_rows=4, max_new_tokens=30, max_steps=40, max_n=4))
    yield made
    made.close()


def begin(writer: Writer, **call) -> tuple[list, threading.Event]:
    """The events that answer a call, as they come, and when all of them have."""
    call = Call(id=str(next(IDS)), **call)
    events, done, left = [], threading.Event(), [call.n]

    def take(event):
        events.append(event)
        left[0] -= isinstance(event, Done)
        if isinstance(event, Refused) or not left[0]:
            done.set()

    writer.write(call, take)
    return events, done


def ask(writer: Writer, **call) -> list:
    events, done = begin(writer, **call)
    assert done.wait(60)
    return events


def sampled(lm, prompt: list[int], seed: int, n: int = 1, **changes):
    return Sampler(lm, dataclasses.replace(CONFIG, seed=seed, **changes)).sample([prompt] * n)


def replayed(events: list[Canvas]) -> list[str | None]:
    """What a viewer has after the events."""
    cells = []
    for event in events:
        if event.step < 0:
            cells = [None] * event.length
        kinds = event.kinds or ("write",) * len(event.positions)
        assert len(event.positions) == len(event.tokens) == len(event.confidences) == len(kinds)
        for place, text, kind in zip(event.positions, event.tokens, kinds, strict=True):
            if kind == "delete":
                del cells[place]
            elif kind == "insert":
                cells.insert(place, text)
            else:
                assert kind == "write" or cells[place] is not None
                cells[place] = text
        assert len(cells) == event.length
    return cells


CHANGES = [{}, {"kappa": "cubic", "start_tokens": 3, "top_p": 0.9}, {"edit_probability": 0.4, "temperature": 0.0}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_seed_gives_the_samplers_texts_streamed_or_not(writer, lm, changes):
    prompt, kinds = chat.encode_prompt(lm.tokenizer, list(MESSAGES)), set()
    for seed in range(3):
        out = sampled(lm, prompt, seed, 3, **changes)
        for stream in (False, True):
            events = ask(
                writer, messages=MESSAGES, n=3, seed=seed, stream=stream, canvas=stream, sampler=changes, spelled=True
            )
            for index, tokens in enumerate(out.completions):
                own = [event for event in events if event.index == index]
                end = own[-1]
                assert end.text == chat.decode(lm.tokenizer, tokens, lm.spec.eot_text)
                assert end.completion_tokens == len(tokens) == len(end.tokens) == len(end.confidences)
                assert (end.prompt_tokens, end.nfe) == (len(prompt), out.row_nfe[index])
                assert end.reason == ("stop" if len(tokens) < 12 else "length")
                if not stream:
                    assert own == [end]
                    continue
                texts = [event for event in own if isinstance(event, Text)]
                assert own[-1 - len(texts) :] == [*texts, end]  # at the end
                assert "".join(event.text for event in texts) == end.text
                assert sum((event.tokens for event in texts), ()) == end.tokens
                kinds |= {kind for event in own if isinstance(event, Canvas) for kind in event.kinds}
    assert kinds >= ({"insert", "delete", "edit"} if not changes else {"insert"})


@pytest.mark.parametrize("changes", [{}, {"start_tokens": 3}], ids=str)
def test_canvas_events_lead_to_the_sequence(writer, lm, changes):
    for seed in range(4):
        events = ask(writer, prompt="sort 日本語", seed=seed, canvas=True, sampler=changes)
        canvases = [event for event in events if isinstance(event, Canvas)]
        assert (canvases[0].step, canvases[0].length) == (-1, changes.get("start_tokens", 0))
        assert [event.step for event in canvases] == sorted(event.step for event in canvases)
        assert len(canvases) == events[-1].nfe + 1
        out = sampled(lm, chat.encode_plain(lm.tokenizer, "sort 日本語"), seed, **changes)
        answer = out.sequences[0][len(chat.encode_plain(lm.tokenizer, "sort 日本語")) :]
        cells = replayed(canvases)
        assert len(cells) == len(answer)
        if answer == out.completions[0]:
            text = "".join(cell or "" for cell in cells)
            assert text == lm.tokenizer.decode(answer, skip_special_tokens=True) or "\ufffd" in text


def test_a_prompt_that_is_edited_stays_out_of_the_answer_and_its_canvas(lm):
    config = dataclasses.replace(CONFIG, edit_prompt=True)
    writer = Writer("tiny", lm, config)
    prompt = chat.encode_prompt(lm.tokenizer, list(MESSAGES))
    changed = 0
    for seed in range(4):
        out = Sampler(lm, dataclasses.replace(config, seed=seed)).sample([prompt])
        events = ask(writer, messages=MESSAGES, seed=seed, canvas=True)
        assert events[-1].text == chat.decode(lm.tokenizer, out.completions[0], lm.spec.eot_text)
        cells = replayed([event for event in events if isinstance(event, Canvas)])
        assert len(cells) >= len(out.completions[0])
        changed += out.sequences[0][: len(prompt)] != prompt
    assert changed
    writer.close()


def test_a_gap_is_filled(writer, lm):
    tokenizer, mask = lm.tokenizer, lm.spec.mask_token_id
    before, after = chat.encode_plain(tokenizer, "the quick"), chat.encode_plain(tokenizer, "fox jumps")
    row = [*before, *[mask] * 7, *after]
    for changes in ({}, {"start_tokens": 2}):
        out = Sampler(lm, dataclasses.replace(CONFIG, seed=5, max_new_tokens=7, **changes)).infill([row] * 2)
        events = ask(
            writer, prompt="the quick", suffix="fox jumps", max_tokens=7, n=2, seed=5, canvas=True, sampler=changes
        )
        for index, completion in enumerate(out.completions):
            own = [event for event in events if event.index == index]
            assert own[-1].text == tokenizer.decode(completion, skip_special_tokens=True)
            assert own[-1].completion_tokens == len(completion) and own[-1].prompt_tokens == len(before) + len(after)
            assert own[-1].reason == ("length" if len(completion) == 7 else "stop")
            assert len(replayed(own[:-1])) == len(out.sequences[index])
    [refused] = ask(writer, prompt="", suffix="x", max_tokens=4)
    assert (refused.kind, refused.field) == ("invalid", "prompt")


def test_a_stop_string_cuts_the_finished_text(writer, lm):
    for seed in range(8):
        whole = ask(writer, messages=MESSAGES, seed=seed)[-1].text
        if len(whole) < 4:
            continue
        stop = whole[2:4]
        events = ask(writer, messages=MESSAGES, seed=seed, stop=(stop,), stream=True)
        assert (events[-1].text, events[-1].reason) == (whole[: whole.index(stop)], "stop")
        assert "".join(event.text for event in events if isinstance(event, Text)) == events[-1].text
        return
    raise AssertionError("no text was long enough")


def test_the_length_of_an_answer_leaves_the_steps_as_they_are(writer, lm):
    prompt = chat.encode_prompt(lm.tokenizer, list(MESSAGES))
    for tokens in (4, 30):
        out = sampled(lm, prompt, 1, max_new_tokens=tokens)
        [end] = ask(writer, messages=MESSAGES, seed=1, max_tokens=tokens)
        assert (end.text, end.nfe) == (chat.decode(lm.tokenizer, out.completions[0]), out.row_nfe[0])


REFUSED = [
    ({"sampler": {"policy": "low_confidence"}}, "unsupported", "diffusion.policy"),  # the default
    ({"sampler": {"block_size": 8}}, "unsupported", "diffusion.block_size"),
    ({"sampler": {"cache": "none"}}, "unsupported", "diffusion.cache"),
    ({"sampler": {"cfg_scale": 1.0}}, "unsupported", "diffusion.cfg_scale"),
    ({"sampler": {"shift_logits": True}}, "unsupported", "diffusion.shift_logits"),
    ({"sampler": {"edit_prompt": True}}, "invalid", "diffusion.edit_prompt"),  # the server's affair
    ({"sampler": {"kappa": "square"}}, "invalid", "diffusion.kappa"),
    ({"sampler": {"start_tokens": 2**30}}, "invalid", "diffusion.start_tokens"),
    ({"sampler": {"start_tokens": -1}}, "invalid", "diffusion.start_tokens"),
    ({"sampler": {"edit_probability": 2.0}}, "invalid", "diffusion.edit_probability"),
    ({"sampler": {"steps": 41}}, "invalid", "diffusion.steps"),
    ({"max_tokens": 31}, "too_long", "max_tokens"),
    ({"messages": None, "prompt": "x" * 120}, "too_long", "prompt"),
]


@pytest.mark.parametrize(("call", "kind", "field"), REFUSED, ids=str)
def test_what_can_not_be_is_refused_by_its_name(writer, call, kind, field):
    [refused] = ask(writer, **({"messages": MESSAGES} | call))
    assert (refused.kind, refused.field) == (kind, field)


@pytest.mark.parametrize("name", [name for name in EDIT_FIELDS if name in Limits().fields])
def test_a_model_that_fills_masks_refuses_what_only_edits_have(sharp_lm, name):
    writer = Writer("tiny", sharp_lm("llama"), dataclasses.replace(CONFIG, block_size=4))
    assert name not in writer.facts.sampler and not writer.facts.edits
    [refused] = ask(writer, messages=MESSAGES, sampler={name: getattr(SamplerConfig(), name)})
    writer.close()
    assert (refused.kind, refused.field) == ("unsupported", f"diffusion.{name}")


def test_facts_name_what_means_something(writer):
    facts = writer.facts
    assert facts.edits and facts.can_infill
    assert list(facts.sampler) == [
        "max_new_tokens", "steps", "temperature", "top_p", "top_k", "eos_penalty",
        "kappa", "start_tokens", "edit_probability",
    ]  # fmt: skip


def test_settings_are_checked_when_a_model_is_loaded(lm, tmp_path):
    with pytest.raises(ConfigError, match=r"sampler\.cache"):
        Writer("tiny", lm, dataclasses.replace(CONFIG, cache="prefix"))
    lm.save(tmp_path)
    few = ServedModel(path=str(tmp_path), sampler={"steps": 2, "max_new_tokens": 64}).sampler_for(str(tmp_path))
    assert few.steps == 2  # fewer than the blocks that it hasn't


def test_rows_take_the_room_that_they_may_come_to_need(lm):
    [row] = Sampler(lm, CONFIG).rows([[1, 2, 3]])
    room = _Room(Limits(max_tokens=40))
    assert room.fits(row)
    for _ in range(2):
        assert room.fits(row)
        room.take(row)
    assert not room.fits(row)
    room.free(row)
    assert room.fits(row)


def test_a_row_that_is_let_go_ends_as_it_is(lm):
    writer = Writer("tiny", lm, dataclasses.replace(CONFIG, steps=400))
    hold, go = threading.Event(), threading.Event()

    def wait(*_):
        hold.set()
        assert go.wait(60)

    handle = lm.model.register_forward_pre_hook(wait)
    ends = []
    writing = writer.write(Call("a", messages=MESSAGES, seed=1), ends.append)
    assert hold.wait(60)
    writing.cancel()
    go.set()
    assert writer.loop.drain(60)
    handle.remove()
    writer.close()
    [row] = Sampler(lm, writer.config).rows([chat.encode_prompt(lm.tokenizer, MESSAGES)], row_seeds(1, [0]))
    engine = EditEngine(lm)
    engine.admit(row)
    engine.step()
    so_far = engine.cancel(row.key)
    written = [token for token, is_its in zip(so_far.tokens, so_far.answer, strict=True) if is_its]
    assert (ends[-1].reason, ends[-1].nfe, ends[-1].completion_tokens) == ("cancelled", 1, len(written))
    assert written and ends[-1].text == chat.decode(lm.tokenizer, written)


class TestOverHttp:
    """OpenAI's own client, unchanged, while others are answered."""

    @pytest.fixture(scope="class")
    def url(self, lm):
        model = LocalModel("tiny", lm, sampler=CONFIG)
        with served(create_app({"tiny": model})) as url:
            yield url
        assert (model.figures().active, model.figures().queued) == (0, 0)
        model.close()

    @pytest.fixture(scope="class")
    def client(self, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client

    def test_streams_say_what_the_sampler_does_whatever_else_runs(self, client, lm):
        def streamed(number: int) -> tuple[str, list[dict]]:
            text, canvases = "", []
            diffusion = {"stream_canvas": True, "steps": 10 + number, "start_tokens": number % 3}
            for chunk in client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": f"sort {number}"}],
                seed=number,
                stream=True,
                extra_body={"diffusion": diffusion},
            ):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                canvases += [] if chunk.choices else [chunk.diffusion]
            return text, canvases

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(streamed, range(12)))
        for number, (text, canvases) in enumerate(found):
            prompt = chat.encode_prompt(lm.tokenizer, [{"role": "user", "content": f"sort {number}"}])
            out = sampled(lm, prompt, number, steps=10 + number, start_tokens=number % 3)
            assert text == chat.decode(lm.tokenizer, out.completions[0], lm.spec.eot_text)
            assert canvases[0]["step"] == -1 and canvases[0]["length"] == number % 3
            assert canvases[-1]["length"] == len(out.sequences[0]) - len(prompt)
        assert any("delete" in canvas["kinds"] for _, canvases in found for canvas in canvases)

    def test_usage_and_logprobs(self, client, lm):
        answer = client.chat.completions.create(model="tiny", messages=list(MESSAGES), seed=2, logprobs=True)
        out = sampled(lm, chat.encode_prompt(lm.tokenizer, list(MESSAGES)), 2)
        assert answer.usage.completion_tokens == len(out.completions[0]) > 0
        assert answer.usage.diffusion["nfe"] == out.row_nfe[0]
        assert answer.usage.diffusion["tpf"] == pytest.approx(out.tpf)
        content = answer.choices[0].logprobs.content
        assert "".join(token.token for token in content) == answer.choices[0].message.content
        assert all(token.logprob <= 0 for token in content)

    def test_a_setting_that_means_nothing_is_named(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="a", extra_body={"diffusion": {"policy": "random"}})
        assert (caught.value.param, caught.value.code) == ("diffusion.policy", "unsupported_parameter")
        assert "edits" in caught.value.message and "kappa" in caught.value.message

    def test_the_terminal_talks_with_it(self, url, lm):
        from dllm_ray.serving.client import Client

        with Client(url) as client:
            facts = client.model()
            assert facts.edits
            partner = ServedPartner(client, facts)
            config = dataclasses.replace(CONFIG, seed=3, kappa="cubic", steps=16)
            expected = sampled(lm, chat.encode_prompt(lm.tokenizer, list(MESSAGES)), 3, kappa="cubic", steps=16)
            for colour in (None, "step"):
                answer = partner.answer(MESSAGES, config, colour)
                assert answer == chat.decode(lm.tokenizer, expected.completions[0], lm.spec.eot_text)


def test_the_benchmarks_engine_counts_the_same_answers(lm, monkeypatch):
    monkeypatch.setattr(speed, "_lm", lm)
    prompt = chat.encode_plain(lm.tokenizer, "sort 21")
    asked = [Question(prompt, new_tokens, seed=seed) for seed, new_tokens in enumerate((4, 12, 9))]
    run = speed._run(asked, CONFIG, batch=2, scales=False)
    expected = [
        Sampler(lm, dataclasses.replace(CONFIG, max_new_tokens=one.new_tokens, seed=one.seed)).sample([prompt])
        for one in asked
    ]
    found = sorted((timing.tokens, timing.nfe) for timing in run.timings)
    assert found == sorted((len(out.completions[0]), out.row_nfe[0]) for out in expected)
