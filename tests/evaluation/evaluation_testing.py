"""A model for lm-eval that is a function."""

from collections.abc import Callable

from lm_eval.api.model import LM


class FixedAnswers(LM):
    """Answers by `answer(prompt) -> text` and `likelihood(context, target) -> nats`; keeps every prompt it is asked."""

    def __init__(self, answer: Callable[[str], str] = str, likelihood: Callable[[str, str], float] | None = None):
        super().__init__()
        self._answer = answer
        self._likelihood = likelihood or (lambda context, target: 0.0)
        self.prompts: list[str] = []

    def generate_until(self, requests, disable_tqdm: bool = False):
        self.prompts += [request.args[0] for request in requests]
        return [self._answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        return [(self._likelihood(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        return [self._likelihood("", request.args[0]) for request in requests]

    @property
    def tokenizer_name(self) -> str:
        return "fixed"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "fixed"

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)
