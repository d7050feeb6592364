"""Starts Ray over a Slurm allocation, runs a job on it, and leaves nothing behind. Called by job.sbatch.

    python3 cluster/slurm/launch.py jobs/sft.py --output_dir /shared/run

Every task of the allocation becomes a Ray node (node.py), all in one job step. They live as long as this process holds
the pipe that is their standard input, so they end with it however it ends. Other allocations' Ray is never touched.

SIGUSR1 (a time limit or a preemption is near) and SIGTERM (Slurm ends the job) become one interrupt of the job, which
saves and ends with status 130. If Slurm has not begun to end the job by then, the job is requeued, and the same command
goes on from what was saved. The exit status is the job's.

Knows nothing of Ray but node.py, and needs the standard library alone, since with a container it runs outside of it.
"""

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

from node import free_port, interface_address

HERE = Path(__file__).resolve().parent
INTERRUPTED = 130
_JOIN_S = 600
"""What nodes may take to start and join."""
_END_S = 20.0
"""What they may take to end: less than the 30 s that Slurm gives a job which it ends, by default."""


class Launch:
    """The processes of one allocation: the step of Ray nodes, and the job, one command after the other."""

    def __init__(self):
        self.asked_to_stop = False
        self._running = None
        self._interrupted = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._stop)

    def run(self, words, environment, needs=None):
        """Runs a command to its end, and returns its status; not at all if we have been asked to stop.

        Args:
            words: the command.
            environment: its variables.
            needs: a process without which it has no sense: it ends with it.
        """
        if self.asked_to_stop:
            return INTERRUPTED
        self._interrupted = False
        self._running = subprocess.Popen(words, env=environment, preexec_fn=_deaf_to_slurm)
        if self.asked_to_stop:  # meanwhile
            self.interrupt()
        while True:
            try:
                status = self._running.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                if needs is not None and needs.poll() is not None:
                    self.interrupt()
        self._running = None
        return 128 - status if status < 0 else status

    def interrupt(self):
        """Interrupts the command that is running, once: a second interrupt would end it before it has saved."""
        if self._running is not None and not self._interrupted:
            self._interrupted = True
            self._running.send_signal(signal.SIGINT)

    def _stop(self, number, frame):
        if not self.asked_to_stop:
            self.asked_to_stop = True
            print(f"slurm     {signal.Signals(number).name}: the job is interrupted", flush=True)
            self.interrupt()


def main(arguments):
    """Returns the exit status of the job."""
    if "SLURM_JOB_ID" not in os.environ:
        return _fail("not in a Slurm allocation: sbatch cluster/slurm/job.sbatch jobs/sft.py ...", 2)
    if not arguments or not Path(arguments[0]).is_file():
        given = f"{arguments[0]} is no file" if arguments else "no job is named"
        return _fail(f"{given}: sbatch cluster/slurm/job.sbatch jobs/sft.py ...", 2)
    launch = Launch()
    status = _run_on_ray(launch, arguments)
    if status == INTERRUPTED and launch.asked_to_stop and _state() == "RUNNING":
        done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"slurm     can't be requeued ({done.stderr.strip()}): submit the same command again", flush=True)
        else:
            print("slurm     requeued: the same command goes on from what was saved", flush=True)
    return status


def _run_on_ray(launch, arguments):
    try:
        host = _head_address()
    except OSError as error:
        name = os.environ.get("DLLM_RAY_INTERFACE") or os.environ["SLURMD_NODENAME"]
        return _fail(f"{name} has no address ({error}): DLLM_RAY_INTERFACE names a network interface of the nodes", 2)
    address = f"{host}:{free_port(host)}"
    environment = {
        **os.environ,
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",  # of this allocation's own: others may share its nodes
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # nodes find the package where the job does
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")])),
    }
    python = [*shlex.split(os.environ.get("DLLM_RAY_CONTAINER", "")), "python3"]
    tasks = _tasks()
    nodes = subprocess.Popen(
        [*_srun(tasks), *python, str(HERE / "node.py"), address, str(_JOIN_S), str(os.getpid())],
        env=environment,
        stdin=subprocess.PIPE,
    )
    began = False
    try:
        status = launch.run([*python, str(HERE / "joined.py"), str(tasks), str(_JOIN_S)], environment, needs=nodes)
        began = status == 0
        if began:
            status = launch.run([*python, *arguments], environment)
            if nodes.poll() is not None:
                print("slurm     the Ray nodes ended before the job; their messages are above", flush=True)
    finally:
        launch.interrupt()
        nodes.stdin.close()
        try:
            nodes.wait(_END_S)
        except subprocess.TimeoutExpired:
            print("slurm     the Ray nodes don't end: Slurm ends them with the job", flush=True)
            nodes.kill()
            nodes.wait()
    # A task that fails makes srun end the others, which looks like Slurm's announcement of an end.
    if not began and 0 < nodes.returncode < 128:
        return _fail("the Ray nodes could not be started; their messages are above")
    return status


def _srun(tasks):
    """The step that holds the Ray nodes, whatever the cluster's defaults are."""
    words = ["srun", f"--ntasks={tasks}", "--export=ALL", "--kill-on-bad-exit=1", "--wait=0"]
    if "SLURM_CPUS_PER_TASK" in os.environ:  # srun doesn't take it from sbatch
        words.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
    return words


def _tasks():
    """Tasks of the allocation."""
    if "SLURM_NTASKS" in os.environ:
        return int(os.environ["SLURM_NTASKS"])
    return int(os.environ["SLURM_JOB_NUM_NODES"]) * int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))


def _head_address():
    """The address of this node, the allocation's first, at which the others reach it."""
    if os.environ.get("DLLM_RAY_INTERFACE"):
        return interface_address(os.environ["DLLM_RAY_INTERFACE"])
    name = os.environ["SLURMD_NODENAME"]
    shown = subprocess.run(["scontrol", "show", "node", "-o", name], stdout=subprocess.PIPE, text=True).stdout
    known = dict(word.partition("=")[::2] for word in shown.split())
    return socket.gethostbyname(known.get("NodeAddr", name))


def _state():
    """What Slurm says of this job: RUNNING until it has decided to end it."""
    words = ["squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format=%T"]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True).stdout.strip()


def _deaf_to_slurm():
    """For a child: Slurm's signals are for us, who tell it; and the interrupt that tells it must reach it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _fail(message, status=1):
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
