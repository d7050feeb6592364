"""jobs/sample.py and jobs/evaluate.py on the tiny trained model: files, figures, and their place in MLflow."""

import json

import pytest
from jobs_testing import run, runs

pytestmark = pytest.mark.slow

SAMPLER = {"sampler__max_new_tokens": "8", "sampler__block_size": "8", "sampler__steps": "4"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_is_answered_and_its_denoising_shown(trained, tmp_path):
    model = str(trained[0] / "final")
    done = run("sample", model__path=model, output_dir=str(tmp_path), prompt="sort 321", show="true", **SAMPLER)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    masks = [line.count("░") for line in steps]
    assert masks[0] == 8 and masks == sorted(set(masks), reverse=True)
    (row,) = read_lines(tmp_path / "samples.jsonl")
    assert row["messages"] == [{"role": "user", "content": "sort 321"}]
    assert done.stdout.rstrip("\n").endswith(row["completion"])


def test_a_file_of_prompts_is_answered_in_order_and_the_same_on_any_number_of_workers(trained, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    questions = [f"reverse {'123456'[: 2 + number % 5]}" for number in range(12)]
    prompts.write_text("".join(json.dumps({"query": question}) + "\n" for question in questions))
    answers = {}
    for workers in ("1", "2"):
        done = run(
            "sample",
            model__path=str(trained[0] / "final"),
            output_dir=str(tmp_path / workers),
            prompts=str(prompts),
            columns="{prompt: query}",
            workers=workers,
            batch_size="5",
            sampler__temperature="1.0",
            sampler__seed="7",
            **SAMPLER,
        )
        assert done.returncode == 0, done.stderr
        rows = read_lines(tmp_path / workers / "samples.jsonl")
        assert [row["messages"][0]["content"] for row in rows] == questions
        answers[workers] = [row["completion"] for row in rows]
    assert answers["1"] == answers["2"]
    assert len(set(answers["1"])) > 1


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    done = run(
        "evaluate",
        model__path=str(trained[0] / "final"),
        output_dir=str(folder),
        evaluate__tasks="[digits]",
        evaluate__limit="20",
        evaluate__workers="2",
        evaluate__variants="[{steps: 1}]",
        **SAMPLER,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_results_are_in_the_harness_own_form_with_the_samplers_figures(evaluated):
    folder, output = evaluated
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["results"]["digits"]["exact_match,none"] <= 1
    assert results["n-samples"]["digits"] == {"original": 500, "effective": 20}
    figures = results["sampler"]
    assert figures["settings"]["steps"] == 4
    assert figures["tpf"] == pytest.approx(figures["tokens"] / figures["nfe"])
    assert figures["tokens_per_s"] == pytest.approx(figures["tokens"] / figures["seconds"])
    one_step = json.loads((folder / "steps=1" / "results.json").read_text())
    assert one_step["sampler"]["nfe"] == 20
    assert "steps=1" in output and "exact_match" in output


def test_every_document_is_kept_with_its_answer(evaluated):
    documents = read_lines(evaluated[0] / "samples_digits.jsonl")
    assert len(documents) == 20
    assert all(document["resps"] and document["doc"]["prompt"] for document in documents)


def test_evaluations_are_children_of_the_training_run_and_variants_of_the_evaluation(trained, evaluated):
    (training,) = runs(trained[0])
    evaluation, variant = runs(trained[0], "evaluate")
    assert evaluation.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert variant.data.tags["mlflow.parentRunId"] == evaluation.info.run_id
    assert {"eval/digits/exact_match", "eval/digits/shuffle", "sampler/tpf", "sampler/nfe", "sampler/tokens_per_s"} <= (
        set(evaluation.data.metrics)
    )
    assert variant.data.params["sampler.steps"] == "1"
    assert evaluation.info.status == variant.info.status == "FINISHED"


def test_a_failed_evaluation_is_recorded_with_its_reason(trained, tmp_path):
    done = run(
        "evaluate",
        model__path=str(trained[0] / "final"),
        output_dir=str(tmp_path),
        tracking__uri=f"sqlite:///{tmp_path}/mlruns.db",
        evaluate__tasks="[no_such_task]",
        **SAMPLER,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: no task 'no_such_task'") == 1 and "Traceback" not in done.stderr
    (record,) = runs(tmp_path, "evaluate")
    assert record.info.status == "FAILED"
    assert "no_such_task" in record.data.tags["dllm_ray.failure"]
