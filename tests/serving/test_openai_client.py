"""OpenAI's own client, unchanged, against the API."""

import asyncio
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_testing import FakeBackend, answer, served, wait_for

from dllm_ray import chat
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.serving.app import AppSettings, create_app
from dllm_ray.serving.calls import Call, Done, Refused, Text
from dllm_ray.serving.keys import digest
from dllm_ray.serving.local import LocalModel

HELLO = [{"role": "user", "content": "Hello"}]
DONE = Done(0, "Hi", "stop", 5, 1, 1, 0.5, 1, ("Hi",), (0.5,))


def told(call: Call):
    """Answers by what the last message asks for: a refusal, a defect, or time."""
    said = call.messages[-1]["content"] if call.messages else ""
    refusals = {
        "be full": Refused("full", "the queue is full", retry_after_s=0.5),
        "be long": Refused("too_long", "the conversation is too long", "messages"),
        "be odd": Refused("invalid", "4 steps are fewer than 8 blocks", "diffusion.steps"),
        "be gone": Refused("draining", "this replica is going away", retry_after_s=0.5),
    }
    if said in refusals:
        return [refusals[said]]
    if said == "be slow":
        return [30, *answer(call)]
    if said == "be late":
        return [Done(0, "", "deadline", 5, 0, 1, 0.5, 1)]
    if said == "break":
        return [Text(0, "Hi"), RuntimeError("secret")]
    return answer(call)


@pytest.fixture(scope="module")
def backend():
    return FakeBackend(told)


@pytest.fixture(scope="module")
def url(backend):
    with served(create_app({"fake": backend}, AppSettings(api_keys=(digest("sk-1"),), max_body_bytes=10_000))) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="sk-1", max_retries=0, timeout=20) as client:
        yield client


def ask(client: openai.OpenAI, text: str = "Hello", **more):
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": text}], **more)


class TestChat:
    def test_an_answer(self, client):
        answer = ask(client)
        assert answer.choices[0].message.content == "You said: Hello #0"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 4, 11)
        assert answer.usage.diffusion == {"nfe": 4, "tpf": 1.0, "tokens_per_s": 8.0}
        assert answer._request_id

    def test_several_answers(self, client):
        answer = ask(client, n=3)
        assert [choice.message.content for choice in answer.choices] == [f"You said: Hello #{i}" for i in range(3)]

    def test_stop_strings(self, client):
        assert ask(client, stop=" said").choices[0].message.content == "You"
        assert ask(client, stop=["#", "Hello"]).choices[0].message.content == "You said: "

    def test_logprobs(self, client):
        content = ask(client, logprobs=True).choices[0].logprobs.content
        assert "".join(token.token for token in content) == "You said: Hello #0"
        assert all(token.logprob == pytest.approx(-0.6931, abs=1e-4) for token in content)
        assert b"".join(bytes(token.bytes) for token in content) == b"You said: Hello #0"

    def test_settings_of_the_sampler(self, client, backend):
        ask(
            client,
            temperature=0,
            seed=3,
            max_completion_tokens=9,
            extra_body={"diffusion": {"steps": 4, "cache": "dual"}},
        )
        call = backend.calls[-1]
        assert call.sampler == {"temperature": 0.0, "steps": 4, "cache": "dual"}
        assert (call.seed, call.max_tokens) == (3, 9)

    def test_a_conversation_of_five_turns(self, client, backend):
        messages = [{"role": "system", "content": "Be brief"}]
        for turn in range(5):
            messages.append({"role": "user", "content": f"turn {turn}"})
            message = client.chat.completions.create(model="fake", messages=messages).choices[0].message
            assert message.content == f"You said: turn {turn} #0"
            messages.append(message)
        seen = [(message["role"], message["content"]) for message in backend.calls[-1].messages]
        assert seen[0] == ("system", "Be brief")
        assert [role for role, _ in seen[1:]] == ["user", "assistant"] * 4 + ["user"]
        assert seen[2] == ("assistant", "You said: turn 0 #0")


class TestStreams:
    def test_text(self, client):
        with ask(client, stream=True) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "You said: Hello #0"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert len(chunks) == 6

    def test_several_texts_with_usage(self, client):
        texts, usage = {}, None
        for chunk in ask(client, n=2, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        assert texts == {0: "You said: Hello #0", 1: "You said: Hello #1"}
        assert usage.completion_tokens == 8

    def test_the_canvas(self, client):
        chunks = ask(client, stream=True, extra_body={"diffusion": {"stream_canvas": True}})
        canvases = [chunk.diffusion for chunk in chunks if not chunk.choices]
        assert [canvas["step"] for canvas in canvases] == [-1, 0, 1, 2, 3]
        assert [canvas["tokens"] for canvas in canvases[1:]] == [["You"], [" said:"], [" Hello"], [" #0"]]

    def test_the_helper_that_gathers(self, client):
        with client.chat.completions.stream(model="fake", messages=HELLO) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert "content.delta" in kinds
        assert final.choices[0].message.content == "You said: Hello #0"

    def test_closing_one_ends_its_call(self, client, backend):
        with ask(client, "be slow", stream=True, timeout=20) as stream:
            next(iter(stream))
        wait_for(lambda: backend.calls[-1].id in backend.closed)

    def test_what_goes_wrong_in_one_is_raised(self, client):
        texts = []
        with pytest.raises(openai.APIError, match="a defect of the server"):
            texts += [chunk.choices[0].delta.content for chunk in ask(client, "break", stream=True)]
        with pytest.raises(openai.RateLimitError):
            ask(client, "be full", stream=True)

    def test_many_at_once(self, url):
        async def one(client: openai.AsyncOpenAI, number: int) -> str:
            text = ""
            async for chunk in await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": str(number)}], stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            return text

        async def all_of_them() -> list[str]:
            async with openai.AsyncOpenAI(base_url=url, api_key="sk-1") as client:
                return await asyncio.gather(*(one(client, number) for number in range(20)))

        assert asyncio.run(all_of_them()) == [f"You said: {number} #0" for number in range(20)]


class TestCompletions:
    def test_a_text_is_continued(self, client):
        answer = client.completions.create(model="fake", prompt="Once")
        assert answer.choices[0].text == "You said: Once #0"
        assert answer.object == "text_completion"

    def test_several_prompts(self, client):
        answer = client.completions.create(model="fake", prompt=["a", "b"], n=2, echo=True)
        assert [choice.text[0] + choice.text[-1] for choice in answer.choices] == ["a0", "a1", "b0", "b1"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]

    def test_tokens(self, client, backend):
        client.completions.create(model="fake", prompt=[1, 2, 3])
        assert backend.calls[-1].prompt == (1, 2, 3)

    def test_a_gap_is_filled(self, client, backend):
        client.completions.create(model="fake", prompt="def f():", suffix="return x", max_tokens=8)
        call = backend.calls[-1]
        assert (call.prompt, call.suffix, call.max_tokens) == ("def f():", "return x", 8)

    def test_a_stream(self, client):
        texts = {}
        for chunk in client.completions.create(model="fake", prompt=["a", "b"], stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert texts == {0: "You said: a #0", 1: "You said: b #0"}

    def test_logprobs(self, client):
        told = client.completions.create(model="fake", prompt="a", logprobs=0).choices[0].logprobs
        assert told.tokens == ["You", " said:", " a", " #0"]
        assert told.text_offset == [0, 3, 9, 11]


class TestModels:
    def test_they_are_listed(self, client):
        assert [model.id for model in client.models.list()] == ["fake"]

    def test_one(self, client):
        assert client.models.retrieve("fake").diffusion["family"] == "mdlm"


class TestErrors:
    @pytest.mark.parametrize(
        ("more", "error", "param"),
        [
            ({"temperature": 9}, openai.BadRequestError, "temperature"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
            ({"text": "be long"}, openai.BadRequestError, "messages"),
            ({"text": "be odd"}, openai.UnprocessableEntityError, "diffusion.steps"),
            ({"text": "be full"}, openai.RateLimitError, None),
            ({"text": "be gone"}, openai.InternalServerError, None),
            ({"text": "be late"}, openai.InternalServerError, None),
            ({"text": "break"}, openai.InternalServerError, None),
        ],
        ids=str,
    )
    def test_each_has_its_class(self, client, more, error, param):
        with pytest.raises(error) as caught:
            ask(client, **more)
        assert caught.value.param == param
        assert caught.value.code
        assert caught.value.request_id
        assert caught.value.message

    def test_a_conversation_that_is_too_long_has_its_code(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, "be long")
        assert caught.value.code == "context_length_exceeded"

    def test_a_wrong_key(self, url):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="sk-2", max_retries=0).models.list()

    def test_an_unknown_model(self, client):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="none", messages=HELLO)

    def test_something_that_is_not_there(self, client):
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="fake", input="x")

    def test_a_body_that_is_too_large(self, client):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, "x" * 5_000_000)
        assert caught.value.status_code == 413

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_does_not_wait(self, client, backend, stream):
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3), "be slow", stream=stream)
        wait_for(lambda: backend.calls[-1].id in backend.closed)

    def test_a_full_queue_is_waited_for(self):
        def script(call):
            return [Refused("full", "wait", retry_after_s=0.5)] if len(backend.calls) == 1 else answer(call)

        backend = FakeBackend(script)
        with served(create_app({"fake": backend})) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1)
            assert ask(client).choices[0].message.content == "You said: Hello #0"
        assert len(backend.calls) == 2


def test_answers_are_read_as_they_are(client):
    """Nothing of an answer is lost or made up by the client's own types."""
    raw = client.chat.completions.with_raw_response.create(model="fake", messages=HELLO)
    assert raw.parse().model_dump(exclude_unset=True) == json.loads(raw.text)


SAMPLER = SamplerConfig(max_new_tokens=16, steps=8, block_size=8)


class TestModel:
    """A model that denoises: what is served is what `Sampler` writes."""

    @pytest.fixture(scope="class")
    def lm(self, make_lm) -> DiffusionLM:
        return make_lm("llama", seed=2, max_position_embeddings=1024)

    @pytest.fixture(scope="class")
    def client(self, lm):
        model = LocalModel("tiny", lm, sampler=SAMPLER)
        with served(create_app({"tiny": model})) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            yield client
        assert (model.figures().active, model.figures().queued) == (0, 0)
        model.close()

    @staticmethod
    def written(lm: DiffusionLM, prompt: list[int], n: int = 1, **changes) -> list[str]:
        """The texts that `Sampler` writes."""
        output = Sampler(lm, dataclasses.replace(SAMPLER, **changes)).sample([prompt] * n)
        return [chat.decode(lm.tokenizer, completion, lm.spec.eot_text) for completion in output.completions]

    def test_an_answer(self, client, lm):
        answer = client.chat.completions.create(model="tiny", messages=HELLO)
        prompt = chat.encode_prompt(lm.tokenizer, HELLO)
        assert [answer.choices[0].message.content] == self.written(lm, prompt)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.diffusion["nfe"] > 0

    def test_answers_that_are_drawn_are_those_of_their_seed(self, client, lm):
        changes = {"temperature": 1.0, "seed": 5}
        answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3, **changes)
        texts = [choice.message.content for choice in answer.choices]
        assert texts == self.written(lm, chat.encode_prompt(lm.tokenizer, HELLO), n=3, **changes)
        assert len(set(texts)) > 1

    def test_settings_of_a_request(self, client, lm):
        changes = {"steps": 16, "block_size": 4, "cache": "prefix", "policy": "random"}
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=32, temperature=0.7, seed=1, extra_body={"diffusion": changes}
        )
        prompt = chat.encode_prompt(lm.tokenizer, HELLO)
        expected = self.written(lm, prompt, max_new_tokens=32, temperature=0.7, seed=1, **changes)
        assert [answer.choices[0].message.content] == expected

    def test_streams_say_the_same_while_others_are_written(self, client, lm):
        def streamed(number: int) -> str:
            stream = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": f"sort {number}"}],
                temperature=1.0,
                seed=number,
                stream=True,
                extra_body={"diffusion": {"stream_canvas": number % 2 == 0, "steps": 4 + number}},
            )
            return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(streamed, range(16)))
        for number, text in enumerate(texts):
            prompt = chat.encode_prompt(lm.tokenizer, [{"role": "user", "content": f"sort {number}"}])
            assert [text] == self.written(lm, prompt, temperature=1.0, seed=number, steps=4 + number)

    def test_a_stop_string_ends_the_text_before_it(self, client, lm):
        more = {"temperature": 1.0, "seed": 3, "max_tokens": 64}
        whole = client.chat.completions.create(model="tiny", messages=HELLO, **more).choices[0].message.content
        stop = whole[len(whole) // 2 :][:2]
        cut = client.chat.completions.create(model="tiny", messages=HELLO, stop=stop, **more).choices[0]
        assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")

    def test_a_gap_is_filled_between_what_is_given(self, client, lm):
        filled = client.completions.create(model="tiny", prompt="the quick", suffix=" fox", max_tokens=6, echo=True)
        before, after = (chat.encode_plain(lm.tokenizer, text) for text in ("the quick", " fox"))
        output = Sampler(lm, SAMPLER).infill([[*before, *[lm.spec.mask_token_id] * 6, *after]])
        gap = output.sequences[0][len(before) : len(before) + 6]
        assert filled.choices[0].text == "the quick" + lm.tokenizer.decode(gap, skip_special_tokens=True)
        assert filled.usage.prompt_tokens == len(before) + len(after)

    def test_a_text_or_its_tokens_are_continued_alike(self, client, lm):
        tokens = chat.encode_plain(lm.tokenizer, "the quick")
        answer = client.completions.create(model="tiny", prompt=[tokens, tokens])
        assert {choice.text for choice in answer.choices} == set(self.written(lm, tokens))
        assert client.completions.create(model="tiny", prompt="the quick").choices[0].text == answer.choices[0].text

    def test_logprobs_of_what_was_committed(self, client):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
        content = answer.choices[0].logprobs.content
        assert len(content) == answer.usage.completion_tokens
        assert all(-20 < token.logprob <= 0 for token in content)

    def test_a_conversation_of_five_turns(self, client, lm):
        messages = [{"role": "system", "content": "Be brief"}]
        for turn in range(5):
            messages.append({"role": "user", "content": f"turn {turn}"})
            answer = client.chat.completions.create(model="tiny", messages=messages)
            prompt = chat.encode_prompt(lm.tokenizer, messages)
            assert [answer.choices[0].message.content] == self.written(lm, prompt)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})

    def test_control_tokens_in_what_is_said_are_text(self, client, lm):
        said = f"a{lm.tokenizer.eos_token}b"
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": said}])
        prompt = chat.encode_prompt(lm.tokenizer, [{"role": "user", "content": said}])
        assert answer.usage.prompt_tokens == len(prompt) > len(lm.tokenizer.encode(said))

    @pytest.mark.parametrize(
        ("more", "error", "param"),
        [
            ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens"),
            ({"messages": [{"role": "user", "content": "x " * 2000}]}, openai.BadRequestError, "messages"),
            ({"n": 9}, openai.UnprocessableEntityError, "n"),
            ({"extra_body": {"diffusion": {"steps": 1}}}, openai.UnprocessableEntityError, "diffusion.steps"),
            (
                {"extra_body": {"diffusion": {"shift_logits": True}}},
                openai.UnprocessableEntityError,
                "diffusion.shift_logits",
            ),
            (
                {"extra_body": {"diffusion": {"timeout_s": 0.01, "steps": 512}}, "max_tokens": 512},
                openai.InternalServerError,
                None,
            ),
        ],
        ids=str,
    )
    def test_what_cannot_be(self, client, more, error, param):
        with pytest.raises(error) as caught:
            client.with_options(max_retries=0).chat.completions.create(**({"model": "tiny", "messages": HELLO} | more))
        assert caught.value.param == param
