"""Settings of a server: what is refused before anything starts, and what `serve run` passes on."""

import hashlib
from pathlib import Path

import pytest
import yaml

from dllm_ray.config import parse, read
from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.serving.config import KEYS, ServeConfig, ServedModel, is_loopback, serve_config
from dllm_ray.serving.limits import Limits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    monkeypatch.delenv(KEYS, raising=False)


def settings(*options: str) -> ServeConfig:
    return parse(ServeConfig, ["--model.path", "some/model", *options], "serve", "Serves.")


def several(*models: dict, **other) -> ServeConfig:
    return read(ServeConfig, {"models": list(models), **other}, "test.yaml")


def test_one_model_needs_no_more_than_its_path():
    (model,) = settings().served()
    assert (model.name, model.path, model.replicas) == ("some/model", "some/model", 1)


def test_several_models_are_called_by_their_names():
    config = several({"path": "a/b"}, {"path": "a/b", "name": "quick", "sampler": {"steps": 4}})
    assert [model.name for model in config.served()] == ["a/b", "quick"]


@pytest.mark.parametrize(
    ("path", "adapter", "name"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", None, "GSAI-ML/LLaDA-8B-Instruct"),
        ("/data/runs/digits/final", None, "digits"),
        ("/data/runs/digits", "/data/adapters/poems/final", "digits+poems"),
        ("a/b", "someone/poems", "a/b+poems"),
        ("models:/digits@champion", None, "digits"),
        ("models:/digits/3", "models:/poems/1", "digits+poems"),
    ],
)
def test_a_model_without_a_name_is_called_by_what_tells_it_apart(path, adapter, name):
    assert ServedModel(path=path, adapter=adapter).name == name


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        ({}, "model.path"),
        ({"models": [{"name": "x"}]}, "models.0.path"),
        ({"model": {"path": "a/b"}, "models": [{"path": "c/d"}]}, "model"),
        ({"models": [{"path": "a/b"}, {"path": "a/b"}]}, "models"),
        ({"model": {"path": "a/b", "name": "with space"}}, "model.name"),
        ({"model": {"path": "a/b", "replicas": 0}}, "model.replicas"),
        ({"model": {"path": "a/b", "replicas": 2, "max_replicas": 1}}, "model.max_replicas"),
        ({"model": {"path": "a/b", "limits": {"max_row": 1}}}, "model.limits"),
        ({"models": [{"path": "a/b", "limits": {"max_rows": 0}}]}, "models.0.limits.max_rows"),
        ({"model": {"path": "a/b", "gpus_per_replica": -1}}, "model.gpus_per_replica"),
        ({"model": {"path": "a/b"}, "port": 70000}, "port"),
        ({"model": {"path": "a/b"}, "drain_s": 0}, "drain_s"),
        ({"model": {"path": "a/b"}, "ingress_replicas": 0}, "ingress_replicas"),
        ({"model": {"path": "a/b"}, "app": {"default_model": "c"}}, "app.default_model"),
        ({"model": {"path": "a/b"}, "app": {"api_keys": ["secret"]}}, "app.api_keys"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(tree, field):
    with pytest.raises(ConfigError) as refused:
        read(ServeConfig, tree, "test.yaml")
    assert f" {field}: " in str(refused.value)


def test_limits_of_a_model_change_those_of_the_server():
    config = several({"path": "a/b", "limits": {"max_rows": 4}}, {"path": "c/d"}, limits={"max_queue": 7})
    first, second = (model.limits_over(config.limits) for model in config.served())
    assert (first.max_rows, first.max_queue) == (4, 7)
    assert (second.max_rows, second.max_queue) == (Limits().max_rows, 7)


def test_sampler_settings_of_the_server_change_those_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text('{"diffusion": {"sampler": {"steps": 12, "block_size": 6}}}')
    config = ServedModel(path=str(tmp_path), sampler={"steps": 24}).sampler_for(str(tmp_path))
    assert (config.steps, config.block_size) == (24, 6)


@pytest.mark.parametrize("sampler", [{"stepz": 4}, {"steps": "many"}, {"steps": 1, "block_size": 8}])
def test_sampler_settings_that_cannot_be_are_refused(sampler, tmp_path):
    with pytest.raises(ConfigError, match="sampler"):
        ServedModel(path=str(tmp_path), sampler=sampler).sampler_for(str(tmp_path))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "server.example.org"])
def test_other_machines_need_keys(host, monkeypatch):
    with pytest.raises(ConfigError, match="API keys"):
        settings("--host", host)
    assert settings("--host", host, "--insecure").digests() == ()
    monkeypatch.setenv(KEYS, "first, second\nthird")
    assert len(settings("--host", host).digests()) == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_own_machine_needs_none(host):
    assert is_loopback(host)
    assert settings("--host", host).digests() == ()


def test_keys_of_the_environment_count_beside_those_of_the_file_and_are_never_told(monkeypatch):
    digest = hashlib.sha256(b"one").hexdigest()
    monkeypatch.setenv(KEYS, "one two")
    config = several({"path": "a/b"}, app={"api_keys": [digest]})
    assert config.settings().api_keys == (digest, hashlib.sha256(b"two").hexdigest())
    assert config.app.api_keys == (digest,)  # what is printed and recorded


def test_arguments_of_serve_run_override_the_file(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": "a/b", "sampler": {"steps": 4}}, "limits": {"max_rows": 3}}))
    config = serve_config({"config": str(file), "limits.max_queue": "9", "model": {"replicas": 2, "name": "it"}})
    (model,) = config.served()
    assert (model.name, model.replicas, model.sampler) == ("it", 2, {"steps": 4})
    assert (config.limits.max_rows, config.limits.max_queue) == (3, 9)


def test_arguments_may_list_models():
    config = serve_config({"models": [{"path": "a/b"}, {"path": "c/d", "sampler": {"steps": 2}}]})
    assert [(model.name, model.sampler) for model in config.served()] == [("a/b", {}), ("c/d", {"steps": 2})]


def test_an_unknown_argument_is_refused():
    with pytest.raises(ConfigError, match="modle"):
        serve_config({"modle.path": "a/b"})


def test_a_directory_that_is_no_model_is_refused_before_anything_starts(tmp_path):
    from dllm_ray.serving import server

    with pytest.raises(ModelError, match=r"config\.json"):
        server.check(settings("--model.path", str(tmp_path)))


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "serve").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_settings_file_can_be_served_once_its_models_and_keys_are_there(file, monkeypatch):
    monkeypatch.setenv(KEYS, "secret")
    config = serve_config({"config": str(file)})
    assert all(model.sampler_for("no/such-model") for model in config.served())
