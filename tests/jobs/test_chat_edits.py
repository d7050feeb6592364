"""jobs/chat.py and settings that only some models can work with: told before the model is loaded, or answered with."""

import pytest
from jobs_testing import load_job

from dllm_ray.cli import run_job
from dllm_ray.models import edit_heads


@pytest.fixture
def chat_with(monkeypatch, tmp_path, capsys):
    """Saves a model and talks with it; returns status, output and errors."""
    job = load_job("chat")

    def call(lm, *said: str, **settings: str) -> tuple[int, list[str], list[str]]:
        lm.save(tmp_path / "model")
        monkeypatch.setattr(job, "lines", lambda: iter(said))
        words = {"model.path": str(tmp_path / "model"), "sampler.max_new_tokens": "16"} | settings
        status = run_job(
            job.ChatJob, job.main, "", [word for name, text in words.items() for word in (f"--{name}", text)]
        )
        out, err = capsys.readouterr()
        return status, out.splitlines(), [line for line in err.splitlines() if line.startswith("error: ")]

    return call


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler.block_size": "4", "sampler.steps": "2"}, "sampler.steps: 2 steps are fewer than the 4 blocks"),
        ({"sampler.kappa": "cubic"}, "sampler.kappa: 'cubic' is for models with edit heads"),
    ],
)
def test_what_a_masked_model_can_not_do_is_said_before_it_is_loaded(chat_with, make_lm, monkeypatch, settings, message):
    monkeypatch.setattr("dllm_ray.models.load.load", lambda *_: pytest.fail("the model was loaded"))
    status, _, errors = chat_with(make_lm(), "sort 21", **settings)
    assert status == 2 and len(errors) == 1 and message in errors[0]


def test_a_model_that_edits_answers_and_fills_gaps(chat_with, make_lm):
    lm = edit_heads.attach(make_lm(), time=False, seed=1)
    settings = {"sampler.max_new_tokens": "40", "sampler.steps": "1", "sampler.kappa": "cubic", "sampler.seed": "1"}
    status, told, errors = chat_with(lm, "sort 21", "sort [MASK:3] up", "/set cache dual", **settings)
    assert status == 0 and len(told) >= 2
    assert len(errors) == 1 and "'dual' has no meaning for a model that edits" in errors[0]
