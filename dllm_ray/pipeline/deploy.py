"""Puts a version of a registered model on the air, on a cluster's Ray Serve."""

import json
import os
import re
import time
import urllib.error
import urllib.request

from dllm_ray import cluster
from dllm_ray.errors import ResourceError
from dllm_ray.serving import server
from dllm_ray.serving.config import KEYS, ServeConfig

_TOLD_S = 60.0  # within which the server tells the version; it asks its replicas every few seconds
_POLL_S = 0.5


def deploy(config: ServeConfig, version: str) -> str:
    """Starts the server on the cluster of RAY_ADDRESS, or updates the one of the same name while it answers.

    Args:
        config: its settings.
        version: what it must tell that it serves, as `models:/name/3`.

    Returns:
        Its address. It goes on when this process ends.

    Raises:
        DllmRayError: the cluster is too small, a setting doesn't fit the model, or the server doesn't come up with it.
    """
    with cluster.connect():
        address = server.start(config)
        until = time.monotonic() + _TOLD_S
        while not serves(address, version):
            if time.monotonic() > until:
                raise ResourceError(f"{address} has been updated, and doesn't tell of {version} in /v1/models")
            time.sleep(_POLL_S)
    return address


def serves(address: str, version: str) -> bool:
    """Whether a server answers and has a version among its models. One that asks for a key that isn't in
    DLLM_RAY_API_KEYS is believed."""
    keys = re.split(r"[\s,]+", os.environ.get(KEYS, "").strip())
    request = urllib.request.Request(f"{address}/v1/models", headers={"Authorization": f"Bearer {keys[0]}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return version in {model["diffusion"].get("version") for model in json.load(response)["data"]}
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
