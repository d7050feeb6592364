"""The API's description (OpenAPI): what answers look like, and where requests go."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from dllm_ray.serving.errors import DESCRIPTIONS

_REFERENCE = "#/components/schemas/{model}"
_EVENT = {
    "title": "An event of a stream",
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk, or an error, as JSON; `[DONE]` at the end"}},
}
_ABOUT = """Diffusion language models behind OpenAI's API. Requests are OpenAI's, with one object more: `diffusion`
changes how the text is denoised."""


class _Told(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class DiffusionUsage(_Told):
    """What denoising took."""

    nfe: int
    """Forwards, summed over texts."""
    tpf: float
    """Tokens per forward."""
    tokens_per_s: float
    """Tokens per second."""


class Usage(_Told):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    diffusion: DiffusionUsage


class TokenLogprob(_Told):
    """Of one token."""

    token: str
    logprob: float | None
    """Logarithm of the probability it was written with; null where the policy measures none (entropy, topk_margin)."""
    bytes: list[int] | None
    top_logprobs: list[Any]
    confidence: float | None
    """What the policy measured."""


class ChatLogprobs(_Told):
    """Of a text's tokens."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(_Told):
    """What the assistant says."""

    role: str
    content: str
    refusal: None


class ChatChoice(_Told):
    """One of the texts."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    """`stop` or `length`."""


class ChatCompletion(_Told):
    """Answers a chat request."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(_Told):
    """Of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Logarithms of the probabilities they were written with; null where the policy measures none."""
    top_logprobs: None
    text_offset: list[int]
    confidences: list[float | None]
    """What the policy measured."""


class TextChoice(_Told):
    """One of the texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str
    """`stop` or `length`."""


class TextCompletion(_Told):
    """Answers a completion request."""

    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelDiffusion(_Told):
    """What makes it a diffusion language model."""

    family: str
    context: int | None
    """Most tokens of prompt and answer together; null: any number."""
    can_chat: bool
    can_infill: bool
    edits: bool
    """Its texts grow and shrink while they are written, and are sent when they are finished."""
    version: str | None
    """Its version in MLflow's registry, as `models:/name/3`; null where it isn't from there."""
    sampler: dict[str, Any]
    """Its sampler settings, which `diffusion` of a request changes."""


class Model(_Told):
    """A served model."""

    id: str
    object: str
    created: int
    owned_by: str
    diffusion: ModelDiffusion


class Models(_Told):
    """The served models."""

    object: str
    data: list[Model]


class Health(_Told):
    """Of a server that answers."""

    status: str


class Problem(_Told):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request."""
    code: str


class Failed(_Told):
    """Any answer that is no success."""

    error: Problem


def answers(ok: type[BaseModel], *statuses: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route.

    Args:
        ok: what a success looks like.
        statuses: of errors.
        streams: whether a success may be a stream of events as well.
    """
    told: dict[int | str, dict[str, Any]] = {200: {"model": ok, "description": "The answer"}}
    if streams:
        told[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    for status in sorted({*statuses, 500}):
        told[status] = {"model": Failed, "description": DESCRIPTIONS[status]}
    if 429 in told:
        told[429]["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
    return told


def takes(request: type[BaseModel]) -> dict[str, Any]:
    """FastAPI's `openapi_extra` of a route that reads its body by itself."""
    schema = {"$ref": _REFERENCE.format(model=request.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, *requests: type[BaseModel]) -> None:
    """Gives the app a description that knows the requests as well."""

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            told = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
            known = told.setdefault("components", {}).setdefault("schemas", {})
            for request in requests:
                schema = request.model_json_schema(ref_template=_REFERENCE)
                known.update(schema.pop("$defs", {}))
                known[request.__name__] = schema
            app.openapi_schema = told
        return app.openapi_schema

    app.openapi = description
