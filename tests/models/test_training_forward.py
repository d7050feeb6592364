"""The training entry: cross-entropy at chosen positions, part by part, through the architecture's own head."""

import pytest
import torch
import torch.nn.functional as F

from dllm_ray.models.adapters import add_lora
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.lm import DiffusionLM

ARCHITECTURES = ["bert", "modernbert", "roberta", "llama", "qwen3", "gemma2", "gpt2", "opt"]
POSITIONS = torch.tensor([0, 3, 7, 8, 13, 16, 23])
IDS = torch.randint(0, 260, (3, 8), generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(20, 20 + len(POSITIONS))

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def lm(make_lm, architecture):
    soft_cap = {"final_logit_softcapping": 0.5, "layer_types": ["full_attention"] * 2}
    return make_lm(architecture, seed=1, extra=soft_cap if architecture == "gemma2" else {})


def gradients(lm: DiffusionLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    lm.model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in lm.model.named_parameters() if weight.grad is not None}


def head_runs(lm: DiffusionLM, run) -> list[int]:
    """Positions that each run of the vocabulary head sees."""
    seen = []
    head = lm.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel()))
    run()
    handle.remove()
    return seen


@every_architecture
@pytest.mark.parametrize("at_once", [None, 7, 3, 1])
@pytest.mark.parametrize("shift", [False, True])
def test_it_is_the_cross_entropy_of_the_logits_and_so_are_its_gradients(lm, at_once, shift):
    weights = torch.arange(1.0, 8.0)
    expected = F.cross_entropy(lm.logits(IDS, positions=POSITIONS, shift=shift), TARGETS, reduction="none")
    found = lm.nll(IDS, None, None, POSITIONS, TARGETS, shift=shift, at_once=at_once)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain = gradients(lm, (expected * weights).sum())
    torch.testing.assert_close(gradients(lm, (found * weights).sum()), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama", "gemma2"])
def test_the_head_sees_a_few_positions_at_a_time_and_all_but_the_first_twice(lm):
    losses = []
    runs = head_runs(lm, lambda: losses.append(lm.nll(IDS, None, None, POSITIONS, TARGETS, at_once=3).sum()))
    assert runs == [3, 2, 2]
    assert sorted(head_runs(lm, losses[0].backward)) == [2, 2]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_few_positions_are_one_run_and_none_are_none(lm):
    assert head_runs(lm, lambda: lm.nll(IDS, None, None, POSITIONS, TARGETS, at_once=7)) == [7]
    nothing = torch.tensor([], dtype=torch.long)
    found = lm.nll(IDS, None, None, nothing, nothing, at_once=3)
    assert found.shape == (0,)
    assert all(not gradient.any() for gradient in gradients(lm, found.sum()).values())


@pytest.mark.parametrize("architecture", ["llama"])
def test_workers_that_meet_in_the_head_run_it_equally_often(lm):
    lm.module.collective_head = True
    for count in (7, 2, 0):
        run = lambda: lm.nll(IDS, None, None, POSITIONS[:count], TARGETS[:count], at_once=10, most=24)  # noqa: B023, E731
        assert len(head_runs(lm, run)) == 3


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_an_adapter_and_bfloat16_change_nothing_about_it(lm):
    adapted = add_lora(lm, LoRAConfig(rank=2), seed=0)
    for name, weight in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = adapted.nll(IDS, None, None, POSITIONS, TARGETS)
        found = adapted.nll(IDS, None, None, POSITIONS, TARGETS, at_once=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    plain, parts = gradients(adapted, expected.sum()), gradients(adapted, found.sum())
    assert all("lora_" in name for name in parts)
    torch.testing.assert_close(parts, plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("architecture", ["bert"])
def test_a_failed_run_leaves_the_model_whole(lm):
    trunk = lm.model.bert
    with pytest.raises((IndexError, RuntimeError)):
        lm.nll(IDS, None, None, POSITIONS, TARGETS + 10_000, at_once=3)
    assert lm.model.bert is trunk
