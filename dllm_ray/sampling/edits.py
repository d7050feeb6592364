"""Commits applied to lists: what the steps of a row made of its tokens, or of whatever stands for each of them.

Plain lists, without torch: viewers and servers follow a row with it, one of a model that edits as well as one whose
positions are written in place.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from dllm_ray.sampling.engine import Commit, Edit  # imports torch

T = TypeVar("T")


def in_turn(edits: Iterable["Edit"]) -> Iterator["Edit"]:
    """The edits of a step with their positions at the time when they are made, one after another from left to right.

    A token is inserted AT its position there, and what stood there moves on. Nothing left of an edit moves any more, so
    that new tokens stand where they do after the step.
    """
    moved = 0
    for edit in edits:
        is_insertion = edit.kind == "insert"
        yield edit._replace(position=edit.position + moved + is_insertion)
        moved += is_insertion - (edit.kind == "delete")


def after(commit: "Commit", items: Sequence[T], new: Iterable[T]) -> list[T]:
    """A list that runs beside a row's tokens, as it is after a step.

    Args:
        commit: what the step did.
        items: one for each token before it.
        new: one for each of `commit.tokens`: those themselves, or `commit.confidences`, or anything else.
    """
    items, new = list(items), iter(new)
    if not commit.edits:
        for position, item in zip(commit.positions, new, strict=True):
            items[position] = item
        return items
    for edit in in_turn(commit.edits):
        if edit.kind == "delete":
            del items[edit.position]
        elif edit.kind == "insert":
            items.insert(edit.position, next(new))
        else:
            items[edit.position] = next(new)
    return items
