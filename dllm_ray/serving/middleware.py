"""What happens to every request, whichever it is: an id, headers, a line in the log, and no defect that gets out."""

import ipaddress
import json
import logging
import re
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllm_ray.serving.config import is_loopback
from dllm_ray.serving.errors import ApiError

LOGGER = logging.getLogger("dllm_ray.serving")
"""One JSON object a request, at level INFO."""

SECURITY = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of every answer."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY = "dllm_ray.served"  # of the record, in the scope
CLIENT_LEFT = 499
"""Status in logs, as nginx has it, of a request whose client went away before the answer began."""


@dataclass
class Served:
    """What is known of a request when it has been answered; for logs and metrics."""

    request_id: str
    method: str
    path: str
    """Without its query."""
    client: str = ""
    """Who asked: a name for the API key, or the address."""
    status: int = CLIENT_LEFT
    outcome: str = "answered"
    """`answered`, `cancelled` (the client went away), or the code of an error, also of one inside a stream."""
    model: str | None = None
    stream: bool = False
    texts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nfe: int = 0
    """Forwards, summed over texts."""
    first_text_s: float | None = None
    """From the request's arrival to its first text; of a stream."""
    seconds: float = 0.0
    """From its arrival to the end of its answer."""
    began: float = field(default_factory=time.perf_counter, repr=False)


Observe = Callable[[Served], None]


def served(scope: Scope) -> Served:
    """The record of a request."""
    return scope[_KEY]


class PerRequest:
    """ASGI middleware around everything.

    Args:
        app: what answers.
        observe: told of each request after it was answered.
    """

    def __init__(self, app: ASGIApp, observe: Observe | None = None):
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_KEY] = Served(_id(scope), scope["method"], scope["path"], _address(scope))
        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                for name, value in SECURITY.items():
                    headers[name] = value
                if "cache-control" not in headers:
                    headers["cache-control"] = "no-store"
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            LOGGER.exception(json.dumps({"request_id": record.request_id, "error": "a defect"}))
            record.outcome = "internal_error"
            if not has_begun:
                error = ApiError(500, f"a defect of the server; its log tells of it under {record.request_id}")
                await error.response()(scope, receive, send_with_headers)
        except BaseException:  # cancelled from outside, where the server does that when a client leaves
            record.outcome = "cancelled"
            raise
        finally:
            record.seconds = time.perf_counter() - record.began
            self._tell(record)

    def _tell(self, record: Served) -> None:
        line = {"time": round(time.time(), 3)} | asdict(record)
        del line["began"]
        LOGGER.info(json.dumps(line | {"seconds": round(record.seconds, 4)}))
        if self._observe is not None:
            self._observe(record)


def _id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""


class LoopbackOnly:
    """Keeps other machines out of a server without API keys, on whatever address it listens; and pages of other sites,
    whose names may be made to lead here (DNS rebinding): a browser says in `Host` which name it followed."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_here = is_loopback(_address(scope))
        if scope["type"] != "http" or (is_here and _is_own_name(Headers(scope=scope).get("host", "localhost"))):
            await self._app(scope, receive, send)
            return
        error = ApiError(403, "this server has no API keys: it answers its own machine only, by a name of its own")
        served(scope).outcome = error.code
        await error.response()(scope, receive, send)


def _is_own_name(host: str) -> bool:
    """Whether a `Host` header can't be another site's name: an address, `localhost`, or what this machine is called."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # no name at all
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", socket.gethostname().lower())
    return True
