"""Serves diffusion language models over HTTP, as the OpenAI API and as a chat page, on Ray Serve.

    python jobs/serve.py --config configs/serve/digits.yaml
    python jobs/serve.py --model.path MODEL_DIR --model.sampler.steps 64 --limits.max_rows 16
    DLLM_RAY_API_KEYS=SECRET python jobs/serve.py --model.path MODEL_DIR --host 0.0.0.0

Then http://127.0.0.1:8000 shows the page, and OpenAI's clients work with base_url http://127.0.0.1:8000/v1. Ctrl-C
ends what was begun and stops. With RAY_ADDRESS set the server runs on that cluster; started again there with other
settings, it is updated while it serves.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.serving.config import ServeConfig


def main(job: ServeConfig) -> None:
    from dllm_ray import cluster
    from dllm_ray.serving import server

    server.check(job)
    is_alone = not os.environ.get("RAY_ADDRESS")
    if is_alone:
        server.check_port(job)
    with cluster.connect(_processes(job)), _terminated_as_interrupted():
        address = server.start(job, is_alone)
        print(f"serving   {address} ({', '.join(model.name for model in job.served())})", flush=True)
        print(f"metrics   {' '.join(server.metrics())}", flush=True)
        if job.detach and not is_alone:
            return
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopping  what was begun is finished first; Ctrl-C again ends at once", file=sys.stderr, flush=True)
            server.stop(job)


def _processes(job: ServeConfig) -> int:
    """Most replicas at a time, on a Ray of our own: twice as many where an update starts new ones first."""
    most = sum(model.max_replicas or model.replicas for model in job.served())
    return most * (2 if job.update == "start_first" else 1)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which containers are stopped with, is Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(run_job(ServeConfig, main, __doc__))
