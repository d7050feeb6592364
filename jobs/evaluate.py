"""Evaluates a diffusion language model on lm-eval tasks, its requests fanned out over Ray workers.

    python jobs/evaluate.py --config configs/evaluate/digits.yaml --model.path outputs/digits/final
    python jobs/evaluate.py --model.path MODEL_DIR --evaluate.tasks [gsm8k_file] \\
        --evaluate.data_files.gsm8k_file test.jsonl --sampler.max_new_tokens 256 --sampler.steps 256
    python jobs/evaluate.py --config configs/evaluate/llada-8b-instruct.yaml --suite gsm8k_cot --limit 100 --plan

Leaves OUTPUT_DIR/results.json in lm-eval's own form, with the sampler's figures, and samples_TASK.jsonl; the same for
each variant of the sampler settings, or each line of a suite, in a folder of its own. Finished answers are kept in
OUTPUT_DIR/answers: the same command goes on where it was broken off. MLflow holds it all under the model's training
run.
"""

import sys
from pathlib import Path

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.evaluation.job import EvaluateJob, prepare, run


def main(job: EvaluateJob) -> None:
    asker = prepare(job)
    from dllm_ray.workers import connected_pool

    def open_pool(run_name: str):
        return connected_pool("evaluate", run_name, job.model, job.evaluate)

    if job.plan:
        _show_plan(job, asker, open_pool)
    else:
        run(job, asker, open_pool)


def _show_plan(job: EvaluateJob, asker, open_pool) -> None:
    from dllm_ray.evaluation.plan import timed
    from dllm_ray.viz.terminal import duration, table

    with open_pool("plan") as pool:
        planned = [plan for ask in job.asks() for plan in timed(asker.plan(ask), ask, pool, asker.context)]
    table(f"{job.model.path}, {pool.workers} workers", [plan.row() for plan in planned])
    print(f"in all    {duration(sum(plan.seconds or 0.0 for plan in planned))} at most, and what loading takes")


if __name__ == "__main__":
    sys.exit(run_job(EvaluateJob, main, __doc__))
