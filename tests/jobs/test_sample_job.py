"""jobs/sample.py in this process, with a pool that needs no Ray: what it keeps, refuses and shows."""

import json
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from jobs_testing import load_job

from dllm_ray import chat, cluster, workers
from dllm_ray.answers import Answer, AnswerStore, canvases, write
from dllm_ray.cli import run_job
from dllm_ray.errors import ModelError
from dllm_ray.models.load import load
from dllm_ray.sampling.sampler import Sampler, row_seeds

SETTINGS = {
    "sampler.max_new_tokens": "8",
    "sampler.block_size": "8",
    "sampler.steps": "4",
    "sampler.temperature": "1.0",
}
SAMPLES, SUMMARY, PARTIAL = "samples.jsonl", "summary.json", ".partial.jsonl"


@pytest.fixture(scope="module")
def model(make_lm, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_lm().save(folder)
    return str(folder)


class Pool:
    """A `ModelPool` of this process."""

    fails = False

    def __init__(self, model, _shares, **_options):
        self._lm = load(model.path)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def wait(self):
        if self.fails:
            raise ModelError("the weights are broken")

    def fill(self, store, prompts, config, _slice_rows, on_progress, infill, drafts):
        sampler = Sampler(self._lm, config)
        seeds = row_seeds(store.facts["seed"], range(len(prompts)))
        rows = [list(prompt) for prompt in prompts]
        output = write(sampler, rows, seeds, infill, drafts)
        answers = map(Answer, output.completions, output.row_nfe, [False] * len(prompts))
        store.add(dict(enumerate(answers)), seconds=1.0)
        on_progress(len(store))

    def trace(self, prompts, config, seeds, infill, drafts):
        sampler = Sampler(self._lm, config)
        rows = [list(prompt) for prompt in prompts]
        return canvases(sampler, rows, infill, drafts), write(sampler, rows, seeds, infill, drafts, trace=True)


@pytest.fixture
def sample(model, monkeypatch, tmp_path, capsys):
    """Runs the job; returns its status, output and errors."""
    job = load_job("sample")

    @contextmanager
    def untracked(*_args, **_kwargs):
        yield SimpleNamespace(run_id="a", uri="", log=lambda _: None, file=lambda _: None)

    monkeypatch.setattr(job, "_tracked", untracked)
    monkeypatch.setattr(cluster, "connect", lambda *_: nullcontext())
    monkeypatch.setattr(cluster, "shares", lambda *_: None)
    monkeypatch.setattr(workers, "ModelPool", Pool)
    monkeypatch.setattr(Pool, "fails", False)

    def call(**settings: str) -> tuple[int, str, str]:
        words = {"model.path": model, "output_dir": str(tmp_path / "out")} | SETTINGS | settings
        capsys.readouterr()
        status = run_job(job.SampleJob, job.main, "", [word for pair in words.items() for word in _option(*pair)])
        return status, *capsys.readouterr()

    return call


def _option(name: str, value: str) -> tuple[str, str]:
    return f"--{name.replace('__', '.')}", value


@pytest.fixture
def prompts(tmp_path):
    """Writes a file of prompts, and returns its name."""

    def write(*rows: dict) -> str:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "prompts.jsonl")

    return write


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- rows


def test_rows_keep_their_other_columns(sample, prompts, tmp_path):
    rows = [{"id": 7, "prompt": "sort 21", "label": {"a": [1]}}, {"id": 8, "prompt": "sort 32", "response": "23"}]
    assert sample(prompts=prompts(*rows))[0] == 0
    found = read_lines(tmp_path / "out" / SAMPLES)
    assert [{name: row[name] for name in given} for row, given in zip(found, rows, strict=True)] == rows
    assert [row["messages"] for row in found] == [[{"role": "user", "content": row["prompt"]}] for row in rows]
    assert all(set(row) - set(given) == {"messages", "completion", "completion_tokens", "nfe", "tpf", "seed"}
               for row, given in zip(found, rows, strict=True))  # fmt: skip


def test_what_was_asked_is_told_and_not_the_whole_conversation_of_the_row(sample, prompts, tmp_path):
    talk = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]
    assert sample(prompts=prompts({"messages": talk}))[0] == 0
    [row] = read_lines(tmp_path / "out" / SAMPLES)
    assert row["messages"] == talk[:1]


@pytest.mark.parametrize("column", ["completion", "seed"])
def test_a_column_called_like_one_of_the_answers_is_refused(sample, prompts, tmp_path, column):
    status, _, said = sample(prompts=prompts({"prompt": "a"}, {"prompt": "b", column: 1}))
    assert status == 2 and f"prompts.jsonl, line 2: its column '{column}' is called like one of the answer's" in said
    assert not (tmp_path / "out" / SAMPLES).exists()


@pytest.mark.parametrize(("name", "value"), [("columns", "{prompt: q}"), ("workers", "2"), ("limit", "3")])
def test_what_is_for_a_source_of_prompts_is_refused_with_a_single_one(sample, name, value):
    status, _, said = sample(prompt="sort 21", **{name: value})
    assert status == 2 and said == f"error: {name}: is for a source of --prompts, not for a single --prompt\n"


def test_a_page_whose_name_is_too_long_is_refused_before_the_work(sample):
    status, _, said = sample(prompt="sort 21", html="x" * 300)
    assert (
        status == 2 and said.startswith("error: html: xxx") and said.endswith("is no file in a folder that is there\n")
    )


# --- what was there


def test_a_page_is_written_of_answers_that_are_there_already(sample, prompts, tmp_path):
    source = prompts(*({"prompt": f"sort {number}"} for number in range(10)))
    pages = [tmp_path / "first.html", tmp_path / "again.html"]
    assert sample(prompts=source, html=str(pages[0]))[0] == 0
    before = (tmp_path / "out" / SAMPLES).read_bytes()
    status, out, _ = sample(prompts=source, html=str(pages[1]))
    assert status == 0 and "from before" in out and f"replay    {pages[1]}" in out
    assert pages[1].read_text() == pages[0].read_text()
    assert (tmp_path / "out" / SAMPLES).read_bytes() == before


def test_a_fresh_start_that_fails_leaves_finished_answers_alone(sample, prompts, monkeypatch, tmp_path):
    source, out = prompts({"prompt": "sort 21"}), tmp_path / "out"
    assert sample(prompts=source)[0] == 0
    before = {name: (out / name).read_bytes() for name in (SAMPLES, SUMMARY)}
    with AnswerStore(out / PARTIAL, {"another": 1}):
        status, _, said = sample(prompts=source, fresh="true")
        assert status == 2 and "another run is using" in said
    monkeypatch.setattr(Pool, "fails", True)
    status, _, said = sample(prompts=source, fresh="true")
    assert status == 2 and said.endswith("error: the weights are broken\n")
    assert {name: (out / name).read_bytes() for name in (SAMPLES, SUMMARY)} == before
    monkeypatch.setattr(Pool, "fails", False)
    assert sample(prompts=source, fresh="true")[0] == 0
    assert json.loads((out / SUMMARY).read_text())["seed"] != json.loads(before[SUMMARY])["seed"]


def test_a_fresh_single_answer_does_not_leave_the_summary_of_others(sample, prompts, tmp_path):
    assert sample(prompts=prompts({"prompt": "sort 21"}))[0] == 0
    assert sample(prompt="sort 9", fresh="true")[0] == 0
    assert [item.name for item in (tmp_path / "out").iterdir()] == [SAMPLES]


# --- on a terminal


def test_what_a_model_writes_does_not_command_the_terminal(sample, monkeypatch):
    monkeypatch.setattr(chat, "decode", lambda *_: "a\x1b[2J\nb")
    assert sample(prompt="sort 21")[1] == "a\x1b[2J\nb\n"  # to a pipe as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sample(prompt="sort 21")[1] == "a␛[2J\nb\n"


def test_what_a_message_quotes_does_not_command_the_terminal(sample, prompts, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\x1b[2J\u202e\n")
    status, _, said = sample(prompts=str(tmp_path / "prompts.jsonl"))
    assert status == 2 and "␛[2J\ufffd" in said and "\x1b" not in said
