"""Tasks through the real lm-eval: found by name, pointed at files, asked as the settings say."""

import json
from pathlib import Path

import pytest
from evaluation_testing import FixedAnswers

from dllm_ray.config import load_yaml
from dllm_ray.data.builtin import digits
from dllm_ray.errors import DataError, EvaluationError
from dllm_ray.evaluation import run
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.evaluation.run import check_data, check_tasks, evaluate, look_up, metrics, requests, standard_errors

ROOT = Path(__file__).resolve().parents[2]


def ask(solve, config):
    """Scores where `solve(question) -> text` answers."""
    results = evaluate(FixedAnswers(lambda prompt: solve(prompt.removeprefix("<user>"))), config, seed=0)
    assert set(results["results"]) == set(results["n-samples"]) == set(config.tasks)
    return metrics(results)


def solve_digits(question: str) -> str:
    task, number = question.split()
    if task == "shuffle":
        return number[1:] + number[:1] if len(set(number)) > 1 else number
    return digits._answer(task, number, None)


def test_digits_gives_full_marks_to_right_answers():
    scores = ask(solve_digits, EvaluateConfig(tasks=("digits",), limit=50))["digits"]
    assert scores == dict.fromkeys(["exact_match", *digits.TASKS], 1.0)


def test_digits_counts_each_kind_of_task_by_itself():
    def only_reverse(question):
        return solve_digits(question) if "reverse" in question else "no"

    scores = ask(only_reverse, EvaluateConfig(tasks=("digits",), limit=50))["digits"]
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
def test_gsm8k_reads_the_final_number(maths, answers, strict, flexible):
    scores = ask(lambda question: answers["thousand" in question], maths)["gsm8k_file"]
    assert scores == {"exact_match.strict": strict, "exact_match.flexible": flexible}


def test_standard_errors_go_by_the_names_of_the_metrics(maths):
    results = evaluate(FixedAnswers(lambda prompt: "#### 2"), maths, seed=0)
    assert metrics(results)["gsm8k_file"] == {"exact_match.strict": 0.5, "exact_match.flexible": 0.5}
    assert standard_errors(results)["gsm8k_file"] == {"exact_match.strict": 0.5, "exact_match.flexible": 0.5}


def test_gsm8k_over_the_real_file_accepts_its_own_answers(real_data):
    path = real_data / "gsm8k" / "test.jsonl"
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        known[row["question"]] = row["answer"]
    config = EvaluateConfig(tasks=("gsm8k_file",), data_files={"gsm8k_file": str(path)}, limit=40)
    scores = ask(known.__getitem__, config)["gsm8k_file"]
    assert scores == {"exact_match.strict": 1.0, "exact_match.flexible": 1.0}


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, "<system>Be brief.<user>a thousand and one?<assistant>...\n#### 1,001<user>one and one?"),
        (
            {"fewshot_as_multiturn": False},
            "<system>Be brief.<user>a thousand and one? ...\n#### 1,001\n\none and one?",
        ),
        ({"chat_template": False}, "Be brief.a thousand and one? ...\n#### 1,001\n\none and one?"),
    ],
)
def test_examples_and_instruction_come_as_the_settings_say(maths, settings, prompt):
    maths.num_fewshot = 1
    maths.system_instruction = "Be brief."
    for name, value in settings.items():
        setattr(maths, name, value)
    model = FixedAnswers()
    evaluate(model, maths, seed=0)
    assert model.prompts[0] == prompt


def test_what_would_be_asked_is_known_without_asking(maths):
    maths.num_fewshot = 1
    model = FixedAnswers()
    (planned,) = requests(model, maths, seed=0, count=len)
    assert (planned.task, planned.documents, planned.counts) == ("gsm8k_file", 2, {"generate_until": 2})
    assert not model.prompts
    evaluate(model, maths, seed=0)
    assert planned.lengths == [len(prompt) for prompt in model.prompts]


def test_what_would_be_asked_of_a_group_is_given_by_its_tasks(tmp_path):
    for name in ("one", "two"):
        examples = [{"input": "Is it?\nOptions:\n- Yes\n- No", "target": "Yes"}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"examples": examples * 3}))
    config = EvaluateConfig(tasks=("bbh_choice_file",), data_files={"bbh_choice_file": str(tmp_path / "*.json")})
    planned = requests(FixedAnswers(), config, seed=0, count=len)
    assert [part.task for part in planned] == ["bbh_choice_file_one", "bbh_choice_file_two"]
    assert all((part.documents, part.counts) == (3, {"loglikelihood": 6}) for part in planned)


def test_tasks_are_looked_up_with_their_documents_and_metrics(maths):
    (found,) = look_up(maths)
    assert (found.name, found.documents, found.filters) == ("gsm8k_file", 2, ["strict", "flexible"])
    assert found.metrics["exact_match"]([0.0, 1.0]) == 0.5
    assert found.higher_is_better == {"exact_match": True}
    (built_in,) = look_up(EvaluateConfig(tasks=("digits",), limit=3))
    assert (built_in.documents, built_in.filters) == (500, ["none"])
    assert list(built_in.metrics) == ["exact_match", *digits.TASKS]


def choices(folder, sizes):
    """A group of tasks over files with so many questions each."""
    for name, size in sizes.items():
        examples = [{"input": f"Is it {n}?\nOptions:\n- Yes\n- No", "target": "Yes"} for n in range(size)]
        (folder / f"{name}.json").write_text(json.dumps({"examples": examples}))
    return EvaluateConfig(tasks=("bbh_choice_file",), data_files={"bbh_choice_file": str(folder / "*.json")})


def test_a_group_is_looked_up_by_its_members(tmp_path):
    found = look_up(choices(tmp_path, {"one": 3, "two": 5}))
    assert [(task.name, task.documents) for task in found] == [
        ("bbh_choice_file_one", 3),
        ("bbh_choice_file_two", 5),
    ]


def asked(results):
    return {task: [sample["doc_id"] for sample in samples] for task, samples in results["samples"].items()}


def test_documents_are_asked_by_their_places_whatever_the_limit_says():
    config = EvaluateConfig(tasks=("digits",), limit=2)
    whole = FixedAnswers()
    evaluate(whole, EvaluateConfig(tasks=("digits",), limit=20), seed=0)
    model = FixedAnswers()
    results = evaluate(model, config, seed=0, documents=range(12, 17))
    assert asked(results) == {"digits": list(range(12, 17))}
    assert model.prompts == whole.prompts[12:17]


def test_places_beyond_a_tasks_documents_are_left_out(tmp_path):
    config = choices(tmp_path, {"one": 3, "two": 5})
    results = evaluate(FixedAnswers(), config, seed=0, documents=range(2, 9))
    assert asked(results) == {"bbh_choice_file_one": [2], "bbh_choice_file_two": [2, 3, 4]}
    with pytest.raises(EvaluationError, match=r"task bbh_choice_file_one has 3 documents, none of them from 3 to 4"):
        evaluate(FixedAnswers(), config, seed=0, documents=range(3, 5))


def test_a_folder_of_ones_own_tasks(tmp_path, maths):
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
    assert ask(lambda question: "2", config) == {"mine": {"exact_match": 1.0}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("gsm8k_file",)}, "gsm8k_file: no such data file: gsm8k_test.jsonl"),
        ({"tasks": ("gsm8k_file",), "data_files": {"gsm8k_file": "gone.jsonl"}}, "no such data file: gone.jsonl"),
        ({"tasks": ("bbh_file",)}, r"Name one with --evaluate\.data_files\.bbh_file FILE"),
        ({"tasks": ("digits",), "data_files": {"gsm8k_file": "x"}}, "not among evaluate.tasks"),
        ({"include_path": "gone"}, "include_path gone: no such folder"),
        ({"tasks": ("digits", "digits")}, "evaluate.tasks asks digits twice"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_loaded(settings, message):
    with pytest.raises(EvaluationError, match=message):
        check_tasks(EvaluateConfig(**settings))


def test_broken_yaml_of_ones_own_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: [")
    with pytest.raises(EvaluationError, match=r"mine\.yaml: broken YAML"):
        check_tasks(EvaluateConfig(include_path=str(tmp_path)))


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


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_text("x")
    with pytest.raises(EvaluationError, match=r"rows\.xlsx: unknown file type; expected \.jsonl"):
        check_tasks(EvaluateConfig(tasks=("gsm8k_file",), data_files={"gsm8k_file": str(path)}))


@pytest.mark.slow  # indexes all of lm-eval's tasks, here and below: once for all
def test_an_unknown_task_names_near_ones():
    with pytest.raises(EvaluationError, match=r"no task 'gsm8kk'; the nearest names: .*gsm8k"):
        check_tasks(EvaluateConfig(tasks=("gsm8kk",)))


@pytest.mark.slow
def test_a_task_whose_data_can_not_be_had_says_which_files_to_give():
    ways = r"data_files\.gsm8k FILE, or ask gsm8k_file over local files.*HF_HUB_CACHE"
    with pytest.raises(EvaluationError, match=rf"data of gsm8k \(openai/gsm8k\) can't be had: .*{ways}"):
        check_data(EvaluateConfig(tasks=("gsm8k",)))


@pytest.mark.slow
def test_lm_evals_own_tasks_over_local_files_in_the_sandbox(real_data):
    path = str(real_data / "humaneval" / "HumanEval.jsonl.gz")
    config = EvaluateConfig(tasks=("humaneval",), data_files={"humaneval": path}, limit=2, chat_template=False)
    with pytest.raises(EvaluationError, match="humaneval runs code"):
        check_tasks(config)
    config.confirm_run_unsafe_code = True
    check_tasks(config)
    solution = "    return [] if not paren_string else ['(()())', '((()))', '()', '((())()())']\n"
    assert ask(lambda question: solution, config) == {"humaneval": {"pass@1": 0.0}}


@pytest.mark.slow
def test_lm_evals_own_examples_stay_over_local_files(maths):
    config = EvaluateConfig(
        tasks=("gsm8k_cot",), data_files={"gsm8k_cot": maths.data_files["gsm8k_file"]}, chat_template=False
    )
    model = FixedAnswers(lambda prompt: "The answer is 2.")
    results = evaluate(model, config, seed=0)
    assert metrics(results)["gsm8k_cot"]["exact_match.strict-match"] == 0.5
    assert model.prompts[0].count("The answer is") == 8


@pytest.mark.slow
def test_code_that_would_run_outside_the_sandbox_is_refused():
    config = EvaluateConfig(tasks=("cruxeval_o",), confirm_run_unsafe_code=True)
    names = [name for name in run._manager(None, True).task_index if name.startswith("cruxeval")]
    config.tasks = (names[0],)
    with pytest.raises(EvaluationError, match="runs code in a way of its own, outside the sandbox"):
        check_tasks(config)


@pytest.mark.slow
def test_every_task_of_the_tables_is_known_and_code_is_marked():
    runs_code = ("humaneval", "mbpp")
    for path in sorted((ROOT / "configs" / "evaluate").glob("*.yaml")):
        for line in load_yaml(path)["evaluate"].get("suite", []):
            config = EvaluateConfig(tasks=(line["task"],))
            index = run._index(config)
            names = list(index.below(line["task"]))
            assert all(name in index for name in names), (path.stem, line["task"])
            unsafe = any(index.trees.get(name, {}).get("unsafe_code") for name in names)
            assert unsafe == line["task"].startswith(runs_code), (path.stem, line["task"])
