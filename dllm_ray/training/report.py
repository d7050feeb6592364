"""What a training run says of itself: lines in the terminal, facts and metrics for the tracking store, a model card."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dllm_ray.config import to_dict, to_yaml
from dllm_ray.data.prepare import Prepared
from dllm_ray.data.tokenize import Account
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import Run
from dllm_ray.viz.terminal import Progress

_SHOWN_SAMPLES = 3
_NOT_IN_NAMES = re.compile(r"[^\w\-./: ]")
"""Characters that MLflow takes in no metric's name."""
_SHOWN_REASONS = 10


def data_line(prepared: Prepared) -> str:
    """What became of the rows, in a few lines for people."""
    account = prepared.account
    if prepared.surveyed:
        lines = [
            f"data      {account.read:,} rows read, {account.usable:,} usable ({account.truncated:,} of them cut), "
            f"{account.tokens:,} tokens; {prepared.rows:,} rows to train on, {len(prepared.valid):,} for validation"
            + (f" ({prepared.held_out:,} held out)" if prepared.held_out else "")
        ]
    else:
        lines = [
            f"data      tokenized ahead of training; of the first {account.read:,} rows {account.usable:,} are usable, "
            f"{len(prepared.valid):,} rows for validation"
        ]
    if len(prepared.accounts) > 1:
        lines += [
            f"          {name}: {part.usable:,} usable rows, {part.tokens:,} tokens"
            for name, part in prepared.accounts.items()
        ]
    reasons = account.dropped.most_common()
    for reason, count in reasons[:_SHOWN_REASONS]:
        lines.append(f"          dropped {count:,}: {reason}; the first: {account.examples[reason]}")
    if len(reasons) > _SHOWN_REASONS:
        others = sum(count for _, count in reasons[_SHOWN_REASONS:])
        lines.append(f"          dropped {others:,} for {len(reasons) - _SHOWN_REASONS} other reasons")
    return "\n".join(lines)


def data_facts(
    prepared: Prepared,
    accounts: Mapping[str, Account] | None = None,
    given: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The same for machines, source by source.

    Args:
        prepared: the run's data.
        accounts: what became of the rows read so far, of each source, where it wasn't known beforehand.
        given: rows and tokens that each source gave to training so far.
    """
    accounts = prepared.accounts if prepared.surveyed or not accounts else accounts
    return {
        "surveyed": prepared.surveyed,
        "rows_train": prepared.rows,
        "rows_valid": len(prepared.valid),
        "fingerprint": prepared.fingerprint,
        "sources": {
            name: {
                "rows_read": account.read,
                "rows_usable": account.usable,
                "rows_truncated": account.truncated,
                "tokens": account.tokens,
                "target_tokens": account.targets,
                "dropped": dict(account.dropped),
                "dropped_first": account.examples,
                **dict(zip(("given_rows", "given_tokens"), (given or {}).get(name, ()), strict=False)),
            }
            for name, account in accounts.items()
        },
    }


@dataclass(frozen=True)
class Seen:
    """What a look at a checkpoint found (`observe`)."""

    step: int
    samples: list[dict[str, str]] = field(default_factory=list)
    """`prompt`, `expected`, `sampled`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`eval/<task>/<metric>`."""
    problems: list[str] = field(default_factory=list)
    """Why samples or metrics are missing."""


class Watcher:
    """Turns what workers report into progress, MLflow metrics and artifacts.

    Args:
        steps: steps of the whole run.
        run: where to record.
        prepared: the run's data.
    """

    def __init__(self, steps: int, run: Run, prepared: Prepared):
        self._steps = steps
        self._run = run
        self._prepared = prepared
        self._progress: Progress | None = None
        self._valid: float | None = None
        self.skipped = 0
        self.parameters = 0
        self.architecture = ""
        self.history: list[tuple[int, float]] = []
        """(step, validation nll), as measured."""

    def on_events(self, events: list[Mapping[str, Any]]) -> None:
        """Handles events of `dllm_ray.training.trainer`."""
        entries = [(event["values"], event["step"]) for event in events if "values" in event]
        if entries:
            self._run.log_many(entries)
        for event in events:
            getattr(self, f"_on_{event['kind']}")(event["step"], event)

    def close(self) -> None:
        """Ends the live line."""
        if self._progress is not None:
            self._progress.close()

    def _on_start(self, step: int, event: Mapping[str, Any]) -> None:
        self.parameters, self.architecture = event["parameters"], event["architecture"]
        trained = "" if event["trainable"] == self.parameters else f", {event['trainable']:,} of them trained"
        where = f"{event['workers']} worker{'s' if event['workers'] > 1 else ''} on {event['device']}"
        where += f", on {event['nodes']} nodes" if event["nodes"] > 1 else ""
        began = f"from step {step} of" if step else "for"
        if self._progress is None:
            self._progress = Progress("train", self._steps, "step", step)
            print(f"model     {self.architecture}, {self.parameters:,} parameters{trained}", flush=True)
        self._progress.note(f"train     {began} {self._steps} steps with {where}")
        self._run.tag({"dllm_ray.parameters": self.parameters})

    def _on_metrics(self, step: int, event: Mapping[str, Any]) -> None:
        values = event["values"]
        figures = {"loss": f"{values['train/loss']:.4f}", "tokens/s": f"{values['train/tokens_per_s']:,.0f}"}
        if self._valid is not None:
            figures["valid nll"] = f"{self._valid:.4f}"
        self._progress.update(step, **figures)

    def _on_valid(self, step: int, event: Mapping[str, Any]) -> None:
        self._valid = event["values"]["valid/nll"]
        self.history.append((step, self._valid))

    def _on_checkpoint(self, step: int, event: Mapping[str, Any]) -> None:
        self._run.tag({"dllm_ray.checkpoint_step": step})
        self._run.json("data.json", data_facts(self._prepared, event["accounts"], event["given"]))
        given = event["given"]
        total = sum(tokens for _, tokens in given.values())
        if len(given) > 1:
            shares = {name: tokens / total for name, (_, tokens) in given.items()}
            named = {f"data/{_NOT_IN_NAMES.sub('_', name)}/token_share": share for name, share in shares.items()}
            self._run.log(named, step)

    def _on_not_finite(self, step: int, event: Mapping[str, Any]) -> None:
        self.skipped += 1
        self._run.log({"train/skipped_steps": self.skipped}, step)
        self._progress.note(f"skipped   {event['what']}")

    def on_seen(self, seen: Seen) -> None:
        """Handles what a look at a checkpoint found."""
        if seen.samples:
            self._run.json(f"samples/step_{seen.step:08d}.json", seen.samples)
        if seen.metrics:
            self._run.log(seen.metrics, seen.step)
        lines = [f"look      none at step {seen.step}: {problem}" for problem in seen.problems]
        if seen.metrics:
            scores = ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in seen.metrics.items())
            lines.append(f"look      step {seen.step}: {scores}")
        shown = seen.samples[:_SHOWN_SAMPLES] if seen.step == self._steps else []
        lines += [
            f"sample    {sample['prompt']!r} -> {sample['sampled']!r} (expected {sample['expected']!r})"
            for sample in shown
        ]
        if lines:
            self._progress.note("\n".join(lines))

    def _on_user_error(self, step: int, event: Mapping[str, Any]) -> None:
        self.close()


def model_card(settings: Mapping[str, Any], job: str, prepared: Prepared, watcher: Watcher) -> str:
    """The README.md of a trained model."""
    start = settings["model"]["path"] or "random weights"
    nll = [f"| {step} | {value:.4f} |" for step, value in watcher.history]
    table = "\n".join(["| step | validation nll |", "|---|---|", *nll]) if nll else "Not validated."
    defaults = to_dict(SamplerConfig())
    data = ", ".join(prepared.accounts)
    rows = f": {prepared.rows:,} rows to train on" if prepared.surveyed else ""
    sampler = ", ".join(f"{key}={value!r}" for key, value in settings["sampler"].items() if value != defaults[key])
    return f"""---
library_name: transformers
tags: [diffusion-language-model, dllm_ray]
---
# {settings["output_dir"].rstrip("/").rpartition("/")[2]}

A diffusion language model ({watcher.architecture}, {watcher.parameters:,} parameters), trained by `jobs/{job}.py` from
{start} with the objective {settings["objective"]["name"]}.

Data: {data}{rows}, fingerprint `{prepared.fingerprint[:16]}`.

{table}

```python
import dllm_ray
from dllm_ray.chat import decode, encode_prompt
from dllm_ray.sampling import Sampler, SamplerConfig

lm = dllm_ray.load("THIS_DIRECTORY")
config = SamplerConfig({sampler})
output = Sampler(lm, config).sample([encode_prompt(lm.tokenizer, "your question")])
print(decode(lm.tokenizer, output.completions[0]))
```

## Settings

```yaml
{to_yaml(settings).rstrip()}
```
"""
