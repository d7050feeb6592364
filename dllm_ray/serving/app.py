"""The HTTP API: OpenAI's, in front of models by name, and the chat page."""

import asyncio
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from dllm_ray.serving import protocol
from dllm_ray.serving.backend import Backend
from dllm_ray.serving.calls import ModelFacts
from dllm_ray.serving.description import ChatCompletion, Health, Model, Models, TextCompletion, answers, describe, takes
from dllm_ray.serving.errors import ApiError
from dllm_ray.serving.keys import holder
from dllm_ray.serving.middleware import CLIENT_LEFT, LoopbackOnly, Observe, PerRequest, Served, served
from dllm_ray.serving.page_files import read_page
from dllm_ray.serving.replies import ChatReply, CompletionReply
from dllm_ray.serving.sending import Answer
from dllm_ray.serving.settings import AppSettings

__all__ = ["AppSettings", "Backend", "Served", "create_app"]

_BODY_S = 60.0  # for the body of a request to arrive
_DRAIN = 16 * 1024 * 1024  # bytes of a body that is too large which are read all the same, so that the answer is read
_READY_S = 5.0


def create_app(
    backends: Mapping[str, Backend],
    settings: AppSettings | None = None,
    observe: Observe | None = None,
    is_private: bool = False,
) -> FastAPI:
    """The API.

    Args:
        backends: the models by the names that clients know; looked up at each request.
        settings: of the API.
        observe: told of each request after it was answered.
        is_private: answer this machine only.
    """
    settings = settings or AppSettings()
    app = FastAPI(title="dllm_ray", version=version("dllm-ray"), docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(_api(backends, settings))
    app.include_router(_open(backends))
    describe(app, protocol.ChatRequest, protocol.CompletionRequest)
    for kind, handler in ((ApiError, _api_error), (HTTPException, _http_error), (ClientDisconnect, _client_left)):
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(RequestValidationError, _invalid)
    if is_private:
        app.add_middleware(LoopbackOnly)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(PerRequest, observe=observe)  # the outermost
    return app


def _api(backends: Mapping[str, Backend], settings: AppSettings) -> APIRouter:
    """What needs a key."""

    def check_key(request: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> None:
        given = request.headers.get("authorization")
        who = holder(given, settings.api_keys)
        if who is None:
            what = "that key is not known" if given else "an API key is needed"
            message = f"{what}: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        served(request.scope).client = who

    def find(name: str | None) -> tuple[str, Backend]:
        name = name if name is not None else settings.default_model
        if name is None and len(backends) == 1:
            name = next(iter(backends))
        if name is None:
            raise ApiError(400, "model: is needed, as there are several", "model", "missing_required_parameter")
        if name not in backends:
            raise ApiError(404, "no model has this name: /v1/models lists them", "model", "model_not_found")
        return name, backends[name]

    router = APIRouter(prefix="/v1", dependencies=[Depends(check_key)] if settings.api_keys else [])
    of_answers = (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)

    @router.post(
        "/chat/completions",
        operation_id="chat",
        summary="Answer a conversation",
        responses=answers(ChatCompletion, *of_answers, streams=True),
        openapi_extra=takes(protocol.ChatRequest),
    )
    async def chat(request: Request) -> Response:
        record = served(request.scope)
        asked = protocol.read_chat(await _body(request, settings.max_body_bytes))
        name, backend = find(asked.model)
        record.model, record.stream, record.texts = name, bool(asked.stream), asked.n or 1
        calls = protocol.chat_calls(asked, backend.facts, record.request_id, record.client, settings.request_timeout_s)
        reply = ChatReply(calls, f"chatcmpl-{record.request_id}", name, int(time.time()))
        return Answer(backend, reply, settings.keepalive_s)

    @router.post(
        "/completions",
        operation_id="complete",
        summary="Continue a text, or fill a gap in it",
        responses=answers(TextCompletion, *of_answers, streams=True),
        openapi_extra=takes(protocol.CompletionRequest),
    )
    async def complete(request: Request) -> Response:
        record = served(request.scope)
        asked = protocol.read_completion(await _body(request, settings.max_body_bytes))
        name, backend = find(asked.model)
        record.model, record.stream = name, bool(asked.stream)
        calls = protocol.completion_calls(
            asked, backend.facts, record.request_id, record.client, settings.request_timeout_s, settings.max_prompts
        )
        record.texts = len(calls.calls) * calls.calls[0].n
        reply = CompletionReply(calls, f"cmpl-{record.request_id}", name, int(time.time()))
        return Answer(backend, reply, settings.keepalive_s)

    @router.get("/models", operation_id="models", summary="The models", responses=answers(Models, 401, 403))
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(name, item.facts) for name, item in backends.items()]})

    @router.get(
        "/models/{name:path}", operation_id="model", summary="One model", responses=answers(Model, 401, 403, 404, 422)
    )
    async def model(name: str) -> JSONResponse:
        return JSONResponse(_model(name, find(name)[1].facts))

    return router


def _open(backends: Mapping[str, Backend]) -> APIRouter:
    """What needs no key."""
    router = APIRouter()
    page = read_page()

    @router.get(
        "/healthz", operation_id="health", summary="Whether all models answer", responses=answers(Health, 403, 503)
    )
    async def health() -> JSONResponse:
        ready = await asyncio.gather(*map(_is_ready, backends.values()))
        if not all(ready):
            raise ApiError(503, "not all models are ready")
        return JSONResponse({"status": "ok"})

    @router.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _page_file(request, "index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        return _page_file(request, name)

    def _page_file(request: Request, name: str) -> Response:
        if name not in page:
            raise ApiError(404, "there is nothing at this address")
        return page[name].response(request)

    return router


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too large, too slow, or no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a browser sends for no other site that is not let in
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
                elif size > limit + _DRAIN:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_S:g} s", headers={"Connection": "close"}) from None
    if size > limit:
        raise ApiError(413, f"the body has more than {limit:,} bytes", headers={"Connection": "close"})
    return bytes(body)


def _model(name: str, facts: ModelFacts) -> dict[str, Any]:
    diffusion = {
        "family": facts.family,
        "context": facts.context,
        "can_chat": facts.can_chat,
        "can_infill": facts.can_infill,
        "edits": facts.edits,
        "version": facts.version,
        "sampler": dict(facts.sampler),
    }
    return {"id": name, "object": "model", "created": facts.created, "owned_by": "dllm_ray", "diffusion": diffusion}


async def _is_ready(backend: Backend) -> bool:
    try:
        async with asyncio.timeout(_READY_S):
            return await backend.ready()
    except Exception:  # whatever hinders it
        return False


# --- errors


async def _api_error(request: Request, error: ApiError) -> Response:
    served(request.scope).outcome = error.code
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    told = {404: "there is nothing at this address", 405: "this address doesn't take this method"}
    status = error.status_code if error.status_code in told else 400
    return await _api_error(
        request, ApiError(status, told.get(status, "the request is not understood"), headers=error.headers)
    )


async def _invalid(request: Request, _: RequestValidationError) -> Response:
    return await _api_error(request, ApiError(400, "the request is not understood"))


async def _client_left(request: Request, _: ClientDisconnect) -> Response:
    served(request.scope).outcome = "cancelled"
    return Response(status_code=CLIENT_LEFT)
