"""Answers, whole and streamed: the same texts, numbered alike, with usage that adds up."""

import math
from dataclasses import replace

import pytest
from serving_testing import answer

from dllm_ray.serving.calls import Call, Canvas, Done, Refused, Text
from dllm_ray.serving.description import ChatCompletion, TextCompletion
from dllm_ray.serving.errors import ApiError
from dllm_ray.serving.protocol import Asked
from dllm_ray.serving.replies import ChatReply, CompletionReply, Reply

DONE = Done(0, "Hi all", "stop", 5, 2, 4, 0.5, 1, ("Hi", " all"), (0.5, 0.25))


def asked(*prompts: str, n: int = 1, **how) -> Asked:
    call = Call(id="x", n=n, stream=how.get("stream", False), canvas=how.pop("canvas", False))
    return Asked(tuple(replace(call, prompt=prompt) for prompt in prompts), **how)


def ask_chat(**how) -> Asked:
    one = asked("", **how)
    return replace(one, calls=(replace(one.calls[0], prompt=None, messages=({"role": "user", "content": "a b c"},)),))


def made(kind: type[Reply], request: Asked) -> tuple[Reply, list[dict]]:
    """The reply when all is done, and the chunks of its stream."""
    reply = kind(request, "id", "model", 1)
    chunks = reply.opening()
    for number, call in enumerate(request.calls):
        for event in answer(call):
            assert not reply.is_complete
            chunks += reply.take(number, event)
    assert reply.is_complete
    return reply, chunks + reply.closing()


def joined(chunks: list[dict]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


def test_a_stream_says_what_a_whole_answer_says():
    whole, _ = made(ChatReply, ask_chat(n=2))
    _, chunks = made(ChatReply, ask_chat(n=2, stream=True))
    said = {choice["index"]: choice["message"]["content"] for choice in whole.body()["choices"]}
    assert joined(chunks) == said == {0: "You said: a b c #0", 1: "You said: a b c #1"}


def test_choices_are_numbered_over_prompts_and_texts():
    request = asked("p", "q", n=2, stream=True, echoes=("p", "q"))
    whole, chunks = made(CompletionReply, request)
    texts = {choice["index"]: choice["text"] for choice in whole.body()["choices"]}
    assert texts == {0: "pYou said: p #0", 1: "pYou said: p #1", 2: "qYou said: q #0", 3: "qYou said: q #1"}
    assert joined(chunks) == texts


def test_whole_answers_look_as_described():
    ChatCompletion.model_validate(made(ChatReply, ask_chat(n=2, logprobs=True))[0].body(), strict=True)
    ChatCompletion.model_validate(made(ChatReply, ask_chat())[0].body(), strict=True)
    TextCompletion.model_validate(made(CompletionReply, asked("a", logprobs=True))[0].body(), strict=True)


def test_each_text_of_a_stream_begins_with_its_role_and_ends_once():
    _, chunks = made(ChatReply, ask_chat(n=2, stream=True))
    for number in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == number]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert mine[-1]["finish_reason"] == "stop"


def test_a_text_that_was_not_sent_in_parts_is_sent_at_its_end():
    reply = ChatReply(ask_chat(stream=True), "id", "model", 1)
    chunks = reply.take(0, Text(0, "Hi", ("Hi",), (0.5,))) + reply.take(0, DONE)
    assert joined(chunks) == {0: "Hi all"}


def test_usage_is_told_at_the_end_of_a_stream_that_asks_for_it():
    _, chunks = made(ChatReply, ask_chat(stream=True, include_usage=True))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 13
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in made(ChatReply, ask_chat(stream=True))[1])


def test_usage_counts_a_prompt_once_and_adds_texts_up():
    reply = CompletionReply(asked("p", "q", n=2), "id", "model", 1)
    for number in (0, 1):
        for index in (0, 1):
            reply.take(number, replace(DONE, index=index, prompt_tokens=5 + number, seconds=0.5 + number))
    assert reply.usage() == {
        "prompt_tokens": 11,
        "completion_tokens": 8,
        "total_tokens": 19,
        "diffusion": {"nfe": 16, "tpf": 0.5, "tokens_per_s": 8 / 1.5},
    }


def test_usage_of_nothing_is_nothing():
    usage = ChatReply(ask_chat(), "id", "model", 1).usage()
    assert usage["total_tokens"] == 0 and usage["diffusion"]["tpf"] == 0


def test_logarithms_of_what_was_committed():
    reply = ChatReply(ask_chat(logprobs=True), "id", "model", 1)
    reply.take(0, DONE)
    told = reply.body()["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in told] == ["Hi", " all"]
    assert [item["logprob"] for item in told] == [math.log(0.5), math.log(0.25)]
    assert told[1]["bytes"] == list(b" all")
    assert told[0]["top_logprobs"] == []


@pytest.mark.parametrize(("confidence", "logprob"), [(0.0, -9999.0), (1.0, 0.0), (5e-324, math.log(5e-324))])
def test_logarithms_are_numbers(confidence, logprob):
    reply = ChatReply(ask_chat(logprobs=True), "id", "model", 1)
    reply.take(0, replace(DONE, tokens=("Hi",), confidences=(confidence,)))
    assert reply.body()["choices"][0]["logprobs"]["content"][0]["logprob"] == logprob


def test_what_is_no_probability_has_no_logarithm():
    reply = ChatReply(ask_chat(logprobs=True, measures_probability=False), "id", "model", 1)
    reply.take(0, replace(DONE, confidences=(-1.5, -0.5)))
    told = reply.body()["choices"][0]["logprobs"]["content"]
    assert [(item["logprob"], item["confidence"]) for item in told] == [(None, -1.5), (None, -0.5)]


def test_part_of_a_character_has_no_bytes():
    reply = ChatReply(ask_chat(logprobs=True), "id", "model", 1)
    reply.take(0, replace(DONE, tokens=("\ufffd",), confidences=(0.5,)))
    assert reply.body()["choices"][0]["logprobs"]["content"][0]["bytes"] is None


def test_offsets_go_on_through_a_stream():
    reply = CompletionReply(asked("p", logprobs=True, stream=True), "id", "model", 1)
    first = reply.take(0, Text(0, "Hi", ("Hi",), (0.5,)))[0]["choices"][0]["logprobs"]
    second = reply.take(0, Text(0, " all", (" a", "ll"), (0.5, 0.5)))[0]["choices"][0]["logprobs"]
    assert first["text_offset"] == [0] and second["text_offset"] == [2, 4]


def test_the_canvas_comes_in_chunks_without_choices():
    _, chunks = made(ChatReply, ask_chat(stream=True, canvas=True))
    canvases = [chunk["diffusion"] for chunk in chunks if "diffusion" in chunk]
    assert all(chunk["choices"] == [] for chunk in chunks if "diffusion" in chunk)
    assert canvases[0] | {"step": -1, "length": 6} == canvases[0]
    assert "".join(token for canvas in canvases for token in canvas["tokens"]) == "You said: a b c #0"
    assert set(canvases[0]) == {"event", "index", "step", "length", "positions", "tokens", "confidences", "kinds"}


def test_json_has_no_infinity():
    reply = ChatReply(ask_chat(stream=True, canvas=True), "id", "model", 1)
    (chunk,) = reply.take(0, Canvas(0, 0, 2, (0, 1), ("a", "b"), (float("-inf"), float("nan"))))
    assert chunk["diffusion"]["confidences"] == [None, None]


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        (Refused("invalid", "no", "diffusion.steps"), 422, "not_possible"),
        (Refused("too_long", "no", "messages"), 400, "context_length_exceeded"),
        (Refused("full", "no", retry_after_s=2.2), 429, "queue_full"),
        (Refused("draining", "no"), 503, "unavailable"),
        (Refused("failed", "no"), 503, "unavailable"),
        (replace(DONE, reason="deadline"), 504, "deadline_exceeded"),
        (replace(DONE, reason="cancelled"), 503, "unavailable"),
    ],
)
def test_what_ends_a_request(event, status, code):
    with pytest.raises(ApiError) as caught:
        ChatReply(ask_chat(), "id", "model", 1).take(0, event)
    error = caught.value
    assert (error.status, error.code, error.param) == (status, code, getattr(event, "field", None))
    if status == 429:
        assert error.headers == {"Retry-After": "3"}
        assert error.body()["error"]["type"] == "rate_limit_error"
