"""Programs out of a model's answers, for the code tasks beside this file; lm-eval calls these by name.

Each filter returns verdicts in place of answers: what was run, and how it ended.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dllm_ray.evaluation import passing

_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_BEHIND_BODY = re.compile(r"\n(?=\S)")
_MARKED = re.compile(r"(?:\[BEGIN\]|^\W*BEGIN\W*$)(.*?)(?:\[DONE\]|^\W*DONE\W*$|\Z)", re.DOTALL | re.MULTILINE)

Documents = Sequence[Mapping[str, Any]]
Verdicts = list[list[dict[str, str]]]


def completions(answers: Sequence[Sequence[str]], docs: Documents) -> Verdicts:
    """HumanEval answered with the function's body or with the whole function, bare or in a fenced block."""
    return _run(answers, docs, completed, _humaneval_tests)


def whole(answers: Sequence[Sequence[str]], docs: Documents) -> Verdicts:
    """HumanEval answered with a program that holds the whole function, bare or in a fenced block."""
    return _run(answers, docs, lambda answer, doc: fenced_block(answer).lstrip(), _humaneval_tests)


def marked(answers: Sequence[Sequence[str]], docs: Documents) -> Verdicts:
    """MBPP answered between [BEGIN] and [DONE], or in a fenced block."""
    return _run(answers, docs, lambda answer, doc: between_marks(answer), _mbpp_tests)


def continued(answers: Sequence[Sequence[str]], docs: Documents) -> Verdicts:
    """MBPP answered behind an opened fence, up to the closing one."""
    return _run(answers, docs, lambda answer, doc: answer.partition("```")[0], _mbpp_tests)


def score(doc: Mapping[str, Any], results: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, float]:
    """pass@1, and pass@k where a document is answered several times."""
    return passing.pass_at_k(results[0])


def fenced_block(answer: str) -> str:
    """The first fenced block, which may lack its end; the whole answer where there is none."""
    found = _FENCED.search(answer)
    return found[1] if found else answer


def between_marks(answer: str) -> str:
    """What stands between the marks, of which each may be missing, without fence and quotes around it."""
    found = _MARKED.search(answer)
    text = found[1] if found else answer.partition("[DONE]")[0]
    return fenced_block(text).strip().strip("'\"`")


def completed(answer: str, doc: Mapping[str, Any]) -> str:
    """The problem's beginning, with the body or the whole function that the answer gives behind it."""
    text = fenced_block(answer)
    if re.search(rf"^(async )?def {re.escape(doc['entry_point'])}\b", text, re.MULTILINE):
        return f"{doc['prompt']}    pass\n\n{text}"  # for what the problem's beginning imports and defines
    return doc["prompt"] + _BEHIND_BODY.split(text, maxsplit=1)[0]


def _humaneval_tests(doc: Mapping[str, Any]) -> str:
    return f"{doc['test']}\ncheck({doc['entry_point']})"


def _mbpp_tests(doc: Mapping[str, Any]) -> str:
    return "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]])


def _run(
    answers: Sequence[Sequence[str]],
    docs: Documents,
    program: Callable[[str, Mapping[str, Any]], str],
    tests: Callable[[Mapping[str, Any]], str],
) -> Verdicts:
    return passing.verdicts(
        [
            [f"{program(answer, doc)}\n\n{tests(doc)}\n" for answer in samples]
            for samples, doc in zip(answers, docs, strict=True)
        ]
    )
