"""Trains a diffusion language model on conversations.

    python jobs/sft.py                                            # the demo: configs/sft/digits.yaml
    python jobs/sft.py --config configs/sft/gsm8k_tiny.yaml --data.path train.jsonl
    python jobs/sft.py --model.path MODEL_DIR --data.path chats.jsonl --output_dir outputs/my-run
    python jobs/sft.py --config configs/sft/llada-8b-lora.yaml --train.strategy fsdp2 --train.workers 8 ...
    ray job submit --working-dir . -- python jobs/sft.py --output_dir /shared/my-run

The same command again goes on where a killed run stopped; an interrupt (Ctrl-C) saves a checkpoint first; --fresh
starts over. Leaves OUTPUT_DIR/final, a Hugging Face directory, and records the run in MLflow.
"""

import sys
from pathlib import Path

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.training.job import SFTJob

DEMO = Path(__file__).resolve().parents[1] / "configs" / "sft" / "digits.yaml"


def main(job: SFTJob) -> None:
    from dllm_ray.training.run import run

    run(job, "sft")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    names_its_data = any(
        word.startswith(("--config", "--data.path", "--data.sources", "-h", "--help")) for word in arguments
    )
    if not names_its_data:
        arguments = ["--config", str(DEMO), *arguments]
    sys.exit(run_job(SFTJob, main, __doc__, arguments))
