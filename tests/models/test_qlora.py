"""QLoRA: an adapter trains on weights held in 4 bits, which stay as they are."""

import multiprocessing
from functools import cache
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_ray.errors import ModelError
from dllm_ray.models.adapters import add_lora
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load
from dllm_ray.objectives import MDLM
from dllm_ray.sampling import Sampler, SamplerConfig

IDS = torch.randint(19, 256, (4, 24), generator=torch.Generator().manual_seed(0))
HEADS = {"bert": ["decoder"], "qwen3": ["lm_head"]}
"""Architectures with tied and with separate tables, and the head of each."""

every_base = pytest.mark.parametrize("architecture", HEADS)
dora_or_not = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(scope="module")
def base(make_lm, tmp_path_factory):
    """`base("bert")`: the directory of a small model, as wide as the 4-bit kernels of every CPU take."""

    @cache
    def make(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp("base") / architecture
        make_lm(architecture, hidden_size=64, intermediate_size=128).save(folder)
        return folder

    return make


def adapted(lm: DiffusionLM, architecture: str, seed: int = 0, **settings) -> DiffusionLM:
    """The model with an adapter that has an effect, and a head that trains."""
    lm = add_lora(lm, LoRAConfig(**{"rank": 4, "trained_modules": HEADS[architecture]} | settings), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lm


def loss_of(lm: DiffusionLM, rows: slice = slice(None)) -> Tensor:
    objective = MDLM(lm.spec)
    batch = {"input_ids": IDS[rows], "labels": IDS[rows]}
    t = torch.full((len(IDS[rows]),), 0.5)
    return objective.loss(lm, objective.corrupt(batch, t=t, masked=IDS[rows] % 3 == 0)).loss


def gradients(lm: DiffusionLM) -> dict[str, Tensor]:
    lm.model.zero_grad()
    loss_of(lm).backward()
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters() if weight.requires_grad}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


def in_full(lm: DiffusionLM, path: Path) -> DiffusionLM:
    """A model in float32 whose weights are the values that those of a 4-bit one stand for."""
    full = load(path)
    with torch.no_grad():
        for name, module in lm.model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                full.model.get_submodule(name).weight.copy_(values)
    return full


@every_base
@dora_or_not
def test_the_gradient_is_the_one_on_the_values_that_the_4_bits_stand_for(base, architecture, dora):
    rough = load(base(architecture), quantization="4bit")
    full = in_full(rough, base(architecture))
    settings = {"architecture": architecture, "dora": dora}
    assert_same(gradients(adapted(rough, **settings)), gradients(adapted(full, **settings)))


@dora_or_not
def test_it_computes_in_bfloat16_and_updates_in_float32(base, dora):
    rough = load(base("qwen3"), quantization="4bit", dtype="bfloat16")
    full = in_full(rough, base("qwen3"))
    settings = {"architecture": "qwen3", "dora": dora, "trained_modules": []}
    ours, expected = gradients(adapted(rough, **settings)), gradients(adapted(full, **settings))
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert_same(ours, expected, tolerance=0.15)


@every_base
def test_the_adapter_and_the_head_alone_move(base, architecture):
    lm = adapted(load(base(architecture), quantization="4bit"), architecture)
    trained = {name for name, weight in lm.model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in lm.model.parameters() if weight.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = loss_of(lm)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, value in lm.model.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == trained


@every_base
def test_activations_may_be_computed_again(base, architecture):
    lm = adapted(load(base(architecture), quantization="4bit"), architecture)
    expected = gradients(lm)
    lm.model.train()  # transformers checkpoints in train mode only; nothing here drops out
    for module in lm.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lm.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(lm), expected, tolerance=1e-6)


@every_base
@dora_or_not
def test_what_was_trained_on_4_bits_opens_on_4_bits_and_on_full_weights(base, tmp_path, architecture, dora):
    lm = adapted(load(base(architecture), quantization="4bit"), architecture, dora=dora)
    lm.save(tmp_path)
    with torch.no_grad():
        expected = lm.logits(IDS)
        again, full = load(tmp_path, quantization="4bit"), load(tmp_path)
        assert torch.equal(again.logits(IDS), expected)
        assert nn.functional.cosine_similarity(full.logits(IDS).flatten(), expected.flatten(), dim=0) > 0.95
    config = SamplerConfig(max_new_tokens=8, block_size=8, steps=4)
    for opened in (again, full):
        assert len(Sampler(opened, config).sample([IDS[0, :8].tolist()]).sequences[0]) == 16


def test_the_constants_of_the_4_bits_are_quantized_too(base):
    lm = load(base("qwen3"), quantization="4bit")
    states = [module.weight.quant_state for module in lm.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert states and all(state.nested and state.quant_type == "nf4" for state in states)


def train_as_one_of_two(rank: int, path: Path, meeting: Path, told) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        lm = adapted(load(path, quantization="4bit"), "qwen3", seed=rank)
        lm.module = nn.parallel.DistributedDataParallel(lm.module)
        loss_of(lm, slice(2 * rank, 2 * rank + 2)).backward()
        told.put({name: weight.grad.numpy() for name, weight in lm.model.named_parameters() if weight.requires_grad})
        dist.destroy_process_group()
    except BaseException as error:
        told.put(repr(error))
        raise


def test_two_workers_train_one_adapter(base, tmp_path):
    """The first one's adapter, whatever the second's was; with the gradient of both halves of the batch."""
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    workers = [
        context.Process(target=train_as_one_of_two, args=(rank, base("qwen3"), tmp_path / "meeting", told))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    answers = [told.get() for _ in workers]
    for worker in workers:
        worker.join()
    expected = gradients(adapted(load(base("qwen3"), quantization="4bit"), "qwen3", seed=0))
    for answer in answers:
        assert isinstance(answer, dict), answer
        assert_same({name: torch.from_numpy(value) for name, value in answer.items()}, expected)


# --- what can't be


def test_a_quantized_module_is_not_trained_whole(base):
    lm = load(base("qwen3"), quantization="4bit")
    with pytest.raises(ModelError, match=r"trained_modules: the weights of model\.layers\.0\.mlp are quantized"):
        add_lora(lm, LoRAConfig(rank=2, trained_modules=["0.mlp"]), seed=0)


def test_dora_on_8_bits_is_refused_before_and_after_training(base, tmp_path):
    lm = load(base("qwen3"), quantization="8bit")
    with pytest.raises(ModelError, match=r"lora\.dora: DoRA works on full or 4-bit weights, not on .*8bit"):
        add_lora(lm, LoRAConfig(rank=2, dora=True), seed=0)
    add_lora(load(base("qwen3")), LoRAConfig(rank=2, dora=True), seed=0).save(tmp_path)
    with pytest.raises(ModelError, match="DoRA works on full or 4-bit weights"):
        load(tmp_path, quantization="8bit")
