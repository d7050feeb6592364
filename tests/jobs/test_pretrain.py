"""jobs/pretrain.py from end to end, and jobs/sft.py with everything that training at scale adds, in one run."""

import json

import pytest
import yaml
from jobs_testing import TINY, history, run, runs, train

pytestmark = pytest.mark.slow


def test_documents_train_a_model_from_files_that_are_read_ahead(tmp_path):
    (tmp_path / "corpus").mkdir()
    documents = [{"text": f"Chapter {number}. " + "One two three four five six. " * 9} for number in range(40)]
    (tmp_path / "corpus" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (tmp_path / "corpus" / "b.txt").write_text("It was a dark and stormy night. " * 200)
    settings = TINY | {"data.path": str(tmp_path / "corpus"), "data.valid_rows": "8", "observe.sample_rows": "1"}
    del settings["data.valid_path"]
    words = {name.replace(".", "__"): value for name, value in settings.items()}
    done = run("pretrain", **words, output_dir=str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sample    'Chapter" in done.stdout or "sample    '" in done.stdout
    losses = history(tmp_path / "run", "train/loss", "pretrain")
    assert losses[30][0] < losses[1][0]
    (found,) = runs(tmp_path / "run", "pretrain")
    assert found.info.status == "FINISHED"
    assert "jobs/pretrain.py" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_a_mixture_is_packed_trained_as_bd3lm_and_looked_at(tmp_path):
    rows = [{"prompt": f"sort {number}", "response": "".join(sorted(str(number)))} for number in range(1000, 1400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data": {
            "sources": [
                {"path": "builtin:digits[train:600]", "name": "digits", "weight": 0.75},
                {"path": str(tmp_path / "rows.jsonl"), "name": "rows", "weight": 0.25, "repeat": 4},
            ],
            "path": None,
            "packing": True,
        },
        "objective": {"name": "bd3lm", "block_size": 8},
        "observe": {"every": 1, "sample_rows": 2, "tasks": ["digits"], "limit": 4},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    few = {"train__max_steps": "20", "train__checkpoint_every": "10", "train__batch_size": "4"}
    done = train(tmp_path / "run", config=str(tmp_path / "job.yaml"), **few, data__path="null")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = runs(tmp_path / "run")
    assert found.data.metrics["data/digits/token_share"] == pytest.approx(0.75, abs=0.03)
    assert found.data.tags["dllm_ray.objective"] == "bd3lm"
    scores = history(tmp_path / "run", "eval/digits/exact_match")
    assert 20 in scores and all(0 <= value <= 1 for seen in scores.values() for value in seen)
    assert f"look      step 20: digits/exact_match {scores[20][0]:.4f}" in done.stdout
