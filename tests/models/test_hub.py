"""Hub ids: the same code path as on a machine with a network, on a cache that was filled before."""

import json
import os
import subprocess
import sys

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

REVISION = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import sys
from dllm_ray.errors import ModelError
from dllm_ray.models.defaults import sampler_settings
from dllm_ray.models.load import check_path, load, open_tokenizer
path = sys.argv[1]
try:
    check_path(path)
    lm = load(path)
    assert open_tokenizer(path)[1] == lm.spec
    print(lm.spec.family, sum(p.numel() for p in lm.model.parameters()), lm.model.name_or_path, sampler_settings(path))
except ModelError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tokenizer):
    """A hub cache with `org/sdar`, a published layout in several shards."""
    home = tmp_path_factory.mktemp("hub")
    model = home / "hub" / "models--org--sdar"
    snapshot = model / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    native = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **sizes))
    native.save_pretrained(snapshot, max_shard_size="20KB")
    index = json.loads((snapshot / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    config = json.loads((snapshot / "config.json").read_text())
    config |= {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4}
    (snapshot / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(snapshot)
    return home


def ask(hub, path: str) -> str:
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_id_is_loaded_shard_by_shard(hub):
    family, parameters, name, sampler = ask(hub, "org/sdar").split(maxsplit=3)
    assert (family, name) == ("sdar", "org/sdar")
    assert int(parameters) > 9000
    assert sampler == "{'policy': 'low_confidence', 'block_size': 4, 'cache': 'block'}"


def test_a_hub_id_that_is_not_there_is_refused(hub):
    assert ask(hub, "org/nothing").startswith("refused: org/nothing: ")


def test_a_shard_that_was_not_downloaded_is_named(hub):
    snapshot = hub / "hub" / "models--org--sdar" / "snapshots" / REVISION
    shard = sorted(snapshot.glob("model-*.safetensors"))[0]
    shard.rename(hub / "aside")
    try:
        said = ask(hub, "org/sdar")
    finally:
        (hub / "aside").rename(shard)
    assert said.startswith("refused: org/sdar: ")
    assert shard.name in said
