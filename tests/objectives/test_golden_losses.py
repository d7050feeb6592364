"""Losses, metrics and gradients recorded from the reference's trainers, for every published kind of model."""

import json

import numpy as np
import pytest
import torch

from dllm_ray.objectives import BD3LM, MDLM, MaskedDiffusion, noise

CASES = {
    "a2d_qwen2": "mdlm_linear_scheduler_token mdlm_eval_mode mdlm_shift_bosprepended mdlm_shift_allprompt bd3lm_b4 "
    "bd3lm_b8 bd3lm_b8_uniform_seq_L20",
    "a2d_qwen3": "mdlm_linear_scheduler_sequence mdlm_linear_scheduler_batch mdlm_linear_uniform_token "
    "mdlm_linear_uniform_sequence mdlm_linear_uniform_batch mdlm_cosine_uniform_token mdlm_cosine_uniform_batch "
    "mdlm_shift_bosprepended bd3lm_b32 bd3lm_b8_uniform_seq_L20",
    "dream": "mdlm_linear_scheduler_token mdlm_shift_bosprepended dream_cart03 dream_cart01 bd3lm_b4 bd3lm_b8 "
    "bd3lm_b32 bd3lm_b8_uniform_seq_L20",
    "llada": "mdlm_linear_scheduler_token mdlm_linear_scheduler_sequence mdlm_linear_scheduler_batch "
    "mdlm_linear_uniform_batch mdlm_cosine_scheduler_token mdlm_cosine_scheduler_batch mdlm_cosine_uniform_token "
    "mdlm_cosine_uniform_sequence mdlm_eval_mode",
    "llada2": "bd3lm_b8 bd3lm_b8_shift bd3lm_b8_uniform_seq_L20",
    "llada21": "bd3lm_b4 bd3lm_b8 bd3lm_b32 bd3lm_b8_shift",
    "llada_moe": "mdlm_linear_scheduler_token mdlm_cosine_uniform_sequence",
    "modernbert": "mdlm_cosine_uniform_sequence mdlm_eval_mode",
}
every_case = pytest.mark.parametrize(
    ("model", "case"), [(model, case) for model, cases in CASES.items() for case in cases.split()]
)


def recorded(golden, model: str, case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    [facts] = [item for item in json.loads((golden / model / "losses.json").read_text()) if item["case"] == case]
    arrays = np.load(golden / model / "losses.npz")
    own = [name for name in arrays.files if name.startswith(f"{case}/")]
    return facts, {name.removeprefix(f"{case}/"): torch.from_numpy(arrays[name]) for name in own}


def objective_of(facts: dict, lm) -> MaskedDiffusion:
    names = {"loss_weight_type": "weight", "loss_norm_type": "norm", "right_shift_logits": "shift_logits"}
    fields = {"shift_logits": facts["trainer"] == "DreamTrainer"}
    fields |= {names.get(name, name): value for name, value in facts["config"].items()}
    weight = fields.get("weight", "cart[geo_p:0.3]" if facts["trainer"] == "DreamTrainer" else "scheduler")
    if weight.startswith("cart"):
        fields |= {"weight": "cart", "cart_p": float(weight[len("cart[geo_p:") : -1])}
    else:
        fields["weight"] = weight.replace("scheduler", "schedule")
    schedule = facts["scheduler"].removesuffix("AlphaScheduler").lower()
    kind = BD3LM if facts["trainer"] == "BD3LMTrainer" else MDLM
    return kind(lm.spec, schedule=schedule, stratified=False, **fields)


def raw_batch(facts: dict, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ["input_ids", "labels", "attention_mask"]
    if facts["trainer"] == "BD3LMTrainer":
        names.remove("attention_mask")  # the reference's block mask takes its place: padding is seen
    return {name: arrays[f"raw_{name}"] for name in names}


@every_case
def test_loss_nll_and_gradients_agree_with_the_reference(golden, golden_lm, model, case):
    facts, arrays = recorded(golden, model, case)
    lm = golden_lm(model)
    objective = objective_of(facts, lm)
    noisy = objective.corrupt(raw_batch(facts, arrays), t=arrays["t"], masked=arrays["masked"].bool())

    result = objective.loss(lm, noisy)

    assert result.loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    assert (result.nll_sum / result.tokens).item() == pytest.approx(facts["metrics"]["nll"], rel=1e-5)
    assert result.tokens.item() == facts["n_maskable"]
    lm.model.zero_grad()
    result.loss.backward()
    gradients = [parameter.grad.double() for parameter in lm.model.parameters() if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert norm == pytest.approx(facts["grad_norm"], rel=1e-4)


@every_case
def test_the_same_draws_corrupt_as_the_reference_does(golden, golden_lm, monkeypatch, model, case):
    facts, arrays = recorded(golden, model, case)
    width = arrays["raw_labels"].shape[1]
    draws = iter([arrays["u_t"], arrays["u_mask"][:, -width:]])  # ours draws nothing for a BOS
    monkeypatch.setattr(noise, "uniform", lambda shape, generator: next(draws))

    noisy = objective_of(facts, golden_lm(model)).corrupt(raw_batch(facts, arrays))

    torch.testing.assert_close(noisy.t, arrays["t"])
    assert torch.equal(noisy.masked, arrays["masked"].bool())
    assert torch.equal(noisy.input_ids, arrays["model_input_ids"][:, : noisy.input_ids.shape[1]])


@pytest.mark.parametrize(
    ("model", "case"), [("a2d_qwen3", "mdlm_linear_scheduler_sequence"), ("modernbert", "mdlm_eval_mode")]
)
def test_the_gradient_of_each_weight_agrees(golden, golden_lm, model, case):
    facts, arrays = recorded(golden, model, case)
    lm = golden_lm(model)
    objective = objective_of(facts, lm)
    noisy = objective.corrupt(raw_batch(facts, arrays), t=arrays["t"], masked=arrays["masked"].bool())
    lm.model.zero_grad()
    objective.loss(lm, noisy).loss.backward()
    norms = {name: parameter.grad.double().norm().item() for name, parameter in lm.model.named_parameters()}
    assert norms == pytest.approx(facts["grad_norm_per_param"], rel=1e-4, abs=1e-6)
