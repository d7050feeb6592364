"""jobs/sweep.py as users run it: what it finds is what jobs/evaluate.py measures, whichever way it came to its end, and
nothing is answered twice; searchers, budgets, and what it says before anything is started."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from jobs_testing import HANGS_S, ROOT, command, complete, environment, load_job, run, runs

from dllm_ray.cli import run_job

SEARCHED, HELD_OUT = 24, 8

# a task with degrees: answers of a model that was hardly trained are all wrong
TASK = {
    "task": "graded",
    "custom_dataset": "!function graded.dataset",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "response",
    "process_results": "!function graded.process_results",
    "generation_kwargs": {"until": [], "do_sample": False},
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("overlap", "wrote")],
    "metadata": {"version": 1.0},
}
TASK_CODE = f"""
import datasets
from dllm_ray.data.builtin import digits

def dataset(**_metadata):
    return {{"test": datasets.Dataset.from_list(list(digits.rows("test", 0, {SEARCHED + HELD_OUT})))}}

def process_results(doc, results):
    answer = results[0][:8]
    return {{"overlap": sum(letter in doc["response"] for letter in answer) / 8, "wrote": float(bool(answer))}}
"""
GRID = {
    "temperature": [0.0, 1.0],
    "eos_penalty": {"choice": [0.0, 4.0], "when": {"temperature": 1.0}},
    "threshold": [None, 0.1],
    "steps": {"choice": [8, 2], "when": {"threshold": None}},
}
IN_GRID = 9
EARLY = 60


def write_settings(path: Path, model: Path, sweep: dict) -> Path:
    """The settings file of a sweep over the graded task."""
    folder = path.parent / "tasks"
    folder.mkdir(exist_ok=True)
    (folder / "graded.yaml").write_text(re.sub("'(!function [a-z_.]+)'", r"\1", yaml.safe_dump(TASK)))
    (folder / "graded.py").write_text(TASK_CODE)
    tree = {
        "model": {"path": str(model)},
        "evaluate": {"tasks": ["graded"], "include_path": str(folder), "batch_size": 8, "workers": 2},
        "sampler": {"max_new_tokens": 8, "block_size": 8, "steps": 8},
        "sweep": {"documents": SEARCHED, "holdout": HELD_OUT} | sweep,
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))  # the order of fields is that of names
    return path


def words(settings: Path, folder: Path) -> dict[str, str]:
    """The command line: everything into one folder."""
    return {"config": str(settings), "output_dir": str(folder), "tracking.uri": f"sqlite:///{folder}/mlruns.db"}


def swept(settings: Path, folder: Path, **more: str) -> tuple[dict, str]:
    """Runs a sweep to its end; returns its `sweep.json` and its output."""
    options = {name.replace(".", "__"): value for name, value in words(settings, folder).items()}
    done = run("sweep", **options, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return json.loads((folder / "sweep.json").read_text()), done.stdout


def kill_after(settings: Path, folder: Path, trials: int) -> int:
    """Runs a sweep and kills it after so many trials; returns how many were over."""
    folder.mkdir()
    log = folder / "log"
    with log.open("w") as file:
        driver = subprocess.Popen(
            command("sweep", words(settings, folder)), cwd=ROOT, env=environment(), stdout=file, stderr=file
        )
    began = time.monotonic()
    while (over := log.read_text().count("\nsetting ")) < trials:
        if driver.poll() is not None or time.monotonic() - began > HANGS_S:
            driver.kill()
            pytest.fail(log.read_text())
        time.sleep(0.005)
    below = [child for child in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in child.name()]
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(below, timeout=60)  # who could answer goes with the driver
    assert not alive
    assert not (folder / "sweep.json").exists()
    return over


def answers(folder: Path) -> list[tuple[str, str]]:
    """The key of every answer on disk: settings, and request."""
    return [
        (file.parent.name, json.loads(line)["request"])
        for file in (folder / "answers").rglob("*.jsonl")
        for line in file.read_text().splitlines()[1:]
    ]


def asked_once(folder: Path) -> set[tuple[str, str]]:
    """The keys of the answers on disk, none of which is there twice."""
    found = answers(folder)
    assert len(found) == len(set(found)) > 0
    return set(found)


def timeless(found: dict) -> dict:
    """What a sweep has found, without what depends on the clock."""
    settings = [
        {name: value for name, value in one.items() if name != "tokens_per_s"}
        for one in sorted(found["settings"], key=lambda one: one["name"])
    ]
    kept = ("subject", "official", "best", "tied", "recommended", "importance", "aup", "held_out")
    return {name: found[name] for name in kept} | {"settings": settings, "front": found["fronts"]["tpf"]}


def evaluated(configs: list[Path], folder: Path, settings: dict[str, str]) -> None:
    """Runs jobs/evaluate.py to its end."""
    settings = settings | {"output_dir": str(folder), "tracking.uri": f"sqlite:///{folder}/mlruns.db"}
    done = complete([*command("evaluate", settings), *(word for path in configs for word in ("--config", str(path)))])
    assert done.returncode == 0, done.stdout + done.stderr


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def recorded(folder: Path) -> tuple[list, dict]:
    """The runs of sweeps, and setting -> the finished run below the latest of them."""
    parents = runs(folder, "sweep")
    wanted = (parents[-1].info.run_id, "FINISHED")
    below = [
        one for one in runs(folder, "sweep-setting") if (one.data.tags["mlflow.parentRunId"], one.info.status) == wanted
    ]
    named = {one.info.run_name: one for one in below}
    assert len(named) == len(below)
    return parents, named


@pytest.fixture(scope="module")
def settings(trained, tmp_path_factory) -> Callable[..., Path]:
    """Writes a settings file: `settings("grid", space=GRID)`."""
    folder = tmp_path_factory.mktemp("sweeps")
    return lambda name, **sweep: write_settings(folder / f"{name}.yaml", trained[0] / "final", sweep)


@pytest.fixture(scope="module")
def early(settings, tmp_path_factory) -> tuple[Path, dict, str, set]:
    """A sweep over the grid that a small budget ended: its folder, `sweep.json`, output and answers."""
    folder = tmp_path_factory.mktemp("grid")
    found, output = swept(settings("grid", space=GRID), folder, sweep__max_documents=str(EARLY))
    return folder, found, output, asked_once(folder)


@pytest.fixture(scope="module")
def grid(settings, early) -> tuple[Path, dict, str]:
    """The same sweep, brought to its end with a larger budget: its folder, `sweep.json` and output."""
    folder, *_ = early
    return folder, *swept(settings("grid", space=GRID), folder, sweep__max_documents="100000")


@pytest.fixture(scope="module")
def both(settings) -> Path:
    """The settings of the sweeps that jobs/evaluate.py has too."""
    path = settings("both")
    tree = yaml.safe_load(path.read_text())
    del tree["sweep"]
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
class TestGrid:
    def test_a_budget_ends_it_early_and_a_larger_one_goes_on(self, early, grid):
        folder, found, output, asked = early
        assert "out of budget" in output and "out of budget" not in grid[2]
        assert 1 < len(found["settings"]) < IN_GRID == len(grid[1]["settings"])
        assert len(asked) >= EARLY and asked < asked_once(folder)
        more = int(re.search(r"(\d+) documents answered", grid[2])[1])
        assert 0 < more <= len(asked_once(folder) - asked)  # held-out ones come on top

    def test_scores_are_those_of_evaluate_to_the_last_bit(self, grid, both, tmp_path):
        _, found, _ = grid
        assert len(found["settings"]) == IN_GRID
        assert len({one["score"]["mean"] for one in found["settings"]}) > IN_GRID // 2, "the settings are alike"
        variants = json.dumps([one["changes"] for one in found["settings"]])
        evaluated([both], tmp_path, {"evaluate.limit": str(SEARCHED), "evaluate.variants": variants})
        for one in found["settings"]:
            name = ",".join(f"{name}={value}" for name, value in one["changes"].items())
            alone = results(tmp_path / name)
            assert one["score"]["mean"] == alone["results"]["graded"]["overlap,none"]
            assert one["tpf"] == alone["sampler"]["tpf"]
            prompts = alone["sampler"]["asked"] + alone["sampler"]["from_disk"]  # equal ones count once
            assert one["nfe"] == alone["sampler"]["nfe"] / prompts
            assert (one["documents"], one["complete"]) == (SEARCHED, True)

    def test_evaluate_takes_the_recommended_settings_and_reads_the_answers_from_disk(self, grid, both, tmp_path):
        folder, found, _ = grid
        recommended = next(one for one in found["settings"] if one["name"] == found["recommended"])
        shared = {"evaluate.limit": str(SEARCHED), "evaluate.cache": str(folder / "answers")}
        evaluated([both, folder / "configs" / "sampler.yaml"], tmp_path, shared)
        alone = results(tmp_path)
        assert alone["sampler"]["settings"] == recommended["sampler"]
        assert alone["results"]["graded"]["overlap,none"] == recommended["score"]["mean"]
        assert alone["sampler"]["asked"] == 0 < alone["sampler"]["from_disk"]

    def test_no_setting_beats_one_of_the_front(self, grid):
        _, found, _ = grid
        settings = {one["name"]: (one["score"]["mean"], one) for one in found["settings"]}
        for axis, front in found["fronts"].items():
            ahead = {name: (score, one[axis]) for name, (score, one) in settings.items()}
            for name, (score, speed) in ahead.items():
                beaten = any(
                    other[0] >= score and other[1] >= speed and other != (score, speed) for other in ahead.values()
                )
                assert (name in front) != beaten
        best = settings[found["best"]]
        recommended = settings[found["recommended"]]
        assert best[0] == max(score for score, _ in settings.values())
        assert recommended[0] >= best[0] - 0.02 - 1e-9 and recommended[1]["tpf"] >= best[1]["tpf"]
        assert settings[found["official"]][1]["changes"] == {"temperature": 0.0, "threshold": None, "steps": 8}
        confirmed = {one["setting"] for one in found["held_out"]}
        assert {found["best"], found["recommended"], found["official"]} <= confirmed
        assert all(one["documents"] == HELD_OUT for one in found["held_out"])

    def test_files_are_there(self, grid):
        folder, found, output = grid
        assert (folder / "front.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        page = (folder / "front.html").read_text()
        assert page.lower().startswith("<!doctype html>")
        assert all(one["name"] in page for one in found["settings"])
        assert found["recommended"] in output
        assert f"{IN_GRID} settings ({IN_GRID} different) in" in output
        assert len(list((folder / "configs").glob("front-*.yaml"))) == len(found["fronts"]["tpf"])

    def test_mlflow_holds_a_run_with_a_child_for_each_setting(self, grid):
        folder, found, _ = grid
        parents, children = recorded(folder)
        assert {one.info.status for one in parents} == {"FINISHED"}
        parent = parents[-1]
        assert parent.data.metrics["trials"] == IN_GRID
        assert parent.data.tags["dllm_ray.sweep.recommended"] == found["recommended"]
        assert parent.data.params["sweep.documents"] == str(SEARCHED)
        assert children.keys() == {one["name"] for one in found["settings"]}
        for one in found["settings"]:
            child = children[one["name"]].data
            assert child.metrics["score"] == one["score"]["mean"]
            assert child.metrics["tpf"] == one["tpf"]
            assert child.metrics["documents"] == SEARCHED
            for name, value in one["sampler"].items():
                assert child.params[f"sampler.{name}"] == str(value)

    def test_after_a_kill_it_goes_on_and_finds_the_same(self, settings, grid, tmp_path):
        folder = tmp_path / "killed"
        assert kill_after(settings("grid", space=GRID), folder, 3) < IN_GRID
        before, (_, kept) = set(answers(folder)), recorded(folder)
        assert 2 <= len(kept) < IN_GRID
        found, _ = swept(settings("grid", space=GRID), folder)
        assert timeless(found) == timeless(grid[1])
        asked = asked_once(folder)
        assert before < asked == set(answers(grid[0]))
        (parent,), children = recorded(folder)
        assert children.keys() == {one["name"] for one in found["settings"]}
        assert all(children[name].info.run_id == child.info.run_id for name, child in kept.items())
        assert parent.info.status == "FINISHED" and "dllm_ray.failure" not in parent.data.tags


@pytest.mark.slow
def test_tpe_with_asha_drops_settings_also_after_a_kill(settings, tmp_path):
    place = settings(
        "asha",
        searcher="tpe",
        samples=8,
        asha=True,
        objectives=["score"],
        first_documents=6,
        reduction=2,
        holdout=0,
        space={"temperature": {"uniform": [0.0, 1.0]}, "eos_penalty": {"uniform": [0.0, 4.0]}},
    )
    folder = tmp_path / "asha"
    kill_after(place, folder, 2)
    found, output = swept(place, folder)
    assert len(asked_once(folder)) < (8 + 1) * SEARCHED
    tried = {one["name"]: one for one in found["settings"]}
    assert len(tried) == 8 + 1 and tried[found["official"]]["complete"] and found["held_out"] == []
    assert {one["documents"] for one in tried.values()} <= {6, 12, SEARCHED}
    assert all(one["complete"] == (one["documents"] == SEARCHED) for one in tried.values())
    dropped = [one["name"] for one in tried.values() if not one["complete"]]
    assert dropped and tried[found["best"]]["complete"] and "dropped" in output
    *_, first = json.loads((folder / "rungs.json").read_text())["rungs"]
    assert len(first) == 8, "each setting stands once on the first rung"
    (_,), children = recorded(folder)
    assert children.keys() == tried.keys() - {"official"}
    assert {children[name].data.tags["dllm_ray.sweep.ended"] for name in dropped} == {"dropped"}


@pytest.mark.slow
def test_nsga2_goes_on_past_combinations_that_can_not_be(settings, tmp_path):
    space = {"temperature": {"uniform": [0.0, 1.0]}, "block_size": [8, 2], "steps": [8, 2]}  # 4 blocks in 2 steps
    place = settings("nsga2", searcher="nsga2", samples=8, documents=8, holdout=0, space=space)
    found, output = swept(place, tmp_path)
    impossible = sum(line.startswith("setting ") and "can't be" in line for line in output.splitlines())
    tried = {one["name"]: one for one in found["settings"] if one["name"] != "official"}
    assert impossible > 0 and len(tried) + impossible == 8
    assert len({one["changes"]["temperature"] for one in tried.values()}) > 4
    assert len(asked_once(tmp_path)) <= 8 * (len(tried) + 1)


def test_a_dry_run_tells_the_plan_and_starts_nothing(make_lm, tmp_path, capsys, monkeypatch):
    def no_ray(*_args, **_kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", no_ray)
    make_lm().save(tmp_path / "model")
    place = write_settings(tmp_path / "grid.yaml", tmp_path / "model", {"space": GRID})
    job = load_job("sweep")
    argv = ["--config", str(place), "--output_dir", str(tmp_path / "out"), "--dry-run"]
    assert run_job(job.SweepJob, job.main, "", argv) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{IN_GRID}, by grid" in told and f"{IN_GRID * SEARCHED} and 6 x {HELD_OUT} held out" in told
    assert "temperature=1,eos_penalty=4,threshold=null,steps=2" in told
    assert not (tmp_path / "out").exists()
