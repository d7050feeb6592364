"""Ray Tune over sampler settings: which setting is tried next, which is dropped, and going on after a kill."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_ray.config import to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.cache import digest
from dllm_ray.tuning.config import SweepConfig
from dllm_ray.tuning.space import Candidate, Space

_NAME = "tune"  # Ray Tune's own folder in the output folder
_LONGEST = 120  # characters of a setting's folder
_MODES = {"score": "max", "tpf": "max", "tokens_per_s": "max", "nfe": "min"}


@dataclass(frozen=True)
class Told:
    """What a trial has told."""

    name: str
    """Of the setting."""
    changes: Mapping[str, Any]
    sampler: Mapping[str, Any]
    folder: Path
    """Of its results."""
    result: Mapping[str, Any]
    """As of `SettingTrial.step`; empty after an error."""
    over: bool
    """Whether it was the trial's last word."""
    error: str | None = None
    """Why it failed."""
    impossible: str = ""
    """Why the setting can't be, if it can't."""


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        config: of the sweep.
        space: of settings.
        candidates: settings that are tried; None: the searcher draws them.
        documents: of each task, in the search.
        seed: of the searcher.
        folder: of the sweep.
        concurrent: settings asked at the same time.
    """

    config: SweepConfig
    space: Space
    candidates: Sequence[Candidate] | None
    documents: int
    seed: int
    folder: Path
    concurrent: int

    @property
    def trials(self) -> int:
        """Settings that are tried."""
        return self.config.samples if self.candidates is None else len(self.candidates)

    def run(self, listen: Callable[[Told], None], go_on: bool) -> list[Told]:
        """Tries settings until all are answered, dropped or out of budget.

        Args:
            listen: is told of each result.
            go_on: go on with the trials of a run that was broken off; else they are begun anew.

        Returns:
            The last word of every trial, those of the run that was broken off included.
        """
        # Ctrl-C ends the job; Tune would finish its own affairs and return as if all were done
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        from ray import tune

        from dllm_ray.tuning import relay
        from dllm_ray.tuning.trial import SettingTrial

        for name in ("ray.tune", "ray.air", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        trainable = tune.with_resources(SettingTrial, tune.PlacementGroupFactory([self._resources()]))
        place = self.folder / _NAME
        with relay.to(lambda trial, result, over, error: listen(self._told(trial.config, result, over, error))):
            if go_on and tune.Tuner.can_restore(str(place)):
                tuner = tune.Tuner.restore(
                    str(place), trainable, resume_unfinished=True, restart_errored=True, param_space=self._param_space()
                )
            else:
                shutil.rmtree(place, ignore_errors=True)
                tuner = tune.Tuner(
                    trainable,
                    param_space=self._param_space(),
                    tune_config=tune.TuneConfig(
                        search_alg=self._searcher(),
                        scheduler=self._scheduler(),
                        num_samples=1 if self.candidates is not None else self.config.samples,
                        max_concurrent_trials=self.concurrent,
                        reuse_actors=True,
                    ),
                    run_config=tune.RunConfig(
                        name=_NAME, storage_path=str(self.folder), callbacks=[relay.Relay()], verbose=0
                    ),
                )
            grid = tuner.fit()
        return [
            self._told(one.config, one.metrics or {}, True, None if one.error is None else relay.reason(one.error))
            for one in grid
        ]

    def _told(self, config: Mapping[str, Any], result: Mapping[str, Any], over: bool, error: str | None) -> Told:
        setting = config["setting"]
        return Told(
            setting["name"],
            setting.get("changes", {}),
            setting.get("sampler", {}),
            setting_folder(self.folder / "settings", setting["name"]),
            result,
            over,
            error,
            setting.get("impossible", ""),
        )

    def _param_space(self) -> dict[str, Any]:
        if self.candidates is None:
            return {}
        from ray import tune

        return {"setting": tune.grid_search([self._setting(candidate) for candidate in self.candidates])}

    def _setting(self, candidate: Candidate) -> dict[str, Any]:
        from dllm_ray.tuning.halving import rungs

        config = self.config
        return {
            "name": candidate.name,
            "changes": candidate.changes,
            "sampler": to_dict(candidate.sampler),
            "folder": str(setting_folder(self.folder / "settings", candidate.name)),
            "rungs": rungs(config.first_documents, config.reduction, self.documents)
            if config.asha
            else [self.documents],
        }

    def _searcher(self) -> Any:
        if self.candidates is not None:
            return None
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if self.config.searcher == "nsga2":
            # a few generations, whatever the number of trials
            population = max(4, min(50, self.config.samples // 4))
            sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=self.seed)
        else:
            # settings under way count as bad ones, so that the next isn't their neighbour
            sampler = optuna.samplers.TPESampler(seed=self.seed, constant_liar=True)
        names = list(self.config.objectives)
        modes = [_MODES[name] for name in names]
        several = len(names) > 1
        return OptunaSearch(
            space=self._define,
            metric=names if several else names[0],
            mode=modes if several else modes[0],
            sampler=sampler,
        )

    def _define(self, trial: Any) -> dict[str, Any]:
        """A setting, drawn by Optuna."""
        try:
            return {"setting": self._setting(self.space.suggest(trial))}
        except ConfigError as error:
            return {"setting": {"name": f"impossible {trial.number}", "impossible": str(error)}}

    def _scheduler(self) -> Any:
        if not self.config.asha:
            return None
        from dllm_ray.tuning.halving import DocumentHalving

        file = self.folder / "rungs.json"
        file.unlink(missing_ok=True)
        return DocumentHalving(str(file), self.config.first_documents, self.config.reduction, self.documents)

    @staticmethod
    def _resources() -> dict[str, float]:
        """Next to nothing, on this process's node, whose disk results are written to."""
        import ray

        return {"CPU": 0.001, f"node:{ray.util.get_node_ip_address()}": 0.001}


def setting_folder(folder: Path, name: str) -> Path:
    """Where a setting's results lie, below the folder of all."""
    safe = "".join(letter if letter.isalnum() or letter in "._-=,+" else "_" for letter in name)
    if safe != name or len(safe) > _LONGEST or name.startswith("."):
        safe = f"{safe[:_LONGEST].lstrip('.')}-{digest(name)[:8]}"
    return folder / safe
