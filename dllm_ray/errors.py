"""The errors that a user of dllm_ray can cause, by name.

Jobs turn any of them into one message and an exit status (`dllm_ray.cli`); everything else is a defect of ours and
shows its traceback. A message names the thing, what was found, what was expected and what to do.
"""


class DllmRayError(Exception):
    """Base of every error that a change of input, settings or environment can mend."""

    exit_status = 2


class ConfigError(DllmRayError):
    """A setting is unknown, has the wrong type, or can't be combined with another.

    Args:
        message: what is wrong and what to do.
        field: the field's name inside its own dataclass; the config parser puts the section in front.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class DataError(DllmRayError):
    """A data source is missing, unreadable, or holds no usable row."""


class ModelError(DllmRayError):
    """A model directory or hub id can't be loaded as a diffusion language model."""


class OutputError(DllmRayError):
    """A result can't be written, or an output folder holds something else."""


class ResourceError(DllmRayError):
    """The cluster can't give what the job asks for."""


class TrainingError(DllmRayError):
    """Training failed for a reason other than its input, after the restarts it is allowed."""

    exit_status = 1


class NotPromoted(DllmRayError):
    """A trained model was registered, and not promoted: its scores don't meet the rules."""

    exit_status = 3


class EvaluationError(DllmRayError):
    """A task or its data can't be evaluated."""


class EnvironmentFaults(DllmRayError):
    """A machine or cluster isn't fit for jobs."""

    exit_status = 1


class ServerError(DllmRayError):
    """A server can't be reached, refuses a request, or breaks off its answer.

    Args:
        message: what is wrong and what to do.
        status: the HTTP status; None: there was no answer, or it was cut off.
        code: the server's own word for it.
        retry_after_s: when it asks to be tried again.
    """

    def __init__(
        self, message: str, status: int | None = None, code: str | None = None, retry_after_s: float | None = None
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


def first_line(error: BaseException) -> str:
    """What an exception of a library says, short enough for a message of ours: its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
