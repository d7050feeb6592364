"""A checkpoint on disk, opened without reading its tensors: its config.json, and where each tensor lies.

Knows files and byte ranges, nothing of architectures. Tensors are read straight into the memory they are wanted in, so
nothing is ever held twice.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dllm_ray.errors import ModelError, first_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
DISTRIBUTED = ".metadata"
"""File that marks a folder written by `torch.distributed.checkpoint`."""

WEIGHTS = (SINGLE, INDEX, _PICKLED, _PICKLED_INDEX, DISTRIBUTED)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(Protocol):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Fills a contiguous tensor of the same dtype with consecutive elements, from flat index `start` on."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file."""

    file: Path
    offset: int
    """Its first byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """See `Stored`.

        Raises:
            ModelError: the file ends too early.
        """
        if not target.numel():
            return
        memory = memoryview(target.view(-1).view(torch.uint8).numpy())
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            done = 0
            while done < len(memory):
                count = file.readinto(memory[done:])
                if not count:
                    raise ModelError(f"{self.file}: the file ends too early; copy or download it again")
                done += count


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that something else holds: a memory-mapped pickle file, or this process."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read_into(self, target: Tensor, start: int = 0) -> None:
        target.view(-1).copy_(self.tensor.reshape(-1)[start : start + target.numel()])


@dataclass(frozen=True)
class DistributedTensor:
    """A tensor in a folder of `torch.distributed.checkpoint`, in pieces that any number of workers wrote."""

    folder: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, target: Tensor, start: int = 0) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        whole = target if start == 0 and target.numel() == prod(self.shape) else torch.empty(prod(self.shape))
        whole = whole.to(self.dtype).view(self.shape)
        warnings.filterwarnings("ignore", message=".*intent is to load in a single process")  # as `no_dist` says
        try:
            dcp.load({self.key: whole}, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise ModelError(
                f"{self.folder}: {self.key!r} can't be read: {str(error).strip().splitlines()[-1].strip()}"
            ) from error
        if whole.data_ptr() != target.data_ptr():
            target.view(-1).copy_(whole.view(-1)[start : start + target.numel()])


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a stored tensor, and the part of a new tensor that they fill."""

    source: Stored
    start: int
    """Flat index of the first element in the source."""
    target: tuple[Any, ...] = ()
    """Index of a contiguous part of the new tensor."""


@dataclass(frozen=True)
class Assembled:
    """A tensor made of pieces of stored ones; read piece by piece into its own memory.

    `transformers` takes it in the place of a tensor: it asks for `tensor[...]` when it is that parameter's turn.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            piece.source.read_into(out[piece.target], piece.start)
        return out

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """See `Stored`. Needed where a mapped tensor is mapped again; reads the whole of it."""
        target.view(-1).copy_(self.read().view(-1)[start : start + target.numel()])

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def whole(tensor: Stored) -> Assembled:
    """A stored tensor as it is."""
    return Assembled(tensor.shape, tensor.dtype, (Piece(tensor, 0),))


class Checkpoint:
    """A model directory or hub id.

    Args:
        path: a directory with config.json, or a hub id.

    Raises:
        ModelError: no readable config.json.
    """

    def __init__(self, path: str):
        self.path = path
        self.config = read_json(path, "config.json")

    @property
    def is_distributed(self) -> bool:
        """Whether the tensors lie in the pieces that the workers of a training run wrote."""
        return (Path(self.path) / DISTRIBUTED).is_file()

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Name -> tensor, from the headers of the weight files.

        Raises:
            ModelError: no weights, a missing or broken file, or an index that names tensors no file holds.
        """
        if self.is_distributed:
            return _distributed(Path(self.path))
        for single, index, reader in ((SINGLE, INDEX, _safetensors), (_PICKLED, _PICKLED_INDEX, _pickled)):
            if (file := find(self.path, single)) is not None:
                return reader(file)
            if find(self.path, index) is not None:
                return self._indexed(index, reader)
        raise ModelError(f"{self.path}: no weights in it; expected {SINGLE} or {INDEX} beside config.json")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

    def _indexed(self, index: str, reader) -> dict[str, Stored]:
        places = read_json(self.path, index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise ModelError(f"{self.path}/{index}: has no weight_map; expected tensor names and their files")
        found: dict[str, Stored] = {}
        for name in sorted(set(places.values())):
            file = find(self.path, name)
            if file is None:
                lost = sum(place == name for place in places.values())
                raise ModelError(f"{self.path}: shard {name} is missing; {index} says it holds {lost} tensors")
            found |= reader(file)
        absent = sorted(set(places) - set(found))
        if absent:
            raise ModelError(
                f"{self.path}: {len(absent)} tensors of {index} are in none of its shards, first {absent[0]!r} "
                f"(expected in {places[absent[0]]})"
            )
        return found


def read_json(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a model directory or hub id.

    Raises:
        ModelError: it is missing, not JSON, or no mapping.
    """
    file = find(path, name)
    if file is None:
        raise ModelError(f"{path}: no {name} can be read or downloaded; expected a Hugging Face model directory")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {name} can't be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelError(f"{path}: {name} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: {name} holds a {type(values).__name__}; expected a mapping")
    return values


def find(path: str, name: str) -> Path | None:
    """A file of a model directory or hub id (downloaded where need be), or None."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ModelError(f"{path}: can't be downloaded: {first_line(error)}") from error
    return None if found is None else Path(found)


class Readable(Protocol):
    """A tensor that can be read into memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor, on the CPU."""


def write_safetensors(file: Path, tensors: Mapping[str, Readable]) -> Iterator[str]:
    """Writes a safetensors file, holding one tensor at a time; yields the name of each when it is written.

    The library's own writer wants all tensors of a file in memory at once.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    # wide types first, as the library does, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            values = tensors[name].read().contiguous()
            out.write(memoryview(values.view(-1).view(torch.uint8).numpy()))
            yield name


def _safetensors(file: Path) -> dict[str, Stored]:
    from huggingface_hub import parse_local_safetensors_file_metadata

    try:
        header = parse_local_safetensors_file_metadata(file)
        with file.open("rb") as handle:
            data = 8 + int.from_bytes(handle.read(8), "little")  # the header's length, and the header, come first
    except Exception as error:  # hub's own parsing error, OSError, ValueError
        raise ModelError(f"{file}: not a readable safetensors file: {first_line(error)}") from error
    size = file.stat().st_size - data
    found: dict[str, Stored] = {}
    for name, info in header.tensors.items():
        begin, end = info.data_offsets
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise ModelError(f"{file}: tensor {name!r} has the type {info.dtype}, which isn't supported")
        if begin < 0 or end > size or end - begin != prod(info.shape) * dtype.itemsize:
            raise ModelError(
                f"{file}: tensor {name!r} should end at byte {end} of the data, but the file holds {size}: "
                "it is cut off or broken; copy or download it again"
            )
        found[name] = FileTensor(file, data + begin, tuple(info.shape), dtype)
    return found


def _pickled(file: Path) -> dict[str, Stored]:
    try:
        by_page = zipfile.is_zipfile(file)  # the format before torch 1.6 has to be read whole
        state = torch.load(file, map_location="cpu", mmap=by_page, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file}: can't be read as a file of tensors: it is broken, or holds a program, which is never run; "
            "convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # torch raises many types for a broken file
        raise ModelError(f"{file}: can't be read as a file of tensors: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{file}: holds a {type(state).__name__}; expected tensors by name")
    return {name: HeldTensor(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}


class _Metadata(pickle.Unpickler):
    """Reads the metadata of a distributed checkpoint, and refuses to build anything else that a pickle may ask for."""

    _MODULES = frozenset({"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"})
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("torch._utils", "_rebuild_dtype"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
            *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module in self._MODULES and "." not in name) or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a checkpoint")


def _distributed(folder: Path) -> dict[str, Stored]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        with (folder / DISTRIBUTED).open("rb") as file:
            _Metadata(file).load()  # dcp unpickles whatever is there
        entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle: whatever a broken one raises
        raise ModelError(f"{folder}: its {DISTRIBUTED} can't be read: {first_line(error)}") from error
    return {
        name: DistributedTensor(folder, name, tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
