"""Looks over this machine, or a cluster, before work is given to it, and says what to mend.

    python jobs/doctor.py
    python jobs/doctor.py --cluster configs/clusters/shared-folder.yaml --nodes 4 --json doctor.json
    RAY_ADDRESS=HEAD:6379 python jobs/doctor.py --train.storage_path /shared/checkpoints --tracking.uri http://mlflow:5000
    ray job submit --working-dir . -- python jobs/doctor.py

On every node of the cluster of RAY_ADDRESS, or of a Ray of its own on this machine: versions, limits and disks, clocks,
storage, the hub, MLflow, GPUs, and process groups between all pairs of nodes. Ends with status 0 where nothing is wrong
(warnings count as right), else with 1. What it writes to try a place is deleted again.
"""

import json
import sys
import time
from pathlib import Path

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.config import without_secrets
from dllm_ray.doctor.config import DoctorConfig
from dllm_ray.doctor.findings import Finding, count, lines, number, tree
from dllm_ray.errors import EnvironmentFaults
from dllm_ray.output import complete_file, printable, writable_folder


def main(job: DoctorConfig) -> None:
    if job.json is not None:
        writable_folder(Path(job.json).expanduser().absolute().parent)
    from dllm_ray.doctor.run import examine

    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        print(printable("\n".join(lines(finding))), flush=True)

    began = time.monotonic()
    facts = examine(job, tell)
    faults, warnings = count(found, "fault"), count(found, "warning")
    took = time.monotonic() - began
    print(f"{number(faults, 'fault')}, {number(warnings, 'warning')}, in {took:.0f} s", flush=True)
    if job.json is not None:
        with complete_file(Path(job.json).expanduser().absolute()) as file:
            json.dump(without_secrets(tree(found, **facts)), file, indent=2, ensure_ascii=False)
    if faults:
        raise EnvironmentFaults(f"{number(faults, 'thing')} to mend: see above")


if __name__ == "__main__":
    sys.exit(run_job(DoctorConfig, main, __doc__))
