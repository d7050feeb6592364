"""The tasks of our own, over files and through the real lm-eval: what counts as right, and what doesn't."""

import gzip
import json

import pytest
from evaluation_testing import FixedAnswers
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import DataError, EvaluationError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.evaluation.run import check_tasks, evaluate, metrics, standard_errors
from dllm_ray.evaluation.tasks import bbh, letters, programs, puzzles


def ask(config: EvaluateConfig, answer=str, likelihood=None) -> dict:
    """lm-eval's result where `answer(prompt) -> text` and `likelihood(context, target) -> nats` answer."""
    check_tasks(config)
    return evaluate(FixedAnswers(answer, likelihood), config, seed=0)


def over(task, file, **settings) -> EvaluateConfig:
    return EvaluateConfig(tasks=(task,), data_files={task: str(file)}, chat_template=False, **settings)


def rows_of(path) -> list[dict]:
    if path.suffix == ".json":
        return json.loads(path.read_text())["examples"]
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def test_humaneval_over_the_real_file_accepts_its_own_solutions(real_data):
    path = real_data / "humaneval" / "HumanEval.jsonl.gz"
    known = {row["prompt"]: row for row in rows_of(path)}
    forms = (
        lambda row: row["canonical_solution"],
        lambda row: row["canonical_solution"] + "\nprint('more')\n",
        lambda row: f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```\nIt works.",
        lambda row: "    return None\n",
    )
    asked = []

    def answer(prompt):
        asked.append(prompt)
        return forms[(len(asked) - 1) % 4](known[prompt])

    config = over("humaneval_file", path, limit=16, confirm_run_unsafe_code=True)
    results = ask(config, answer)
    assert metrics(results) == {"humaneval_file": {"pass@1": 0.75}}
    assert 0 < standard_errors(results)["humaneval_file"]["pass@1"] < 0.2
    shown = results["samples"]["humaneval_file"][3]["filtered_resps"][0][0]
    assert shown["status"] == "failed"
    assert shown["message"].startswith("AssertionError")


def test_code_is_run_only_with_leave(real_data):
    config = over("humaneval_file", real_data / "humaneval" / "HumanEval.jsonl.gz")
    with pytest.raises(EvaluationError, match=r"humaneval_file runs code .* --evaluate\.confirm_run_unsafe_code true"):
        check_tasks(config)


DOC = {"entry_point": "add", "prompt": "import math\ndef add(a, b):\n    '''Adds.'''\n"}


@pytest.mark.parametrize(
    "answer",
    [
        "    return a + b",
        "    return a + b\n\nadd = None\n",
        "```python\n    return a + b\n```",
        "Sure:\n```python\ndef add(a, b):\n    return math.fsum([a, b])\n```\nDone.",
        "```\ndef add(a, b):\n    return a + b",
        "def add(a, b):\n    return a + b",
    ],
)
def test_programs_are_read_out_of_answers(answer):
    names = {}
    exec(programs.completed(answer, DOC), names)
    assert names["add"](1, 2) == 3


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


MBPP = [
    {
        "text": f"Write a function that adds {number}.",
        "code": f"def add(a):\n    return a + {number}",
        "test_list": [f"assert add(0) == {number}", f"assert add(1) == {number + 1}"],
        "test_setup_code": "",
    }
    for number in range(4)
]
FORMS = {"mbpp_instruct_llada": "[BEGIN]\n{}\n[DONE]", "mbpp_instruct_dream": "{}\n```"}


@pytest.mark.parametrize("task", FORMS)
def test_mbpp_as_an_instruction(task, tmp_path):
    def answer(prompt):
        number = int(prompt.rpartition("that adds ")[2].partition(".")[0])
        assert prompt.endswith("```python\n") == (task == "mbpp_instruct_dream")
        assert prompt.count("[BEGIN]\ndef add") == (3 if task == "mbpp_instruct_llada" else 0)
        return FORMS[task].format(MBPP[number]["code"] if number else "def add(a): pass")

    config = over(task, write_rows(tmp_path / "mbpp.jsonl", MBPP), confirm_run_unsafe_code=True)
    assert metrics(ask(config, answer)) == {task: {"pass@1": 0.75}}


@pytest.mark.parametrize("task", ["humaneval_instruct_llada", "humaneval_instruct_dream"])
def test_humaneval_as_an_instruction(task, real_data):
    path = real_data / "humaneval" / "HumanEval.jsonl.gz"
    known = {row["prompt"].strip(): row for row in rows_of(path)}

    def answer(prompt):
        (row,) = [row for key, row in known.items() if key in prompt]
        return f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}```\n"

    assert metrics(ask(over(task, path, limit=4, confirm_run_unsafe_code=True), answer)) == {task: {"pass@1": 1.0}}


def test_hellaswag_is_answered_with_a_letter(tmp_path):
    rows = [
        {
            "activity_label": "Rowing",
            "ctx": f"{n}. A man",
            "endings": ["rows", "flies", "reads", "ends"],
            "label": str(n),
        }
        for n in range(4)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    results = ask(over("hellaswag_gen", path), lambda prompt: "(B) flies" if "1. A man" in prompt else "It is c")
    assert metrics(results) == {"hellaswag_gen": {"exact_match": 0.5}}


@pytest.mark.parametrize(
    "answer",
    ["x = 1", "[BEGIN]\nx = 1\n[DONE]", "[BEGIN]'x = 1'[DONE] more", "x = 1\n[DONE] x = 2", "```python\nx = 1\n```",
     "Sure.\nBEGIN\nx = 1\nDONE\nx = 2", "[BEGIN]\n```python\nx = 1\n```\n[DONE]"],
)  # fmt: skip
def test_programs_between_marks(answer):
    assert programs.between_marks(answer) == "x = 1"


def test_bbh_asks_each_file_as_a_task_of_its_own(real_data):
    folder = real_data / "bbh"
    known = {row["input"]: row["target"] for path in folder.glob("*.json") for row in rows_of(path)}

    def answer(prompt):
        question = prompt.partition("\nEnd with a line")[0]
        wrong = "Do you return" in question or "do you return" in question
        return f"Step by step.\nAnswer: {'Neither' if wrong else known[question]}."

    config = over("bbh_file", folder / "[bnw]*.json", limit=5)
    scores = metrics(ask(config, answer))
    names = ["boolean_expressions", "navigate", "web_of_lies", "word_sorting"]
    alone = {f"bbh_file_{name}": {"exact_match": float(name != "navigate")} for name in names}
    assert scores == {"bbh_file": {"exact_match": 0.75}} | alone


def test_bbh_examples_are_solved_and_never_the_question_itself(real_data):
    path = real_data / "bbh" / "navigate.json"

    def answer(prompt):
        assert prompt.count("End with a line") == 4
        assert prompt.count("\nAnswer: ") == 3
        questions = prompt.split("\n\n")
        assert len({question.partition("\nEnd")[0] for question in questions}) == 4
        return "Answer: Yes"

    ask(over("bbh_file", path, limit=4, num_fewshot=3), answer)


@pytest.mark.parametrize(
    ("text", "choices", "said"),
    [
        ("so the answer is (B).", ["(A)", "(B)"], "(B)"),
        ("Answer: B", ["(A)", "(B)"], "(B)"),
        ("Answer: B) the crow", ["(A)", "(B)"], "(B)"),
        ("(A) is wrong.\n**Answer: (B) the crow**", ["(A)", "(B)"], "(B)"),
        ("I think\nno", ["Yes", "No"], "No"),
        ("Answer: yes, or no", ["Yes", "No"], "yes, or no"),
        ("The answer is 8.", [], "8"),
        ("", ["Yes", "No"], ""),
    ],
)
def test_bbh_answers_are_read_out_of_texts(text, choices, said):
    assert bbh.answer(text, choices) == said


def test_bbh_as_a_choice(real_data):
    known = {row["input"]: row["target"] for path in (real_data / "bbh").glob("*.json") for row in rows_of(path)}

    def likelihood(context, target):
        return 0.0 if known[context.removesuffix("\nAnswer:")] == target.strip() else -9.0

    for name, choices in (("date_understanding", 6), ("navigate", 2), ("web_of_lies", 2), ("object_counting", 17)):
        results = ask(over("bbh_choice_file", real_data / "bbh" / f"{name}.json", limit=3), likelihood=likelihood)
        assert metrics(results)["bbh_choice_file"]["acc"] == 1.0
        assert max(len(sample["arguments"]) for sample in results["samples"]["bbh_choice_file"]) == choices


def test_free_answers_are_no_choices(real_data):
    with pytest.raises(DataError, match="250 different answers are no choices: ask bbh_file"):
        ask(over("bbh_choice_file", real_data / "bbh" / "word_sorting.json"))


def test_perplexity_of_text(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    (tmp_path / "text.txt").write_text("one two\n\nthree")
    for name, words, letters_ in (("text.jsonl", 3, 12), ("text.txt", 3, 14)):
        results = ask(over("text_file", tmp_path / name), likelihood=lambda context, target: -float(len(target)))
        scores = metrics(results)["text_file"]
        assert scores["byte_perplexity"] == pytest.approx(2.718281828)
        assert scores["word_perplexity"] == pytest.approx(2.718281828 ** (letters_ / words))
        assert scores["bits_per_byte"] == pytest.approx(1.442695)


def test_puzzles_over_the_real_files_accept_their_own_solutions(real_data):
    for task, path in (
        ("sudoku_file", real_data / "sudoku" / "sudoku_4x4_4.jsonl"),
        ("countdown_file", real_data / "countdown" / "cd4_test.jsonl"),
    ):
        known = {row["input"]: row["output"] for row in rows_of(path)}

        def answer(prompt, known=known):
            return known[prompt.split("\n\n")[-1].partition(":\n")[2].rpartition("\n")[0].rpartition("\n")[0]]

        assert metrics(ask(over(task, path, limit=20), answer)) == {task: {"solved": 1.0}}


def test_every_solution_on_file_is_one(real_data):
    for path in (real_data / "sudoku").glob("*.jsonl"):
        assert all(puzzles.sudoku(row, [row["output"]])["solved"] for row in rows_of(path))
    for path in (real_data / "countdown").glob("*.jsonl"):
        assert all(puzzles.countdown(row, [row["output"]])["solved"] for row in rows_of(path))


GRID = {"input": "1000\n0002\n4003\n0000", "output": "1234\n3412\n4123\n2341"}


@pytest.mark.parametrize(
    ("answer", "solved"),
    [
        ("1234\n3412\n4123\n2341", 1.0),
        ("Solution: 1234 3412 4123 2341 and so on", 1.0),
        ("1234\n3412\n4123", 0.0),
        ("1234\n3412\n2341\n4123", 0.0),
        ("1234\n2341\n3412\n4123", 0.0),
        ("", 0.0),
    ],
)
def test_sudoku(answer, solved):
    assert puzzles.sudoku(GRID, [answer]) == {"solved": solved}


@pytest.mark.parametrize(
    ("answer", "solved"),
    [
        ("44-15=29,79-29=50", 1.0),
        ("79 - 44 = 35, 35 + 15 = 50\nmore", 1.0),
        ("44-15=29", 0.0),
        ("79-29=50", 0.0),
        ("44-15=29,79-29=51", 0.0),
        ("44-15=30,79-29=50", 0.0),
        ("79/0=1", 0.0),
        ("no idea", 0.0),
    ],
)
def test_countdown(answer, solved):
    assert puzzles.countdown({"input": "15,44,79,50"}, [answer]) == {"solved": solved}


@given(st.text(alphabet="0123456789+-*/x=,\n ", max_size=60))
def test_puzzles_take_any_text(text):
    assert puzzles.countdown({"input": "15,44,79,50"}, [text])["solved"] in (0.0, 1.0)
    assert puzzles.sudoku(GRID, [text])["solved"] in (0.0, 1.0)


def test_trips():
    plan = "Day 1-2: fly to Riga and stay in Riga for 2 days. Day 2-5: visit New York for 3 days."
    assert puzzles.trip({"output": plan}, ["Riga for 2 days, then New York for 3 days"]) == {"solved": 1.0}
    assert puzzles.trip({"output": plan}, ["New York for 3 days, then Riga for 2 days"]) == {"solved": 0.0}
    assert puzzles.trip({"output": plan}, [""]) == {"solved": 0.0}


def test_letters():
    assert letters.first([["The B", "none", "(D) or A"]], [{}]) == [["b", "", "d"]]
    assert letters.leading([["(C) because", " D.", "Dogs", "a"]], [{}]) == [["C", "D", "", ""]]


def test_a_gzipped_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"no")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: expected gzipped JSON lines"):
        check_tasks(over("humaneval_file", path, confirm_run_unsafe_code=True))
