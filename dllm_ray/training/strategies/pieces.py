"""A sharded checkpoint of parameters that lie cut up in flat buffers, readable on any number of workers.

Each worker writes its buffers as they are into one safetensors file, with a list of which piece of which parameter
lies where. A reader takes for each of its own pieces what overlaps, out of whatever files hold it, so no parameter is
ever put together.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_ray.errors import TrainingError


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter, and where they lie."""

    name: str
    """The parameter."""
    start: int
    """The first element, counted in the flattened parameter."""
    count: int
    """How many."""
    buffer: int
    """Number of the flat buffer they lie in."""
    offset: int
    """Where in it they begin."""


def write(
    directory: Path, rank: int, buffers: Sequence[Mapping[str, Tensor]], pieces: Sequence[Piece], step: int
) -> None:
    """Writes what one worker holds.

    Args:
        directory: an existing folder.
        rank: the worker's number.
        buffers: kind (weights, a moment) -> [elements], for each flat buffer.
        pieces: what lies in them.
        step: updates done so far.
    """
    tensors = {f"{number}.{kind}": tensor for number, held in enumerate(buffers) for kind, tensor in held.items()}
    about = {"step": str(step), "pieces": json.dumps([astuple(piece) for piece in pieces])}
    save_file(tensors, directory / file_of(rank), metadata=about)


def file_of(rank: int) -> str:
    """The name of a worker's file."""
    return f"pieces-{rank:05d}.safetensors"


class Pieces:
    """The files of all workers together.

    Args:
        directory: the folder they lie in; there is one at least.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._files = [safe_open(path, framework="pt") for path in sorted(directory.glob("pieces-*.safetensors"))]
        self._held: dict[str, list[tuple[Piece, int]]] = defaultdict(list)
        for number, file in enumerate(self._files):
            for values in json.loads(file.metadata()["pieces"]):
                self._held[values[0]].append((Piece(*values), number))
        self.step = int(self._files[0].metadata()["step"])
        """Updates done when it was written."""

    def read(self, kind: str, piece: Piece, buffer: Tensor) -> None:
        """Fills the part of a buffer [elements] where a piece lies.

        Raises:
            TrainingError: the files don't hold all of it.
        """
        found = 0
        for held, number in self._held[piece.name]:
            first = max(held.start, piece.start)
            last = min(held.start + held.count, piece.start + piece.count)
            if first >= last:
                continue
            source = held.offset + first - held.start
            values = self._files[number].get_slice(f"{held.buffer}.{kind}")[source : source + last - first]
            buffer.narrow(0, piece.offset + first - piece.start, last - first).copy_(values)
            found += last - first
        if found != piece.count:
            raise TrainingError(f"{self._directory}: the checkpoint lacks a part of {piece.name}; a file is missing")
