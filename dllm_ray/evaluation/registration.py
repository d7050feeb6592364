"""Makes `lm_eval --model dllm_ray` know us.

lm-eval has no plug-ins of its own: it knows the models that were registered before it looks. It imports torch before
that, and torch calls the entry points named `torch.backends`, of which `register` is one (pyproject.toml).
"""

import sys

NAME = "dllm_ray"
"""What the model is called on lm-eval's command line."""

_TARGET = "dllm_ray.evaluation.local:LocalHarness"


def register() -> None:
    """Tells lm-eval, where it is being used, which class to load for `NAME`."""
    if "lm_eval" not in sys.modules:
        return
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)
