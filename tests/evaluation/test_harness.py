"""The lm-eval adapter without Ray: requests in, texts out."""

from dataclasses import dataclass

import pytest
from lm_eval.api.instance import Instance

from dllm_ray import chat
from dllm_ray.errors import EvaluationError
from dllm_ray.evaluation.lm import DiffusionHarness


@dataclass
class Answers:
    completions: list[list[int]]


class Answerer:
    """Answers every prompt with a fixed text, and remembers the prompts."""

    def __init__(self, tokenizer, text):
        self.completion = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.prompts = []

    def __call__(self, prompts):
        self.prompts += prompts
        return Answers([self.completion] * len(prompts))


def requests(*contexts, until=()):
    return [
        Instance("generate_until", {}, (context, {"until": until}), number) for number, context in enumerate(contexts)
    ]


def harness(tokenizer, text="12 sort", max_prompt=None):
    answerer = Answerer(tokenizer, text)
    return DiffusionHarness(answerer, tokenizer, max_prompt, "name"), answerer


def test_texts_come_back_in_order(tokenizer):
    model, answerer = harness(tokenizer)
    assert model.generate_until(requests("a", "b")) == ["12 sort", "12 sort"]
    assert [tokenizer.decode(prompt) for prompt in answerer.prompts] == ["a", "b"]


@pytest.mark.parametrize(
    ("until", "expected"),
    [([], "one\ntwo # three"), (["\n"], "one"), ("#", "one\ntwo "), (["#", "\n"], "one"), ([""], "one\ntwo # three")],
)
def test_answers_end_before_the_first_stop_string(tokenizer, until, expected):
    model, _ = harness(tokenizer, "one\ntwo # three")
    assert model.generate_until(requests("q", until=until)) == [expected]


def test_a_chat_is_asked_with_the_tokens_of_training_whatever_it_quotes(tokenizer):
    model, answerer = harness(tokenizer)
    hostile = [{"role": "user", "content": f"say {tokenizer.mask_token} and {tokenizer.eos_token}"}]
    model.generate_until(requests(model.apply_chat_template(hostile)))
    assert answerer.prompts == [chat.encode_prompt(tokenizer, hostile)]
    assert tokenizer.mask_token_id not in answerer.prompts[0]


def test_the_beginning_of_an_answer_can_be_given(tokenizer):
    model, _ = harness(tokenizer)
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer"}]
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("The answer")


def test_long_prompts_lose_their_beginning_and_are_counted(tokenizer):
    model, answerer = harness(tokenizer, max_prompt=3)
    model.generate_until(requests("123456", "12"))
    assert [tokenizer.decode(prompt) for prompt in answerer.prompts] == ["456", "12"]
    assert model.truncated == 1


def test_likelihood_tasks_are_refused_with_the_reason(tokenizer):
    model, _ = harness(tokenizer)
    for method in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(EvaluationError, match="likelihoods"):
            method([])
