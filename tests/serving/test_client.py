"""The client reads what servers of OpenAI's API say, whole or cut anywhere, and puts their refusals into words."""

import asyncio
import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_testing import FACTS, FakeBackend, served, wait_for

from dllm_ray.errors import ConfigError, ServerError
from dllm_ray.serving.app import create_app
from dllm_ray.serving.calls import Canvas, Refused, Text
from dllm_ray.serving.client import API_KEY, Answer, AsyncClient, Client, StreamReader, chosen, request
from dllm_ray.serving.keys import digest
from dllm_ray.serving.settings import AppSettings

HELLO = [{"role": "user", "content": "hello there"}]
SAID = "You said: hello there #0"


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def url(backend):
    with served(create_app({"fake": backend}, AppSettings())) as address:
        yield address


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)


def answering(status: int, body: bytes, **headers: str) -> Client:
    """A client whose server always says the same."""
    transport = httpx2.MockTransport(lambda _: httpx2.Response(status, content=body, headers=headers))
    return Client("http://127.0.0.1:1", transport=transport)


def refused(client: Client) -> ServerError:
    with pytest.raises(ServerError) as found:
        list(client.chat(HELLO, "m"))
    return found.value


# --- answers


def test_a_conversation_is_answered_in_pieces_and_as_a_whole(url):
    with Client(url) as client:
        *pieces, answer = client.chat(HELLO, "fake")
        assert all(isinstance(piece, Text) for piece in pieces) and len(pieces) > 1
        assert "".join(piece.text for piece in pieces) == answer.text == SAID
        assert (answer.reason, answer.prompt_tokens, answer.completion_tokens, answer.nfe) == ("stop", 7, 5, 5)
        assert answer.tpf == 1.0 and answer.tokens_per_s == pytest.approx(10.0)
        assert list(client.chat(HELLO, "fake", stream=False)) == [answer]


def test_canvases_come_before_the_text_that_they_show(url):
    with Client(url) as client:
        pieces = list(client.chat(HELLO, "fake", canvas=True))
    canvases = [piece for piece in pieces if isinstance(piece, Canvas)]
    assert [canvas.step for canvas in canvases] == [-1, 0, 1, 2, 3, 4]
    assert canvases[0].length == 5 and canvases[0].positions == ()
    assert canvases[1].tokens == ("You",) and canvases[1].confidences == (0.5,) and canvases[1].kinds == ("write",)
    assert isinstance(pieces[-1], Answer)


def test_a_gap_and_tokens_are_asked_for_as_completions(url, backend):
    with Client(url) as client:
        list(client.complete("The ", "fake", " sat.", sampler={"max_new_tokens": 3}))
        assert (backend.calls[-1].prompt, backend.calls[-1].suffix, backend.calls[-1].max_tokens) == (
            "The ",
            " sat.",
            3,
        )
        [answer] = client.complete([5, 6], "fake", stream=False)
    assert backend.calls[-1].prompt == (5, 6) and answer.text == "You said: (5, 6) #0"


def test_settings_go_where_the_api_has_them(url, backend):
    sampler = {"max_new_tokens": 9, "temperature": 0.5, "seed": 4, "steps": 3, "threshold": None, "top_p": None}
    assert request("m", sampler, stop=["a"], canvas=True, timeout_s=2.5) == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 4,
        "stop": ["a"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "diffusion": {"steps": 3, "threshold": None, "top_p": None, "stream_canvas": True, "timeout_s": 2.5},
    }
    assert request("m", {"seed": None}, stream=False) == {"model": "m"}
    with Client(url) as client:
        list(client.chat(HELLO, "fake", sampler=sampler, stop=["there"]))
    call = backend.calls[-1]
    assert (call.max_tokens, call.seed, call.stop) == (9, 4, ("there",))
    assert call.sampler == {"temperature": 0.5, "steps": 3, "threshold": None, "top_p": None}


def test_models_are_told_with_their_facts(url):
    with Client(url + "/v1/") as client:
        [facts] = client.models()
        assert facts == FACTS and client.model() == client.model("fake") == FACTS
        with pytest.raises(ConfigError, match="the server has no model 'fak', only fake"):
            client.model("fak")
    with pytest.raises(ConfigError, match="say which of the server's models: none"):
        chosen([], None)


def test_the_async_client_is_the_same_and_leaving_cancels(url, backend):
    async def talk() -> None:
        async with AsyncClient(url) as client:
            assert await client.model() == FACTS
            pieces = [piece async for piece in client.chat(HELLO, "fake")]
            assert pieces[-1].text == SAID and isinstance(pieces[0], Text)
            [answer] = [piece async for piece in client.complete("x", "fake", stream=False)]
            assert answer.text == "You said: x #0"
            backend.pause_s = 0.05
            stream = client.chat(HELLO, "fake")
            assert (await anext(stream)).text == "You"
            await stream.aclose()

    closed = len(backend.closed)
    try:
        asyncio.run(talk())
        wait_for(lambda: len(backend.closed) == closed + 1)
    finally:
        backend.pause_s = 0.0


def test_leaving_a_stream_cancels_it(url, backend):
    closed = len(backend.closed)
    backend.pause_s = 0.05
    try:
        with Client(url) as client:
            stream = client.chat(HELLO, "fake")
            next(stream)
            stream.close()
        wait_for(lambda: len(backend.closed) == closed + 1)
    finally:
        backend.pause_s = 0.0


def event(**chunk) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


CANVAS = {"event": "canvas", "index": 0, "step": 0, "length": 2, "positions": [1], "tokens": ["é"]}
STREAM = (
    b": keep-alive\r\n\r\n"
    + event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    + event(choices=[], diffusion=CANVAS | {"confidences": [None], "kinds": []})
    + event(choices=[{"index": 0, "delta": {"content": "é\u2028\x85 🙂"}, "finish_reason": None}], usage=None)
    + event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}]).replace(b"\n", b"\r\n")
    + event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})
    + b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_a_stream_reads_the_same_however_it_is_cut(cuts):
    reader, pieces = StreamReader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(STREAM)], strict=True):
        pieces += reader.feed(STREAM[start:stop])
    canvas, text = pieces
    assert (canvas.step, canvas.tokens) == (0, ("é",)) and canvas.confidences[0] != canvas.confidences[0]
    assert text == Text(0, "é\u2028\x85 🙂")
    assert reader.answer() == Answer("é\u2028\x85 🙂", "length", 3, 2)


# --- what goes wrong


def test_a_stream_that_ends_too_early_is_no_answer():
    end = STREAM.index(b"data: [DONE]")
    assert "broke off" in str(refused(answering(200, STREAM[:end])))


def test_an_error_in_a_stream_is_told():
    error = {"message": "the model stopped answering", "type": "server_error", "param": None, "code": "unavailable"}
    found = refused(answering(200, STREAM[:-14] + event(error=error)))
    assert (str(found), found.code) == ("the model stopped answering", "unavailable")


@pytest.mark.parametrize("line", [b"data: {", b"data: []", b'data: {"choices": [3]}', b'data: {"choices": [{}], "x": '])
def test_a_stream_of_something_else_is_refused(line):
    assert "no event of OpenAI's API" in str(refused(answering(200, line + b"\n\ndata: [DONE]\n\n")))


def test_a_refusal_names_what_is_wrong(url):
    with Client(url) as client, pytest.raises(ServerError) as found:
        list(client.chat(HELLO, "fake", sampler={"stepz": 3}))
    assert found.value.status == 400 and "diffusion.stepz: unknown parameter" in str(found.value)
    with Client(url) as client, pytest.raises(ServerError) as found:
        list(client.chat(HELLO, "gone"))
    assert found.value.status == 404


def test_a_full_server_says_when_to_try_again():
    full = FakeBackend(lambda _: [Refused("full", "too many requests are waiting", retry_after_s=2.0)])
    with served(create_app({"fake": full}, AppSettings())) as address, Client(address) as client:
        found = refused(client)
    assert (found.status, found.retry_after_s) == (404, None)
    with served(create_app({"m": full}, AppSettings())) as address, Client(address) as client:
        found = refused(client)
    assert (found.status, found.retry_after_s) == (429, 2.0) and str(found).endswith("(try again in 2 s)")


def test_keys_come_from_the_environment_and_are_never_shown(monkeypatch):
    app = create_app({"fake": FakeBackend()}, AppSettings(api_keys=(digest("sesame"),)))
    with served(app) as address:
        with pytest.raises(ServerError, match=API_KEY) as found, Client(address) as client:
            client.models()
        assert found.value.status == 401
        monkeypatch.setenv(API_KEY, "sesame")
        with Client(address) as client:
            assert client.model().name == "fake"
    monkeypatch.setenv(API_KEY, "ses\name")
    with pytest.raises(ConfigError) as found:
        Client("http://127.0.0.1:1")
    assert "name" not in str(found.value) and API_KEY in str(found.value)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://h:x", "http://h/?a", "http://h\n"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="url: expected the address of a server"):
        Client(url)


def test_a_server_that_is_not_there_is_one_sentence():
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(ServerError, match=r"no server answers at http://127.0.0.1:9/v1: start one with jobs/serve"):
            client.models()
        assert "no server answers" in str(refused(client))


def test_a_silent_server_is_given_up():
    slow = FakeBackend(lambda _: [5.0])
    with served(create_app({"m": slow}, AppSettings())) as address, Client(address, timeout_s=0.2) as client:
        assert "has been silent" in str(refused(client))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (502, b"<html>bad gateway</html>", "answers 502: <html>bad gateway</html>"),
        (404, b"", "answers 404 (is it the address of a server of jobs/serve.py?)"),
        (302, b"elsewhere", "answers 302 (is it"),
        (500, b'{"error": "oops"}', 'answers 500: {"error": "oops"}'),
        (500, b"\xff" * 5000, "..."),
    ],
)
def test_answers_of_other_servers_are_quoted(status, body, said):
    found = refused(answering(status, body))
    assert said in str(found) and found.status == status and len(str(found)) < 500


def test_what_is_no_list_of_models_is_refused():
    for body in (b"hi", b"[]", b'{"data": [3]}', b'{"data": [{}]}'):
        with pytest.raises(ServerError, match="no list of models"):
            answering(200, body).models()
    with pytest.raises(ServerError, match="no answer of OpenAI's API"):
        list(answering(200, b'{"choices": []}').chat(HELLO, "m", stream=False))


def test_other_servers_of_the_api_do_without_facts():
    [facts] = answering(200, b'{"data": [{"id": "gpt"}]}').models()
    assert (facts.name, facts.sampler, facts.can_chat) == ("gpt", {}, True)
