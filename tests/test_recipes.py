"""The recipes of the published families in `configs/sft`: each fits a checkpoint of its family and trains it."""

from pathlib import Path

import pytest
import torch

from dllm_ray.config import parse
from dllm_ray.models.adapters import add_lora
from dllm_ray.models.load import open_model
from dllm_ray.objectives import build
from dllm_ray.training.job import TrainingJob

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "sft"
CHECKPOINTS = {
    "llada-8b": "llada",
    "llada-moe": "llada_moe",
    "llada2-mini": "llada2",
    "dream-7b": "dream",
    "a2d-qwen3": "a2d_qwen3",
    "modernbert-chat": "modernbert",
}
"""How a family's recipes begin, and the reference checkpoint of that family."""
SMALL = ("digits", "edits", "gsm8k_tiny", "lengths")
"""Models from scratch."""
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in SMALL)


def checkpoint_of(recipe: str) -> str:
    (name,) = {name for start, name in CHECKPOINTS.items() if recipe.startswith(start)}
    return name


def settings_of(recipe: str, *options: str) -> TrainingJob:
    return parse(TrainingJob, ["--config", str(FOLDER / f"{recipe}.yaml"), *options], "sft", "Trains.")


def test_every_family_has_a_recipe_and_every_recipe_a_family():
    assert {checkpoint_of(recipe) for recipe in RECIPES} == set(CHECKPOINTS.values())


def test_no_two_recipes_write_to_one_place():
    folders = [settings_of(recipe).output_dir for recipe in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_a_checkpoint_of_its_family(recipe, golden):
    path = golden / checkpoint_of(recipe) / "checkpoint"
    job = settings_of(recipe, "--model.path", str(path))
    assert job.model.path == str(path)
    lm = open_model(job.model)
    if job.lora.rank is not None:
        lm = add_lora(lm, job.lora, job.seed)
    objective = build(job.objective, lm.spec)
    ids = torch.randint(19, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :10] = -100
    noisy = objective.corrupt({"input_ids": ids, "labels": labels}, torch.Generator().manual_seed(1))
    lm.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.train.precision == "bf16"):
        loss = objective.loss(lm, noisy).loss
    loss.backward()
    assert loss.isfinite() and loss > 0
    gradients = [weight.grad for weight in lm.model.parameters() if weight.requires_grad]
    assert sum(gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients) > len(gradients) / 3
