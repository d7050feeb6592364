"""MDLM: masked diffusion over whole rows. A time is drawn for each sample, and the model sees all of it at once
(Sahoo et al., arXiv 2406.07524; LLaDA, Nie et al., arXiv 2502.09992)."""

from torch import Tensor

from dllm_ray.models.attention import Pattern
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.objectives.batch import NoisyBatch
from dllm_ray.objectives.masked import MaskedDiffusion


class MDLM(MaskedDiffusion):
    """The masked-diffusion objective; arguments as of `MaskedDiffusion`."""

    name = "mdlm"

    def _nll(self, lm: DiffusionLM, noisy: NoisyBatch, positions: Tensor) -> Tensor:
        seen = noisy.attention_mask
        if noisy.segment_ids is not None:
            seen = Pattern(noisy.segment_ids, noisy.position_ids)
        return lm.nll(
            noisy.input_ids,
            seen,
            noisy.position_ids,
            positions=self._sources(noisy, positions),
            targets=noisy.targets.flatten()[positions],
            shift=False,
            at_once=self.config.logits_at_once,
            most=len(noisy.masked) * noisy.width,
        )
