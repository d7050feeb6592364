"""Every strategy trains the same model: as one plain process does, on any number of workers, whatever its options."""

from itertools import pairwise

import pytest
import strategy_testing as runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dllm_ray.errors import ConfigError, TrainingError
from dllm_ray.models.load import load
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.strategies import check
from dllm_ray.training.strategies.pieces import Piece, Pieces, write

pytestmark = pytest.mark.slow

SHARDED = runs.STRATEGIES[1:]
ZERO = SHARDED[1:]
AFTER = 5
"""Steps taken from a restored checkpoint."""


def near(curve: list[tuple[float, float]], tolerance: float = 1e-4) -> list:
    return [pytest.approx(step, abs=tolerance) for step in curve]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def trained(folder):
    """What each strategy did: number of workers -> strategy -> figures."""
    two = runs.in_group(2, folder / "two", runs.curves, 2, folder / "exports-2", folder / "checkpoints")
    one = runs.in_group(1, folder / "one", runs.curves, 1, folder / "exports-1")
    return {1: one[0], 2: two[0]}


@pytest.fixture(scope="module")
def optional(folder):
    """What strategies did with their options: (option, strategy) -> steps."""
    return runs.in_group(2, folder / "options", runs.variants, folder / "variants")[0]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("strategy", runs.STRATEGIES)
def test_every_strategy_gives_the_curve_of_one_plain_process(trained, strategy, workers):
    plain = trained[1]["ddp"]["at once"]
    assert len(plain) == runs.STEPS and plain[-1][0] != plain[0][0]
    assert max(norm for _, norm in plain) > 1.0  # so gradients were clipped
    assert trained[workers][strategy]["at once"] == near(plain)
    assert trained[workers][strategy]["accumulated"] == near(plain)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("strategy", runs.STRATEGIES)
def test_the_exported_model_is_that_of_one_plain_process(trained, folder, strategy, workers):
    ids = torch.arange(20, 44).view(2, 12)
    expected, found = (
        load(path).logits(ids) for path in (folder / "exports-1" / "ddp", folder / f"exports-{workers}" / strategy)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_checkpoint_of_two_workers_goes_on_with_another_number(trained, folder, workers):
    written_by = {name: name for name in runs.STRATEGIES}
    if workers == 3:  # and in another stage of ZeRO
        written_by |= dict(zip(ZERO, (*ZERO[1:], ZERO[0]), strict=True))
    results = runs.in_group(
        workers, folder / f"again-{workers}", runs.go_on, workers, folder / "checkpoints", AFTER, written_by
    )
    for name, found in results[0].items():
        undisturbed = trained[2][name]
        assert found["nll"] == pytest.approx(undisturbed["nll"], abs=1e-5), name
        assert found["steps"] == near(undisturbed["accumulated"][runs.SAVED :][:AFTER]), name


def test_a_checkpoint_of_another_strategy_is_refused(trained, folder):
    written_by = {"ddp": "fsdp2", "fsdp2": "zero1", "zero2": "ddp"}
    (said,) = runs.in_group(1, folder / "refused", runs.refused, folder / "checkpoints", written_by)
    assert said.keys() == written_by.keys()
    for name, message in said.items():
        assert "go on with the strategy that wrote it" in message and name in message


@pytest.mark.parametrize("strategy", runs.STRATEGIES)
def test_activation_checkpointing_runs_layers_twice_and_changes_no_gradient(optional, strategy):
    assert optional["activation checkpointing", strategy] == near(optional["none", "ddp"], 1e-5)
    forwards = 2 * len(optional["none", strategy])  # two micro-batches in a step
    assert optional["calls", strategy] == 2 * forwards


@pytest.mark.parametrize("strategy", SHARDED)
def test_offload_changes_nothing(optional, strategy):
    for what in runs.OFFLOADS[strategy]:
        assert optional[f"offload {what}", strategy] == near(optional["none", "ddp"], 1e-5)
        undisturbed, restored = optional[f"offload {what}, after", strategy]
        assert restored == near(undisturbed, 1e-5)


@pytest.mark.parametrize("strategy", runs.STRATEGIES)
def test_bfloat16_trains_close_to_float32(optional, strategy):
    for option in ("bf16", "bf16 weights"):
        assert optional[option, strategy] == near(optional["none", "ddp"], 0.02)
        assert optional[option, strategy] != optional["none", strategy]


@pytest.mark.parametrize("strategy", runs.STRATEGIES)
def test_a_gradient_that_is_not_finite_changes_no_weights(optional, strategy):
    norm, (before, after) = optional["untouched", strategy]
    assert not torch.tensor(norm).isfinite()
    assert after == before


@pytest.mark.parametrize("strategy", runs.STRATEGIES)
def test_an_adapter_trains_alike_and_alone(optional, folder, strategy):
    assert optional["lora", strategy] == near(optional["lora", "ddp"], 1e-5)
    undisturbed, restored = optional["lora, after", strategy]
    assert restored == near(undisturbed, 1e-5)
    expected, found = (
        load_file(folder / "variants" / "adapters" / name / "adapter_model.safetensors") for name in ("ddp", strategy)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_edit_heads_train_alike_under_every_strategy(folder):
    """With an adapter or without; each edit of a global batch is seen by one worker, in parts of eight tokens."""
    plain = runs.in_group(1, folder / "edits-1", runs.edit_curves, 1, folder / "edits-of-1", ("ddp",))[0]
    names = ("ddp", "fsdp2", "zero2", "zero3")
    found = runs.in_group(2, folder / "edits-2", runs.edit_curves, 2, folder / "edits-of-2", names)[0]
    for what in ("", ", adapter"):
        assert plain[f"ddp{what}"][0] != plain[f"ddp{what}"][-1]
        expected = load_file(folder / "edits-of-1" / f"ddp{what}" / f"{'adapter_' if what else ''}model.safetensors")
        for name in names:
            assert found[f"{name}{what}"] == near(plain[f"ddp{what}"]), f"{name}{what}"
            file = folder / "edits-of-2" / f"{name}{what}" / f"{'adapter_' if what else ''}model.safetensors"
            exported = load_file(file)
            assert exported.keys() == expected.keys() and any("edit_heads" in tensor for tensor in exported)
            for tensor, values in expected.items():
                torch.testing.assert_close(exported[tensor], values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strategy", SHARDED)
def test_quantized_weights_are_for_ddp(strategy):
    with pytest.raises(ConfigError, match=f"^strategy: {strategy} can't shard weights in 4bit"):
        check(TrainConfig(strategy=strategy), "4bit")
    check(TrainConfig(strategy=strategy), None)
    check(TrainConfig(strategy="ddp"), "4bit")


@given(data=st.data(), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_pieces_cut_anywhere_are_found_again(tmp_path_factory, data, sizes):
    """Parameters lie one after the other in one row, which writers and readers cut in different places."""
    values = torch.rand(sum(sizes))

    def cut() -> list[tuple[int, int]]:
        places = data.draw(st.lists(st.integers(0, len(values)), max_size=4))
        edges = sorted({0, len(values), *places})
        return list(pairwise(edges))

    def pieces(begin: int, end: int) -> list[Piece]:
        found, at = [], 0
        for number, size in enumerate(sizes):
            first, last = max(begin, at), min(end, at + size)
            if first < last:
                found.append(Piece(f"p{number}", first - at, last - first, 0, first - begin))
            at += size
        return found

    folder = tmp_path_factory.mktemp("pieces")
    for rank, (begin, end) in enumerate(cut()):
        write(folder, rank, [{"weights": values[begin:end]}], pieces(begin, end), step=7)
    stored = Pieces(folder)
    assert stored.step == 7
    for begin, end in cut():
        buffer = torch.full((end - begin,), torch.nan)
        for piece in pieces(begin, end):
            stored.read("weights", piece, buffer)
        assert torch.equal(buffer, values[begin:end])


def test_a_missing_file_of_pieces_is_named(tmp_path):
    write(tmp_path, 0, [{"weights": torch.zeros(4)}], [Piece("w", 0, 4, 0, 0)], step=1)
    with pytest.raises(TrainingError, match="lacks a part of w"):
        Pieces(tmp_path).read("weights", Piece("w", 2, 4, 0, 0), torch.zeros(4))
