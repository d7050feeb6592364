"""Models of MLflow's registry: an alias means a version, and a version a directory."""

import pytest

from dllm_ray.errors import ModelError, OutputError
from dllm_ray.models.load import load
from dllm_ray.serving.config import ServedModel
from dllm_ray.tracking import fetch_model, registered_version

pytestmark = pytest.mark.slow  # MLflow makes a database


@pytest.fixture(scope="module")
def registry(make_lm, tmp_path_factory) -> str:
    """A registry with two versions of `digits`, the first of them `champion`; the address of its database."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlruns.db"
    client = MlflowClient(tracking_uri=uri)
    client.create_registered_model("digits")
    for seed in (0, 1):
        make_lm(seed=seed).save(folder / f"model{seed}")
        client.create_model_version("digits", (folder / f"model{seed}").as_uri())
    client.set_registered_model_alias("digits", "champion", "1")
    return uri


def test_an_alias_is_its_version(registry, monkeypatch):
    assert registered_version("models:/digits@champion", registry) == "models:/digits/1"
    assert registered_version("models:/digits/2", registry) == "models:/digits/2"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    assert registered_version("models:/digits@champion", None) == "models:/digits/1"


@pytest.mark.parametrize("model", ["models:/digits@best", "models:/digits/9", "models:/letters/1", "models:/digits/x"])
def test_what_is_not_there_is_told_by_its_name(model, registry):
    with pytest.raises(ModelError, match=model):
        registered_version(model, registry)


def test_a_registry_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(OutputError, match="MLFLOW_TRACKING_URI"):
        registered_version("models:/digits/1", None)
    with pytest.raises(OutputError, match="no such database"):
        registered_version("models:/digits/1", f"sqlite:///{tmp_path}/none.db")


def test_a_version_is_a_directory_that_can_be_loaded(registry, make_lm):
    folder = fetch_model("models:/digits/2", registry)
    found, expected = (lm.model.get_input_embeddings().weight for lm in (load(folder), make_lm(seed=1)))
    assert (found == expected).all()


def test_a_moved_alias_is_another_deployment(registry):
    from mlflow import MlflowClient

    from dllm_ray.serving.deploy import _pinned

    model = ServedModel(path="models:/digits@champion")
    before = _pinned(model, registry)
    MlflowClient(tracking_uri=registry).set_registered_model_alias("digits", "champion", "2")
    try:
        after = _pinned(model, registry)
    finally:
        MlflowClient(tracking_uri=registry).set_registered_model_alias("digits", "champion", "1")
    assert (before.path, after.path) == ("models:/digits/1", "models:/digits/2")
    assert before.name == after.name == "digits"
