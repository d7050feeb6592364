"""Trains a diffusion language model on documents.

    python jobs/pretrain.py --config configs/pretrain/tiny.yaml --data.path book.txt
    python jobs/pretrain.py --model.path MODEL_DIR --data.path 'corpus/*.jsonl' --train.max_steps 10000
    ray job submit --working-dir . -- python jobs/pretrain.py --config my.yaml --output_dir /shared/my-run

Documents are laid end to end and cut to `train.max_length`. With `train.max_steps` training begins at once and files
are tokenized ahead of it; with `train.epochs` they are counted first. Resuming, interrupts and results are as in
jobs/sft.py.
"""

import sys
from pathlib import Path

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.training.job import PretrainJob


def main(job: PretrainJob) -> None:
    from dllm_ray.training.run import run

    run(job, "pretrain")


if __name__ == "__main__":
    sys.exit(run_job(PretrainJob, main, __doc__))
