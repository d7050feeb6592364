"""What stands around the app in a process of Ray Serve: who is let in, ids, and ports that several processes share."""

import asyncio
import socket

import httpx2
import pytest

from dllm_ray.serving.ingress import OneRequestId, serve_on
from dllm_ray.serving.middleware import LoopbackOnly, PerRequest


async def app(scope, receive, send) -> None:
    """Answers with its own copy of the request's id, and another header."""
    headers = [header for header in scope["headers"] if header[0] == b"x-request-id"]
    await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"x-other", b"1")]})
    await send({"type": "http.response.body", "body": b"hello"})


def answer(wrapped, client: tuple[str, int] | None, *headers: tuple[bytes, bytes]) -> list[dict]:
    """The messages that answer one request."""
    sent = []

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "client": client, "headers": list(headers), "method": "GET", "path": "/"}
    asyncio.run(wrapped(scope, None, send))
    return sent


@pytest.mark.parametrize("client", [("127.0.0.1", 1), ("::1", 1), ("127.8.8.8", 9)])
def test_the_own_machine_is_let_in(client):
    assert answer(PerRequest(LoopbackOnly(app)), client)[0]["status"] == 200


@pytest.mark.parametrize("client", [("192.0.2.7", 1), ("2001:db8::1", 1), ("", 0), None])
def test_others_are_kept_out_and_told_why(client):
    start, body = answer(PerRequest(LoopbackOnly(app)), client, (b"x-forwarded-for", b"127.0.0.1"))
    assert start["status"] == 403
    assert b"API keys" in body["body"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:8000", 200),
        (b"[::1]:8000", 200),
        (b"localhost:8000", 200),
        (socket.gethostname().encode(), 200),
        (b"evil.example.org:8000", 403),
        (b"127.0.0.1.evil.example.org", 403),
        (b"", 403),
        (b"a]b[", 403),
        (b"[::1", 403),
    ],
)
def test_a_page_whose_name_leads_here_is_kept_out(host, status):
    assert answer(PerRequest(LoopbackOnly(app)), ("127.0.0.1", 1), (b"host", host))[0]["status"] == status


def test_one_request_id_is_left_to_the_proxy_and_another_one_kept():
    same = answer(OneRequestId(app), None, (b"x-request-id", b"mine"))[0]["headers"]
    assert same == [(b"x-other", b"1")]

    async def own(scope, receive, send) -> None:
        await app(scope | {"headers": [(b"x-request-id", b"another")]}, receive, send)

    kept = answer(OneRequestId(own), None, (b"x-request-id", b"not valid"))[0]["headers"]
    assert (b"x-request-id", b"another") in kept


def test_a_new_process_listens_before_the_old_one_stops():
    async def hand_over() -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        old, old_task = serve_on(app, "127.0.0.1", port, 5.0)
        new, new_task = serve_on(app, "127.0.0.1", port, 5.0)
        old.should_exit = True
        await old_task
        async with httpx2.AsyncClient() as client:
            said = [(await client.get(f"http://127.0.0.1:{port}/")).text for _ in range(3)]
        new.should_exit = True
        await new_task
        return said

    assert asyncio.run(hand_over()) == ["hello"] * 3
