"""From data to a served model: trains, evaluates, compares, registers, and deploys what meets the rules.

    python jobs/pipeline.py                                       # the demo: configs/pipeline/digits.yaml
    python jobs/pipeline.py --config my-pipeline.yaml --output_dir outputs/tuesday
    python jobs/pipeline.py --train.config configs/sft/gsm8k_tiny.yaml --train.set '{data.path: train.jsonl}' \\
        --evaluate.config my-evaluation.yaml --promote.name gsm8k --promote.rules '[gsm8k_file/exact_match >= champion]'
    RAY_ADDRESS=auto python jobs/pipeline.py --serve.set '{port: 8080, model.replicas: 2}'
    ray job submit --working-dir . -- python jobs/pipeline.py --output_dir /shared/pipeline

The same command again goes on in the stage that was broken off; stages whose settings have changed are done again with
those after them, but for training, which asks for --fresh or another folder. Leaves OUTPUT_DIR/train/final,
evaluate/results.json, compare/compare.html and pipeline.json; MLflow has one run with those of the stages below it, and
the model in its registry. Ends with status 0 when the model is promoted, with 3 when it is registered and its scores
don't meet promote.rules, with 2 for bad input and 1 for failed work.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(ROOT)]

from dllm_ray.cli import run_job
from dllm_ray.pipeline.config import PipelineJob

DEMO = ROOT / "configs" / "pipeline" / "digits.yaml"


def main(job: PipelineJob) -> None:
    from dllm_ray.pipeline.run import run

    run(job, ROOT)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(word.startswith(("--config", "--train.", "-h", "--help")) for word in arguments):
        arguments = ["--config", str(DEMO), *arguments]
    sys.exit(run_job(PipelineJob, main, __doc__, arguments))
