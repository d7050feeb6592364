"""Runs the stages of a pipeline, each from where it was broken off.

Every stage may be killed at any point and done again: training goes on from its checkpoint, evaluation reads what was
answered from disk, a model that is registered already is found by its digest, and a server is updated to what it may
serve already. The pipeline's MLflow run has theirs below it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dllm_ray import tracking
from dllm_ray.config import flatten, to_dict, without_secrets
from dllm_ray.errors import EvaluationError, ModelError, NotPromoted
from dllm_ray.evaluation import compare_job
from dllm_ray.evaluation import job as evaluation
from dllm_ray.evaluation.report import metric_key
from dllm_ray.evaluation.run import metrics
from dllm_ray.models.provenance import PROVENANCE, read_provenance
from dllm_ray.output import new_directory, writable_folder
from dllm_ray.pipeline import rules
from dllm_ray.pipeline.config import PipelineJob
from dllm_ray.pipeline.plan import Plan
from dllm_ray.pipeline.state import STAGES, State
from dllm_ray.training.run import run as train

_DIGEST = "dllm_ray.digest"  # tag of a version: of what the model is
_PIPELINE = "dllm_ray.pipeline"  # tag of a version: the pipeline's run that made it
_SCORES = "scores.json"  # artifact of a pipeline's run: what its model was asked, and its scores
_NOT_THE_MODEL = {PROVENANCE, "README.md", "config.yaml"}  # files of a model that tell of its training
_ELSEWHERE = ("fresh", "output_dir", "tracking.")  # settings of training that the pipeline sets


def run(job: PipelineJob, repository: Path) -> None:
    """Runs what is left to do.

    Args:
        job: the settings.
        repository: folder with the `configs/` that settings may name, and the official settings among them.

    Raises:
        NotPromoted: the scores don't meet the rules.
        DllmRayError: bad input, before anything expensive starts; or a stage failed.
    """
    folder = Path(job.output_dir).expanduser().resolve()
    plan = Plan(job, folder, repository)
    if job.fresh or not plan.model.is_dir():  # training is still to come
        _check(plan)
    with State(writable_folder(folder), job.fresh) as state:
        label = replace(plan.tracking, run_name=plan.tracking.run_name or f"pipeline {folder.name}")
        tags = {"dllm_ray.pipeline.registered_model": job.promote.name}
        with tracking.start("pipeline", to_dict(job), folder, label, tags, resume=state.run_id) as record:
            state.run_id = record.run_id
            kept = Pipeline(plan, state, record).run()
        print(f"tracking  run {record.run_id}: {tracking.ui_command(record.uri)}")
    if kept is not None:
        raise NotPromoted(kept)


def _check(plan: Plan) -> None:
    """Tasks, and the scores that rules speak of."""
    from dllm_ray.evaluation.run import look_up, metric_names

    asked = plan.evaluation().asks()
    evaluation.check(asked)
    if plan.rules:
        measured = {}
        for ask in asked:
            found = {one.name: metric_names(one) for one in look_up(ask.evaluate)}
            # of a group's own scores it is only known that they are some of its members'
            groups = {task: [name for names in found.values() for name in names] for task in ask.evaluate.tasks}
            measured[ask.name] = groups | found
        rules.check(plan.rules, measured)


class Pipeline:
    """The stages of a run.

    Args:
        plan: what they are.
        state: how far they are.
        record: the pipeline's MLflow run.
    """

    def __init__(self, plan: Plan, state: State, record: tracking.Run):
        self._plan = plan
        self._state = state
        self._record = record
        self._job = plan.job
        self._uri = plan.tracking.uri

    def run(self) -> str | None:
        """Does what is left; returns why the model wasn't promoted."""
        self._train()
        digest = _digest(self._plan.model)
        evaluated = self._evaluate(digest)
        compared = self._compare(evaluated)
        registered = self._register(digest, evaluated, compared)
        self._deploy(registered)
        self._record.tag({"dllm_ray.pipeline.version": registered["version"]})
        if registered["promoted"]:
            return None
        failed = [verdict["rule"] for verdict in compared["verdicts"] if not verdict["holds"]]
        champion = evaluated["champion"]
        stays = f"; {self._job.promote.alias} stays {champion['version']}" if champion else ""
        return f"{registered['version']} is registered and not promoted: {', '.join(failed)} doesn't hold{stays}"

    # --- stages

    def _train(self) -> dict[str, Any]:
        settings = {
            key: value
            for key, value in flatten(without_secrets(to_dict(self._plan.training))).items()
            if not key.startswith(_ELSEWHERE)
        }

        def work() -> dict[str, Any]:
            train(self._plan.training, self._job.train.job, self._record.run_id)
            return {"model": str(self._plan.model), "run_id": read_provenance(str(self._plan.model)).get("run_id")}

        if self._state.outcome("train") and self._plan.model.is_dir() and self._state.changes("train", settings):
            # refuses what would make another model
            train(self._plan.training, self._job.train.job, self._record.run_id)
            return self._state.outcome("train")
        is_there = self._plan.model.is_dir()
        return self._stage("train", settings, work, lambda outcome: outcome["model"], is_there)

    def _evaluate(self, digest: str) -> dict[str, Any]:
        job = self._plan.evaluation()
        asked = {
            "seed": job.seed,
            **{f"model.{name}": getattr(job.model, name) for name in ("adapter", "dtype", "quantization")},
            **{f"{ask.name or 'main'}: {key}": value for ask in job.asks() for key, value in _flat(ask).items()},
        }
        champion = self._champion(digest)
        settings = {**asked, "champion": champion and str(champion)}

        def work() -> dict[str, Any]:
            run_id, scores = self._ask(job, "evaluate", str(self._plan.model))
            self._record.json(_SCORES, {"asked": _plain(asked), "run_id": run_id, "scores": scores})
            self._record.log(_points(scores))
            return {"run_id": run_id, "scores": scores, "champion": self._champions_scores(champion, asked, job)}

        return self._stage("evaluate", settings, work, lambda outcome: _told(outcome["scores"]))

    def _compare(self, evaluated: Mapping[str, Any]) -> dict[str, Any]:
        champion = evaluated["champion"]
        runs = [evaluated["run_id"], *([champion["run_id"]] if champion else [])]
        settings = {
            "rules": [rule.text for rule in self._plan.rules],
            "runs": list(dict.fromkeys(runs)),
            "published": self._job.published,
        }

        def work() -> dict[str, Any]:
            verdicts = [
                asdict(rule.judge(evaluated["scores"], champion and champion["scores"])) for rule in self._plan.rules
            ]
            job = compare_job.CompareJob(
                output_dir=str(self._plan.folder / "compare"),
                run_ids=",".join(settings["runs"]),
                published=self._job.published,
                all=True,
                tracking=self._plan.label("compare"),
            )
            run_id, files = compare_job.run(job, self._plan.repository / "configs" / "evaluate", self._record.run_id)
            for file in files:
                self._record.file(file)
            holds = all(verdict["holds"] for verdict in verdicts)
            self._record.json("verdicts.json", verdicts)
            self._record.tag({"dllm_ray.pipeline.rules": "hold" if holds else "fail"})
            for verdict in verdicts:
                print(f"rule      {rules.Verdict(**verdict)}")
            return {"run_id": run_id, "verdicts": verdicts, "holds": holds}

        def told(outcome: Mapping[str, Any]) -> str:
            holding = sum(verdict["holds"] for verdict in outcome["verdicts"])
            return f"{holding} of {len(outcome['verdicts'])} rules hold" if outcome["verdicts"] else "no rules"

        return self._stage("compare", settings, work, told)

    def _register(self, digest: str, evaluated: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, Any]:
        name, alias = self._job.promote.name, self._job.promote.alias
        settings = {"name": name, "alias": alias, "promote": compared["holds"], "digest": digest}

        def work() -> dict[str, Any]:
            tags = {_DIGEST: digest}
            version = tracking.tagged_version(name, self._uri, tags)
            if version is None:
                scores = {name: str(value) for name, value in _points(evaluated["scores"]).items()}
                trained = read_provenance(str(self._plan.model))["run_id"]
                source = tracking.open_run(self._plan.tracking, trained).folder(self._plan.model, "model")
                tags |= {_PIPELINE: self._record.run_id, **scores}
                version = tracking.register(name, source, trained, tags, self._uri)
            if compared["holds"]:
                self._require_champion(version, evaluated["champion"])
                tracking.set_alias(version, alias, self._uri)
            return {"version": str(version), "promoted": compared["holds"]}

        def told(outcome: Mapping[str, Any]) -> str:
            return f"{outcome['version']}, " + (f"now {alias}" if outcome["promoted"] else "not promoted")

        return self._stage("register", settings, work, told)

    def _deploy(self, registered: Mapping[str, Any]) -> None:
        if not registered["promoted"] or not self._job.deploy:
            self._say("deploy", "left out: " + ("deploy is off" if registered["promoted"] else "rules don't hold"))
            return
        if not os.environ.get("RAY_ADDRESS"):
            self._say("deploy", f"left to you, without a cluster (RAY_ADDRESS): {self._plan.serve_command()}")
            return
        from dllm_ray.pipeline import deploy

        version, serving = registered["version"], self._plan.serving
        settings = {"version": version, **flatten(without_secrets(to_dict(serving)))}
        holder = tracking.find_version(self._job.promote.model, self._uri)
        if str(holder) != version:
            self._say("deploy", f"left out: {self._job.promote.model} is {holder} by now")
            return

        def work() -> dict[str, Any]:
            address = deploy.deploy(serving, version)
            self._record.tag({"dllm_ray.pipeline.address": address})
            return {"address": address}

        before = self._state.outcome("deploy")
        is_up = before is not None and deploy.serves(before["address"], version)
        self._stage("deploy", settings, work, lambda outcome: f"{version} at {outcome['address']}", is_up)

    # --- what stages need

    def _stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        work: Callable[[], dict[str, Any]],
        told: Callable[[Mapping[str, Any]], str],
        is_there: bool = True,
    ) -> dict[str, Any]:
        """Does a stage, unless it was done with the same settings and what it made is there."""
        changed = self._state.changes(name, settings)
        before = self._state.outcome(name)
        if before is not None and not changed and is_there:
            self._say(name, f"done before: {told(before)}")
            return before
        if before is not None:
            self._say(name, "again: " + ("; ".join(changed) or "what it made is gone"))
        else:
            self._say(name, "goes on" if self._state.settings(name) is not None and not changed else "begins")
        self._state.begin(name, settings)
        if name != "train":  # whose run goes on
            self._record.prune(self._runs())
        began = time.monotonic()
        outcome = work()
        self._state.finish(name, outcome)
        self._say(name, f"done in {time.monotonic() - began:.0f} s: {told(outcome)}")
        return outcome

    def _runs(self) -> set[str]:
        """MLflow runs of the stages that are done. Others were broken off by a kill, or are of a stage done again."""
        outcomes = [self._state.outcome(name) or {} for name in STAGES]
        return {
            run for one in outcomes for run in (one.get("run_id"), (one.get("champion") or {}).get("run_id")) if run
        }

    def _say(self, stage: str, text: str) -> None:
        print(f"stage     {STAGES.index(stage) + 1}/{len(STAGES)} {stage}: {text}", flush=True)

    def _ask(self, job: evaluation.EvaluateJob, label: str, called: str) -> tuple[str, dict[str, Any]]:
        """Evaluates; returns the MLflow run and the scores, by setting."""
        from dllm_ray.workers import connected_pool

        job = replace(job, tracking=self._plan.label(label))
        run_id, told = evaluation.run(
            job,
            evaluation.prepare(job),
            lambda name: connected_pool("evaluate", name, job.model, job.evaluate),
            self._record.run_id,
            called,
        )
        return run_id, {one.ask.name: metrics(one.results) for one in told}

    def _champion(self, digest: str) -> tracking.Version | None:
        """The version that this model is compared with, where a rule asks for one."""
        if not any(rule.is_relative for rule in self._plan.rules):
            return None
        held = tracking.find_version(self._job.promote.model, self._uri)
        is_ours = held is not None and held.tags.get(_DIGEST) == digest
        was_promoted = (self._state.outcome("register") or {}).get("promoted")
        before = self._state.settings("evaluate")
        if before is not None and (is_ours or was_promoted):  # this model has replaced what it was compared with
            return before["champion"] and tracking.find_version(before["champion"], self._uri)
        return held

    def _require_champion(self, version: tracking.Version, champion: Mapping[str, Any] | None) -> None:
        """Makes sure that the alias is still with the version that the model was compared with."""
        if not any(rule.is_relative for rule in self._plan.rules):
            return
        held = tracking.find_version(self._job.promote.model, self._uri)
        if held is not None and str(held) not in (str(version), champion and champion["version"]):
            raise EvaluationError(
                f"{self._job.promote.model} is {held} by now, which the model was not compared with: the same command "
                "does that"
            )

    def _champions_scores(
        self, champion: tracking.Version | None, asked: Mapping[str, Any], job: evaluation.EvaluateJob
    ) -> dict[str, Any] | None:
        """Scores of the champion under the same settings: on record, or asked for now."""
        if champion is None:
            return None
        maker = champion.tags.get(_PIPELINE)
        maker = maker and tracking.find_run(self._plan.tracking, maker)
        recorded = json.loads((maker and maker.artifact(_SCORES)) or "{}")
        if recorded.get("asked") == _plain(asked) and tracking.find_run(self._plan.tracking, recorded["run_id"]):
            print(f"champion  {champion} was asked the same before, in run {recorded['run_id']}")
            return {"version": str(champion), "run_id": recorded["run_id"], "scores": recorded["scores"]}
        print(f"champion  {champion} is asked the same")
        folder = self._plan.folder / "champion" / f"{champion.name}-{champion.number}"
        if not folder.is_dir():  # of its own: other machines' workers load it
            fetched = tracking.fetch_model(str(champion), self._uri)
            with new_directory(folder, overwrite=False) as temporary:
                shutil.copytree(fetched, temporary, dirs_exist_ok=True)
        there = replace(
            job,
            model=replace(job.model, path=str(folder)),
            output_dir=str(self._plan.folder / "champion" / "evaluate"),
        )
        run_id, scores = self._ask(there, "evaluate champion", str(champion))
        return {"version": str(champion), "run_id": run_id, "scores": scores}


def _flat(ask) -> dict[str, Any]:
    """What an ask's answers depend on, and nothing that only steers how fast they come."""
    return {key: value for key, value in flatten(ask.settings()).items() if key != "name"}


def _points(scores: rules.Scores) -> dict[str, float]:
    """The scores by names for MLflow: `eval/TASK/METRIC`, and of variants and lines `eval/SETTING/TASK/METRIC`."""
    return {
        metric_key("/".join(filter(None, ("eval", setting, task, metric)))): value
        for setting, tasks in scores.items()
        for task, values in tasks.items()
        for metric, value in values.items()
    }


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(tree))


def _told(scores: rules.Scores) -> str:
    main = next(iter(scores.values()), {})
    return ", ".join(f"{task}/{name} {value:.4g}" for task, values in main.items() for name, value in values.items())


def _digest(model: Path) -> str:
    """Of a model's files, without those that tell of its training."""
    if not model.is_dir():
        raise ModelError(f"{model} is gone")
    digest = hashlib.sha256()
    for file in sorted(model.rglob("*")):
        if file.is_file() and file.name not in _NOT_THE_MODEL:
            with file.open("rb") as content:
                digest.update(
                    f"{file.relative_to(model)}\n{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
                )
    return digest.hexdigest()
