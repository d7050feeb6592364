"""The HTTP API: what it lets in, how it answers, and that nothing gets out or is left behind when things go wrong."""

import json
import logging
import re
import socket
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from serving_testing import FACTS, FakeBackend, answer, served, wait_for
from starlette.testclient import TestClient

from dllm_ray.serving import app as app_module
from dllm_ray.serving import sending
from dllm_ray.serving.app import AppSettings, create_app
from dllm_ray.serving.calls import Done, Refused, Text
from dllm_ray.serving.description import Failed
from dllm_ray.serving.keys import digest

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
DONE = Done(0, "Hi", "stop", 5, 1, 1, 0.5, 1, ("Hi",), (0.5,))


def client(*backends: FakeBackend, observe=None, **settings) -> TestClient:
    named = {backend.facts.name: backend for backend in backends or (FakeBackend(),)}
    return TestClient(create_app(named, AppSettings(**settings), observe), raise_server_exceptions=False)


def events(text: str) -> list:
    """The data of server-sent events."""
    return [
        line if line == "[DONE]" else json.loads(line)
        for line in (part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: "))
    ]


def error_of(response) -> dict:
    """The error of an answer in OpenAI's form."""
    assert response.headers["content-type"] == "application/json"
    Failed.model_validate(response.json(), strict=True)
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def script(*steps):
    """A backend that gives these for every call."""
    return FakeBackend(lambda call: steps)


def head(length: str) -> bytes:
    """What comes before the body of a chat request."""
    return f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()


@contextmanager
def raw(url: str, body: dict):
    """A connection that has asked for a chat answer, and nothing else."""
    port = int(url.rpartition(":")[2])
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(f"Content-Length: {len(content)}") + content)
        yield connection


class TestAnswers:
    def test_a_whole_answer(self):
        response = client().post(CHAT, json=HELLO)
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == "You said: Hello #0"
        assert response.json()["model"] == "fake"

    def test_a_stream(self):
        response = client().post(CHAT, json=HELLO | {"stream": True})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        *chunks, end = events(response.text)
        assert end == "[DONE]"
        said = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
        assert "".join(said) == "You said: Hello #0"

    def test_text_of_any_language_is_streamed_as_it_is(self):
        response = client(script(Text(0, "日本\n\n🙂\u2028"), replace(DONE, text="日本\n\n🙂\u2028"))).post(
            CHAT, json=HELLO | {"stream": True}
        )
        assert "日本" in response.text
        assert events(response.text)[1]["choices"][0]["delta"]["content"] == "日本\n\n🙂\u2028"

    def test_text_is_sent_when_it_is_there(self):
        backend = FakeBackend(lambda call: (Text(0, "Hi"), 30, DONE))
        with served(create_app({"fake": backend})) as url, raw(url, HELLO | {"stream": True}) as connection:
            got = b""
            while b"Hi" not in got:
                got += connection.recv(65536)

    def test_a_slow_reader_misses_nothing(self):
        words = [f" word{number}" * 50 for number in range(400)]
        backend = script(*(Text(0, word) for word in words), replace(DONE, text="".join(words)))
        response = client(backend).post(CHAT, json=HELLO | {"stream": True})
        chunks = [event["choices"][0]["delta"].get("content", "") for event in events(response.text)[:-1]]
        assert chunks[1:-1] == words

    def test_several_prompts_are_asked_at_once(self):
        backend = FakeBackend(lambda call: (0.3, *answer(call)))
        began = time.perf_counter()
        response = client(backend).post("/v1/completions", json={"prompt": ["a", "b", "c", "d"], "n": 2})
        assert time.perf_counter() - began < 1
        assert [choice["index"] for choice in response.json()["choices"]] == list(range(8))
        assert response.json()["choices"][5]["text"] == "You said: c #1"

    def test_models_are_listed_with_what_can_be_set(self):
        other = replace(FACTS, name="org/other")
        here = client(FakeBackend(), FakeBackend(facts=other))
        listed = here.get("/v1/models").json()
        assert [item["id"] for item in listed["data"]] == ["fake", "org/other"]
        assert listed["data"][0]["diffusion"]["sampler"] == FACTS.sampler
        assert here.get("/v1/models/org/other").json() == listed["data"][1]
        assert here.get("/v1/models/org%2Fother").json() == listed["data"][1]
        assert error_of(here.get("/v1/models/none"))["code"] == "model_not_found"

    def test_the_model_that_is_asked_for_answers(self):
        one, two = FakeBackend(), FakeBackend(facts=replace(FACTS, name="two"))
        here = client(one, two)
        assert here.post(CHAT, json=HELLO | {"model": "two"}).json()["model"] == "two"
        assert (len(one.calls), len(two.calls)) == (0, 1)
        assert error_of(here.post(CHAT, json=HELLO))["param"] == "model"
        assert client(one, two, default_model="two").post(CHAT, json=HELLO).json()["model"] == "two"
        assert here.post(CHAT, json=HELLO | {"model": "three"}).status_code == 404

    def test_models_come_and_go(self):
        backends = {}
        here = TestClient(create_app(backends))
        assert here.post(CHAT, json=HELLO | {"model": "fake"}).status_code == 404
        backends["fake"] = FakeBackend()
        assert here.post(CHAT, json=HELLO | {"model": "fake"}).status_code == 200


class TestErrors:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v1/nothing", 404),
            ("POST", "/v1", 404),
            ("GET", "/v1/", 404),
            ("GET", "/docs", 404),
            ("GET", CHAT, 405),
            ("DELETE", "/v1/models", 405),
            ("OPTIONS", CHAT, 405),
            ("PUT", "/healthz", 405),
        ],
    )
    def test_addresses_and_methods(self, method, path, status):
        response = client().request(method, path)
        assert response.status_code == status
        assert error_of(response)["type"] == "invalid_request_error"
        assert status != 405 or response.headers["allow"]

    @pytest.mark.parametrize(
        "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
    )
    def test_a_body_must_be_called_json(self, content_type):
        headers = {"content-type": content_type} if content_type else {}
        response = client().post(CHAT, content=json.dumps(HELLO), headers=headers)
        assert response.status_code == 415
        assert error_of(response)["code"] == "unsupported_media_type"

    def test_json_may_have_a_charset(self):
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        assert client().post(CHAT, content=json.dumps(HELLO), headers=headers).status_code == 200

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": NaN}', b'{"n": 1e999}'])
    def test_bad_bodies(self, body):
        response = client().post(CHAT, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        error_of(response)

    def test_a_body_that_is_too_large(self):
        big = {"messages": [{"role": "user", "content": "x" * 2000}]}
        here = client(max_body_bytes=1000)
        assert error_of(here.post(CHAT, json=big))["code"] == "request_too_large"
        assert here.post(CHAT, json=HELLO).status_code == 200

    def test_a_body_that_does_not_tell_its_size_is_measured(self):
        with served(create_app({"fake": FakeBackend()}, AppSettings(max_body_bytes=1000))) as url:
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(head("Transfer-Encoding: chunked"))
                for _ in range(40):
                    connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                connection.sendall(b"0\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")

    def test_a_body_that_never_comes(self, monkeypatch):
        monkeypatch.setattr(app_module, "_BODY_S", 0.2)
        with served(create_app({"fake": FakeBackend()})) as url:
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                head = (
                    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
                )
                connection.sendall(head.encode())
                assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("refused", "status"),
        [
            (Refused("invalid", "can't be", "diffusion.steps"), 422),
            (Refused("too_long", "too long", "messages"), 400),
            (Refused("full", "wait", retry_after_s=7.5), 429),
            (Refused("draining", "going", retry_after_s=1), 503),
            (Refused("failed", "broken"), 503),
        ],
    )
    def test_what_a_replica_refuses_has_its_status_also_when_a_stream_was_asked_for(self, refused, status, stream):
        response = client(script(refused)).post(CHAT, json=HELLO | {"stream": stream})
        assert response.status_code == status
        error = error_of(response)
        assert (error["message"], error["param"]) == (refused.message, refused.field)
        assert response.headers.get("retry-after") == {"full": "8", "draining": "1"}.get(refused.kind)

    def test_one_prompt_refused_ends_the_others(self):
        backend = FakeBackend(lambda call: (Refused("full", "wait"),) if call.prompt == "b" else (30, *answer(call)))
        response = client(backend).post("/v1/completions", json={"prompt": ["a", "b", "c"]})
        assert response.status_code == 429
        assert len(backend.closed) == 2

    @pytest.mark.parametrize("steps", [(RuntimeError("secret /etc/passwd"),), (Text(0, "Hi"), RuntimeError("secret"))])
    def test_defects_do_not_get_out(self, steps, caplog):
        response = client(script(*steps)).post(CHAT, json=HELLO)
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal_error"
        assert "secret" not in response.text and "Traceback" not in response.text
        assert response.headers["x-request-id"] in response.json()["error"]["message"]
        assert "secret" in caplog.text and response.headers["x-request-id"] in caplog.text

    @pytest.mark.parametrize(
        ("last", "code"),
        [
            (RuntimeError("secret"), "internal_error"),
            (Refused("failed", "broken"), "unavailable"),
            (replace(DONE, reason="deadline"), "deadline_exceeded"),
        ],
    )
    def test_what_goes_wrong_in_a_stream_is_an_event_that_ends_it(self, last, code):
        response = client(script(Text(0, "Hi"), last)).post(CHAT, json=HELLO | {"stream": True})
        assert response.status_code == 200
        *_, end = events(response.text)
        assert end["error"]["code"] == code
        assert "secret" not in response.text

    @pytest.mark.parametrize("steps", [(), (Text(0, "Hi"),), (DONE,)])
    def test_a_backend_that_stops_early(self, steps):
        body = HELLO | {"n": 2}
        assert client(script(*steps)).post(CHAT, json=body).status_code == 503
        response = client(script(*steps)).post(CHAT, json=body | {"stream": True})
        assert response.status_code == 503 or events(response.text)[-1]["error"]["code"] == "unavailable"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_backend_that_forgets_the_time_is_given_up(self, stream, monkeypatch):
        monkeypatch.setattr(sending, "_GRACE_S", 0.1)
        backend = script(30, DONE)
        body = HELLO | {"stream": stream, "diffusion": {"timeout_s": 0.1}}
        response = client(backend).post(CHAT, json=body)
        assert response.status_code == 504
        assert error_of(response)["code"] == "deadline_exceeded"
        assert backend.closed == [backend.calls[0].id]

    def test_a_stream_that_forgets_the_time_is_ended(self, monkeypatch):
        monkeypatch.setattr(sending, "_GRACE_S", 0.1)
        backend = script(Text(0, "Hi"), 30, DONE)
        response = client(backend, request_timeout_s=0.1).post(CHAT, json=HELLO | {"stream": True})
        assert events(response.text)[-1]["error"]["code"] == "deadline_exceeded"
        assert backend.closed == [backend.calls[0].id]

    def test_no_answer_in_time(self):
        response = client(script(replace(DONE, reason="deadline"))).post(CHAT, json=HELLO)
        assert response.status_code == 504


class TestKeys:
    def test_a_key_is_needed_where_there_are_some(self):
        here = client(api_keys=(digest("one"), digest("two")))
        for path in ("/v1/models", "/v1/models/fake"):
            assert here.get(path).status_code == 401
        response = here.post(CHAT, json=HELLO)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["code"] == "invalid_api_key"
        assert here.post(CHAT, json=HELLO, headers={"authorization": "Bearer three"}).status_code == 401
        for key in ("one", "two"):
            assert here.post(CHAT, json=HELLO, headers={"authorization": f"Bearer {key}"}).status_code == 200

    def test_a_body_is_not_read_before_the_key(self):
        response = client(api_keys=(digest("one"),), max_body_bytes=10).post(CHAT, json=HELLO)
        assert response.status_code == 401

    def test_health_page_and_description_are_open(self):
        here = client(api_keys=(digest("one"),))
        for path in ("/healthz", "/openapi.json", "/"):
            assert here.get(path).status_code == 200

    def test_clients_are_told_apart_by_key(self):
        backend = FakeBackend()
        here = client(backend, api_keys=(digest("one"), digest("two")))
        for key in ("one", "two", "one"):
            here.post(CHAT, json=HELLO, headers={"authorization": f"Bearer {key}"})
        one, two, again = (call.client for call in backend.calls)
        assert one == again != two


class TestEveryRequest:
    @pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/nothing", "/healthz"])
    def test_headers_for_browsers(self, path):
        headers = client().get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers

    def test_what_is_answered_is_not_kept(self):
        assert client().post(CHAT, json=HELLO).headers["cache-control"] == "no-store"

    def test_ids_are_taken_over_or_made(self):
        backend = FakeBackend()
        here = client(backend)
        assert here.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        made = {here.get("/healthz").headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3 and all(re.fullmatch(r"req-[0-9a-f]{32}", item) for item in made)
        here.post(CHAT, json=HELLO, headers={"x-request-id": "mine-2"})
        assert backend.calls[0].id == "mine-2"

    @pytest.mark.parametrize("given", ["", "a b", 'a"b', "a" * 129, "ä", "a\tb"])
    def test_ids_that_could_do_harm_are_not_taken_over(self, given):
        response = client().get("/healthz", headers={"x-request-id": given.encode()})
        assert response.headers["x-request-id"].startswith("req-")

    def test_each_leaves_a_line_of_json_in_the_log(self, caplog):
        caplog.set_level(logging.INFO, "dllm_ray.serving")
        here = client()
        here.post(CHAT, json=HELLO | {"n": 2}, headers={"x-request-id": "a"})
        here.get("/nothing?key=secret", headers={"x-request-id": "b"})
        first, second = (json.loads(record.message) for record in caplog.records if record.name == "dllm_ray.serving")
        assert first | {"request_id": "a", "status": 200, "outcome": "answered", "model": "fake", "texts": 2} == first
        assert (first["prompt_tokens"], first["completion_tokens"], first["nfe"]) == (7, 8, 8)
        assert first["seconds"] > 0
        assert second | {"request_id": "b", "status": 404, "outcome": "not_found", "path": "/nothing"} == second
        assert "secret" not in caplog.text and "Hello" not in caplog.text

    def test_metrics_are_told_of_each(self):
        told = []
        here = client(observe=told.append)
        here.post(CHAT, json=HELLO | {"stream": True})
        here.post(CHAT, json={})
        assert [(item.status, item.outcome) for item in told] == [
            (200, "answered"),
            (400, "missing_required_parameter"),
        ]
        assert 0 < told[0].first_text_s < told[0].seconds

    def test_other_origins_are_kept_out_unless_let_in(self):
        asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in client().options(CHAT, headers=asks).headers
        here = client(cors_origins=("https://a.example",), api_keys=(digest("one"),))
        assert here.options(CHAT, headers=asks).headers["access-control-allow-origin"] == "https://a.example"
        assert here.options(CHAT, headers=asks | {"origin": "https://b.example"}).status_code == 400
        refused = here.post(CHAT, json=HELLO, headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"


class TestHealth:
    def test_all_models_ready(self):
        assert client().get("/healthz").json() == {"status": "ok"}

    def test_one_that_is_not(self):
        late = FakeBackend(facts=replace(FACTS, name="late"))
        late.is_ready = False
        response = client(FakeBackend(), late).get("/healthz")
        assert response.status_code == 503
        error_of(response)

    def test_one_that_cannot_be_asked(self):
        broken = FakeBackend()
        broken.ready = None
        assert client(broken).get("/healthz").status_code == 503


class TestLeaving:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_ends_its_call(self, stream):
        backend = FakeBackend(lambda call: (Text(0, "Hi"), 30, DONE))
        told = []
        with served(create_app({"fake": backend}, observe=told.append)) as url:
            with raw(url, HELLO | {"stream": stream}):
                wait_for(lambda: backend.calls)
                assert not backend.closed
            wait_for(lambda: backend.closed)
            wait_for(lambda: told)
        assert told[0].outcome == "cancelled"
        assert told[0].status in (200, 499)

    def test_a_client_that_leaves_before_there_is_anything_to_send(self):
        backend = script(30, DONE)
        with served(create_app({"fake": backend})) as url:
            with raw(url, HELLO | {"stream": True}):
                wait_for(lambda: backend.calls)
            wait_for(lambda: backend.closed)

    def test_a_client_that_leaves_in_the_middle_of_its_body(self):
        told = []
        with served(create_app({"fake": FakeBackend()}, observe=told.append)) as url:
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                head = (
                    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
                )
                connection.sendall(head.encode())
                time.sleep(0.1)
            wait_for(lambda: told)
        assert (told[0].status, told[0].outcome) == (499, "cancelled")

    def test_those_who_stay_are_answered(self):
        told = []
        lingers = FakeBackend(lambda call: (*answer(call), 30))  # it is left when all was said
        with served(create_app({"fake": lingers}, observe=told.append)) as url:
            for stream in (False, True):
                with raw(url, HELLO | {"stream": stream}) as connection:
                    got = b""
                    while b"#0" not in got:
                        got += connection.recv(65536)
            wait_for(lambda: len(told) == 2)
        assert [item.outcome for item in told] == ["answered"] * 2

    def test_a_client_that_does_not_read_is_left_at_the_end_of_its_time(self, monkeypatch):
        monkeypatch.setattr(sending, "_GRACE_S", 0.2)
        backend = FakeBackend(lambda call: (Text(0, "x" * 500_000) for _ in range(10_000)), pause_s=0.01)
        told = []
        app = create_app({"fake": backend}, AppSettings(request_timeout_s=0.5), told.append)
        with served(app) as url, raw(url, HELLO | {"stream": True}):
            wait_for(lambda: told)
            assert backend.closed

    def test_a_slow_stream_is_kept_alive(self, monkeypatch):
        monkeypatch.setattr(sending, "_FIRST_S", 0.05)
        backend = script(0.5, Text(0, "Hi"), 0.5, DONE)
        response = client(backend, keepalive_s=0.1).post(CHAT, json=HELLO | {"stream": True})
        comments = [part for part in response.text.split("\n\n") if part.startswith(":")]
        assert len(comments) >= 4
        assert events(response.text)[-1] == "[DONE]"


class TestPage:
    def test_it_is_at_the_root_with_its_files(self):
        here = client()
        page = here.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        names = re.findall(r'(?:src|href)="/?page/([^"]+)"', page.text)
        assert names
        types = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
        for name in names:
            file = here.get(f"/page/{name}")
            assert file.status_code == 200
            assert file.headers["content-type"] == types[name.rpartition(".")[2]]

    def test_a_browser_that_has_it_already_is_told_so(self):
        here = client()
        tag = here.get("/").headers["etag"]
        again = here.get("/", headers={"if-none-match": tag})
        assert (again.status_code, again.content, again.headers["cache-control"]) == (304, b"", "no-cache")
        assert here.get("/", headers={"if-none-match": '"other"'}).status_code == 200

    @pytest.mark.parametrize(
        "path",
        ["/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd"],
    )
    def test_nothing_else_can_be_reached(self, path):
        response = client().get(path)
        assert response.status_code == 404
        error_of(response)


def test_the_description_names_requests_answers_and_errors():
    told = client().get("/openapi.json").json()
    assert set(told["paths"]) == {CHAT, "/v1/completions", "/v1/models", "/v1/models/{name}", "/healthz"}
    body = told["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    known = told["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "DiffusionOptions", "ChatCompletion", "Failed"} <= set(known)
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(told)))
    assert used <= set(known)
    assert {"400", "401", "404", "413", "422", "429", "503", "504"} <= set(told["paths"][CHAT]["post"]["responses"])
