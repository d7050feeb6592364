"""The adapter that lm-eval makes by itself, with the model in this process:

    lm_eval --model dllm_ray --model_args pretrained=MODEL_DIR,steps=64,block_size=32,policy=entropy,mc_num=64 \\
        --tasks gsm8k --apply_chat_template
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from dllm_ray.config import read
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.answering import LocalAnswers
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig
from dllm_ray.evaluation.lm import DiffusionHarness
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.load import open_model
from dllm_ray.sampling.config import SamplerConfig

_ASKING = ("until", "escape_until", "add_bos_token", "batch_size")  # fields of `EvaluateConfig`
_LM_EVALS_BATCH = (1, "1", "auto")  # what lm-eval says by itself, or leaves to the model


class LocalHarness(DiffusionHarness):
    """`DiffusionHarness` around a model that it loads.

    Args:
        pretrained: a Hugging Face directory or hub id.
        device: where the model goes; None: the first GPU, or the CPU where there is none.
        seed: of the requests' own seeds.
        max_batch_size: what lm-eval tells every model; has no effect.
        settings: fields of `SamplerConfig`, `LikelihoodConfig` and `ModelConfig` by name, and `until`, `escape_until`,
            `add_bos_token`. `batch_size` is both the documents denoised together and the noisy copies in a forward,
            `cfg_scale` that of both too.

    Raises:
        ConfigError: an unknown argument (the nearest is named), or a value that doesn't fit.
        ModelError: the model can't be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        **settings: Any,
    ):
        places = {
            SamplerConfig: _names(SamplerConfig) - {"seed"},
            LikelihoodConfig: _names(LikelihoodConfig),
            ModelConfig: _names(ModelConfig) - {"path", "scratch"},
            EvaluateConfig: set(_ASKING),
        }
        known = sorted(set().union(*places.values()) | {"pretrained", "device", "seed"})
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                raise ConfigError(
                    f"unknown argument{f'; did you mean {near[0]}?' if near else ''}", f"model_args.{name}"
                )
        if isinstance(settings.get("until"), str):
            settings["until"] = [settings["until"]]

        def part(cls: type, **more: Any) -> Any:
            named = {name: value for name, value in settings.items() if name in places[cls]}
            return read(cls, {**named, **more}, "model_args")

        sampler, likelihood, asking = part(SamplerConfig), part(LikelihoodConfig), part(EvaluateConfig)
        model = part(ModelConfig, path=str(pretrained))
        lm = open_model(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        super().__init__(
            LocalAnswers(lm, sampler, likelihood, asking.batch_size),
            lm.tokenizer,
            lm.spec,
            lm.max_length,
            sampler.max_new_tokens,
            str(pretrained),
            seed,
            asking.until,
            asking.escape_until,
            asking.add_bos_token,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "LocalHarness":
        """What lm-eval calls: `arg_dict` is --model_args, and wins over `additional_config`, its own options. A
        `batch_size` that is lm-eval's default counts as not given."""
        own = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if own.get("batch_size") in _LM_EVALS_BATCH:
            del own["batch_size"]
        if str(own.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del own["device"]  # which lm-eval's command line says where it is told nothing
        return cls(**{**own, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "LocalHarness":
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)


def _names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}
