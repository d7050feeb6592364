"""Converts model directories, tensor by tensor.

    python jobs/convert.py --describe MODEL                               # what it is, and how it is mapped
    python jobs/convert.py --model.path LLADA --output_dir OUT            # a published checkpoint to a native one
    python jobs/convert.py --model.path OUT --to original --output_dir BACK   # and back, bit for bit
    python jobs/convert.py --model.path QWEN3 --to mdlm --output_dir OUT  # any decoder or encoder to a diffusion model
    python jobs/convert.py --model.path QWEN3 --to bd3lm --block_size 32 --output_dir OUT
    python jobs/convert.py --model.path MODEL --to editflow --output_dir OUT  # any of them, to a model that edits
    python jobs/convert.py --model.path MODEL --model.adapter LORA --output_dir MERGED
    python jobs/convert.py --model.path CHECKPOINT --output_dir OUT       # of a training run, also in several parts

A native directory opens with plain transformers too. MODEL is a directory or a hub id. OUTPUT_DIR appears when it is
complete; one that exists is replaced only with --overwrite.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.errors import ConfigError, OutputError
from dllm_ray.models.config import ModelConfig, place
from dllm_ray.output import new_directory

_MIB = 1 << 20
_MODELS = ("config.json", "adapter_config.json")  # what marks a directory that --overwrite may replace


@dataclass
class ConvertJob:
    """Settings of jobs/convert.py."""

    output_dir: str | None = None
    """The directory to make."""
    describe: str | None = None
    """Print what a model directory or hub id is, and stop."""
    to: Literal["native", "mdlm", "bd3lm", "editflow", "original"] = "native"
    """native: the transformers architecture, to be used as the checkpoint was trained; mdlm, bd3lm: the same, to be
    trained with full or with block-causal attention; editflow: the same with edit heads, to be trained to insert,
    delete and substitute; original: the layout that the family publishes."""
    block_size: int = 32
    """Positions in a block, for bd3lm."""
    shift_logits: bool | None = None
    """Whether the logits at a position are to predict the token to its right, as an autoregressive model's do; null: as
    the checkpoint says, false for an ordinary model."""
    edit_time: bool = False
    """Of editflow: the edit heads are told the time, so that rates may depend on more than the sequence."""
    overwrite: bool = False
    """Replace `output_dir` if it exists."""
    shard_gb: float = 4.0
    """Most gigabytes in one weight file."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(dtype="auto"))
    """The model to convert; an adapter is merged into it. Any `dtype` but auto changes the weights."""

    def __post_init__(self):
        if self.describe is not None:
            return
        if self.model.path is None:
            raise ConfigError("name the model, e.g. --model.path MODEL_DIR", "model.path")
        if self.output_dir is None:
            raise ConfigError("name the directory to make", "output_dir")
        if self.model.quantization is not None:
            raise ConfigError("has no effect here: weights are quantized while they are loaded", "model.quantization")
        if self.edit_time and self.to != "editflow":
            raise ConfigError("only --to editflow makes edit heads", "edit_time")
        if self.block_size < 1:
            raise ConfigError(f"must be at least 1, got {self.block_size}", "block_size")
        if not self.shard_gb > 0:
            raise ConfigError(f"must be above 0, got {self.shard_gb}", "shard_gb")
        if self.to == "original" and (self.shift_logits is not None or self.model.dtype != "auto"):
            name = "model.dtype" if self.shift_logits is None else "shift_logits"
            raise ConfigError("has no effect on --to original, which changes no values", name)


def main(job: ConvertJob) -> None:
    from dllm_ray.models import convert
    from dllm_ray.models.adapters import base_of, is_adapter
    from dllm_ray.models.load import check_path

    if job.describe is not None:
        path = place(job.describe)
        check_path(path)
        print(convert.description(path))
        return
    check_path(job.model.path)
    from dllm_ray.viz.terminal import Progress

    progress: Progress | None = None
    shown = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal progress, shown
        progress = progress or Progress("convert", -(-total // _MIB), "MiB")
        if done == total or done // _MIB > shown:
            shown = done // _MIB
            progress.update(shown if done < total else -(-total // _MIB))

    path, adapter, shard_bytes = job.model.path, job.model.adapter, int(job.shard_gb * 1e9)
    if adapter is None and is_adapter(path):
        path, adapter = base_of(path), path
    objective = "native" if job.to == "original" else job.to
    target = convert.Target(objective, job.block_size, job.shift_logits, job.edit_time)
    output_dir = Path(job.output_dir).expanduser().resolve()
    if output_dir.is_dir() and any(output_dir.iterdir()) and not any((output_dir / name).is_file() for name in _MODELS):
        raise OutputError(f"{output_dir} exists and holds no model, so it isn't replaced; name another --output_dir")
    with new_directory(output_dir, job.overwrite) as directory:
        if adapter is not None and job.to == "original":
            merged = directory / "merged"
            convert.merge_adapter(path, adapter, merged, target)
            convert.to_original(str(merged), directory, shard_bytes, on_progress)
            shutil.rmtree(merged)
        elif adapter is not None:
            convert.merge_adapter(path, adapter, directory, target, job.model.dtype)
        elif job.to == "original":
            convert.to_original(path, directory, shard_bytes, on_progress)
        else:
            convert.to_native(path, directory, target, job.model.dtype, shard_bytes, on_progress)
    if progress is not None:
        progress.close()
    print(f"model     {output_dir}")


if __name__ == "__main__":
    sys.exit(run_job(ConvertJob, main, __doc__))
