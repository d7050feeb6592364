"""jobs/sft.py with objective edit_flow, from end to end."""

import pytest
from jobs_testing import TINY, history, run, runs, train

from dllm_ray.models.load import load

EDITS = {
    "objective__name": "edit_flow",
    "objective__x0": "[empty, noised, masks, uniform]",
    "objective__x0_length": "8",
    "objective__norm": "token",
    "data__path": "builtin:lengths[train:500]",
    "data__valid_path": "builtin:lengths[test:32]",
    "sampler__max_new_tokens": "8",
    "sampler__steps": "8",
}


def edits(folder, **changes):
    settings = {name.replace(".", "__"): value for name, value in TINY.items() if name != "sampler.block_size"}
    return train(folder, **(settings | EDITS | {"sampler__block_size": "32"} | changes))


@pytest.mark.slow
def test_a_model_that_edits_is_trained_tracked_and_looked_at(tmp_path):
    done = edits(tmp_path / "run", train__strategy="fsdp2", observe__sample_rows="4")
    assert done.returncode == 0, done.stdout + done.stderr
    lm = load(tmp_path / "run" / "final")
    assert lm.spec.edit_heads == {"time": False, "reads": None} and lm.spec.sampler["kappa"] == "cubic"
    losses = history(tmp_path / "run", "train/loss")
    assert sorted(losses) == list(range(1, 31))
    first, last = ([losses[step][0] for step in steps] for steps in (range(1, 6), range(26, 31)))
    assert sum(last) < sum(first)
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "FINISHED" and record.data.metrics["valid/nll"] < 20
    assert "sample    " in done.stdout, "answers to validation questions are shown at the end"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__padding": "eos"}, "data.padding: edit_flow's rows have lengths of their own"),
        ({"data__packing": "true"}, "data.packing: edit_flow's rows change their lengths"),
        ({"objective__weight": "uniform"}, "objective.weight: has no effect on edit_flow"),
        ({"objective__x0": "[full]"}, "objective.x0"),
        ({"lora__rank": "2", "model__path": "MODEL"}, "lora.rank: an adapter needs its base's edit heads"),
    ],
)
def test_what_does_not_go_together_is_said_before_any_work(make_lm, tmp_path, changes, message):
    make_lm("bert").save(tmp_path / "model")
    changes = {name: str(tmp_path / "model") if value == "MODEL" else value for name, value in changes.items()}
    settings = {name: value for name, value in EDITS.items() if name not in changes}
    done = run("sft", output_dir=str(tmp_path / "run"), train__max_length="64", **(settings | changes))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
