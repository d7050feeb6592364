"""Checkpoints on disk: every tensor is read back bit for bit, whole or in parts, and what is broken is named."""

import json
import os
import pickle
import struct
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dllm_ray.errors import ModelError
from dllm_ray.models.checkpoint import (
    INDEX,
    SINGLE,
    Assembled,
    Checkpoint,
    DistributedTensor,
    FileTensor,
    HeldTensor,
    Piece,
    Stored,
    whole,
    write_safetensors,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *SMALL_FLOATS, *INTEGERS, torch.bool]
SHAPES = [(), (1,), (7,), (3, 4), (2, 3, 5), (0,), (0, 3), (2, 0, 3)]
KINDS = ["file", "held", "distributed"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits (of zeros and ones for bool)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    data = torch.randint(0, 256, (prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """What makes a tensor the same bit for bit; NaNs are equal to themselves."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }


def stored(kind: str, tensor: torch.Tensor, folder: Path) -> Stored:
    """The tensor as something that has not been read yet, with another one before it and one after it."""
    if kind == "held":
        return HeldTensor(tensor)
    tensors = {"before": torch.arange(5), "it": tensor, "then": torch.arange(3)}
    if kind == "file":
        save_file(tensors, folder / SINGLE)
    else:
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    configured(folder)
    found = Checkpoint(str(folder)).tensors["it"]
    assert isinstance(found, FileTensor if kind == "file" else DistributedTensor)
    return found


def configured(folder: Path) -> Path:
    """The folder, with a config.json in it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: whole(tensor).read() for name, tensor in Checkpoint(str(folder)).tensors.items()}


# --- one tensor


@every_kind
@every_dtype
def test_a_tensor_of_any_type_is_read_bit_for_bit(tmp_path, kind, dtype):
    tensor = filled((3, 5), dtype)
    lazy = stored(kind, tensor, tmp_path)
    assert (lazy.shape, lazy.dtype) == ((3, 5), dtype)
    target = torch.zeros((3, 5), dtype=dtype)
    lazy.read_into(target)
    assert bits(target) == bits(tensor)


@every_kind
@every_shape
def test_a_tensor_of_any_shape_is_read_even_if_it_is_empty(tmp_path, kind, shape):
    tensor = filled(shape, torch.float32)
    lazy = stored(kind, tensor, tmp_path)
    assert lazy.shape == shape
    target = torch.zeros(shape)
    lazy.read_into(target)
    assert bits(target) == bits(tensor)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
def test_any_part_of_a_tensor_is_read_from_where_it_starts(tmp_path, kind, dtype):
    tensor = filled((4, 3), dtype)
    lazy = stored(kind, tensor, tmp_path)
    for start, count in [(0, 12), (0, 1), (0, 5), (11, 1), (5, 7), (3, 6), (12, 0), (4, 0)]:
        target = torch.zeros(count, dtype=dtype)
        lazy.read_into(target, start)
        assert bits(target) == bits(tensor.view(-1)[start : start + count]), (start, count)


@every_kind
def test_a_part_of_a_larger_tensor_is_filled_and_nothing_else(tmp_path, kind):
    tensor = filled((2, 3), torch.int32)
    lazy = stored(kind, tensor, tmp_path)
    target = torch.full((4, 3), 7, dtype=torch.int32)
    lazy.read_into(target[1:3])
    assert torch.equal(target[1:3], tensor)
    assert target[0].eq(7).all() and target[3].eq(7).all()


def test_a_held_tensor_may_lie_in_memory_in_any_order():
    tensor = torch.arange(12).view(3, 4).T
    target = torch.zeros((2, 3), dtype=torch.int64)
    HeldTensor(tensor).read_into(target, 3)
    assert torch.equal(target, tensor[1:3])


def test_a_file_that_got_shorter_after_it_was_opened_is_named(tmp_path):
    lazy = stored("file", torch.ones(100, dtype=torch.uint8), tmp_path)
    file = tmp_path / SINGLE
    os.truncate(file, lazy.offset + 99)
    lazy.read_into(torch.zeros(99, dtype=torch.uint8))
    with pytest.raises(ModelError, match=r"model\.safetensors: the file ends too early"):
        lazy.read_into(torch.zeros(100, dtype=torch.uint8))


# --- a tensor made of pieces


@every_kind
def test_pieces_are_put_together_from_any_place_of_their_sources(tmp_path, kind):
    tensor = filled((4, 3), torch.bfloat16)
    source = stored(kind, tensor, tmp_path)
    other = filled((3,), torch.bfloat16, seed=1)
    made = Assembled(
        (2, 2, 3),
        torch.bfloat16,
        (
            Piece(source, 3, (0,)),
            Piece(HeldTensor(other), 0, (1, slice(1, 2))),
            Piece(source, 0, (1, slice(0, 1))),
        ),
    )
    expected = torch.stack([tensor[1:3], torch.stack([tensor[0], other])])
    assert bits(made.read()) == bits(expected)
    assert bits(made[...]) == bits(expected)
    assert bits(made[1]) == bits(expected[1])
    assert made.nbytes == 24
    assert made.is_floating_point()


@every_kind
@every_shape
def test_a_whole_tensor_is_one_piece(tmp_path, kind, shape):
    tensor = filled(shape, torch.int64)
    made = whole(stored(kind, tensor, tmp_path))
    assert bits(made.read()) == bits(tensor)
    assert bits(made[...]) == bits(tensor)
    assert made.nbytes == 8 * prod(shape)
    assert not made.is_floating_point()


def test_an_assembled_tensor_can_be_a_source_again():
    tensor = torch.arange(12)
    made = Assembled((2, 6), torch.int64, (Piece(HeldTensor(tensor), 6, (0,)), Piece(HeldTensor(tensor), 0, (1,))))
    again = Assembled((5,), torch.int64, (Piece(made, 4),))
    assert again.read().tolist() == [10, 11, 0, 1, 2]


# --- writing


@st.composite
def named_tensors(draw) -> dict[str, torch.Tensor]:
    text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda name: name != "__metadata__")
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    names = draw(st.lists(text, max_size=6, unique=True))
    return {name: filled(draw(shapes), draw(st.sampled_from(DTYPES)), seed) for seed, name in enumerate(names)}


def write(file: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    return list(write_safetensors(file, {name: whole(HeldTensor(tensor)) for name, tensor in tensors.items()}))


@settings(max_examples=60)
@given(tensors=named_tensors())
def test_what_is_written_is_read_back_by_safetensors_bit_for_bit(tmp_path_factory, tensors):
    file = tmp_path_factory.mktemp("written") / SINGLE
    names = write(file, tensors)
    assert sorted(names) == sorted(tensors)
    assert same(load_file(file), tensors)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@settings(max_examples=30)
@given(tensors=named_tensors())
def test_what_is_written_is_read_back_by_us_bit_for_bit(tmp_path_factory, tensors):
    folder = configured(tmp_path_factory.mktemp("written"))
    write(folder / SINGLE, tensors)
    assert same(read(folder), tensors)


@settings(max_examples=30)
@given(tensors=named_tensors())
def test_every_written_tensor_is_aligned_to_its_type(tmp_path_factory, tensors):
    folder = configured(tmp_path_factory.mktemp("written"))
    write(folder / SINGLE, tensors)
    for name, tensor in Checkpoint(str(folder)).tensors.items():
        assert tensor.offset % tensor.dtype.itemsize == 0, name


def test_names_come_when_their_tensor_is_written_wide_types_first_one_in_memory_at_a_time(tmp_path):
    reads = []

    class Watched(HeldTensor):
        def read(self):
            reads.append(tuple(self.shape))
            return self.tensor

    tensors = {
        "b": Watched(torch.ones(3, dtype=torch.uint8)),
        "c": Watched(torch.ones(2, dtype=torch.int64)),
        "a": Watched(torch.ones(1, dtype=torch.uint8)),
        "d": Watched(torch.ones(4, dtype=torch.bfloat16)),
    }
    written = write_safetensors(tmp_path / SINGLE, tensors)
    assert (next(written), reads) == ("c", [(2,)])
    assert (next(written), reads) == ("d", [(2,), (4,)])
    assert list(written) == ["a", "b"]
    assert list(load_file(tmp_path / SINGLE)) == ["c", "d", "a", "b"]


def test_a_tensor_that_is_not_contiguous_is_written_in_its_own_order(tmp_path):
    tensor = torch.arange(6).view(2, 3).T

    class Transposed(HeldTensor):
        def read(self):
            return self.tensor

    list(write_safetensors(tmp_path / SINGLE, {"it": Transposed(tensor)}))
    assert torch.equal(load_file(tmp_path / SINGLE)["it"], tensor)


# --- the layouts that a checkpoint may have

TENSORS = {
    "embed.weight": filled((4, 3), torch.float32),
    "head.weight": filled((4, 3), torch.bfloat16, seed=1),
    "steps": torch.tensor(12),
    "seen": torch.tensor([True, False]),
    "none": torch.zeros((0, 3)),
}
NBYTES = 48 + 24 + 8 + 2


def sharded(folder: Path, index: str, save, pattern: str, **shards: list[str]) -> None:
    """Writes TENSORS in shards, and their index."""
    weight_map = {}
    for number, names in shards.items():
        file = pattern.format(number)
        save({name: TENSORS[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


SPLIT = {"one": ["head.weight", "none"], "two": ["embed.weight", "steps"], "three": ["seen"]}
PICKLED_INDEX = "pytorch_model.bin.index.json"


def in_one_file(folder):
    save_file(TENSORS, folder / SINGLE)


def in_shards(folder):
    sharded(folder, INDEX, save_file, "model-{}.safetensors", **SPLIT)


def pickled(folder):
    torch.save(TENSORS, folder / "pytorch_model.bin")


def pickled_in_shards(folder):
    sharded(folder, PICKLED_INDEX, torch.save, "pytorch_model-{}.bin", **SPLIT)


def pickled_in_the_format_before_torch_1_6(folder):
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def distributed(folder):
    dcp.save(TENSORS, checkpoint_id=folder, no_dist=True)


LAYOUTS = [in_one_file, in_shards, pickled, pickled_in_shards, pickled_in_the_format_before_torch_1_6, distributed]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_tensors(tmp_path, layout):
    layout(configured(tmp_path))
    checkpoint = Checkpoint(str(tmp_path))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    assert same(read(tmp_path), TENSORS)
    assert checkpoint.nbytes == NBYTES
    assert checkpoint.is_distributed is (layout is distributed)


def test_a_training_checkpoint_in_pieces_may_hold_more_than_tensors_and_nested_ones(tmp_path):
    configured(tmp_path)
    state = {"model": {"a.weight": torch.arange(6).view(2, 3)}, "optimizer": {"step": 3, "lr": "x"}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert same(read(tmp_path), {"model.a.weight": state["model"]["a.weight"]})


def test_a_pickle_may_hold_more_than_tensors_and_the_same_tensor_twice(tmp_path):
    configured(tmp_path)
    table = torch.arange(6).view(2, 3)
    torch.save({"embed": table, "head": table, "part": table[1:], "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert same(read(tmp_path), {"embed": table, "head": table, "part": table[1:]})


def test_safetensors_win_over_a_pickle_beside_them(tmp_path):
    save_file({"it": torch.zeros(2)}, configured(tmp_path) / SINGLE)
    torch.save({"it": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert same(read(tmp_path), {"it": torch.zeros(2)})


def test_a_single_file_wins_over_an_index_beside_it(tmp_path):
    in_shards(configured(tmp_path))
    save_file({"it": torch.zeros(2)}, tmp_path / SINGLE)
    assert same(read(tmp_path), {"it": torch.zeros(2)})


def test_opening_a_checkpoint_reads_no_weights(tmp_path):
    configured(tmp_path)
    assert Checkpoint(str(tmp_path)).config == {"model_type": "llama"}


# --- what is refused


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        _ = Checkpoint(str(folder)).tensors
    assert "\n" not in str(error.value)
    return str(error.value)


def reindexed(folder: Path, change, index: str = INDEX) -> None:
    """Changes an index file."""
    text = json.loads((folder / index).read_text())
    change(text)
    (folder / index).write_text(json.dumps(text))


def test_a_directory_without_weights_is_refused(tmp_path):
    said = refused(configured(tmp_path))
    assert said == f"{tmp_path}: no weights in it; expected {SINGLE} or {INDEX} beside config.json"


@pytest.mark.parametrize("layout", [in_shards, pickled_in_shards], ids=lambda layout: layout.__name__)
def test_a_missing_shard_is_named_with_the_number_of_its_tensors(tmp_path, layout):
    layout(configured(tmp_path))
    (lost,) = tmp_path.glob("*-two.*")
    lost.unlink()
    said = refused(tmp_path)
    assert f"{tmp_path}: shard {lost.name} is missing; " in said
    assert "says it holds 2 tensors" in said


def test_a_tensor_that_no_shard_holds_is_named_with_the_shard_that_should(tmp_path):
    in_shards(configured(tmp_path))
    reindexed(tmp_path, lambda index: index["weight_map"].update({"lost.weight": "model-one.safetensors"}))
    said = refused(tmp_path)
    assert f"1 tensors of {INDEX} are in none of its shards, first 'lost.weight'" in said
    assert "(expected in model-one.safetensors)" in said


def test_an_index_without_a_weight_map_is_refused(tmp_path):
    in_shards(configured(tmp_path))
    reindexed(tmp_path, lambda index: index.pop("weight_map"))
    assert f"{INDEX}: has no weight_map" in refused(tmp_path)


@pytest.mark.parametrize("places", [{}, [], "x", None], ids=str)
def test_an_index_whose_weight_map_is_no_mapping_or_empty_is_refused(tmp_path, places):
    in_shards(configured(tmp_path))
    reindexed(tmp_path, lambda index: index.update(weight_map=places))
    assert f"{INDEX}: has no weight_map" in refused(tmp_path)


def test_an_index_whose_places_are_no_file_names_is_refused(tmp_path):
    in_shards(configured(tmp_path))
    reindexed(tmp_path, lambda index: index["weight_map"].update({"steps": 3}))
    assert INDEX in refused(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\x00"])
def test_a_broken_index_is_refused(tmp_path, text):
    in_shards(configured(tmp_path))
    (tmp_path / INDEX).write_text(text)
    assert INDEX in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 30, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path, kept):
    in_one_file(configured(tmp_path))
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:kept])
    said = refused(tmp_path)
    assert str(tmp_path / SINGLE) in said
    assert ("cut off or broken" in said) if kept == -1 else ("not a readable safetensors file" in said)


def test_the_cut_off_tensor_is_named_with_both_sizes(tmp_path):
    save_file({"first": torch.zeros(2), "second": torch.zeros(4)}, configured(tmp_path) / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:-5])
    said = refused(tmp_path)
    assert "tensor 'second' should end at byte 24 of the data, but the file holds 19" in said


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 64, b"garbage!" * 9, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 1 << 62) + b"{}"],
    ids=repr,
)
def test_a_file_of_garbage_is_refused(tmp_path, garbage):
    (configured(tmp_path) / SINGLE).write_bytes(garbage)
    assert f"{tmp_path / SINGLE}: not a readable safetensors file" in refused(tmp_path)


def described(folder: Path, **tensors) -> None:
    """A safetensors file of 16 bytes of data with any header."""
    header = json.dumps(tensors).encode()
    (configured(folder) / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


@pytest.mark.parametrize("kind", ["U16", "C64", "F4", "NONSENSE"])
def test_a_tensor_of_an_unsupported_type_is_named(tmp_path, kind):
    described(tmp_path, odd={"dtype": kind, "shape": [2], "data_offsets": [0, 4]})
    assert f"tensor 'odd' has the type {kind}, which isn't supported" in refused(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 12], [0, 4], [12, 4], [-8, 0], [16, 24]], ids=str)
def test_a_tensor_whose_bytes_do_not_fit_its_shape_or_the_file_is_refused(tmp_path, offsets):
    described(tmp_path, odd={"dtype": "F32", "shape": [2], "data_offsets": offsets})
    assert str(tmp_path / SINGLE) in refused(tmp_path)


def test_a_truncated_pickle_is_refused(tmp_path):
    pickled(configured(tmp_path))
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    assert "pytorch_model.bin: can't be read as a file of tensors" in refused(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage!" * 9, pickle.dumps({"a": 1})], ids=["empty", "garbage", "no torch"]
)
def test_a_pickle_that_is_none_of_torch_is_refused(tmp_path, content):
    (configured(tmp_path) / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin: can't be read as a file of tensors" in refused(tmp_path)


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(2), "text", 3], ids=["list", "tensor", "text", "number"]
)
def test_a_pickle_that_holds_no_mapping_is_refused(tmp_path, content):
    torch.save(content, configured(tmp_path) / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(tmp_path)


class Program:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_with_a_program_in_it_is_refused_and_not_run(tmp_path, zipped):
    mark = tmp_path / "ran"
    state = {"it": torch.zeros(2), "program": Program(mark)}
    torch.save(state, configured(tmp_path) / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert "pytorch_model.bin: can't be read as a file of tensors" in refused(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"garbage!", pickle.dumps([1]), pickle.dumps(None)], ids=repr)
def test_unreadable_metadata_of_a_distributed_checkpoint_is_refused(tmp_path, content):
    distributed(configured(tmp_path))
    (tmp_path / ".metadata").write_bytes(content)
    assert f"{tmp_path}: its .metadata can't be read" in refused(tmp_path)


def test_metadata_with_a_program_in_it_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    (configured(tmp_path) / ".metadata").write_bytes(pickle.dumps(Program(mark)))
    assert f"{tmp_path}: its .metadata can't be read" in refused(tmp_path)
    assert not mark.exists()


def test_a_distributed_checkpoint_that_lost_a_piece_is_refused_when_it_is_read(tmp_path):
    distributed(configured(tmp_path))
    for file in tmp_path.glob("*.distcp"):
        file.unlink()
    tensor = Checkpoint(str(tmp_path)).tensors["embed.weight"]
    with pytest.raises(ModelError):
        whole(tensor).read()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[]", "config.json holds a list; expected a mapping"),
        (b"3", "config.json holds a int; expected a mapping"),
        (b"null", "config.json holds a NoneType; expected a mapping"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=said):
        Checkpoint(str(tmp_path))


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json can be read or downloaded; expected a Hugging Face"):
        Checkpoint(str(tmp_path))


def test_a_directory_in_the_place_of_the_config_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json can be read"):
        Checkpoint(str(tmp_path))
