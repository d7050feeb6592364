"""Every published family trains, with and without LoRA, and writes answers, from its own on-disk format."""

import pytest
import torch

from dllm_ray.models.adapters import add_lora
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.load import load
from dllm_ray.models.probe import check_training, unused_parameters
from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.objectives import Part, build
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, train_steps
from dllm_ray.training.strategies import wrap

FAMILIES = ["llada", "llada_moe", "dream", "a2d_qwen3", "a2d_qwen2", "llada2", "llada21", "modernbert"]
STEPS = 3


def batch(seed: int = 0) -> Batch:
    ids = torch.randint(20, 500, (4, 20), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :6] = IGNORE_INDEX
    return Batch({"input_ids": ids, "labels": labels}, Part(0, 4), ids.numel())


def trained(lm, steps: int = STEPS, objective: str = "mdlm"):
    settings = TrainConfig(learning_rate=1e-2, precision="float32", max_steps=steps)
    strategy = wrap(lm, settings)
    minimised = build(ObjectiveConfig(name=objective, block_size=8), lm.spec)
    results = list(train_steps(strategy, minimised, [batch()] * steps, settings, steps, seed=0))
    lm.model.eval()
    return strategy, [result.loss.item() for result in results]


def weights(lm) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


@pytest.fixture(params=FAMILIES)
def lm(request, golden):
    return load(golden / request.param / "checkpoint")


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_every_weight_trains_and_the_loss_falls(lm, objective):
    before = weights(lm)
    _, losses = trained(lm, steps=20, objective=objective)
    assert losses[-1] < losses[0]
    assert not [name for name, tensor in weights(lm).items() if torch.equal(tensor, before[name])]


def test_it_is_fit_for_padding_packing_and_block_diffusion(lm):
    check_training(lm.model, padded=True, positions=True)
    assert unused_parameters(lm.model) == []


def test_an_adapter_trains_and_nothing_else(lm):
    adapted = add_lora(lm, LoRAConfig(rank=2), seed=0)
    before = weights(adapted)
    _, losses = trained(adapted)
    assert all(torch.isfinite(torch.tensor(losses)))
    changed = {name for name, tensor in weights(adapted).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_a_checkpoint_of_an_adapter_goes_on_where_it_was(lm, golden, tmp_path):
    strategy, _ = trained(add_lora(lm, LoRAConfig(rank=2), seed=0))
    strategy.save(tmp_path)
    fresh = add_lora(load(lm.model.name_or_path), LoRAConfig(rank=2), seed=1)
    again = wrap(fresh, TrainConfig(learning_rate=1e-2, precision="float32", max_steps=STEPS))
    again.load(tmp_path)
    for name, tensor in weights(strategy.lm).items():
        assert torch.equal(tensor, weights(again.lm)[name])
    strategy.export(tmp_path / "adapter")
    assert load(tmp_path / "adapter").model.peft_config.keys() == strategy.lm.model.peft_config.keys()


def test_a_checkpoint_of_the_whole_model_goes_on_where_it_was(lm, tmp_path):
    strategy, _ = trained(lm)
    strategy.save(tmp_path)
    again = wrap(load(lm.model.name_or_path), TrainConfig(learning_rate=1e-2, precision="float32", max_steps=STEPS))
    again.load(tmp_path)
    for (name, ours), (_, theirs) in zip(
        strategy.lm.model.state_dict().items(), again.lm.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "seed": 3, "policy": "random"}, {"cfg_scale": 1.0}])
def test_it_answers_prompts_of_any_length_with_its_own_sampler_settings(lm, changes):
    config = SamplerConfig(**(dict(lm.spec.sampler) | {"max_new_tokens": 40, "eos_early_stop": False} | changes))
    prompts = [[30, 31, 32], list(range(40, 75)), [50]]
    out = Sampler(lm, config).sample(prompts)
    whole_blocks = config.policy in ("llada2", "llada21")  # written to the end of the last one
    for prompt, sequence, answer in zip(prompts, out.sequences, out.completions, strict=True):
        assert sequence[: len(prompt)] == prompt
        assert len(answer) <= 40 <= len(sequence) - len(prompt) < 40 + (config.block_size if whole_blocks else 1)
        assert lm.spec.mask_token_id not in sequence[len(prompt) :]
    alone = Sampler(lm, config).sample([prompts[1]], seeds=None if config.seed is None else [out_seed(config, 1)])
    assert alone.sequences[0] == out.sequences[1]


def out_seed(config: SamplerConfig, row: int) -> int:
    from dllm_ray.sampling.sampler import row_seeds

    return row_seeds(config.seed, range(row + 1))[row]
