"""MLflow: one run for each job, with its settings, metrics, system facts and artifacts. Only this module imports it.

The client API is used throughout, so nothing depends on a global "active run", and several runs can be open at once.
"""

import base64
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import subprocess
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dllm_ray.config import flatten, to_yaml, without_credentials, without_secrets
from dllm_ray.errors import ConfigError, DllmRayError, ModelError, OutputError, first_line

COMPARISON = "dllm_ray.compare"
"""Tag: id of the comparison that a column belongs to."""

_PACKAGES = ("dllm-ray", "torch", "transformers", "ray", "datasets", "lm-eval", "mlflow", "numpy", "tokenizers", "peft")
_SQLITE = "sqlite:///"
_DATABASE = re.compile(r"(postgresql|mysql|mssql)(\+\w+)?://")
_LOCK = 0x646C6C6D  # of ours, among the advisory locks of a PostgreSQL database
_PARAM_LIMIT = 6000  # characters that MLflow stores of a parameter
_FAILURE = "dllm_ray.failure"  # tag: why a run broke off
_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
_VIEW_LIMIT = 4500  # characters; a tag of an experiment holds 5,000


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking server or database; null: `mlruns.db` (SQLite) and `mlartifacts/` in the output folder."""
    experiment: str = "dllm_ray"
    """MLflow experiment."""
    artifacts: str | None = None
    """Folder or URL (`s3://...`) of the artifacts of a new experiment; null: `mlartifacts/` beside a SQLite database,
    or as the server says. Other databases need one."""
    run_name: str | None = None
    """Name of the run; null: the job and the output folder."""


class Run:
    """An open MLflow run."""

    def __init__(self, client, run_id: str, uri: str):
        self._client = client
        self.run_id = run_id
        self.uri = uri

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Records metrics of one step."""
        self.log_many([(metrics, step)])

    def log_many(self, entries: list[tuple[Mapping[str, float], int]]) -> None:
        """Records the metrics of several steps in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(key, float(value), now, step) for metrics, step in entries for key, value in metrics.items()]
        for start in range(0, len(points), 1000):  # the most one request may hold
            self._client.log_batch(self.run_id, metrics=points[start : start + 1000])

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Sets tags."""
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def text(self, name: str, text: str) -> None:
        """Stores a text artifact under a file name."""
        self._client.log_text(self.run_id, text, name)

    def json(self, name: str, value: Any) -> None:
        """Stores a JSON artifact under a file name."""
        self.text(name, json.dumps(value, indent=2, ensure_ascii=False, default=str))

    def file(self, path: str | Path, folder: str | None = None) -> None:
        """Stores a file as an artifact."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def child(
        self,
        name: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        settings: Mapping[str, Any] | None = None,
        known: str | None = None,
        nested: bool = True,
    ) -> str:
        """Records a finished run of its own below this one, or beside it.

        Args:
            name: of the run.
            metrics, tags: of it.
            settings: its parameters.
            known: id of such a run whose metrics and tags are brought up to date; None: a new one.
            nested: stand below this one; else beside it, where the UI shows it in lists that are filtered.

        Returns:
            Its id.
        """
        from mlflow.entities import Metric, Param, RunTag

        tags = {**({"mlflow.parentRunId": self.run_id} if nested else {}), "mlflow.runName": name, **tags}
        if known is None:
            experiment = self._client.get_run(self.run_id).info.experiment_id
            run_id = self._client.create_run(experiment, tags=tags).info.run_id
        else:
            run_id = known
        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, float(value), now, 0) for key, value in metrics.items()],
            params=[Param(key, str(value)[:_PARAM_LIMIT]) for key, value in flatten(settings or {}).items()],
            tags=[RunTag(key, value) for key, value in tags.items()] if known else [],
        )
        if known is None:
            self._client.set_terminated(run_id, "FINISHED")
        return run_id

    def save_view(self, name: str, runs: str, columns: Sequence[str], charts: Sequence[str]) -> str:
        """Saves a view of some runs for the MLflow UI: it stands under `name` among the saved views of
        the experiment, in place of an earlier one of that name.

        Args:
            name: of the view.
            runs: filter for its runs, as `search_runs` takes it; none of them nested, which the UI would hide.
            columns: columns of the table, as `metrics.NAME`, `tags.NAME` or `params.NAME`.
            charts: metrics that have a chart.

        Returns:
            The address that opens it, of a server that `ui_command` starts.
        """
        experiment = self._client.get_run(self.run_id).info.experiment_id
        state = _view_state(runs, columns, charts)
        if len(state) > _VIEW_LIMIT:  # of many charts; the UI makes them itself where it is told none
            state = _view_state(runs, columns, ())
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        view = {"name": name, "createdAt": int(time.time() * 1000), "state": state}
        self._client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(view))
        server = without_credentials(self.uri) if self.uri.startswith("http") else _UI
        return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?viewStateShareKey={key}"

    def children(self) -> dict[str, tuple[str, dict[str, float]]]:
        """Name -> id and metrics of the finished runs below this one; what a kill left unfinished is deleted."""
        experiment = self._client.get_run(self.run_id).info.experiment_id
        found, page = {}, None
        while page != "":
            query = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
            some = self._client.search_runs([experiment], query, max_results=1000, page_token=page)
            page = some.token or ""
            for run in some:
                if run.info.status == "FINISHED":
                    found[run.info.run_name] = (run.info.run_id, run.data.metrics)
                else:
                    self._client.delete_run(run.info.run_id)
        return found

    def prune(self, known: Collection[str]) -> None:
        """Deletes the runs below this one, but for those whose ids are known; with those below them, and a comparison
        with its columns."""
        experiment = self._client.get_run(self.run_id).info.experiment_id

        def below(run_id: str) -> list[str]:
            queries = [f"tags.`{tag}` = '{run_id}'" for tag in ("mlflow.parentRunId", COMPARISON)]
            found = [self._client.search_runs([experiment], query, max_results=1000) for query in queries]
            return [run.info.run_id for some in found for run in some]

        def delete(run_id: str) -> None:
            for child in below(run_id):
                delete(child)
            self._client.delete_run(run_id)

        for child in below(self.run_id):
            if child not in known:
                delete(child)

    def folder(self, path: str | Path, name: str) -> str:
        """Stores a folder's files as an artifact of that name, in place of earlier ones, and returns its URI."""
        self._client.log_artifacts(self.run_id, str(path), name)
        return f"{self._client.get_run(self.run_id).info.artifact_uri}/{name}"


@dataclass(frozen=True)
class Recorded:
    """A run as the tracking store holds it."""

    run_id: str
    name: str
    status: str
    """MLflow's word: RUNNING, FINISHED, FAILED, KILLED, ..."""
    started: int
    """Milliseconds since 1970."""
    parent: str | None
    """Id of the run that it belongs under."""
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """The latest values."""
    artifact: Callable[[str], str | None]
    """Reads a text artifact by its name; None: there is none, or it can't be had."""


@contextmanager
def start(
    job: str,
    settings: Mapping[str, Any],
    output_dir: Path,
    tracking: TrackingConfig,
    tags: Mapping[str, str],
    resume: str | None = None,
    parent: str | None = None,
) -> Iterator[Run]:
    """Opens a run for the time of a `with` block and records how it ended.

    An error marks the run FAILED, with the reason in the tag `dllm_ray.failure`; an interrupt marks it KILLED.

    Args:
        job: `sft`, `evaluate`, ...
        settings: the resolved settings; recorded as parameters and as `config.yaml`.
        output_dir: the job's output folder.
        tracking: where to record.
        tags: what the run is about, e.g. `dllm_ray.model`.
        resume: id of an earlier run to go on with.
        parent: id of the run this one belongs under, in the same tracking store.

    Raises:
        OutputError: the tracking store can't be reached or written.
    """
    uri = tracking.uri or default_uri(output_dir)
    client, experiment = _open(uri, tracking.experiment, tracking.artifacts)
    name = run_name(job, output_dir, tracking)
    run_tags = {
        "dllm_ray.job": job,
        "mlflow.runName": name,
        **{key: str(value) for key, value in tags.items() if value is not None},
        **({"mlflow.parentRunId": parent} if parent and _exists(client, parent) else {}),
        **_git(),
    }
    if resume is not None and _exists(client, resume):
        client.update_run(resume, status="RUNNING")
        if _FAILURE in client.get_run(resume).data.tags:
            client.delete_tag(resume, _FAILURE)
        run = Run(client, resume, uri)
        run.tag(run_tags)
    else:
        run = Run(client, client.create_run(experiment, tags=run_tags).info.run_id, uri)
        _record(run, client, settings)
    try:
        yield run
    except BaseException as error:
        reason = without_credentials(f"{type(error).__name__}: {error}")
        run.tag({_FAILURE: reason[:5000]})
        client.set_terminated(run.run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    client.set_terminated(run.run_id, "FINISHED")


def run_name(job: str, output_dir: Path, tracking: TrackingConfig) -> str:
    """What the run of a job is called; arguments as of `start`."""
    return tracking.run_name or f"{job} {output_dir.name}"


def _view_state(runs: str, columns: Sequence[str], charts: Sequence[str]) -> str:
    """The state of MLflow's experiment page, in its own packed form.

    Args:
        runs, columns, charts: as of `Run.save_view`.
    """
    section = "scores"
    drawn = {
        "compareRunCharts": [
            {
                "uuid": f"chart-{number}",
                "type": "BAR",
                "metricKey": metric,
                "metricSectionId": section,
                "runsCountToCompare": 50,
                "deleted": False,
                "isGenerated": False,
            }
            for number, metric in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": section, "name": "Scores", "display": True, "isReordered": False, "deleted": False}
        ],
    }
    state = {
        "searchFilter": runs,
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": [f"{kind}.`{name}`" for kind, _, name in (column.partition(".") for column in columns)],
        "runsHiddenMode": "SHOW_ALL",
        "autoRefreshEnabled": False,
        **(drawn if charts else {}),
    }
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()


def resolved(tracking: TrackingConfig, output_dir: Path) -> TrackingConfig:
    """The settings with the store by name, in a way that means the same in any working directory."""
    uri = tracking.uri or default_uri(output_dir)
    if uri.startswith(_SQLITE):
        uri = f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).resolve()}"
    return replace(tracking, uri=uri)


def default_uri(output_dir: Path) -> str:
    """The SQLite database of an output folder."""
    return f"{_SQLITE}{output_dir.resolve()}/mlruns.db"


def beside_training(tracking: TrackingConfig, provenance: Mapping[str, Any]) -> TrackingConfig:
    """Where work on a trained model is recorded: unless told otherwise, where its training was, if still there."""
    trained = provenance.get("tracking_uri", "")
    if tracking.uri is not None or not trained:
        return tracking
    if trained.startswith(_SQLITE) and not Path(trained.removeprefix(_SQLITE)).is_file():
        return tracking
    return replace(tracking, uri=trained)


def find_runs(tracking: TrackingConfig, job: str) -> list[Recorded]:
    """The runs of a job in a tracking store, the newest first; nothing is created or changed.

    Args:
        tracking: the store and the experiment; `uri` is needed.
        job: `evaluate`, ...

    Raises:
        OutputError: the store can't be reached, or has no such experiment.
    """
    uri = tracking.uri
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        raise OutputError(f"tracking.uri {uri}: no such database")
    with _patient(uri):
        client = _client(uri)
        found = client.get_experiment_by_name(tracking.experiment)
        if found is None:
            names = ", ".join(repr(item.name) for item in client.search_experiments()) or "none"
            raise OutputError(f"{without_credentials(uri)} has no experiment {tracking.experiment!r}; it has {names}")
        runs, page = [], None
        while page != "":
            query = f"tags.`dllm_ray.job` = '{job}'"
            some = client.search_runs([found.experiment_id], query, max_results=1000, page_token=page)
            runs, page = runs + list(some), some.token or ""
    return [_recorded(client, run) for run in runs]


def find_run(tracking: TrackingConfig, run_id: str) -> Recorded | None:
    """A run of the experiment by its id; None: it isn't there, or was deleted."""
    from mlflow.exceptions import MlflowException

    with _patient(tracking.uri):
        client = _client(tracking.uri)
        experiment = client.get_experiment_by_name(tracking.experiment)
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
    is_here = experiment is not None and run.info.experiment_id == experiment.experiment_id
    return _recorded(client, run) if is_here and run.info.lifecycle_stage == "active" else None


def open_run(tracking: TrackingConfig, run_id: str) -> Run:
    """A run that is there, to add to it; how it stands is left as it is."""
    return Run(_client(tracking.uri), run_id, tracking.uri)


def _recorded(client, run) -> Recorded:
    def artifact(name: str) -> str | None:
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(client.download_artifacts(run.info.run_id, name, folder)).read_text(encoding="utf-8")
            except (MlflowException, OSError, UnicodeDecodeError):
                return None

    return Recorded(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        started=run.info.start_time,
        parent=run.data.tags.get("mlflow.parentRunId"),
        tags=run.data.tags,
        params=run.data.params,
        metrics=run.data.metrics,
        artifact=artifact,
    )


def probe(tracking: TrackingConfig) -> dict[str, Any]:
    """Tries a tracking store: a run and an artifact are written, read and deleted. Where the experiment isn't there
    yet, they are in one that is deleted too.

    Args:
        tracking: the store, whose `uri` is needed, and the experiment.

    Returns:
        `server`, `client`: MLflow's versions, None where it is no server; `where`: the place of artifacts;
        `artifacts`: why they can't be kept there, or None; `is_new`: there is no such database yet, so that nothing but
        its folder was tried.

    Raises:
        OutputError: the store can't be reached, read or written.
    """
    uri = tracking.uri
    found = {"server": None, "client": version("mlflow"), "where": None, "artifacts": None, "is_new": False}
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        folder = Path(uri.removeprefix(_SQLITE)).resolve().parent
        if not os.access(folder, os.W_OK):
            raise OutputError(f"tracking.uri {uri}: {folder} isn't there, or can't be written")
        return found | {"is_new": True}
    with _patient(uri):
        with _one_at_a_time(uri):
            client = _client(uri)
            known = client.get_experiment_by_name(tracking.experiment)
        name = f"dllm_ray doctor {secrets.token_hex(8)}"
        experiment = known.experiment_id if known else client.create_experiment(name, _place(uri, tracking.artifacts))
        try:
            run = client.create_run(experiment, run_name="doctor", tags={"dllm_ray.job": "doctor"})
            try:
                client.log_metric(run.info.run_id, "doctor", 1.0)
                if client.get_run(run.info.run_id).data.metrics != {"doctor": 1.0}:
                    raise OutputError(f"tracking.uri {without_credentials(uri)} doesn't give back what was written")
                found["where"] = run.info.artifact_uri
                found["artifacts"] = _try_artifacts(client, run.info)
            finally:
                client.set_terminated(run.info.run_id)
                client.delete_run(run.info.run_id)
        finally:
            if known is None:
                client.delete_experiment(experiment)
    if uri.startswith("http"):
        found["server"] = _server_version(uri)
    return found


def _try_artifacts(client, info) -> str | None:
    """Why artifacts of a run can't be kept; None: they can."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        client.log_text(info.run_id, "doctor", "doctor.txt")
        with tempfile.TemporaryDirectory() as folder:
            if Path(client.download_artifacts(info.run_id, "doctor.txt", folder)).read_text() != "doctor":
                return "an artifact comes back as another"
    except Exception as error:  # each kind of storage has its own
        return first_line(error)
    with suppress(Exception):  # some servers delete none
        get_artifact_repository(info.artifact_uri, tracking_uri=client.tracking_uri).delete_artifacts()
    return None


def _server_version(uri: str) -> str | None:
    """The version that a tracking server tells; None: it doesn't."""
    try:
        with urllib.request.urlopen(f"{without_credentials(uri).rstrip('/')}/version", timeout=20) as answer:
            told = answer.read(100).decode().strip()
    except (OSError, ValueError):
        return None
    return told if re.fullmatch(r"\d+\.\d+[\w.]*", told) else None


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI over a tracking store, or the address of a server."""
    uri = without_credentials(uri)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def _open(uri: str, experiment: str, artifacts: str | None = None):
    with _patient(uri), _one_at_a_time(uri):
        client = _client(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        return client, client.create_experiment(experiment, artifact_location=_place(uri, artifacts))


def _place(uri: str, artifacts: str | None) -> str | None:
    """Where artifacts of a new experiment are kept; None: as the server says.

    Raises:
        ConfigError: nobody says it.
    """
    if artifacts is None and uri.startswith(_SQLITE):  # beside the database, wherever the job was started
        return (Path(uri.removeprefix(_SQLITE)).resolve().parent / "mlartifacts").as_uri()
    if artifacts is None and _DATABASE.match(uri):
        raise ConfigError("name a folder or URL that all nodes reach: a database holds none", "tracking.artifacts")
    return artifacts


def _client(uri: str):
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they narrate the creation of a database
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _patient(uri: str) -> Iterator[None]:
    """A server that can't be reached is known at once; by itself the client would go on trying for minutes."""
    from mlflow.exceptions import MlflowException

    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    before = {name: os.environ.get(name) for name in patience}
    os.environ |= {name: value for name, value in patience.items() if before[name] is None}
    try:
        yield
    except (MlflowException, OSError) as error:
        raise _unusable(uri, error) from error
    except DllmRayError:
        raise
    except Exception as error:  # database drivers raise their own types
        raise _unusable(uri, error) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Keeps others out while a database is set up: of two that make its tables at once, one would fail."""
    if uri.startswith("postgresql"):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:  # the lock ends with the connection
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(_LOCK)))
            yield
        return
    if not uri.startswith(_SQLITE):
        yield
        return
    folder = os.open(Path(uri.removeprefix(_SQLITE)).resolve().parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _unusable(uri: str, error: Exception) -> OutputError:
    return OutputError(without_credentials(f"tracking.uri {uri} can't be used: {str(error).splitlines()[0]}"))


def _exists(client, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException:
        return False
    return True


def _record(run: Run, client, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    settings = without_secrets(settings)
    params = [Param(key, str(value)[:_PARAM_LIMIT]) for key, value in flatten(settings).items()]
    client.log_batch(run.run_id, params=params)
    run.text("config.yaml", to_yaml(settings))
    run.json("system.json", system_facts())


def system_facts() -> dict[str, Any]:
    """What a result may depend on beside settings: machine, devices, package versions."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }
    import torch

    facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, str]:
    """The revision of the checkout this package runs from, when it is one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {}
    command = ["git", "-C", str(root)]
    try:
        revision = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if revision.returncode:
        return {}
    dirty = "yes" if changed.stdout.strip() else "no"
    return {"mlflow.source.git.commit": revision.stdout.strip(), "dllm_ray.git_dirty": dirty}


def registered_version(model: str, uri: str | None) -> str:
    """A model of the registry by its version: `models:/name@alias` becomes `models:/name/3`.

    Args:
        model: `models:/name/version` or `models:/name@alias`.
        uri: tracking server or database; None: as MLFLOW_TRACKING_URI says.

    Raises:
        ModelError: there is no such model, version or alias.
        OutputError: the store can't be reached.
    """
    _, _, rest = model.partition(":/")
    uri, client = _registry(uri)
    from mlflow.exceptions import MlflowException

    name, at, alias = rest.partition("@")
    if not at:
        name, _, version = rest.rpartition("/")
        if not (name and version.isdecimal()):
            raise ModelError(f"expected models:/NAME/VERSION or models:/NAME@ALIAS, got {model!r}")
    with _patient(uri):
        try:
            found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ModelError(f"{without_credentials(uri)} has no {model}: {first_line(error)}") from None
    return f"models:/{name}/{found.version}"


def fetch_model(model: str, uri: str | None) -> Path:
    """A model directory of the registry, on this machine.

    Args:
        model: `models:/name/version`.
        uri: tracking server or database; None: as MLFLOW_TRACKING_URI says.

    Raises:
        OutputError: it can't be fetched.
    """
    uri, client = _registry(uri)
    from mlflow.artifacts import download_artifacts

    name, _, version = model.partition(":/")[2].rpartition("/")
    with _patient(uri):
        # by itself MLflow would look for the model in a registry of its own settings
        where = client.get_model_version_download_uri(name, version)
        return Path(download_artifacts(artifact_uri=where, tracking_uri=uri))


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: int
    run_id: str | None
    """Its training run."""
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.number}"


def find_version(model: str, uri: str) -> Version | None:
    """The version of a registered model that `models:/name/3` or `models:/name@alias` means; None: there is none.

    Raises:
        OutputError: the store can't be reached.
    """
    from mlflow.exceptions import MlflowException

    rest = model.partition(":/")[2]
    with _patient(uri):
        client = _client(uri)
        try:
            if "@" in rest:
                return _model_version(client.get_model_version_by_alias(*rest.split("@")))
            return _model_version(client.get_model_version(*rest.rsplit("/", 1)))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None


def tagged_version(name: str, uri: str, tags: Mapping[str, str]) -> Version | None:
    """The newest version of a registered model with these tags; None: there is none.

    Raises:
        OutputError: the store can't be reached.
    """
    found, page = [], None
    with _patient(uri):
        client = _client(uri)
        while page != "":
            some = client.search_model_versions(f"name = '{name}'", page_token=page)
            found, page = found + list(map(_model_version, some)), some.token or ""
    return max((one for one in found if tags.items() <= one.tags.items()), key=lambda one: one.number, default=None)


def register(name: str, source: str, run_id: str, tags: Mapping[str, str], uri: str) -> Version:
    """Makes a new version of a registered model, which is made where it isn't there yet.

    Args:
        name: of the model.
        source: URI of the artifact that holds the version.
        run_id: its training run.
        tags: of the version; they are there as soon as it is.
        uri: tracking server or database.

    Raises:
        OutputError: the store can't be reached or written.
    """
    from mlflow.exceptions import MlflowException

    with _patient(uri):
        client = _client(uri)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return _model_version(client.create_model_version(name, source, run_id, dict(tags)))


def set_alias(version: Version, alias: str, uri: str) -> None:
    """Gives an alias to a version, and takes it from the one that had it.

    Raises:
        OutputError: the store can't be reached or written.
    """
    with _patient(uri):
        _client(uri).set_registered_model_alias(version.name, alias, str(version.number))


def _model_version(found) -> Version:
    return Version(found.name, int(found.version), found.run_id or None, dict(found.tags))


def _registry(uri: str | None):
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise OutputError("models:/ needs to know where MLflow is: set tracking_uri, or MLFLOW_TRACKING_URI")
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        raise OutputError(f"{uri}: no such database")
    return uri, _client(uri)
