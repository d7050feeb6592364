"""Asks a pool of workers what an `Ask` says: lm-eval's requests in, its results and our figures out."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dllm_ray.answers import Progress, model_key
from dllm_ray.chat import encode_text
from dllm_ray.config import section
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.answering import Figures, Pool, PooledAnswers
from dllm_ray.evaluation.cache import AnswerCache
from dllm_ray.evaluation.lm import DiffusionHarness
from dllm_ray.evaluation.plan import Planned
from dllm_ray.evaluation.run import check_written, evaluate, requests
from dllm_ray.evaluation.suite import Ask
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.load import open_tokenizer
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.plan import check
from dllm_ray.viz import terminal


class Asker:
    """Runs asks on one pool.

    Args:
        model: what the pool's workers hold.
        seed: of the requests' own seeds, and of the choice of few-shot examples.

    Raises:
        ModelError: there is no such model.
    """

    def __init__(self, model: ModelConfig, seed: int):
        self.tokenizer, self.spec, blueprint = open_tokenizer(model.path)
        self.context = blueprint.max_length
        """Tokens in the model's context; None: unlimited."""
        self._model, self._seed = model, seed

    def check(self, ask: Ask) -> None:
        """Makes sure that the settings can work on the model, and that it can answer what tasks ask.

        Raises:
            ConfigError: the settings can't, or prompts have no room beside answers.
            EvaluationError: a task asks for likelihoods, which a model that edits doesn't have; or as
                `run.check_tasks`.
        """
        where = f"{ask.name}: " if ask.name else ""
        try:
            with section("sampler"):
                self.check_sampler(ask.sampler)
        except ConfigError as error:
            raise ConfigError(f"{where}{error.message}", error.field) from None
        new = ask.sampler.max_new_tokens or 1
        if self.context is not None and new >= self.context:
            raise ConfigError(
                f"{where}{new} leaves no room for a prompt in the model's context of {self.context}",
                "sampler.max_new_tokens",
            )
        if self.spec.edit_heads is not None:
            check_written(ask.evaluate)

    def check_sampler(self, config: SamplerConfig) -> None:
        """Makes sure that settings can work on the model; raises ConfigError."""
        check(config, self.spec)

    def plan(self, ask: Ask) -> list[Planned]:
        """What the ask's tasks would ask of the model.

        Raises:
            EvaluationError: a task's data can't be had.
        """
        harness = self.harness(ask, None)
        found = requests(harness, ask.evaluate, self._seed, lambda text: len(encode_text(self.tokenizer, text)))
        return [Planned(ask.name, part.task, part.documents, part.counts, part.lengths) for part in found]

    def harness(self, ask: Ask, answerer) -> DiffusionHarness:
        """The model as lm-eval sees it."""
        asked = ask.evaluate
        return DiffusionHarness(
            answerer,
            self.tokenizer,
            self.spec,
            self.context,
            ask.sampler.max_new_tokens,
            self._model.path,
            self._seed,
            asked.until,
            asked.escape_until,
            asked.add_bos_token,
            ask.sampler.seed,
        )

    def ask(
        self,
        ask: Ask,
        pool: Pool,
        cache: str,
        documents: range | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """lm-eval's results, and figures of the sampler and the pool.

        Args:
            ask: what to ask.
            pool: answers.
            cache: folder or URI of finished answers.
            documents: places of the documents of each task that are asked, in place of the first `evaluate.limit`.
            on_progress: told how far requests are.

        Raises:
            DllmRayError: a task can't be run, or a worker met an error.
        """
        lines = _Lines(f"evaluate {ask.name}".rstrip())

        def tell(progress: Progress) -> None:
            lines.update(progress.done, progress.requests)
            if on_progress is not None:
                on_progress(progress)

        kept = AnswerCache(cache, model_key(self._model))
        size = ask.evaluate.batch_size
        answerer = PooledAnswers(pool, ask.sampler, ask.likelihood, size, kept, tell)
        harness = self.harness(ask, answerer)
        try:
            results = evaluate(harness, ask.evaluate, self._seed, documents)
        finally:
            lines.close()
        if harness.truncated:
            print(f"note      {harness.truncated} requests were longer than the context and lost their beginning")
        return results, figures(answerer.figures, harness.truncated)


def figures(found: Figures, truncated: int) -> dict[str, float]:
    """Figures by the names they have in results and in MLflow."""
    return {
        **asdict(found),
        "nfe": float(found.nfe),
        "tpf": found.tpf,
        "tokens_per_s": found.tokens_per_s,
        "seconds": found.seconds,
        "truncated_prompts": truncated,
    }


class _Lines:
    """Progress, a line for each kind of request."""

    def __init__(self, label: str):
        self._label = label
        self._line: terminal.Progress | None = None

    def update(self, done: int, total: int) -> None:
        if self._line is None or done == 0:
            self.close()
            self._line = terminal.Progress(self._label, total, "request")
        self._line.update(done)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
