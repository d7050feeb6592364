"""Settings of an evaluation."""

from dataclasses import dataclass, field
from typing import Any

from dllm_ray.errors import ConfigError


@dataclass
class LikelihoodConfig:
    """How the log-likelihood of a given text is estimated, for tasks that compare likelihoods."""

    mc_num: int = 128
    """Noisy copies of each target that the estimate averages; targets so short that all their masks are fewer are
    summed exactly."""
    batch_size: int = 32
    """Most noisy copies in one forward, of one target or of many; on a CPU also no more than suit its caches. The
    estimate doesn't depend on it."""
    cfg_scale: float = 0.0
    """Classifier-free guidance (arXiv 2207.12598) of the scored distribution; 0 is off, else forwards double."""
    check_greedy: bool = False
    """Also find out whether greedy denoising, one token a step, would write the target; off: answered with no."""
    adaptive: bool = False
    """Stop early where the ranking of a question's choices is decided; `mc_num` is then the most copies of each."""

    def __post_init__(self):
        for name in ("mc_num", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"must be a whole number of at least 1, got {value!r}", name)
        if not 0 <= self.cfg_scale < float("inf"):
            raise ConfigError(f"must be a number that is not negative, got {self.cfg_scale}", "cfg_scale")


@dataclass
class Setting:
    """One line of a table of evaluations: a task, and how it is asked. What is null is as the job's settings say."""

    task: str
    """lm-eval task or group."""
    name: str | None = None
    """What the line is called on the command line and in results; null: like its task."""
    num_fewshot: int | None = None
    """Solved examples before each question."""
    chat_template: bool | None = None
    """Ask as a user's message in the model's chat template."""
    limit: int | None = None
    """Documents, from the first."""
    batch_size: int | None = None
    """Documents denoised together by a worker."""
    until: list[str] = field(default_factory=list)
    """Strings that end an answer, beside the task's own."""
    escape_until: bool | None = None
    """Leave answers uncut by the task's own stop strings."""
    add_bos_token: bool | None = None
    """Begin prompts and scored texts with the model's BOS."""
    data_file: str | None = None
    """File or glob of the test rows, as in `EvaluateConfig.data_files`."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Changes to the job's sampler settings."""
    likelihood: dict[str, Any] = field(default_factory=dict)
    """Changes to the job's likelihood settings."""
    reference: str | None = None
    """Task name in the published scores that this line's score stands beside."""
    metric: str | None = None
    """The metric that is compared, e.g. `exact_match,flexible-extract`; null: the task's first."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the line is from: framework, script, and what of it has no counterpart here."""
    note: str | None = None
    """What a reader should know."""


@dataclass
class EvaluateConfig:
    """What is asked, and who answers."""

    tasks: tuple[str, ...] = ("digits",)
    """lm-eval tasks or groups by name: those of `dllm_ray/evaluation/tasks`, of `include_path`, and lm-eval's own."""
    suite: list[Setting] = field(default_factory=list)
    """A table of tasks, each with settings of its own, asked in place of `tasks`."""
    include_path: str | None = None
    """A folder with further tasks as lm-eval YAML."""
    data_files: dict[str, str] = field(default_factory=dict)
    """Task -> file or glob of its test rows, e.g. `{gsm8k_file: test.jsonl}`. lm-eval's own tasks take files too, in
    place of their hub data; tasks over puzzles and texts become one task for each file of a glob."""
    limit: int | None = None
    """Documents of each task, from the first; null: all."""
    num_fewshot: int | None = None
    """Solved examples before each question; null: as the task says."""
    chat_template: bool = True
    """Ask as a user's message in the model's chat template; off: the bare text."""
    fewshot_as_multiturn: bool = True
    """With the chat template: solved examples are earlier turns of the conversation, not a part of the message."""
    system_instruction: str | None = None
    """A system message before each question."""
    until: list[str] = field(default_factory=list)
    """Strings that end an answer, beside the task's own."""
    escape_until: bool = False
    """Leave answers uncut by the task's own stop strings."""
    add_bos_token: bool = False
    """Begin prompts and scored texts with the model's BOS."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run the model's code, in a process with limits and without network."""
    workers: int | None = None
    """Ray workers that hold the model; null: one for each GPU of the cluster, or 2 where there is none."""
    cpus_per_worker: float | None = None
    """CPUs each worker reserves; null: 1, or less on a small cluster."""
    gpus_per_worker: float | None = None
    """GPUs each worker reserves; fractions share a GPU; null: 1 where the cluster has any."""
    threads_per_worker: int | None = None
    """Torch threads in each worker on a CPU; null: the machine's cores divided by the workers."""
    variants: list[dict[str, Any]] = field(default_factory=list)
    """Further sampler settings to ask the same with, as changes to `sampler`, e.g. `[{steps: 4}, {steps: 2}]`."""
    batch_size: int = 64
    """Documents denoised together by a worker; they go to workers in slices of this size."""
    cache: str | None = None
    """Folder or URI of finished answers, which later runs with the same model and settings read instead of asking
    again; null: `answers` in the output folder."""

    def __post_init__(self):
        self.tasks = tuple(self.tasks)
        if not self.tasks and not self.suite:
            raise ConfigError("name at least one task", "tasks")
        for name in ("limit", "workers", "threads_per_worker", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        for name in ("num_fewshot", "gpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"must not be negative, got {value}", name)
