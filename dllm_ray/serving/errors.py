"""Errors of the API in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import math

from starlette.responses import JSONResponse

from dllm_ray.serving.calls import Refused

DESCRIPTIONS = {
    400: "The request is not understood, or asks for what this API doesn't do",
    401: "The API key is missing or wrong",
    403: "The server has no API keys, so it answers its own machine only",
    404: "There is no such model, or no such address",
    405: "The address doesn't take this method",
    408: "The request's body took too long to arrive",
    413: "The request's body is too large",
    415: "The request's body is not `application/json`",
    422: "The request is understood, but not possible with this model",
    429: "Too many requests are waiting: try again after `Retry-After` seconds",
    500: "A defect of the server",
    503: "The model can't answer now",
    504: "There was not enough time for the answer",
}
"""Status -> what it means. No other is sent, 200 aside."""

_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "no_api_keys",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "not_possible",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_exceeded",
}


class ApiError(Exception):
    """Ends a request.

    Args:
        status: of HTTP, one of `DESCRIPTIONS`.
        message: what is wrong, what was expected and what to do.
        param: the field of the request that is wrong, dotted.
        code: a word for programs; None: that of the status.
        headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES[status]
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict:
        """As JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As an answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def of_refused(refused: Refused) -> ApiError:
    """What a client is told of a call that a replica refused."""
    wait = {"Retry-After": str(max(1, math.ceil(refused.retry_after_s or 1)))}
    if refused.kind == "invalid":
        return ApiError(422, refused.message, refused.field)
    if refused.kind == "unsupported":
        return ApiError(400, refused.message, refused.field, "unsupported_parameter")
    if refused.kind == "too_long":
        return ApiError(400, refused.message, refused.field, "context_length_exceeded")
    if refused.kind == "full":
        return ApiError(429, refused.message, refused.field, headers=wait)
    return ApiError(503, refused.message, refused.field, headers=wait if refused.kind == "draining" else None)
