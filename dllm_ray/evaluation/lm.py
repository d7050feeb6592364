"""The lm-eval adapter: turns the harness's requests into prompts of token ids, and completions into text.

Who denoises is not its business: it is given a function, which may be a local sampler or a pool of Ray workers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from dllm_ray import chat
from dllm_ray.errors import EvaluationError


class HasCompletions(Protocol):
    """What an answerer returns, e.g. a `SampleOutput`."""

    completions: list[list[int]]


Answerer = Callable[[Sequence[Sequence[int]]], HasCompletions]
"""Denoises prompts."""


class DiffusionHarness(LM):
    """A diffusion language model as lm-eval sees it.

    Args:
        answer: denoises prompts, in order.
        tokenizer: of the model.
        max_prompt: most tokens of a prompt; longer ones lose their beginning, and are counted. None: no limit.
        name: the model's name, for the harness's records.
        eot_text: text that ends an answer, where no single token does.
    """

    def __init__(self, answer: Answerer, tokenizer, max_prompt: int | None, name: str, eot_text: str | None = None):
        super().__init__()
        self._answer = answer
        self._tokenizer = tokenizer
        self._max_prompt = max_prompt
        self._name = name
        self._eot_text = eot_text
        self._chats: dict[str, list[int]] = {}  # rendered conversation -> its token ids
        self.truncated = 0
        """Prompts that lost their beginning."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [self._encode(request.args[0]) for request in requests]
        output = self._answer(prompts)
        texts = []
        for request, completion in zip(requests, output.completions, strict=True):
            text = _cut(chat.decode(self._tokenizer, completion, self._eot_text), request.args[1].get("until"))
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def loglikelihood(self, requests: list[Instance], **_ignored) -> list[tuple[float, bool]]:
        raise EvaluationError(_NO_LIKELIHOODS)

    def loglikelihood_rolling(self, requests: list[Instance], **_ignored) -> list[float]:
        raise EvaluationError(_NO_LIKELIHOODS)

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Its token ids are kept, so that what documents quote can't turn into control
        tokens when the harness hands the text back."""
        if not add_generation_prompt:  # the answer's beginning is given
            return self._tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True)
        text = self._tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=True)
        self._chats[text] = chat.encode_prompt(self._tokenizer, chat_history)
        return text

    def _encode(self, context: str) -> list[int]:
        ids = self._chats.get(context)
        if ids is None:
            ids = chat.encode_text(self._tokenizer, context)
        if self._max_prompt is not None and len(ids) > self._max_prompt:
            self.truncated += 1
            ids = ids[-self._max_prompt :]
        return ids


_NO_LIKELIHOODS = (
    "the task compares likelihoods, and this version answers by generating only: choose a task with "
    "output_type generate_until"
)


def _cut(text: str, until: Any) -> str:
    """The text before the first stop string."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.partition(stop)[0]
    return text
