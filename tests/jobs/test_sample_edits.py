"""jobs/sample.py --edit: drafts are revised, alone and by workers; what can't be is said before the work."""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from jobs_testing import load_job, run

from dllm_ray import chat
from dllm_ray.cli import run_job
from dllm_ray.models import edit_heads
from dllm_ray.models.load import load
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling.sampler import row_seeds

SAMPLER = SamplerConfig(max_new_tokens=12, steps=6, temperature=1.0, seed=3)
SETTINGS = {
    "sampler.max_new_tokens": "12",
    "sampler.steps": "6",
    "sampler.temperature": "1.0",
    "sampler.seed": "3",
}


@pytest.fixture(scope="module")
def model(make_lm, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("edits")
    edit_heads.attach(make_lm(), time=False, seed=1).save(folder)
    return str(folder)


@pytest.fixture
def sample(model, monkeypatch, tmp_path, capsys):
    """Runs the job in this process; returns its status, output and errors."""
    job = load_job("sample")

    @contextmanager
    def untracked(*_args, **_kwargs):
        yield SimpleNamespace(run_id="a", uri="", log=lambda _: None, file=lambda _: None)

    monkeypatch.setattr(job, "_tracked", untracked)
    monkeypatch.setitem(sys.modules, "ray", None)  # a single prompt needs none

    def call(**settings: str) -> tuple[int, str, str]:
        words = {"model.path": model, "output_dir": str(tmp_path / "out")} | SETTINGS | settings
        argv = [word for name, value in words.items() for word in (f"--{name.replace('__', '.')}", value)]
        capsys.readouterr()
        return run_job(job.SampleJob, job.main, "", argv), *capsys.readouterr()

    return call


def revised(model: str, rows: list[dict[str, str]], config: SamplerConfig = SAMPLER) -> list[str]:
    """What the sampler by itself makes of drafts."""
    lm = load(model)
    prompts = [chat.encode_prompt(lm.tokenizer, row["prompt"]) for row in rows]
    drafts = [chat.encode_plain(lm.tokenizer, row["draft"]) for row in rows]
    output = Sampler(lm, config).edit(prompts, drafts, seeds=row_seeds(config.seed, range(len(rows))))
    return [chat.decode(lm.tokenizer, completion, lm.spec.eot_text) for completion in output.completions]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("edit_prompt", [False, True])
def test_the_draft_of_a_single_prompt_is_revised(sample, model, tmp_path, edit_prompt):
    row = {"prompt": "sort 321", "draft": "1 3"}
    more = {"sampler.edit_prompt": str(edit_prompt).lower()}
    status, told, said = sample(**row, edit="true", **more)
    assert status == 0, said
    [found] = read_lines(tmp_path / "out" / "samples.jsonl")
    [expected] = revised(model, [row], SamplerConfig(**vars(SAMPLER) | {"edit_prompt": edit_prompt}))
    assert found["completion"] == expected and found["draft"] == "1 3"
    assert found["messages"] == [{"role": "user", "content": "sort 321"}]
    assert told.endswith(expected + "\n")


def test_gaps_are_filled_with_as_many_tokens_as_the_model_wants(sample, model, tmp_path):
    status, _, said = sample(prompt="sort [MASK:6] is [MASK]", infill="true")
    assert status == 0, said
    [found] = read_lines(tmp_path / "out" / "samples.jsonl")
    assert found["completion"].startswith("sort ") and " is " in found["completion"]
    assert found["completion_tokens"] <= 7


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "a", "edit": "true"}, "draft: give the draft that is to be revised with --draft"),
        ({"prompt": "a", "draft": "b"}, "draft: is there to be revised: say --edit"),
        ({"prompt": "a", "draft": "b", "edit": "true", "infill": "true"}, "edit: a draft is revised or gaps are"),
        ({"prompts": "x.jsonl", "draft": "b", "edit": "true"}, "draft: is for a single --prompt"),
        ({"prompt": "a", "draft": "1" * 99, "edit": "true"}, "prompt 1 has 4 tokens and its draft 99: they don't fit"),
        ({"prompt": "a", "sampler.cache": "dual"}, "sampler.cache: 'dual' has no meaning for a model that edits"),
    ],
)
def test_what_can_not_be_revised_is_said_before_the_work(sample, tmp_path, settings, said):
    status, _, message = sample(**settings)
    assert status == 2 and message.startswith(f"error: {said}") and message.count("\n") == 1
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_a_source_without_drafts_and_a_model_without_edit_heads(sample, make_lm, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "draft": "1"}\n{"prompt": "b"}\n')
    status, _, message = sample(prompts=str(tmp_path / "prompts.jsonl"), edit="true")
    assert status == 2 and "prompts.jsonl, line 2: no draft, which is to be revised" in message
    make_lm().save(tmp_path / "masked")
    status, _, message = sample(model__path=str(tmp_path / "masked"), prompt="a", draft="1", edit="true")
    assert status == 2 and message.startswith("error: edit: the model has no edit heads")


@pytest.mark.slow
def test_workers_revise_the_drafts_of_a_source_and_a_second_call_finds_them(model, tmp_path):
    rows = [{"prompt": f"sort {'4321'[: 1 + number % 4]}", "guess": "12" * (number % 3)} for number in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.path": model,
        "output_dir": str(tmp_path / "out"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "columns": "{draft: guess}",
        "edit": "true",
        "workers": "1",
        "batch_size": "2",
    } | SETTINGS
    settings = {name.replace(".", "__"): value for name, value in settings.items()}
    done = run("sample", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_lines(tmp_path / "out" / "samples.jsonl")
    assert [row["guess"] for row in found] == [row["guess"] for row in rows]
    assert [row["completion"] for row in found] == revised(
        model, [{"prompt": row["prompt"], "draft": row["guess"]} for row in rows]
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({**row, "guess": "9"}) + "\n" for row in rows))
    other = run("sample", **settings)
    assert other.returncode == 2 and "drafts was " in other.stderr
