"""The processes that speak HTTP and hand calls to the models' replicas, wherever these are.

On a cluster Ray Serve's proxies listen, on every node. On a Ray of our own an ingress listens itself: a proxy in front
of it would cost some four milliseconds of a core for each request.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import uvicorn
from ray import serve
from ray.serve.handle import DeploymentHandle

from dllm_ray.serving.metrics import RequestMetrics
from dllm_ray.serving.middleware import LOGGER
from dllm_ray.serving.remote import RemoteModel
from dllm_ray.serving.settings import AppSettings

_KEEP_ALIVE_S = 90
_PATIENCE_S = 60.0  # that a model which doesn't come up keeps the others waiting
_LOG_BYTES = 100 * 1024 * 1024
_LOGS_KEPT = 5


@serve.ingress()
class Ingress:
    """One process that speaks HTTP.

    Args:
        settings: of the API.
        handles: the models' deployments by the names that clients know.
        rooms: most calls that all replicas of each model take.
        insecure: answer other machines without API keys.
        listen: host and port to listen on; None: behind Serve's proxies.
        drain_s: seconds that requests under way may take when it leaves.
    """

    async def __init__(
        self,
        settings: AppSettings,
        handles: Mapping[str, DeploymentHandle],
        rooms: Mapping[str, int],
        insecure: bool,
        listen: tuple[str, int] | None,
        drain_s: float,
    ):
        self._settings = settings
        self._models = {name: RemoteModel(name, handle, rooms[name]) for name, handle in handles.items()}
        self._is_private = not settings.api_keys and not insecure
        self._listen = listen
        self._drain_s = drain_s
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task | None = None
        self._is_leaving = False
        for model in self._models.values():
            model.watch()
        await asyncio.wait([asyncio.create_task(model.known()) for model in self._models.values()], timeout=_PATIENCE_S)

    def __serve_build_asgi_app__(self):
        from dllm_ray.serving.app import create_app

        _log_requests()
        app = create_app(self._models, self._settings, RequestMetrics(), self._is_private)
        if self._listen is None:
            app.add_middleware(OneRequestId)
        if self._listen is not None:
            self._server, self._serving = serve_on(app, *self._listen, self._drain_s)
        return app

    async def check_health(self) -> None:
        """Serve replaces an ingress for which this raises."""
        if self._serving is not None and self._serving.done() and not self._is_leaving:
            raise RuntimeError("it listens no longer")

    async def leave(self) -> None:
        """Takes no more requests, and waits for those under way. The models must be there until then."""
        self._is_leaving = True
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.wait({self._serving}, timeout=self._drain_s)

    async def __del__(self):
        await self.leave()


def _log_requests() -> None:
    """The app's own log, a JSON object a line for each request, goes to a file of its own beside Serve's."""
    if LOGGER.handlers:
        return
    LOGGER.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.serve").handlers:
        file = getattr(getattr(handler, "target", handler), "baseFilename", None)
        if file is not None:
            path = Path(file).with_name(f"requests_{os.getpid()}.jsonl")
            LOGGER.addHandler(RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOGS_KEPT))
            LOGGER.propagate = False
            return


def serve_on(app, host: str, port: int, drain_s: float) -> tuple[uvicorn.Server, asyncio.Task]:
    """Serves an app in the running event loop, beside other processes that listen on the same port.

    Args:
        app: the app.
        host: address to listen on.
        port: port to listen on.
        drain_s: seconds that requests under way may take when it ends.

    Returns:
        The server, which ends when its `should_exit` is set, and the task that it runs in.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, reuse_port=True, backlog=2048)
    config = uvicorn.Config(
        app,
        lifespan="off",  # Serve runs it
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(drain_s),
    )
    server = uvicorn.Server(config)
    return server, asyncio.get_running_loop().create_task(server.serve([listener]))


class OneRequestId:
    """Leaves out the app's `X-Request-Id`, as Serve's proxy adds the same."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        repeated = [tuple(header) for header in scope["headers"] if header[0] == b"x-request-id"]

        async def once(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message.get("headers", ()) if tuple(header) not in repeated]
                message = message | {"headers": headers}
            await send(message)

        await self._app(scope, receive, once)
