"""Waits until all nodes of a Ray cluster have joined, and says what it has.

    joined.py NODES SECONDS

Ends with status 1 and a message when the time is over, with 130 when interrupted. The cluster is that of RAY_ADDRESS.
"""

import os
import socket
import sys
import time


def main(nodes, seconds):
    """Returns the exit status."""
    try:
        import ray
    except ModuleNotFoundError:
        return _fail(f"{sys.executable} has no ray: call sbatch in the environment that jobs run in")
    deadline = time.monotonic() + seconds
    host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
    here = []
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                socket.create_connection((host, int(port)), timeout=5).close()
                ray.init(log_to_driver=False, logging_level="critical")
            here = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        except (OSError, RuntimeError, ValueError):
            pass  # the head is not up yet
        if len(here) >= nodes:
            has = ray.cluster_resources()
            cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
            print(
                f"ray       {nodes} nodes with {cpus:g} CPUs and {gpus:g} GPUs at {os.environ['RAY_ADDRESS']}",
                flush=True,
            )
            return 0
        time.sleep(0.3)
    names = ", ".join(sorted(here)) or "none"
    return _fail(
        f"{len(here)} of {nodes} Ray nodes joined in {seconds:g} s ({names}). All must reach "
        f"{os.environ['RAY_ADDRESS']}: DLLM_RAY_INTERFACE names the network interface that connects them"
    )


def _fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
    except KeyboardInterrupt:
        sys.exit(130)
