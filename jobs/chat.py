"""Talks with a diffusion language model in the terminal, and shows how each answer is denoised.

    python jobs/chat.py --model.path outputs/digits/final
    python jobs/chat.py --model.path MODEL_DIR --model.adapter ADAPTER_DIR --sampler.steps 64 --show confidence
    python jobs/chat.py --url http://127.0.0.1:8000 --served_model digits

With --url the model is one of a server (jobs/serve.py) and none is loaded here; the environment variable
DLLM_RAY_API_KEY holds the key, where the server wants one.

/help lists the commands. A message with [MASK], or [MASK:8] for eight tokens, is a text to fill in, outside the
conversation. Lines from a pipe are answered in plain text, until they end.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import print_error, run_job
from dllm_ray.config import section
from dllm_ray.conversation import Conversation, LocalPartner, Partner, check_template, is_interactive, is_unicode
from dllm_ray.errors import ConfigError, DllmRayError
from dllm_ray.models.config import ModelConfig
from dllm_ray.sampling.config import SamplerConfig


@dataclass
class ChatJob:
    """Settings of jobs/chat.py."""

    system: str | None = None
    """The system message."""
    show: Literal["step", "confidence", "off"] = "step"
    """Draw the denoising on a terminal, coloured by step or by confidence."""
    url: str | None = None
    """Address of a server whose model is talked with, e.g. http://127.0.0.1:8000; null: the model is loaded here."""
    served_model: str | None = None
    """With `url`: the name of the model there; null: the only one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; `model.path` is needed, unless there is a `url`."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How to denoise; with `url`: what is set here is asked of the server."""

    def __post_init__(self):
        if self.url is None:
            if self.model.path is None:
                raise ConfigError("name the model, e.g. --model.path outputs/digits/final", "model.path")
            if self.served_model is not None:
                raise ConfigError("needs a url: it names a model of a server", "served_model")
        elif self.model.path is not None:
            raise ConfigError("give model.path or url, not both", "model.path")
        if self.system is not None and not is_unicode(self.system):
            raise ConfigError("it is not valid Unicode", "system")


def main(job: ChatJob) -> None:
    if job.url is None:
        hold(job, _loaded(job))
        return
    from dllm_ray.serving.client import Client
    from dllm_ray.serving.partner import ServedPartner

    with Client(job.url) as client:
        hold(job, ServedPartner(client, client.model(job.served_model)))


def hold(job: ChatJob, partner: Partner) -> None:
    """The conversation, to its end."""
    talk = Conversation(partner, job.sampler, job.system, job.show)
    with section("sampler"):
        partner.check(job.sampler)
    if is_interactive():
        print(f"{partner.name}: /help lists the commands, Ctrl-D ends.")
    for text in lines():
        try:
            if not talk.take(text):
                break
        except KeyboardInterrupt:
            if not is_interactive():
                raise
            print("\ninterrupted: the answer is dropped", file=sys.stderr)
        except DllmRayError as error:
            print_error(error)


def _loaded(job: ChatJob) -> LocalPartner:
    """The model, in this process."""
    from dllm_ray.models.load import check_path

    check_path(job.model.path)
    import torch

    from dllm_ray.models.load import open_model, open_tokenizer
    from dllm_ray.sampling.plan import check

    tokenizer, spec, _ = open_tokenizer(job.model.path)
    with section("sampler"):
        check(job.sampler, spec)
    check_template(tokenizer, job.system)
    lm = open_model(job.model, device="cuda" if torch.cuda.is_available() else "cpu")
    return LocalPartner(lm, job.model.path)


def lines() -> Iterator[str]:
    """What the user types, or the lines of a pipe, until the end."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a broken line must not end those after it
    if not is_interactive():
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and called back
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends")
        except EOFError:
            print()
            return


if __name__ == "__main__":
    sys.exit(run_job(ChatJob, main, __doc__))
