"""From a command line to an exit status: parses a job's settings, runs it, and reports user errors in one message."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dllm_ray.cluster_file import VARIABLE, ClusterFile
from dllm_ray.config import parse, to_dict
from dllm_ray.errors import DllmRayError
from dllm_ray.output import printable

T = TypeVar("T")


def run_job(job: type[T], main: Callable[[T], None], description: str, argv: list[str] | None = None) -> int:
    """Runs a job and returns its exit status.

    Args:
        job: the dataclass of its settings.
        main: does the work.
        description: first lines of `--help`.
        argv: the command line; None: this process's.

    Returns:
        0 when the job did what it says; 2 for bad input and 1 for failed work, each with one message; 130 when
        interrupted. Defects of ours raise.
    """
    # libraries that draw progress bars or warn at import would write over the job's own output
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    named = os.environ.get(VARIABLE)
    try:
        argv = sys.argv[1:] if argv is None else argv
        prog = f"python jobs/{Path(sys.argv[0]).name}"
        main(parse(job, argv, prog, description, {"sampler": _sampler_of_the_model}, _cluster))
    except DllmRayError as error:
        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        os.environ.pop(VARIABLE, None)
        if named is not None:
            os.environ[VARIABLE] = named
    return 0


def print_error(error: DllmRayError) -> None:
    """Tells the user. What a message quotes may be broken Unicode, or try to command the terminal."""
    print(printable(f"error: {error}").encode(errors="backslashreplace").decode(), file=sys.stderr)


def _cluster(path: str | None) -> ClusterFile | None:
    """The file that an option or the environment names. Jobs that this one is made of find it in the environment."""
    if path:
        os.environ[VARIABLE] = path
    return ClusterFile.named(path)


def _sampler_of_the_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler settings that come with the chosen model; settings of the user's own override them."""
    url, path = given.get("url"), given.get("model.path")
    if isinstance(url, str) and path is None:
        from dllm_ray.serving.client import Client
        from dllm_ray.serving.partner import settings_of

        with Client(url) as client:
            return to_dict(settings_of(client.model(given.get("served_model"))))
    if not isinstance(path, str) or not path:
        return {}
    from dllm_ray.models.defaults import sampler_settings

    return sampler_settings(path)
