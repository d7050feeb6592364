"""jobs/sample.py and jobs/evaluate.py on the tiny trained model: files, figures, and their place in MLflow."""

import io
import json
import shutil
import sys

import pytest
from jobs_testing import complete, load_job, run, runs
from rich.console import Console

from dllm_ray.cli import run_job
from dllm_ray.viz import terminal

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


def in_this_process(**settings: str) -> int:
    """Runs jobs/sample.py; dots in names of settings are written as __."""
    job = load_job("sample")
    argv = [word for name, value in settings.items() for word in (f"--{name.replace('__', '.')}", value)]
    return run_job(job.SampleJob, job.main, "", argv)


WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = None  # an import of it fails
sys.argv = ["sample.py", *sys.argv[1:]]
runpy.run_path("jobs/sample.py", run_name="__main__")
"""


def test_a_single_prompt_is_answered_without_ray(make_lm, tmp_path):
    make_lm().save(tmp_path / "model")
    settings = {"model__path": str(tmp_path / "model"), "prompt": "sort 21", "html": str(tmp_path / "page.html")}
    words = {"output_dir": str(tmp_path / "out")} | settings | SAMPLER
    argv = [word for name, value in words.items() for word in (f"--{name.replace('__', '.')}", value)]
    done = complete([sys.executable, "-c", WITHOUT_RAY, *argv])
    assert done.returncode == 0, done.stderr
    assert len(read_lines(tmp_path / "out" / "samples.jsonl")) == 1 and (tmp_path / "page.html").is_file()


def replayed(path):
    page = path.read_text()
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


@pytest.mark.parametrize(
    ("prompt", "infill", "tokens"), [("sort 321", "false", None), ("sort [MASK:3] is [MASK]", "true", 4)]
)
def test_on_a_terminal_denoising_is_drawn_live_and_answers_stay_the_same(
    trained, tmp_path, monkeypatch, capsys, prompt, infill, tokens
):
    drawn = io.StringIO()
    answers, pages = [], []
    for name in ("plain", "live"):
        if name == "live":
            monkeypatch.setattr(terminal, "console", Console(file=drawn, force_terminal=True, width=80))
        page = tmp_path / f"{name}.html"
        status = in_this_process(
            model__path=str(trained[0] / "final"),
            output_dir=str(tmp_path / name),
            tracking__uri=f"sqlite:///{tmp_path}/mlruns.db",
            prompt=prompt,
            infill=infill,
            show=str(name == "live").lower(),
            html=str(page),
            sampler__temperature="1.0",
            sampler__seed="5",
            **SAMPLER,
        )
        assert status == 0
        (row,) = read_lines(tmp_path / name / "samples.jsonl")
        assert capsys.readouterr().out.rstrip("\n").endswith(row["completion"])
        answers.append(row)
        pages.append(replayed(page))
    assert answers[0] == answers[1]
    assert tokens is None or answers[0]["completion_tokens"] == tokens
    assert "masks left" in drawn.getvalue() and "step " in drawn.getvalue()
    assert pages[0] == pages[1]
    (row,) = pages[0]["rows"]
    assert len(row["steps"]) == answers[0]["nfe"]
    last = runs(tmp_path, "sample")[-1]
    assert last.data.metrics["sampler/nfe"] == answers[0]["nfe"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": "x.jsonl", "show": "true"}, "show: shows a single --prompt"),
        ({"prompt": "a", "html": "no/such/folder/page.html"}, "html: no/such/folder/page.html is no file in a folder"),
        ({"prompts": "[]"}, "prompts: name at least one source"),
        ({"prompt": "no gap", "infill": "true"}, "--prompt: text has no gap: write [MASK:8]"),
        ({"prompt": "[MASK:99]", "infill": "true"}, "prompt 1 has 99 tokens: it doesn't fit the model's context of 64"),
    ],
)
def test_what_can_not_be_sampled_is_said_before_anything_is_started(trained, tmp_path, capsys, settings, said):
    status = in_this_process(model__path=str(trained[0] / "final"), output_dir=str(tmp_path), **settings)
    assert status == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not (tmp_path / "mlruns.db").exists()


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
    assert one_step["sampler"]["nfe"] == one_step["sampler"]["asked"] <= 20  # equal questions are asked once
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


def test_an_unknown_task_is_refused_before_anything_is_started(trained, tmp_path):
    output_dir = tmp_path / "out"
    done = run(
        "evaluate", model__path=str(trained[0] / "final"), output_dir=str(output_dir), evaluate__tasks="[no_such_task]"
    )
    assert done.returncode == 2
    assert done.stderr.count("error: no task 'no_such_task'") == 1 and "Traceback" not in done.stderr
    assert not output_dir.exists()


def test_a_failed_evaluation_is_recorded_with_its_reason(trained, tmp_path):
    shutil.copytree(trained[0] / "final", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    done = run("evaluate", model__path=str(tmp_path / "model"), output_dir=str(tmp_path), tracking__uri=uri, **SAMPLER)
    assert done.returncode == 2
    assert done.stderr.count("model.safetensors") >= 1 and "Traceback" not in done.stderr
    (record,) = runs(tmp_path, "evaluate")
    assert record.info.status == "FAILED"
    assert "model.safetensors" in record.data.tags["dllm_ray.failure"]
