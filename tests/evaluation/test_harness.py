"""The lm-eval adapter: requests in, texts and log-likelihoods out; and lm-eval's own command line around it."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dllm_ray import chat
from dllm_ray.answers import Answer
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.answering import Figures, LocalAnswers
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.evaluation.likelihood import Likelihood, estimate
from dllm_ray.evaluation.lm import DiffusionHarness
from dllm_ray.evaluation.local import LocalHarness
from dllm_ray.evaluation.run import TASKS
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler


class Answers:
    """Answers every prompt with a fixed text, scores a target by its length, and remembers what it was asked."""

    def __init__(self, tokenizer, text):
        self.figures = Figures()
        self.completion = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.prompts, self.pairs, self.seeds, self.groups, self.sizes = [], [], [], [], []

    def generate(self, prompts, seeds):
        self.prompts, self.seeds = prompts, seeds
        return [Answer(self.completion, 4, True)] * len(prompts)

    def score(self, pairs, seeds, groups, sizes):
        self.pairs, self.seeds, self.groups, self.sizes = pairs, seeds, groups, sizes
        return [Likelihood(-float(len(target)), 0.0, 1, len(target) == 1) for _, target in pairs]


@pytest.fixture
def spec(make_lm):
    return make_lm().spec


def requests(*contexts, until=(), kind="generate_until"):
    arguments = [(context, {"until": until}) if kind == "generate_until" else context for context in contexts]
    return [Instance(kind, {}, argument, 0, metadata=("task", number, 1)) for number, argument in enumerate(arguments)]


@pytest.fixture
def harness(tokenizer, spec):
    def make(text="12 sort", max_length=None, max_new_tokens=None, **options):
        answers = Answers(tokenizer, text)
        changes = options.pop("spec", {})
        model = DiffusionHarness(
            answers, tokenizer, replace(spec, **changes), max_length, max_new_tokens, "name", **options
        )
        return model, answers

    return make


def texts(tokenizer, pairs):
    return [(tokenizer.decode(prefix), tokenizer.decode(target)) for prefix, target in pairs]


def test_texts_come_back_in_order(harness, tokenizer):
    model, answers = harness()
    assert model.generate_until(requests("a", "b")) == ["12 sort", "12 sort"]
    assert [tokenizer.decode(prompt) for prompt in answers.prompts] == ["a", "b"]


@pytest.mark.parametrize(
    ("until", "expected"),
    [([], "one\ntwo # three"), (["\n"], "one"), ("#", "one\ntwo "), (["#", "\n"], "one"), ([""], "one\ntwo # three")]
    + [(None, "one\ntwo # three")],
)
def test_answers_end_before_the_first_stop_string(harness, until, expected):
    model, _ = harness("one\ntwo # three")
    assert model.generate_until(requests("q", until=until)) == [expected]


def test_stop_strings_of_ones_own_and_the_tasks_left_out(harness):
    model, _ = harness("one\ntwo # three", until=["two"])
    assert model.generate_until(requests("q", until=["#"])) == ["one\n"]
    model, _ = harness("one\ntwo # three", until=["#"], escape_until=True)
    assert model.generate_until(requests("q", until=["\n"])) == ["one\ntwo "]


def test_a_stop_string_that_is_a_control_token_ends_the_answer(harness, tokenizer):
    model, answers = harness("one")
    answers.completion += [tokenizer.mask_token_id, *answers.completion]
    assert model.generate_until(requests("q", until=[tokenizer.mask_token])) == ["one"]


def test_a_chat_is_asked_with_the_tokens_of_training_whatever_it_quotes(harness, tokenizer):
    model, answers = harness()
    hostile = [
        {"role": "user", "content": f"say {tokenizer.mask_token}"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": f"and {tokenizer.eos_token}"},
    ]
    model.generate_until(requests(model.apply_chat_template(hostile)))
    assert answers.prompts == [chat.encode_prompt(tokenizer, hostile)]
    assert tokenizer.mask_token_id not in answers.prompts[0]


def test_the_beginning_of_an_answer_can_be_given(harness, tokenizer):
    model, answers = harness()
    history = [
        {"role": "user", "content": f"q {tokenizer.mask_token}"},
        {"role": "assistant", "content": "The answer"},
    ]
    text = model.apply_chat_template(history, add_generation_prompt=False)
    assert text.endswith("The answer")
    model.generate_until(requests(text))
    assert tokenizer.decode(answers.prompts[0]) == text and tokenizer.mask_token_id not in answers.prompts[0]


def test_long_prompts_lose_their_beginning_and_are_counted(harness, tokenizer):
    model, answers = harness(max_length=8, max_new_tokens=5)
    model.generate_until(requests("123456", "12"))
    assert [tokenizer.decode(prompt) for prompt in answers.prompts] == ["456", "12"]
    assert model.truncated == 1
    model, _ = harness(max_length=8, max_new_tokens=8)
    with pytest.raises(ConfigError, match="8 leaves no room for a prompt in the model's context of 8"):
        model.generate_until(requests("1"))


def test_a_context_and_what_follows_it_are_told_apart_as_lm_eval_does_it(harness, tokenizer, spec):
    model, answers = harness()
    asked = [("sort 98", " 7"), ("sort 98  ", "7"), ("", "sort"), (" ", "x"), ("sort", "")]
    assert model.loglikelihood(requests(*asked, kind="loglikelihood"))[-1] == (0.0, True)
    start = tokenizer.decode([spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id])
    expected = [("sort 98", " 7"), ("sort 98", "  7"), (start, "sort"), (start, " x")]
    assert texts(tokenizer, answers.pairs) == expected
    assert all(
        prefix + target == chat.encode_text(tokenizer, "".join(words))
        for (prefix, target), words in zip(answers.pairs[:2], asked[:2], strict=True)
    )


def test_a_text_that_begins_with_the_starting_token_is_conditioned_on_it(harness, tokenizer, spec):
    model, answers = harness(spec={"bos_token_id": spec.eos_token_id})
    model.loglikelihood(requests(("", f"{tokenizer.eos_token}ab"), kind="loglikelihood"))
    assert texts(tokenizer, answers.pairs) == [(tokenizer.eos_token, "ab")]


def test_choices_after_a_chat_keep_its_tokens(harness, tokenizer):
    model, answers = harness()
    hostile = [{"role": "user", "content": f"say {tokenizer.eos_token}"}]
    context = model.apply_chat_template(hostile)
    model.loglikelihood(requests((context, f"A{tokenizer.mask_token}"), kind="loglikelihood"))
    ((prefix, target),) = answers.pairs
    assert prefix + target == chat.encode_prompt(tokenizer, hostile) + target
    assert tokenizer.decode(target) == f"A{tokenizer.mask_token}" and tokenizer.mask_token_id not in target


def test_bos_begins_prompts_and_scored_texts_where_it_is_asked_for(harness, spec):
    bos = spec.eos_token_id
    model, answers = harness(add_bos_token=True, spec={"bos_token_id": bos})
    model.generate_until(requests("a"))
    model.loglikelihood(requests(("a", "b"), ("", "b"), kind="loglikelihood"))
    assert [prompt.count(bos) for prompt in answers.prompts] == [1] and answers.prompts[0][0] == bos
    assert [(prefix[0], prefix.count(bos)) for prefix, _ in answers.pairs] == [(bos, 1)] * 2
    model, answers = harness(add_bos_token=True, spec={"bos_token_id": bos}, max_length=6, max_new_tokens=3)
    model.generate_until(requests("123456"))
    model.loglikelihood(requests(("123456", "78"), kind="loglikelihood"))
    assert [len(answers.prompts[0]), answers.prompts[0][0]] == [3, bos]  # also where the beginning is lost
    assert [len(part) for part in answers.pairs[0]] == [4, 2] and answers.pairs[0][0][0] == bos
    model, answers = harness(add_bos_token=True, spec={"bos_token_id": None})
    model.generate_until(requests("a"))
    assert bos not in answers.prompts[0]


def test_what_is_too_long_to_score_loses_its_beginning_and_is_counted(harness, tokenizer):
    model, answers = harness(max_length=6)
    model.loglikelihood(requests(("1234", "56"), ("12345", "67"), ("12", "3456789"), kind="loglikelihood"))
    assert texts(tokenizer, answers.pairs) == [("1234", "56"), ("2345", "67"), ("4", "56789")]
    assert model.truncated == 2


@pytest.mark.parametrize("max_length", [None, 5, 8, 100])
def test_rolling_windows_score_each_token_once(harness, tokenizer, max_length):
    model, answers = harness(max_length=max_length)
    text = "1234567890abcdefghij"
    ids = chat.encode_text(tokenizer, text)
    assert model.loglikelihood_rolling(requests((text,), ("",), kind="loglikelihood_rolling")) == [-len(ids), 0.0]
    assert [token for _, target in answers.pairs for token in target] == ids
    for prefix, target in answers.pairs:
        assert prefix and len(prefix) + len(target) <= (max_length or 100)
    last = answers.pairs[-1]
    assert len(answers.pairs) == 1 or len(last[0]) + len(last[1]) == max_length


def test_the_greedy_flag_and_the_choices_of_a_question(harness):
    model, answers = harness()
    contexts = [("q", " long choice"), ("q", "1"), ("", "1"), ("r", "1"), ("r", "22")]
    asked = requests(*contexts, kind="loglikelihood")
    for request, document in zip(asked, [0, 0, 0, 1, 1], strict=True):
        request.doc_id = document
    found = model.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [False, True, True, True, False]
    assert answers.groups == [[0, 1], [2], [3, 4]]
    assert answers.sizes == [11.0, 1.0, 1.0, 1.0, 2.0]


def test_a_seed_depends_on_its_request_alone(harness):
    def seeds(*contexts, **options):
        model, answers = harness(**options)
        model.generate_until(requests(*contexts))
        return answers.seeds

    one, two, three = seeds("a", "b", "c")
    assert len({one, two, three}) == 3 and all(0 <= seed < 2**62 for seed in (one, two, three))
    assert seeds("c", "a") == [three, one]
    assert seeds("a", seed=1) != [one]
    assert seeds("a", seed=7, sampler_seed=1) == seeds("a", seed=1)
    model, answers = harness()
    model.loglikelihood(requests(("a", "b"), ("a", "c"), kind="loglikelihood"))
    first = answers.seeds
    model.loglikelihood(requests(("a", "c"), kind="loglikelihood"))
    assert answers.seeds == first[1:] and first[0] != first[1]


def test_repeats_of_a_request_are_draws_of_their_own(harness):
    model, answers = harness()
    request, other = requests("a", "b")
    model.generate_until([request] * 3 + [other] * 3)
    assert len(set(answers.seeds)) == 6
    first = answers.seeds
    model.generate_until([other] * 2)
    assert answers.seeds == first[3:5]
    twin = requests("a", "a")  # two documents that ask the same
    model.generate_until(twin)
    assert answers.seeds == [first[0]] * 2


def test_what_lm_eval_sees_is_what_sampler_and_estimate_give(make_lm):
    lm = make_lm()
    sampler, likelihood = SamplerConfig(max_new_tokens=8, block_size=8, steps=4), LikelihoodConfig(mc_num=8)
    answers = LocalAnswers(lm, sampler, likelihood, 2)
    model = DiffusionHarness(answers, lm.tokenizer, lm.spec, lm.max_length, 8, "name")
    prompts = [chat.encode_text(lm.tokenizer, text) for text in ("sort 1", "reverse 2", "x")]
    output = Sampler(lm, sampler).sample(prompts)
    expected = [chat.decode(lm.tokenizer, tokens) for tokens in output.completions]
    assert model.generate_until(requests("sort 1", "reverse 2", "x")) == expected
    pairs = [model._pair("sort 1", " 2"), model._pair("sort 1", " 21")]
    (one, two) = estimate(lm, pairs, likelihood, model._seeds(requests("a", "b"), pairs, 0))
    found = model.loglikelihood(requests(("sort 1", " 2"), ("sort 1", " 21"), kind="loglikelihood"))
    assert [mean for mean, _ in found] == pytest.approx([one.mean, two.mean], abs=1e-4)


@pytest.fixture(scope="module")
def folder(make_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_lm().save(path)
    return str(path)


def test_lm_evals_arguments_by_name(folder):
    model = get_model("dllm_ray").create_from_arg_string(
        f"pretrained={folder},steps=4,block_size=4,max_new_tokens=8,mc_num=6,cfg_scale=0.5,until=##,dtype=bfloat16",
        {"batch_size": 1, "max_batch_size": None, "device": "cpu"},
    )
    assert isinstance(model, LocalHarness)
    answers = model.answerer
    assert (answers._sampler.steps, answers._sampler.cfg_scale, answers._likelihood.cfg_scale) == (4, 0.5, 0.5)
    assert (answers._likelihood.mc_num, answers._batch_size) == (6, 64)
    assert next(answers._lm.model.parameters()).dtype.itemsize == 2
    assert model._until == ("##",)
    model = LocalHarness.create_from_arg_obj({"pretrained": folder, "batch_size": 1}, {"batch_size": 8})
    assert (model.answerer._batch_size, model.answerer._likelihood.batch_size) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 4}, r"^model_args\.step: unknown argument; did you mean steps\?$"),
        ({"steps": "many"}, r"model_args.*steps"),
        ({"policy": "best"}, r"model_args.*policy"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        LocalHarness(pretrained=folder, **arguments)


@pytest.mark.slow  # lm-eval indexes all of its tasks
def test_the_command_line_of_lm_eval_finds_the_model(folder, tmp_path):
    if not any(point.name == "dllm_ray" for point in entry_points(group="torch.backends")):
        pytest.skip("the package was installed without its entry point: install it again")
    arguments = f"pretrained={folder},steps=4,block_size=8,max_new_tokens=8"
    words = ["--model", "dllm_ray", "--model_args", arguments, "--tasks", "digits", "--include_path", str(TASKS)]
    words += ["--limit", "4", "--apply_chat_template", "--output_path", str(tmp_path / "out.json"), "--log_samples"]
    command = [str(Path(sys.executable).with_name("lm_eval")), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("out*.json")
    results = json.loads(path.read_text())
    assert results["results"]["digits"]["exact_match,none"] >= 0 and results["n-samples"]["digits"]["effective"] == 4
