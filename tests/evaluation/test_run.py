"""Tasks through the real lm-eval, answered by a function that knows or doesn't know the answers."""

import json
from dataclasses import dataclass

import pytest

from dllm_ray.data import builtin
from dllm_ray.errors import DataError, EvaluationError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.evaluation.lm import DiffusionHarness
from dllm_ray.evaluation.run import check_tasks, evaluate, metrics


@dataclass
class Answers:
    completions: list[list[int]]


def ask(tokenizer, solve, config):
    """Runs tasks against `solve(prompt) -> text`."""

    def answer(prompts):
        questions = [tokenizer.decode(prompt) for prompt in prompts]
        texts = [solve(question) for question in questions]
        return Answers([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])

    results = evaluate(DiffusionHarness(answer, tokenizer, None, "test"), config, seed=0)
    assert set(results["results"]) == set(results["n-samples"]) == set(config.tasks)
    return metrics(results)


def solve_digits(question: str) -> str:
    task, number = question.removeprefix("<|user|>").partition("<|endoftext|>")[0].split()
    if task == "shuffle":
        return number[1:] + number[:1] if len(set(number)) > 1 else number
    return builtin._answer(task, number, None)


def test_digits_gives_full_marks_to_right_answers(tokenizer):
    scores = ask(tokenizer, solve_digits, EvaluateConfig(tasks=("digits",), limit=50))["digits"]
    assert scores == dict.fromkeys(["exact_match", *builtin.TASKS], 1.0)


def test_digits_counts_each_kind_of_task_by_itself(tokenizer):
    def only_reverse(question):
        return solve_digits(question) if "reverse" in question else "no"

    scores = ask(tokenizer, only_reverse, EvaluateConfig(tasks=("digits",), limit=50))["digits"]
    assert scores["exact_match"] == pytest.approx(0.2)
    assert (scores["reverse"], scores["sort"]) == (1.0, 0.0)


@pytest.fixture
def maths(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [
        {"question": "one and one?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"},
        {"question": "a thousand and one?", "answer": "...\n#### 1,001"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return EvaluateConfig(tasks=("gsm8k_file",), data_files={"gsm8k_file": str(path)})


@pytest.mark.parametrize(
    ("answers", "strict", "flexible"),
    [
        (["#### 2", "#### 1,001"], 1.0, 1.0),
        (["#### 2", "#### 1001"], 1.0, 1.0),
        (["so it is 2", "that makes $1001."], 0.0, 1.0),
        (["#### 3", "no idea"], 0.0, 0.0),
    ],
)
def test_gsm8k_reads_the_final_number(tokenizer, maths, answers, strict, flexible):
    def solve(question):
        return answers["thousand" in question]

    scores = ask(tokenizer, solve, maths)["gsm8k_file"]
    assert scores == {"exact_match.strict": strict, "exact_match.flexible": flexible}


def test_gsm8k_over_the_real_file_accepts_its_own_answers(tokenizer, real_data):
    path = real_data / "gsm8k" / "test.jsonl"
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        known[row["question"]] = row["answer"]

    def solve(question):
        return known[question.removeprefix("<|user|>").partition("<|endoftext|>")[0]]

    config = EvaluateConfig(tasks=("gsm8k_file",), data_files={"gsm8k_file": str(path)}, limit=40)
    scores = ask(tokenizer, solve, config)["gsm8k_file"]
    assert scores == {"exact_match.strict": 1.0, "exact_match.flexible": 1.0}


def test_few_shot_examples_come_as_earlier_turns(tokenizer, maths):
    seen = []

    def solve(question):
        seen.append(question)
        return "#### 2"

    maths.num_fewshot = 1
    ask(tokenizer, solve, maths)
    assert all(question.count("####") == 1 for question in seen)


def test_a_folder_of_ones_own_tasks(tokenizer, tmp_path, maths):
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": maths.data_files["gsm8k_file"]}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "2",
        "generation_kwargs": {"until": []},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    config = EvaluateConfig(tasks=("mine",), include_path=str(tmp_path))
    check_tasks(config)
    assert ask(tokenizer, lambda question: "2", config) == {"mine": {"exact_match": 1.0}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("gsm8k_file",)}, "gsm8k_file: no such data file: gsm8k_test.jsonl"),
        ({"tasks": ("gsm8k_file",), "data_files": {"gsm8k_file": "gone.jsonl"}}, "no such data file: gone.jsonl"),
        ({"tasks": ("digits",), "data_files": {"gsm8k_file": "x"}}, "not among evaluate.tasks"),
        ({"include_path": "gone"}, "include_path gone: no such folder"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_loaded(settings, message):
    with pytest.raises(EvaluationError, match=message):
        check_tasks(EvaluateConfig(**settings))


def test_a_file_without_the_tasks_columns_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1"}\n{"q": "1+1", "answer": "#### 2"}\n')
    config = EvaluateConfig(tasks=("gsm8k_file",), data_files={"gsm8k_file": str(path)})
    with pytest.raises(EvaluationError, match=r"rows\.jsonl, line 2: no column 'question', found 'q', 'answer'"):
        check_tasks(config)


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1"}\n{"question": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not valid JSON"):
        check_tasks(EvaluateConfig(tasks=("gsm8k_file",), data_files={"gsm8k_file": str(path)}))


@pytest.mark.slow  # indexes all of lm-eval's tasks
def test_an_unknown_task_names_near_ones(tokenizer):
    with pytest.raises(EvaluationError, match=r"no task 'gsm8kk'; the nearest names: .*gsm8k"):
        ask(tokenizer, str, EvaluateConfig(tasks=("gsm8kk",)))


@pytest.mark.slow
def test_a_task_whose_data_can_not_be_had_says_what_to_do(tokenizer):
    with pytest.raises(EvaluationError, match="data_files"):
        ask(tokenizer, str, EvaluateConfig(tasks=("gsm8k",)))
