"""Sets evaluation runs beside the published scores of the same models and benchmarks.

    python jobs/compare.py --tracking.uri sqlite:///outputs/evaluate/mlruns.db
    python jobs/compare.py --tracking.uri http://mlflow:5000 --model LLaDA-8B-Instruct --task gsm8k,humaneval
    python jobs/compare.py --tracking.uri sqlite:///outputs/digits/mlruns.db --published LLaDA-8B-Instruct
    python jobs/compare.py --tracking.uri http://mlflow:5000 --html /var/www/html/scores.html

Prints a table, and leaves OUTPUT_DIR/compare.md, compare.json, and a page with plots (compare.html, or --html). An
MLflow run of its own in the same store holds them as well. Beside it MLflow has one run for each column; a saved view
of the experiment sets them side by side, and the job prints its address.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(ROOT)]

from dllm_ray.cli import run_job
from dllm_ray.evaluation.compare_job import CompareJob, run

OFFICIAL_SETTINGS = ROOT / "configs" / "evaluate"


def main(job: CompareJob) -> None:
    run(job, OFFICIAL_SETTINGS)


if __name__ == "__main__":
    sys.exit(run_job(CompareJob, main, __doc__))
