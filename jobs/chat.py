"""Talks with a diffusion language model in the terminal, and shows how each answer is denoised.

    python jobs/chat.py --model.path outputs/digits/final
    python jobs/chat.py --model.path MODEL_DIR --model.adapter ADAPTER_DIR --sampler.steps 64 --show confidence

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
from dllm_ray.conversation import Conversation, check_template, is_interactive, is_unicode
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
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; `model.path` is needed."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How to denoise."""

    def __post_init__(self):
        if self.model.path is None:
            raise ConfigError("name the model, e.g. --model.path outputs/digits/final", "model.path")
        if self.system is not None and not is_unicode(self.system):
            raise ConfigError("it is not valid Unicode", "system")
        with section("sampler"):
            self.sampler.blocks()


def main(job: ChatJob) -> None:
    from dllm_ray.models.load import check_path

    check_path(job.model.path)
    import torch

    from dllm_ray.models.load import open_model, open_tokenizer

    tokenizer, _, _ = open_tokenizer(job.model.path)
    check_template(tokenizer, job.system)
    lm = open_model(job.model, device="cuda" if torch.cuda.is_available() else "cpu")
    talk = Conversation(lm, job.model.path, job.sampler, job.system, job.show)
    with section("sampler"):
        talk.check(job.sampler)
    if is_interactive():
        print(f"{job.model.path}: /help lists the commands, Ctrl-D ends.")
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
