"""Connecting to Ray, and what may be asked of the cluster.

A job started by `ray job submit` (or with RAY_ADDRESS set) joins that cluster; started alone it starts a Ray of its own
on this machine.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from dllm_ray.errors import ResourceError

_ELASTIC_CPUS = 0.9
_SPARE_CPUS = 2  # for data tasks and evaluation beside the workers, on a Ray of our own


@contextmanager
def connect(workers: int = 1) -> Iterator[None]:
    """A connection to Ray for the time of a `with` block.

    Args:
        workers: processes the job will hold, so that a Ray started here counts enough CPUs for them. CPUs are a
            bookkeeping number of Ray's: the processes share the cores there are.

    Raises:
        ResourceError: the cluster named by RAY_ADDRESS can't be joined.
    """
    # Lines printed by workers stay in Ray's session logs; what a user must know comes back as metrics and errors.
    quiet = {"log_to_driver": False, "logging_level": "error"}
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(runtime_env={"env_vars": environment}, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ResourceError(
                f"no Ray cluster can be joined at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}"
            ) from error
    else:
        # Workers find this package where the driver found it, installed or not.
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, workers + _SPARE_CPUS),
            include_dashboard=False,
            runtime_env={"env_vars": environment},
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Shares:
    """What each process of a job reserves."""

    workers: int
    """Number of workers."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""
    data_cpus: float
    """CPUs of a data task beside them."""
    most: int | None = None
    """Most workers, where their number follows what the cluster has; `workers` is the fewest then."""


def shares(
    workers: int | None, cpus: float | None, gpus: float | None, section: str, most: int | None = None
) -> Shares:
    """Divides the connected cluster among workers, leaving room for data tasks beside them.

    Workers hold what they reserve for their whole life. So at least half a CPU is left over, or data tasks would wait
    for ever.

    Args:
        workers: how many; None: one for each GPU, or 2 where there is none.
        cpus: CPUs of each; None: 1, or less on a small cluster.
        gpus: GPUs of each; None: 1 where the cluster has any.
        section: what stands before the fields' names in messages, e.g. `train.`.
        most: most workers, where `workers` is the fewest that will do. Ray then fills the cluster with them, so each
            takes a little less than a CPU by itself, or data tasks would find none.

    Raises:
        ResourceError: the cluster is too small; the message says what it has and what to set.
    """
    has = ray.cluster_resources()
    total_cpus, total_gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    if workers is None:
        workers = int(total_gpus) or 2
    if gpus is None:
        gpus = 1.0 if total_gpus else 0.0
    if workers * gpus > total_gpus:
        raise ResourceError(
            f"{workers} workers with {gpus:g} GPUs each need {workers * gpus:g}, the cluster has {total_gpus:g}: "
            f"lower {section}workers, or {section}gpus_per_worker (fractions share a GPU, 0 means CPU)"
        )
    data_cpus = min(1.0, total_cpus / 2)
    if most is not None:
        data_cpus = 1 - _ELASTIC_CPUS
        cpus = _ELASTIC_CPUS if cpus is None else cpus
    if cpus is None:
        cpus = min(1.0, (total_cpus - data_cpus) / workers)
    left = total_cpus - workers * cpus
    if left < 0.01 or cpus <= 0:
        raise ResourceError(
            f"{workers} workers with {cpus:g} CPUs each leave none of the cluster's {total_cpus:g} for data tasks: "
            f"lower {section}cpus_per_worker (a fraction will do: it is what Ray counts, not a limit)"
        )
    return Shares(workers, cpus, gpus, min(data_cpus, left), most)
