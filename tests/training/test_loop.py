"""The training step without Ray: what a seed, a resumption and micro-batches may and may not change."""

import pytest
import torch
from torch import nn

from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.objectives import MDLM, Part
from dllm_ray.training import checkpoint
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, train_steps, validate
from dllm_ray.training.strategies import wrap

STEPS = 6


def make_batches(count: int = STEPS, rows: int = 6, width: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(10, 200, (rows, width), generator=generator)
        labels = ids.clone()
        labels[:, :4] = IGNORE_INDEX
        batches.append(Batch({"input_ids": ids, "labels": labels}, Part(0, rows), ids.numel()))
    return batches


def config(**changes) -> TrainConfig:
    return TrainConfig(**({"learning_rate": 1e-2, "precision": "float32", "max_steps": STEPS} | changes))


def start(make_lm, settings: TrainConfig, norm: str = "token", **model):
    strategy = wrap(make_lm(**model), settings)
    return strategy, MDLM(strategy.lm.spec, norm=norm)


def losses(strategy, objective, settings, batches, seed=0, start_step=0) -> list[float]:
    steps = train_steps(strategy, objective, batches, settings, STEPS, seed, start_step)
    return [result.loss.item() for result in steps]


def test_training_lowers_the_loss_of_a_batch_it_sees_again_and_again(make_lm):
    settings = config(max_steps=60)
    strategy, objective = start(make_lm, settings)
    batch = make_batches(1)[0]
    before, _ = validate(strategy, objective, [batch], seed=0)
    for _ in train_steps(strategy, objective, [batch] * 60, settings, 60, seed=0):
        pass
    after, targets = validate(strategy, objective, [batch], seed=0)
    assert after < before / 2
    assert targets == 6 * 8


def test_a_seed_reproduces_a_run_and_another_seed_does_not(make_lm):
    settings = config()
    runs = [losses(*start(make_lm, settings), settings, make_batches(), seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_change_nothing(make_lm, norm, size):
    whole, parts = config(), config(micro_batch_size=size)
    expected = losses(*start(make_lm, whole, norm), whole, make_batches())
    assert losses(*start(make_lm, parts, norm), parts, make_batches()) == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_repeats_the_undisturbed_one_to_the_last_bit(make_lm, tmp_path):
    settings, batches = config(), make_batches()
    undisturbed = losses(*start(make_lm, settings), settings, batches)

    strategy, objective = start(make_lm, settings)
    first = losses(strategy, objective, settings, batches[:3])
    checkpoint.save(tmp_path, strategy, {"seed": 0}, {"step": 3, "valid_nll": None}, False)

    again, objective = start(make_lm, settings, seed=99)  # other weights, which restoring replaces
    state = checkpoint.restore(tmp_path, again)
    assert state == {"step": 3, "valid_nll": None}
    assert first + losses(again, objective, settings, batches[3:], start_step=3) == undisturbed


def test_dropout_is_seeded_too(make_lm, tmp_path):
    settings, batches = config(), make_batches()
    model = {"extra": {"hidden_dropout_prob": 0.2}}
    runs = [losses(*start(make_lm, settings, **model), settings, batches) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != losses(*start(make_lm, settings), settings, batches)


def test_the_gradient_is_clipped_to_the_norm_asked_for(make_lm, monkeypatch):
    settings = config(clip_norm=0.01)
    strategy, objective = start(make_lm, settings)
    seen = []
    step = strategy.optimizer.step

    def spy():
        grads = [p.grad for p in strategy.lm.model.parameters() if p.grad is not None]
        seen.append(nn.utils.get_total_norm(grads).item())
        step()

    monkeypatch.setattr(strategy.optimizer, "step", spy)
    (result,) = train_steps(strategy, objective, make_batches(1), settings, 1, seed=0)
    assert result.grad_norm.item() > 0.01
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_zero_means_no_clipping(make_lm):
    free, clipped = config(clip_norm=0.0), config(clip_norm=1e9)
    assert losses(*start(make_lm, free), free, make_batches()) == losses(
        *start(make_lm, clipped), clipped, make_batches()
    )


def test_bf16_trains_close_to_float32(make_lm):
    exact, rounded = config(), config(precision="bf16")
    expected = losses(*start(make_lm, exact), exact, make_batches())
    found = losses(*start(make_lm, rounded), rounded, make_batches())
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected


def test_validation_repeats_itself_and_leaves_the_model_in_training_mode(make_lm):
    settings = config()
    strategy, objective = start(make_lm, settings)
    strategy.lm.model.train()
    batches = make_batches(2)
    assert validate(strategy, objective, batches, 0) == validate(strategy, objective, batches, 0)
    assert strategy.lm.model.training


def test_filler_rows_change_neither_loss_nor_gradient(make_lm):
    settings = config()
    plain = make_batches()
    filled = []
    for batch in plain:
        ids, labels = batch.tensors["input_ids"], batch.tensors["labels"]
        extra = {
            "input_ids": torch.cat([ids, ids[:2]]),
            "labels": torch.cat([labels, torch.full_like(labels[:2], IGNORE_INDEX)]),
        }
        # the noise of a global batch is drawn for `total` rows; two more are dealt out as filler
        filled.append(Batch(extra, Part(0, len(ids)), batch.tokens))
    expected = losses(*start(make_lm, settings), settings, plain)
    assert losses(*start(make_lm, settings), settings, filled) == pytest.approx(expected, rel=1e-5)


def poisoned(batch: Batch, row: int) -> Batch:
    """The batch with a token in one row whose embedding isn't a number."""
    ids = batch.tensors["input_ids"].clone()
    ids[row, 0] = POISON
    return Batch(batch.tensors | {"input_ids": ids}, batch.part, batch.tokens)


POISON = 9


def test_a_row_that_is_not_finite_changes_no_weights_and_is_named(make_lm):
    settings, batches = config(micro_batch_size=2), make_batches()
    strategy, objective = start(make_lm, settings, architecture="qwen3")
    with torch.no_grad():
        strategy.lm.model.get_input_embeddings().weight[POISON] = torch.nan
    batches[2] = poisoned(batches[2], 3)
    results = []
    before = after = None
    for result in train_steps(strategy, objective, batches, settings, STEPS, seed=0):
        results.append(result)
        before, after = after, next(strategy.lm.model.model.layers.parameters()).clone()
        if result.step == 3:
            assert torch.equal(before, after)
    assert [result.finite for result in results] == [True, True, False, True, True, True]
    assert [result.poisoned for result in results] == [[], [], [3], [], [], []]
    assert all(result.loss.isfinite() for result in results if result.finite)


def test_a_wish_to_stop_is_told_with_the_step_in_which_it_came(make_lm):
    settings = config()
    answers = iter([False, False, True, True, True, True])
    steps = train_steps(
        *start(make_lm, settings), make_batches(), settings, STEPS, seed=0, asked_to_stop=lambda: next(answers)
    )
    assert [result.stop for result in steps] == [False, False, True, True, True, True]
