"""Letters of choices out of answers, for the tasks beside this file that ask for one."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def first(texts: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The first of a, b, c, d anywhere in each answer, in either case."""
    return [[_found(r"[abcd]", text.lower()) for text in samples] for samples in texts]


def leading(texts: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The capital letter that each answer begins with, in brackets or not."""
    return [[_found(r"\A[A-D](?!\w)", text.strip().lstrip("(")) for text in samples] for samples in texts]


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[0] if found else ""
