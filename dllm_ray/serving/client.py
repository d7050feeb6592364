"""A client of a served model: asks questions, and reads the answers while they are written.

It knows HTTP and JSON, no model, tokenizer or tensor, and works against any server with OpenAI's API; the canvas, facts
and figures of denoising come from ours only.
"""

import ipaddress
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from dllm_ray.errors import ConfigError, DllmRayError, ServerError
from dllm_ray.serving.calls import Canvas, ModelFacts, Text

API_KEY = "DLLM_RAY_API_KEY"
"""Environment variable with the key that clients send."""

_CONNECT_S = 10.0
_LONGEST_QUOTE = 300  # characters of an answer that isn't ours


@dataclass(frozen=True)
class Answer:
    """A finished text and what it took; None where the server doesn't tell."""

    text: str
    reason: str | None = None
    """Why it ended: stop or length."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    nfe: int | None = None
    """Forwards."""
    tpf: float | None = None
    """Tokens per forward."""
    tokens_per_s: float | None = None


Piece = Text | Canvas | Answer
"""What a stream yields: `Text` and `Canvas` while the text is written, and the `Answer` at its end."""


class Client:
    """Talks to a server; a context manager, which keeps connections open between requests.

    Args:
        url: where it is, e.g. `http://127.0.0.1:8000`; with or without `/v1`.
        api_key: None: that of the environment variable DLLM_RAY_API_KEY, if it is set.
        timeout_s: longest silence of the server.
        transport: how requests travel, for tests.

    Raises:
        ConfigError: the URL or the key is none.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx2.BaseTransport | None = None,
    ):
        self.url = _checked(url)
        self._http = httpx2.Client(**_options(self.url, api_key, timeout_s), transport=transport)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def models(self) -> list[ModelFacts]:
        """The models that the server has.

        Raises:
            ServerError: it can't be reached, or refuses.
        """
        try:
            response = self._http.get("/models")
        except httpx2.HTTPError as error:
            raise _unreachable(self.url, error) from error
        return _read_models(self.url, response)

    def model(self, name: str | None = None) -> ModelFacts:
        """One of the models; without a name the only one.

        Raises:
            ServerError: it can't be reached, or refuses.
            ConfigError: there is no such model, or several and no name.
        """
        return chosen(self.models(), name)

    def chat(self, messages: Sequence[Mapping[str, Any]], model: str, **options: Any) -> Iterator[Piece]:
        """A conversation's next turn, while it is written.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            model: its name.
            **options: those of `request`.

        Raises:
            ServerError: the server can't be reached, refuses, or breaks off.
        """
        return self._stream("/chat/completions", request(model, **options) | {"messages": list(messages)})

    def complete(
        self, prompt: str | Sequence[int], model: str, suffix: str | None = None, **options: Any
    ) -> Iterator[Piece]:
        """What follows a text (or tokens), or with `suffix` what stands between the two; the rest as in `chat`."""
        body = request(model, **options) | {"prompt": prompt}
        return self._stream("/completions", body if suffix is None else body | {"suffix": suffix})

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Piece]:
        reader = StreamReader()
        try:
            with self._http.stream("POST", path, content=_encoded(body), headers=_JSON) as response:
                if response.status_code != 200:
                    response.read()
                    raise refusal(self.url, response)
                if not body.get("stream"):
                    yield read_answer(response.read())
                    return
                for data in response.iter_bytes():
                    yield from reader.feed(data)
        except httpx2.HTTPError as error:
            raise _unreachable(self.url, error) from error
        yield reader.answer()


class AsyncClient:
    """`Client` for asyncio. Closing an iterator of answers closes its connection, which cancels the request."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ):
        self.url = _checked(url)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx2.AsyncClient(**_options(self.url, api_key, timeout_s), limits=limits, transport=transport)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_exception) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def models(self) -> list[ModelFacts]:
        """As `Client.models`."""
        try:
            response = await self._http.get("/models")
        except httpx2.HTTPError as error:
            raise _unreachable(self.url, error) from error
        return _read_models(self.url, response)

    async def model(self, name: str | None = None) -> ModelFacts:
        """As `Client.model`."""
        return chosen(await self.models(), name)

    def chat(self, messages: Sequence[Mapping[str, Any]], model: str, **options: Any) -> AsyncIterator[Piece]:
        """As `Client.chat`."""
        return self._stream("/chat/completions", request(model, **options) | {"messages": list(messages)})

    def complete(
        self, prompt: str | Sequence[int], model: str, suffix: str | None = None, **options: Any
    ) -> AsyncIterator[Piece]:
        """As `Client.complete`."""
        body = request(model, **options) | {"prompt": prompt}
        return self._stream("/completions", body if suffix is None else body | {"suffix": suffix})

    async def _stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Piece]:
        reader = StreamReader()
        try:
            async with self._http.stream("POST", path, content=_encoded(body), headers=_JSON) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise refusal(self.url, response)
                if not body.get("stream"):
                    yield read_answer(await response.aread())
                    return
                async for data in response.aiter_bytes():
                    for piece in reader.feed(data):
                        yield piece
        except httpx2.HTTPError as error:
            raise _unreachable(self.url, error) from error
        yield reader.answer()


def request(
    model: str,
    sampler: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
    canvas: bool = False,
    timeout_s: float | None = None,
    stream: bool = True,
) -> dict[str, Any]:
    """The body of a request, but for what is asked.

    Args:
        model: its name.
        sampler: changes to the model's sampler settings, by the names of `SamplerConfig`.
        stop: strings before which the text ends.
        canvas: ask for `Canvas` events, too.
        timeout_s: by when it must be answered.
        stream: ask for the text while it is written; else only the `Answer` comes.
    """
    body: dict[str, Any] = {"model": model}
    diffusion: dict[str, Any] = {}
    for name, value in (sampler or {}).items():
        if name == "max_new_tokens":
            body["max_tokens"] = value
        elif name == "seed" and value is None:
            continue  # a seed is drawn where none is given
        elif name in ("temperature", "top_p", "seed") and value is not None:
            body[name] = value  # OpenAI's own; null would not mean "off" there
        else:
            diffusion[name] = value
    if stop:
        body["stop"] = list(stop)
    if canvas:
        diffusion["stream_canvas"] = True
    if timeout_s is not None:
        diffusion["timeout_s"] = timeout_s
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body | ({"diffusion": diffusion} if diffusion else {})


class StreamReader:
    """Server-sent events -> what they say about one text. It is fed with bytes as they come, however they are cut."""

    def __init__(self):
        self._rest = b""
        self._texts: list[str] = []
        self._reason: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._is_complete = False

    def feed(self, data: bytes) -> list[Text | Canvas]:
        """What some more bytes say.

        Raises:
            ServerError: the server tells of a failure, or writes what can't be read.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        pieces: list[Text | Canvas] = []
        for line in lines:
            if line.startswith(b"data:"):  # comments and names of events say nothing
                pieces += self._event(line[5:].strip())
        return pieces

    def answer(self) -> Answer:
        """The whole text, after the last bytes.

        Raises:
            ServerError: the stream ended too early.
        """
        if not self._is_complete:
            raise ServerError("the server broke off its answer: ask again", code="cut_off")
        return _answer("".join(self._texts), self._reason, self._usage)

    def _event(self, data: bytes) -> list[Text | Canvas]:
        if data == b"[DONE]":
            self._is_complete = True
            return []
        try:
            chunk = json.loads(data)
            if chunk.get("error") is not None:
                raise _told(chunk["error"])
            self._usage = chunk.get("usage") or self._usage
            pieces: list[Text | Canvas] = []
            told = chunk.get("diffusion") or {}
            if told.get("event") == "canvas":
                pieces.append(_canvas(told))
            for choice in chunk.get("choices") or ():
                text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
                if text:
                    self._texts.append(text)
                    pieces.append(Text(choice.get("index", 0), text))
                self._reason = choice.get("finish_reason") or self._reason
        except DllmRayError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ServerError(f"the server wrote what is no event of OpenAI's API: {_quoted(data)}") from None
        return pieces


def read_answer(data: bytes) -> Answer:
    """The text of an answer that was not streamed.

    Raises:
        ServerError: it is none of OpenAI's API.
    """
    try:
        body = json.loads(data)
        choice = body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return _answer(text, choice.get("finish_reason"), body.get("usage") or {})
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ServerError(f"the server wrote what is no answer of OpenAI's API: {_quoted(data)}", 200) from None


def chosen(models: Sequence[ModelFacts], name: str | None) -> ModelFacts:
    """The model of a name; without one the only model.

    Raises:
        ConfigError: there is none.
    """
    names = ", ".join(model.name for model in models) or "none"
    for model in models:
        if model.name == name or (name is None and len(models) == 1):
            return model
    if name is None:
        raise ConfigError(f"say which of the server's models: {names}", "served_model")
    raise ConfigError(f"the server has no model {name!r}, only {names}", "served_model")


def refusal(url: str, response: Any) -> ServerError:
    """What a response (anything with `status_code`, `headers`, `content`) that is no success says, in one sentence."""
    status, headers = response.status_code, response.headers
    try:
        told = json.loads(response.content)["error"]
        error = _told(told, status, headers.get("Retry-After"))
    except (ValueError, TypeError, KeyError):
        hint = " (is it the address of a server of jobs/serve.py?)" if status in (404, 405) or status < 400 else ""
        return ServerError(f"{url} answers {status}{hint}: {_quoted(response.content)}", status)
    if status == 401:
        error.args = (f"{error}; keys are read from the environment variable {API_KEY}",)
    elif error.retry_after_s is not None:
        error.args = (f"{error} (try again in {error.retry_after_s:g} s)",)
    return error


_JSON = {"Content-Type": "application/json"}


def _checked(url: str) -> str:
    """The URL that paths such as `/chat/completions` follow."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address or parts.query or parts.fragment or not url.isprintable():
        raise ConfigError(f"expected the address of a server, such as http://127.0.0.1:8000, got {url!r}", "url")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    api_key = os.environ.get(API_KEY) if api_key is None else api_key
    if api_key and not (api_key.isascii() and api_key.isprintable()):  # the key itself is not shown
        raise ConfigError(f"the API key (environment variable {API_KEY}) has characters that no header can hold")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx2.Timeout(timeout_s, connect=_CONNECT_S),
        "trust_env": not _is_loopback(urlsplit(url).hostname or ""),  # no proxy reaches this machine's own address
    }


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _unreachable(url: str, error: Exception) -> ServerError:
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return ServerError(f"no server answers at {url}: start one with jobs/serve.py, or mend the address ({error})")
    if isinstance(error, httpx2.TimeoutException):
        return ServerError(f"{url} has been silent for too long: it is overloaded or gone; ask again")
    return ServerError(f"{url} broke off its answer: ask again ({error or type(error).__name__})", code="cut_off")


def _read_models(url: str, response: httpx2.Response) -> list[ModelFacts]:
    if response.status_code != 200:
        raise refusal(url, response)
    try:
        return [_facts(entry) for entry in response.json()["data"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ServerError(f"{url}/models is no list of models: {_quoted(response.content)}", 200) from None


def _facts(entry: Mapping[str, Any]) -> ModelFacts:
    told = entry.get("diffusion") or {}
    return ModelFacts(
        name=entry["id"],
        family=told.get("family", ""),
        created=entry.get("created", 0),
        context=told.get("context"),
        can_chat=told.get("can_chat", True),
        can_infill=told.get("can_infill", False),
        sampler=dict(told.get("sampler") or {}),
        edits=bool(told.get("edits")),
        version=told.get("version"),
    )


def _told(told: Any, status: int | None = None, retry_after: str | None = None) -> ServerError:
    """An error in OpenAI's form."""
    message = told["message"]
    param, code = told.get("param"), told.get("code") or told.get("type")
    if param and param not in message:
        message = f"{param}: {message}"
    seconds = float(retry_after) if retry_after and retry_after.replace(".", "", 1).isdecimal() else None
    return ServerError(message, status, None if code is None else str(code), seconds)


def _answer(text: str, reason: str | None, usage: Mapping[str, Any]) -> Answer:
    told = usage.get("diffusion") or {}
    return Answer(
        text=text,
        reason=reason,
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        nfe=told.get("nfe"),
        tpf=told.get("tpf"),
        tokens_per_s=told.get("tokens_per_s"),
    )


def _canvas(told: Mapping[str, Any]) -> Canvas:
    return Canvas(
        index=told["index"],
        step=told["step"],
        length=told["length"],
        positions=tuple(told["positions"]),
        tokens=tuple(told["tokens"]),
        confidences=tuple(float("nan") if value is None else value for value in told["confidences"]),
        kinds=tuple(told.get("kinds") or ()),
    )


def _quoted(data: bytes) -> str:
    text = " ".join(data[: 4 * _LONGEST_QUOTE].decode(errors="replace").split())
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + " ..."
