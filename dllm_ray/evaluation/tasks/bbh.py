"""BIG-Bench Hard (arXiv 2210.09261) over local files: choices of a question, answers out of texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from dllm_ray.errors import DataError

_LETTERED = re.compile(r"^\s*(\([A-Z]\))", re.MULTILINE)
_LISTED = re.compile(r"^\s*- (.+?)\s*$", re.MULTILINE)
_ANNOUNCED = re.compile(r"(?:the answer is|answer\s*[:=])\s*(.+)", re.IGNORECASE)
_MOST_TARGETS = 30


def with_choices(docs: datasets.Dataset) -> datasets.Dataset:
    """Adds `choices` and the index of the right one, `gold`: the options that the question lists, or else all the
    answers of the file.

    Raises:
        DataError: the file's answers are free text, or a question's answer is not among its options.
    """
    targets = sorted(set(docs["target"]))

    def add(doc: Mapping[str, Any]) -> dict[str, Any]:
        choices = options(doc["input"]) or targets
        if choices is targets and len(targets) > _MOST_TARGETS:
            raise DataError(
                f"bbh_choice_file: {len(targets)} different answers are no choices: ask bbh_file over this file"
            )
        if doc["target"] not in choices:
            raise DataError(f"bbh_choice_file: the answer {doc['target']!r} is not among {', '.join(choices)}")
        return {"choices": choices, "gold": choices.index(doc["target"])}

    return docs.map(add)


def options(question: str) -> list[str]:
    """What the question offers under `Options:`: letters in brackets, or words behind dashes."""
    _, found, listed = question.partition("Options:")
    return (_LETTERED.findall(listed) or _LISTED.findall(listed)) if found else []


def answers(texts: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The filter of bbh_file: what each text says is its answer."""
    return [[answer(text, options(doc["input"])) for text in samples] for samples, doc in zip(texts, docs, strict=True)]


def answer(text: str, choices: Sequence[str]) -> str:
    """What is announced last as the answer, or else the last line; of a question with options, the option in it."""
    announced = _ANNOUNCED.findall(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = (announced or lines or [""])[-1].strip().strip("*").rstrip(".").strip()
    named = [choice for choice in choices if re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", said, re.IGNORECASE)]
    letter = re.fullmatch(r"\(?([A-Z])\)?(?:[\s.:)].*)?", said)
    if not named and letter and f"({letter[1]})" in choices:
        return f"({letter[1]})"
    return named[0] if len(named) == 1 else said
