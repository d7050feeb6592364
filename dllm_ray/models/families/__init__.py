"""The published kinds of diffusion language models: one small file for each, found by what config.json says."""

from collections.abc import Mapping
from typing import Any

from dllm_ray.errors import ModelError
from dllm_ray.models.families import (
    a2d,
    bert,
    diffusion_gemma,
    dream,
    editflow,
    fast_dllm_v2,
    llada,
    llada2,
    llada_moe,
    sdar,
)
from dllm_ray.models.families.base import Family, Fields

FAMILIES: tuple[Family, ...] = (
    llada.FAMILY,
    llada_moe.FAMILY,
    *llada2.FAMILIES,
    dream.FAMILY,
    *a2d.FAMILIES,
    *bert.FAMILIES,
    *sdar.FAMILIES,
    fast_dllm_v2.FAMILY,
    diffusion_gemma.FAMILY,
    editflow.FAMILY,
)

_REFUSED = {
    "NemotronLabsDiffusionModel": "its layers switch between causal and block-bidirectional attention, and its "
    "published facts (query/key norms, biases, rotary scaling) are not known well enough to map it",
}
"""Architectures that are known and can't be mapped exactly, with the reason."""


def find(config: Mapping[str, Any], where: str) -> Family | None:
    """The family of a published config.json; None for an architecture of transformers that is none of them.

    Args:
        config: the file's content.
        where: the checkpoint, for messages.

    Raises:
        ModelError: a known architecture that can't be mapped, or a shared `model_type` without the class that tells.
    """
    kind, named = config.get("model_type"), config.get("architectures") or []
    for architecture in named:
        if architecture in _REFUSED:
            raise ModelError(f"{where}: {architecture} is refused: {_REFUSED[architecture]}")
    candidates = [family for family in FAMILIES if kind in family.model_types]
    if len(candidates) == 1:
        return candidates[0]
    named_by_class = [
        family for family in candidates or FAMILIES if not family.is_native and set(named) & set(family.architectures)
    ]
    if named_by_class:
        return named_by_class[0]
    if candidates:
        known = ", ".join(family.architectures[0] for family in candidates)
        raise ModelError(
            f"{where}: several families have the model_type {kind!r}; architectures is {named}, expected one of {known}"
        )
    return None


def by_name(name: str) -> Family | None:
    """The family that a spec names; None for a model that was none of them to begin with."""
    return next((family for family in FAMILIES if family.name == name), None)


__all__ = ["FAMILIES", "Family", "Fields", "by_name", "find"]
