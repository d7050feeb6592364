"""jobs/sample.py on a source of prompts: killed and started again it ends as if nothing had happened, and it neither
mixes answers of different settings nor loses them."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs_testing import ROOT, command, environment, load_job, run, runs

from dllm_ray import tracking
from dllm_ray.answers import Answer, AnswerStore
from dllm_ray.cli import run_job
from dllm_ray.errors import OutputError
from dllm_ray.models.load import open_tokenizer
from dllm_ray.prompts import encode_rows
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler, row_seeds

pytestmark = pytest.mark.slow

QUESTIONS = [f"reverse {'123456789'[: 1 + number % 7]}" for number in range(60)]
DENOISING = {"max_new_tokens": 32, "block_size": 32, "steps": 32, "temperature": 1.0}
PARTIAL = ".partial.jsonl"


@pytest.fixture(scope="module")
def model(make_lm, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_lm().save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """A folder of two files."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [json.dumps({"prompt": question}) + "\n" for question in QUESTIONS]
    (folder / "a.jsonl").write_text("".join(rows[:20]))
    (folder / "b.csv").write_text("prompt\n" + "".join(f"{question}\n" for question in QUESTIONS[20:]))
    return folder


def settings(model, prompts, output_dir, **changes) -> dict[str, str]:
    return {
        "model__path": model,
        "prompts": str(prompts),
        "output_dir": str(output_dir),
        "batch_size": "2",
        "workers": "2",
        **{f"sampler__{name}": str(value) for name, value in DENOISING.items()},
        **changes,
    }


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_this_process(**changes) -> int:
    """Runs the job, which must not get as far as Ray."""
    job = load_job("sample")
    argv = [word for name, value in changes.items() for word in (f"--{name.replace('__', '.')}", value)]
    return run_job(job.SampleJob, job.main, "", argv)


def rows_in(partial: Path) -> int:
    try:
        return partial.read_bytes().count(b'{"row":')
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def killed(model, prompts, tmp_path_factory):
    """The output folder of a run that was killed after some answers, and what it held then."""
    folder = tmp_path_factory.mktemp("killed")
    words = {name.replace("__", "."): value for name, value in settings(model, prompts, folder).items()}
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(command("sample", words), cwd=ROOT, env=environment(), stdout=log, stderr=log)
    while rows_in(folder / PARTIAL) < 6:
        assert driver.poll() is None, (folder / "log").read_text()
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    return folder, (folder / PARTIAL).read_bytes()


def test_other_settings_or_prompts_are_refused_while_answers_are_kept(killed, model, prompts, capsys):
    folder, held = killed
    for changes, said in (
        ({"sampler__steps": "16"}, "sampler.steps was 32, is now 16"),
        ({"limit": "50"}, "prompts was '60 of digest "),
        ({"batch_size": "3"}, "batch_size was 2, is now 3"),
        ({"model__dtype": "bfloat16"}, "model.dtype was 'float32', is now 'bfloat16'"),
    ):
        assert in_this_process(**settings(model, prompts, folder, **changes)) == 2
        message = capsys.readouterr().err
        assert "answers of an unfinished run with other settings" in message and said in message
        assert "Go on with those settings, start over with --fresh, or name another output_dir" in message
        assert message.count("\n") == 1
    assert (folder / PARTIAL).read_bytes() == held
    assert not (folder / "samples.jsonl").exists()


@pytest.fixture(scope="module")
def resumed(killed, model, prompts):
    """The same folder after the same command ran to its end; its output."""
    folder, _ = killed
    done = run("sample", **settings(model, prompts, folder, html=str(folder / "replay.html")))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(killed, resumed, model, make_lm, tmp_path):
    folder, _ = resumed
    rows = read_lines(folder / "samples.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == QUESTIONS

    tokenizer, *_ = open_tokenizer(model)
    _, tokens = encode_rows([(str, {"prompt": question}) for question in QUESTIONS], tokenizer, {})
    seed = json.loads((folder / "summary.json").read_text())["seed"]
    seeds = row_seeds(seed, range(len(QUESTIONS)))
    whole = Sampler(make_lm(), SamplerConfig(**DENOISING)).sample([list(ids) for ids in tokens], seeds=seeds)
    assert [row["completion"] for row in rows] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in whole.completions
    ]
    assert [row["nfe"] for row in rows] == whole.row_nfe
    assert [row["seed"] for row in rows] == seeds


def test_what_was_answered_before_the_kill_is_not_answered_again(killed, resumed, tmp_path):
    _, held = killed
    (tmp_path / PARTIAL).write_bytes(held)
    key = json.loads(held.splitlines()[0])["key"]
    with AnswerStore(tmp_path / PARTIAL, key) as store:
        before, seed = len(store), store.facts["seed"]
    assert 6 <= before < len(QUESTIONS)
    folder, said = resumed
    assert f"{before} of 60 prompts were answered before" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["answered_before"] == before and summary["seed"] == seed
    assert not (folder / PARTIAL).exists()


def test_the_summary_counts_all_answers_and_is_in_mlflow_under_one_run(resumed):
    folder, said = resumed
    rows = read_lines(folder / "samples.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["prompts"] == 60 and summary["ended"] + summary["at_limit"] == 60
    assert summary["tokens"] == sum(row["completion_tokens"] for row in rows)
    assert summary["mean_tokens"] == pytest.approx(summary["tokens"] / 60)
    assert summary["nfe"] == sum(row["nfe"] for row in rows)
    assert summary["tpf"] == pytest.approx(summary["tokens"] / summary["nfe"])
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert summary["at_limit"] == sum(row["completion_tokens"] == 32 for row in rows)
    (record,) = runs(folder, "sample")
    assert record.info.status == "FINISHED" and record.info.run_id == summary["run_id"]
    for name in ("prompts", "tokens", "nfe", "tpf", "tokens_per_s", "ended", "at_limit", "answered_before"):
        assert record.data.metrics[f"sampler/{name}"] == pytest.approx(summary[name])
    assert "answered before" in said and "at limit" in said


def test_a_page_replays_the_first_prompts(resumed):
    folder, _ = resumed
    page = (folder / "replay.html").read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert len(data["rows"]) == 8
    rows = read_lines(folder / "samples.jsonl")
    assert [len(row["steps"]) for row in data["rows"]] == [row["nfe"] for row in rows[:8]]


def test_a_finished_run_is_neither_repeated_nor_replaced_unasked(resumed, model, prompts, capsys):
    folder, _ = resumed
    before = (folder / "samples.jsonl").read_bytes()
    assert in_this_process(**settings(model, prompts, folder)) == 0
    assert "from before; --fresh answers again" in capsys.readouterr().out
    assert in_this_process(**settings(model, prompts, folder, sampler__seed="1")) == 2
    assert "holds the answers of another run: sampler.seed was None, is now 1" in capsys.readouterr().err
    one = {"model__path": model, "output_dir": str(folder), "prompt": "sort 21", "sampler__max_new_tokens": "8"}
    assert in_this_process(**one) == 2
    assert "holds the answers of another run: they are to a source" in capsys.readouterr().err
    assert (folder / "samples.jsonl").read_bytes() == before


def test_a_run_that_is_told_to_start_afresh_drops_what_was_there(model, prompts, tmp_path, monkeypatch, capsys):
    (tmp_path / "summary.json").write_text('{"key": {"other": 1}}')
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with AnswerStore(tmp_path / PARTIAL, {"another": 1}) as store:
        store.add({0: Answer([1], 1, True)})

    def unreachable(*_args, **_kwargs):
        raise OutputError("no store")

    monkeypatch.setattr(tracking, "start", unreachable)
    assert in_this_process(**settings(model, prompts, tmp_path, fresh="true")) == 2
    assert capsys.readouterr().err == "error: no store\n"
    assert rows_in(tmp_path / PARTIAL) == 0
