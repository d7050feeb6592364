"""What is in a checkpoint, and how it becomes `final/`."""

import json

import pytest
import torch
import yaml

from dllm_ray.models.load import load
from dllm_ray.models.provenance import read_provenance
from dllm_ray.training import checkpoint
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.strategies import wrap


@pytest.fixture
def saved(make_lm, tmp_path):
    strategy = wrap(make_lm(), TrainConfig(learning_rate=1e-3))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    checkpoint.save(
        folder, strategy, {"seed": 7, "train": {"betas": (0.9, 0.99)}}, {"step": 4, "valid_nll": 1.5}, False
    )
    return strategy, folder


def test_a_checkpoint_holds_settings_and_state(saved):
    _, folder = saved
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 7, "train": {"betas": [0.9, 0.99]}}
    assert json.loads((folder / "state.json").read_text()) == {"step": 4, "valid_nll": 1.5}


def test_the_export_loads_as_the_same_model_with_its_settings_and_origin(saved, tmp_path):
    strategy, folder = saved
    target = tmp_path / "final"
    checkpoint.export(folder, target, card="# a model", provenance={"run_id": "abc"})
    ids = torch.arange(10, 20).unsqueeze(0)
    assert torch.equal(load(target).logits(ids), strategy.lm.model.eval()(ids).logits)
    assert read_provenance(str(target)) == {"run_id": "abc"}
    assert (target / "README.md").read_text() == "# a model"
    assert (target / "config.yaml").is_file()
    assert not list(target.glob("optimizer*")) and not (target / "state.json").exists()


def test_an_export_replaces_an_older_one_whole(saved, tmp_path):
    _, folder = saved
    target = tmp_path / "final"
    target.mkdir()
    (target / "stale.bin").touch()
    checkpoint.export(folder, target, card="", provenance={})
    assert not (target / "stale.bin").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("final")] == ["final"]


def test_an_interrupted_export_leaves_no_half_model(saved, tmp_path, monkeypatch):
    _, folder = saved
    target = tmp_path / "final"

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.json, "dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.export(folder, target, card="", provenance={})
    assert not target.exists()


def test_a_model_without_provenance_has_none(tmp_path):
    assert read_provenance(str(tmp_path)) == {}
    assert read_provenance("some/hub-id") == {}
