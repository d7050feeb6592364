"""What the HTTP side may be told. Plain data, without FastAPI, so that a job's `--help` is quick."""

from dataclasses import dataclass

from dllm_ray.errors import ConfigError
from dllm_ray.serving.keys import is_digest


@dataclass(frozen=True)
class AppSettings:
    """Of the API, whatever models are behind it."""

    api_keys: tuple[str, ...] = ()
    """SHA-256 digests, in hexadecimal, of the API keys let in (`printf %s KEY | sha256sum`); none: everyone."""
    max_body_bytes: int = 1024 * 1024
    """Largest body of a request."""
    max_prompts: int = 128
    """Most prompts of one completion request."""
    request_timeout_s: float = 600.0
    """Longest time for an answer; a request may ask for less (`diffusion.timeout_s`)."""
    keepalive_s: float = 15.0
    """A stream that has nothing to send for so long sends a comment, so that proxies keep it."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser, e.g. `https://chat.example.org`; none: only our own page."""
    default_model: str | None = None
    """The model of requests that name none; null: the only one there is, else the name is needed."""

    def __post_init__(self):
        for name in ("api_keys", "cors_origins"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(map(is_digest, self.api_keys)):  # the value is not shown: it may be the key itself
            raise ConfigError("expected SHA-256 digests, 64 hexadecimal digits (printf %s KEY | sha256sum)", "api_keys")
        for name in ("max_body_bytes", "max_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, got {getattr(self, name)}", name)
        for name in ("request_timeout_s", "keepalive_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be a number above 0, got {getattr(self, name)}", name)
