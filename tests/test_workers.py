"""A pool of Ray actors that hold the model: the same answers from any number of them, also when one is lost."""

import os
import signal

import pytest
import ray

from dllm_ray.cluster import Shares
from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.config import ModelConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.workers import ModelPool

pytestmark = pytest.mark.slow

CONFIG = SamplerConfig(max_new_tokens=8, block_size=4, steps=4, temperature=1.0, seed=3)
PROMPTS = [list(range(20, 22 + number % 5)) for number in range(11)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(make_lm, tmp_path_factory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    make_lm().save(folder)
    return ModelConfig(path=str(folder))


def pool(model, workers=2):
    return ModelPool(model, Shares(workers, cpus=0.5, gpus=0, data_cpus=1), threads=1)


def test_the_pool_answers_like_one_sampler_whatever_the_workers_and_slices(model, make_lm):
    expected = Sampler(make_lm(), CONFIG).sample(PROMPTS)
    progress = []
    with pool(model, workers=2) as two, pool(model, workers=1) as one:
        found = two.sample(PROMPTS, CONFIG, 3, progress.append)
        assert found.sequences == expected.sequences
        assert found.row_nfe == expected.row_nfe
        assert one.sample(PROMPTS, CONFIG, 4).sequences == expected.sequences
    assert progress == sorted(progress) and progress[-1] == len(PROMPTS)


def test_a_lost_worker_is_replaced_and_its_slice_done_again(model, make_lm):
    expected = Sampler(make_lm(), CONFIG).sample(PROMPTS).sequences
    with pool(model) as answers:
        answers.wait()
        killed = []

        def kill_one(_done: int) -> None:
            if not killed:  # after the first slice, while others are under way
                worker = answers._workers[0]
                killed.append(worker)
                os.kill(ray.get(worker.__ray_call__.remote(lambda _self: os.getpid())), signal.SIGKILL)

        assert answers.sample(PROMPTS, CONFIG, 2, kill_one).sequences == expected
        assert killed and killed[0] is not answers._workers[0]


def test_a_workers_complaint_arrives_as_itself(model, tmp_path):
    with pool(model) as answers, pytest.raises(ConfigError, match=r"^a canvas of 68 tokens .* context of 64"):
        answers.sample([list(range(20, 80))], CONFIG, 4)
    gone = ModelConfig(path=str(tmp_path / "gone"))
    with pool(gone) as answers, pytest.raises(ModelError, match=r"^no such model directory: .*gone$"):
        answers.sample(PROMPTS, CONFIG, 4)


def test_no_prompts_no_answers(model):
    with pool(model, workers=1) as answers:
        assert answers.sample([], CONFIG, 4).completions == []
