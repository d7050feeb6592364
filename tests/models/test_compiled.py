"""`torch.compile`: the same tokens, with a cache and without."""

import copy

import pytest
import torch

from dllm_ray.models.config import ModelConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import open_model
from dllm_ray.objectives import MDLM, Part
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, train_steps
from dllm_ray.training.strategies import wrap

PROMPTS = [list(range(40, 60)), list(range(60, 73))]


@pytest.mark.slow
def test_a_compiled_model_writes_the_same_tokens(make_lm):
    lm = make_lm("llama", num_hidden_layers=1)
    compiled = DiffusionLM(copy.deepcopy(lm.model), None, lm.spec)
    compiled.compile("reduce-overhead")
    for cache in ("none", "dual"):
        config = SamplerConfig(max_new_tokens=16, steps=16, block_size=8, cache=cache, eos_early_stop=False)
        assert Sampler(compiled, config).sample(PROMPTS).sequences == Sampler(lm, config).sample(PROMPTS).sequences


@pytest.mark.slow
def test_a_compiled_model_trains_with_the_same_losses(make_lm):
    config = TrainConfig(learning_rate=1e-2, precision="float32", max_steps=3)
    batches = []
    for width in (12, 16, 12):
        ids = torch.arange(10, 10 + 4 * width).view(4, width)
        batches.append(Batch({"input_ids": ids, "labels": ids}, Part(0, 4), ids.numel()))

    def losses(lm: DiffusionLM) -> list[float]:
        steps = train_steps(wrap(lm, config), MDLM(lm.spec), batches, config, 3, seed=0)
        return [result.loss.item() for result in steps]

    plain = losses(make_lm("llama", num_hidden_layers=1))
    lm = make_lm("llama", num_hidden_layers=1)
    lm.compile()
    assert losses(lm) == pytest.approx(plain, rel=1e-5)


def test_a_model_is_compiled_where_its_settings_ask_for_it(make_lm, tmp_path, monkeypatch):
    make_lm("llama").save(tmp_path)
    asked = []

    def compile(forward, mode):
        asked.append(mode)
        return forward

    monkeypatch.setattr(torch, "compile", compile)
    open_model(ModelConfig(path=str(tmp_path)))
    assert asked == []
    lm = open_model(ModelConfig(path=str(tmp_path), compile="reduce-overhead"))
    assert asked == ["reduce-overhead"]
    lm.save(tmp_path / "again")
    assert open_model(ModelConfig(path=str(tmp_path / "again"))).spec == lm.spec
