"""Scores of code tasks: which programs pass in the sandbox, and pass@k.

lm-eval's own code tasks (humaneval, mbpp, ...) ask Hugging Face's `code_eval`, which has to be fetched, and which runs
programs with the user's own rights. `sandboxed` puts the sandbox in its place while such tasks are loaded.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dllm_ray.evaluation import sandbox


def verdicts(programs: Sequence[Sequence[str]]) -> list[list[dict[str, str]]]:
    """Runs every program of every document, several at a time.

    Args:
        programs: documents x samples; each program holds its tests.

    Returns:
        The same shape: `program`, `status` and `message` of each, as sample logs show them.
    """
    flat = [program for samples in programs for program in samples]
    outcomes = iter(sandbox.run(flat))
    return [
        [{"program": program} | vars(next(outcomes)) for program in samples]
        for samples in programs
    ]  # fmt: skip


def pass_at_k(samples: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """pass@1, and pass@k for every power of two up to the number of samples of one document.

    Args:
        samples: verdicts.
    """
    passed = sum(sample["status"] == "passed" for sample in samples)
    powers = [2**power for power in range(len(samples).bit_length())]
    return {f"pass@{k}": chance(len(samples), passed, k) for k in powers}


def chance(samples: int, passed: int, k: int) -> float:
    """The chance that at least one of `k` samples drawn without replacement passes (arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


class CodeEval:
    """What `evaluate.load("code_eval")` gives, with programs run in the sandbox."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[Any]]]:
        """The mean pass@k over documents, and how each program ended.

        Args:
            references: the tests of each document.
            predictions: programs of each document, without tests.
            k: those larger than the number of programs are left out.
        """
        pairs = zip(predictions, references, strict=True)
        ended = verdicts([[f"{program}\n{tests}" for program in samples] for samples, tests in pairs])
        counts = [(len(samples), sum(sample["status"] == "passed" for sample in samples)) for samples in ended]
        scores = {
            f"pass@{size}": sum(chance(*count, size) for count in counts) / len(counts)
            for size in k
            if all(samples >= size for samples, _ in counts)
        }
        return scores, {number: list(enumerate(samples)) for number, samples in enumerate(ended)}


@contextmanager
def sandboxed() -> Iterator[None]:
    """Tasks that are loaded inside the `with` block get the sandbox where they ask for `code_eval`."""
    import evaluate

    load = evaluate.load

    def load_here(path: str, *arguments, **options):
        return CodeEval() if path == "code_eval" else load(path, *arguments, **options)

    evaluate.load = load_here
    try:
        yield
    finally:
        evaluate.load = load
