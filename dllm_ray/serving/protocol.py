"""What requests of the API look like, and the calls they are: OpenAI's chat and text completions, with `diffusion`.

Every field of OpenAI's requests has its place here. What would change the answer and can't be done is refused by name;
what doesn't change it is ignored; a name that nobody knows is refused, for it is most likely a slip.
"""

import difflib
import time
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving.calls import Call, ModelFacts
from dllm_ray.serving.errors import ApiError

_NOT_SAMPLER = ("seed", "max_new_tokens", "max_length")  # the API has its own
_LARGEST = 2**31 - 1
_TYPES = ("str", "int", "float", "bool")  # of pydantic's names for the alternatives of a field, those that are words


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _options() -> type[BaseModel]:
    """`DiffusionOptions`, whose fields are those of `SamplerConfig` and two more."""
    told = {item.arg_name: item.description for item in docstring_parser.parse_from_object(SamplerConfig).params}
    fields: dict[str, Any] = {
        name: (hint | None, Field(None, description=told.get(name)))
        for name, hint in typing.get_type_hints(SamplerConfig).items()
        if name not in _NOT_SAMPLER
    }
    canvas = "Send what each step writes as well, in chunks with `diffusion` and without choices. Needs `stream`."
    timeout = "Seconds for the whole answer, queue included."
    fields["stream_canvas"] = (bool, Field(False, description=canvas))
    fields["timeout_s"] = (Annotated[float, Field(gt=0, le=1e6)] | None, Field(None, description=timeout))
    about = "How the text is denoised: changes to the model's sampler settings, within what the server allows."
    return create_model("DiffusionOptions", __base__=_Model, __doc__=about, **fields)


DiffusionOptions = _options()

NoItems = Annotated[list[Any], Field(max_length=0)] | None
NoEntries = Annotated[dict[str, Any], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(_Model):
    """Of a stream."""

    include_usage: bool | None = None
    """End with a chunk that has `usage` and no choices."""
    include_obfuscation: Any = None
    """Ignored."""


class ResponseFormat(_Model):
    """Of the answer."""

    type: Literal["text"]
    """Only text."""


class _Request(_Model):
    model: str | None = None
    """Name of the model, as `/v1/models` lists it; needed unless there is one, or a default."""
    max_tokens: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    """Most tokens to write; null: as the model's settings say."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token; null: as the model's settings say."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among the likeliest tokens whose probabilities reach this sum; null: as the model's settings say."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Texts to write."""
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    """Up to 4 strings before which a text ends."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The same seed and settings give the same text."""
    stream: bool | None = None
    """Send text as soon as it can no longer change, as server-sent events."""
    stream_options: StreamOptions | None = None
    """What streams hold besides text."""
    diffusion: DiffusionOptions | None = None
    """How the text is denoised."""
    presence_penalty: Zero = None
    """Not supported."""
    frequency_penalty: Zero = None
    """Not supported."""
    logit_bias: NoEntries = None
    """Not supported."""
    user: Any = None
    """Ignored."""


class TextPart(_Model):
    """A part of a message."""

    type: Literal["text"]
    """Only text."""
    text: str
    """What it says."""


class Message(_Model):
    """A turn of a conversation. A message of an answer can be given back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` is taken as `system`."""
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    """What is said. Text that looks like a control token stays text."""
    name: Any = None
    """Ignored."""
    refusal: None = None
    """Not supported."""
    annotations: Any = None
    """Ignored."""
    audio: None = None
    """Not supported."""
    function_call: None = None
    """Not supported."""
    tool_calls: NoItems = None
    """Not supported."""

    def text(self) -> str:
        """All of the content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Tell for each token the logarithm of its probability when it was written, and the plain `confidence`."""
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    """Not supported above 0."""
    response_format: ResponseFormat | None = None
    """Only text."""
    tools: NoItems = None
    """Not supported."""
    tool_choice: Literal["none", "auto"] | None = None
    """Not supported."""
    functions: NoItems = None
    """Not supported."""
    function_call: Literal["none", "auto"] | None = None
    """Not supported."""
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    """Only text."""
    audio: None = None
    """Not supported."""
    reasoning_effort: Literal["none"] | None = None
    """Not supported."""
    verbosity: None = None
    """Not supported."""
    web_search_options: None = None
    """Not supported."""
    metadata: Any = None
    """Ignored."""
    moderation: Any = None
    """Ignored."""
    parallel_tool_calls: Any = None
    """Ignored."""
    prediction: Any = None
    """Ignored."""
    prompt_cache_key: Any = None
    """Ignored."""
    prompt_cache_options: Any = None
    """Ignored."""
    prompt_cache_retention: Any = None
    """Ignored."""
    safety_identifier: Any = None
    """Ignored."""
    service_tier: Any = None
    """Ignored."""
    store: Any = None
    """Ignored."""


TokenId = Annotated[int, Field(ge=0, le=_LARGEST)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(_Request):
    """Of `/v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    )
    """What is to be continued as it is: a text, token ids, or several of either, which are answered one by one."""
    suffix: str | None = None
    """Text after the gap: `max_tokens` tokens are filled in between. Empty: there is no gap."""
    echo: bool | None = None
    """Put the prompt in front of the answer; not with token ids, nor with `logprobs`."""
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    """0: tell for each token the logarithm of its probability when it was written, and the plain confidence. Not
    supported above 0."""
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    """Not supported, unless it is `n`."""


@dataclass(frozen=True)
class Asked:
    """A request, read: its calls, and how the answer is to look."""

    calls: tuple[Call, ...]
    """One for each prompt."""
    stream: bool = False
    include_usage: bool = False
    """In a stream; other answers always have it."""
    logprobs: bool = False
    measures_probability: bool = True
    """Whether confidences are probabilities."""
    echoes: tuple[str, ...] = ()
    """What stands in front of each call's texts; empty: nothing."""


def read_chat(body: bytes) -> ChatRequest:
    """Reads the body of a chat request.

    Raises:
        ApiError: 400, naming the field.
    """
    return _read(ChatRequest, body)


def read_completion(body: bytes) -> CompletionRequest:
    """Reads the body of a completion request.

    Raises:
        ApiError: 400, naming the field.
    """
    return _read(CompletionRequest, body)


def chat_calls(request: ChatRequest, facts: ModelFacts, id: str, client: str, timeout_s: float) -> Asked:
    """The call that a chat request is.

    Raises:
        ApiError: 400 or 422, naming the field.
    """
    if not facts.can_chat:
        raise ApiError(422, f"{facts.name} has no chat template: use /v1/completions", "messages")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            400, "given twice, as max_tokens and as max_completion_tokens: give one", "max_completion_tokens"
        )
    messages = tuple(
        {"role": "system" if message.role == "developer" else message.role, "content": message.text()}
        for message in request.messages
    )
    common = _common(request, client, timeout_s, bool(request.logprobs))
    call = Call(id=id, messages=messages, max_tokens=next(iter(limits), None), **common)
    return _asked(request, facts, (call,))


def completion_calls(
    request: CompletionRequest, facts: ModelFacts, id: str, client: str, timeout_s: float, max_prompts: int
) -> Asked:
    """The calls that a completion request is, one for each prompt.

    Raises:
        ApiError: 400 or 422, naming the field.
    """
    several = isinstance(request.prompt, list) and not isinstance(request.prompt[0], int)
    prompts = request.prompt if several else [request.prompt]
    if len(prompts) > max_prompts:
        raise ApiError(400, f"at most {max_prompts} prompts in one request, got {len(prompts)}", "prompt")
    if request.best_of not in (None, request.n or 1):
        raise ApiError(
            400, "is not supported: ask for n texts and choose among them", "best_of", "unsupported_parameter"
        )
    if request.suffix and not facts.can_infill:
        raise ApiError(422, f"{facts.name} can't fill gaps: leave suffix out", "suffix")
    if request.echo and not isinstance(prompts[0], str):
        raise ApiError(400, "needs prompts of text, not of token ids", "echo")
    if request.echo and request.logprobs is not None:
        raise ApiError(400, "can't be combined with logprobs: prompts have none", "echo")
    common = _common(request, client, timeout_s, request.logprobs is not None)
    calls = tuple(
        Call(
            id=f"{id}-{number}" if several else id,
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            suffix=request.suffix or None,
            max_tokens=request.max_tokens,
            **common,
        )
        for number, prompt in enumerate(prompts)
    )
    return _asked(request, facts, calls, tuple(prompts) if request.echo else ())


def _common(request: _Request, client: str, timeout_s: float, logprobs: bool) -> dict[str, Any]:
    """What calls have from either kind of request."""
    options = request.diffusion
    sampler = options.model_dump(exclude_unset=True, exclude={"stream_canvas", "timeout_s"}) if options else {}
    for name in ("temperature", "top_p"):
        value = getattr(request, name)
        if value is not None and name in sampler:
            raise ApiError(400, "given twice, alone and in diffusion: give one", name)
        if value is not None:
            sampler[name] = value
    is_canvas = options is not None and options.stream_canvas
    if is_canvas and not request.stream:
        raise ApiError(400, "needs stream: true", "diffusion.stream_canvas")
    if options and options.timeout_s:
        timeout_s = min(timeout_s, options.timeout_s)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return {
        "client": client,
        "sampler": sampler,
        "seed": request.seed,
        "n": request.n or 1,
        "stop": stop,
        "stream": bool(request.stream),
        "canvas": is_canvas,
        "spelled": logprobs,
        "deadline": time.time() + timeout_s,
    }


def _asked(request: _Request, facts: ModelFacts, calls: tuple[Call, ...], echoes: tuple[str, ...] = ()) -> Asked:
    policy = calls[0].sampler.get("policy") or facts.sampler.get("policy")
    return Asked(
        calls=calls,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        logprobs=calls[0].spelled,
        measures_probability=policy not in ("entropy", "topk_margin"),
        echoes=echoes,
    )


# --- what is wrong with a body, in words


def _read(cls: type[BaseModel], body: bytes) -> Any:
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        raise _explained(cls, error) from None


def _explained(cls: type[BaseModel], error: ValidationError) -> ApiError:
    """Of all that is wrong, what lies deepest: of the alternatives that a field has, it came nearest to that one."""
    found = [
        (_place(item["loc"]), item["type"], item["msg"])
        for item in error.errors(include_url=False, include_context=False, include_input=False)[:100]
    ]
    deepest = max(found, key=lambda item: len(item[0]))
    place, kind, _ = deepest
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {deepest[2].removeprefix('Invalid JSON: ')}", code="invalid_json")
    if not place:
        return ApiError(400, "the body is no JSON object")
    param = ".".join(map(str, place))[:100]
    if kind == "extra_forbidden":
        return ApiError(400, f"{param}: unknown parameter{_hint(cls, place)}", param, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param}: is needed", param, "missing_required_parameter")
    field = cls.model_fields.get(str(place[0]))
    if field is not None and (field.description or "").startswith("Not supported"):
        return ApiError(400, f"{param}: is not supported, leave it out", param, "unsupported_parameter")
    reasons = list(dict.fromkeys(message for where, _, message in found if where == place))
    return ApiError(400, f"{param}: {'; or: '.join(reasons)}", param)


def _place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where an error lies, without pydantic's names for the alternatives of a field."""
    return tuple(
        part
        for number, part in enumerate(location)
        if isinstance(part, int) or number == 0 or (part.isidentifier() and part not in _TYPES)
    )


def _hint(cls: type[BaseModel], place: tuple[int | str, ...]) -> str:
    name = str(place[-1])
    if place[0] == "diffusion":
        if name in ("max_new_tokens", "max_length"):
            return ": the length of the answer is max_tokens, outside of diffusion"
        if name == "seed":
            return ": seed stands outside of diffusion"
        known = DiffusionOptions.model_fields
    elif len(place) == 1:
        if name in DiffusionOptions.model_fields:
            return f": settings of the sampler stand in diffusion, as diffusion.{name}"
        known = cls.model_fields
    else:
        return ""
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else ""
