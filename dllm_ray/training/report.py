"""What a training run says of itself: lines in the terminal, facts and metrics for the tracking store, a model card."""

from collections.abc import Mapping
from typing import Any

from dllm_ray.config import to_dict, to_yaml
from dllm_ray.data.prepare import Prepared
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import Run
from dllm_ray.viz.terminal import Progress

_SHOWN_SAMPLES = 3
_SHOWN_REASONS = 10


def data_line(prepared: Prepared) -> str:
    """What became of the rows, in a few lines for people."""
    account = prepared.account
    held = sum(map(len, prepared.held_out))
    lines = [
        f"data      {account.read:,} rows read, {account.usable:,} usable ({account.truncated:,} of them cut), "
        f"{account.tokens:,} tokens; {prepared.plan.rows:,} rows to train on, {len(prepared.valid):,} for validation"
        + (f" ({held:,} held out)" if held else "")
    ]
    reasons = account.dropped.most_common()
    for reason, count in reasons[:_SHOWN_REASONS]:
        lines.append(f"          dropped {count:,}: {reason}; the first: {account.examples[reason]}")
    if len(reasons) > _SHOWN_REASONS:
        others = sum(count for _, count in reasons[_SHOWN_REASONS:])
        lines.append(f"          dropped {others:,} for {len(reasons) - _SHOWN_REASONS} other reasons")
    return "\n".join(lines)


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """The same for machines."""
    account = prepared.account
    return {
        "sources": sorted({shard.name for shard in prepared.source.corpus.shards}),
        "formats": sorted({rules.row_format for rules in prepared.source.corpus.rules}),
        "rows_read": account.read,
        "rows_usable": account.usable,
        "rows_truncated": account.truncated,
        "rows_train": prepared.plan.rows,
        "rows_valid": len(prepared.valid),
        "tokens": account.tokens,
        "target_tokens": account.targets,
        "dropped": dict(account.dropped),
        "dropped_first": account.examples,
        "fingerprint": account.digest,
    }


class Watcher:
    """Turns what workers report into progress, MLflow metrics and artifacts.

    Args:
        steps: steps of the whole run.
        run: where to record.
    """

    def __init__(self, steps: int, run: Run):
        self._steps = steps
        self._run = run
        self._progress: Progress | None = None
        self._valid: float | None = None
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

    def _on_samples(self, step: int, event: Mapping[str, Any]) -> None:
        self._run.json("samples.json", event["samples"])
        self.close()
        if event["problem"]:
            print(f"sample    none: {event['problem']}")
        for sample in event["samples"][:_SHOWN_SAMPLES]:
            print(f"sample    {sample['prompt']!r} -> {sample['sampled']!r} (expected {sample['expected']!r})")

    def _on_user_error(self, step: int, event: Mapping[str, Any]) -> None:
        self.close()


def model_card(settings: Mapping[str, Any], prepared: Prepared, watcher: Watcher) -> str:
    """The README.md of a trained model."""
    start = settings["model"]["path"] or "random weights"
    nll = [f"| {step} | {value:.4f} |" for step, value in watcher.history]
    table = "\n".join(["| step | validation nll |", "|---|---|", *nll]) if nll else "Not validated."
    defaults = to_dict(SamplerConfig())
    sampler = ", ".join(f"{key}={value!r}" for key, value in settings["sampler"].items() if value != defaults[key])
    return f"""---
library_name: transformers
tags: [diffusion-language-model, dllm_ray]
---
# {settings["output_dir"].rstrip("/").rpartition("/")[2]}

A diffusion language model ({watcher.architecture}, {watcher.parameters:,} parameters), trained by `jobs/sft.py` from
{start} with the objective {settings["objective"]["name"]}.

Data: {settings["data"]["path"]}: {prepared.plan.rows:,} rows to train on, fingerprint `{prepared.account.digest[:16]}`.

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
