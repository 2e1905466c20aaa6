"""One process per GPU: start them with torchrun, recognise those that torchrun or Slurm started, write a job script.

Imports no torch, so that the command line can be read first.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mefem_cli.errors import MefemError, UsageError

STATUS_FILE = "MEFEM_STATUS_FILE"  # where the first process of a launched job leaves its exit code
STOP_SECONDS = 600  # what the processes have to end a step and write a checkpoint before they are killed
FIRST_PORT, NUM_PORTS = 15_000, 15_000  # under the range from which Linux lends ports to clients
FLAGS_WITH_VALUE, FLAGS = ("--gpus",), ("--print-sbatch",)


@dataclass(frozen=True)
class LaunchOptions:
    """Several devices."""

    gpus: int = 1  # GPUs of this machine to train on, one process each; without GPUs: processes on the CPU
    print_sbatch: bool = False  # print a Slurm job script for this command and start nothing

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus {self.gpus}: wanted 1 or more")


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job, and where the job's processes meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    address: str = ""
    port: int = 0


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """Return this process's place in a job of torchrun or of `srun`; alone if neither started it.

    In the batch shell of a Slurm job, outside `srun`, SLURM_PROCID and SLURM_NTASKS are set as well: only
    SLURM_STEP_NUM_TASKS says that the other tasks are really there.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ and "MASTER_ADDR" in environ:
        return Place(
            rank=int(environ["RANK"]),
            size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", 0)),
            local_size=int(environ.get("LOCAL_WORLD_SIZE", 1)),
            address=environ["MASTER_ADDR"],
            port=int(environ.get("MASTER_PORT", FIRST_PORT)),
        )
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "localhost")
        job = int(environ.get("SLURM_JOB_ID", 0)) + int(environ.get("SLURM_STEP_ID", 0))
        return Place(
            rank=int(environ["SLURM_PROCID"]),
            size=int(environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environ.get("SLURM_LOCALID", 0)),
            local_size=_first_count(environ.get("SLURM_STEP_TASKS_PER_NODE", "1")),
            address=environ.get("MASTER_ADDR") or first_host(nodes),
            port=int(environ.get("MASTER_PORT", FIRST_PORT + job % NUM_PORTS)),
        )
    return Place()


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list.

    >>> first_host("gpu[007-009,012],login1")
    'gpu007'
    """
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _first_count(tasks_per_node: str) -> int:
    """Return 4 for Slurm's `4(x2),3`: four tasks on each of two nodes, then three."""
    return int(re.match(r"\d+", tasks_per_node)[0])  # type: ignore[index]


def run_processes(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `mefem ARGUMENTS` in `num_processes` processes under torchrun; return the exit code of the first.

    SIGTERM, SIGUSR1 and Ctrl-C reach all of them. Raises MefemError if a process was killed.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from mefem_cli.engine.device import cores

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // num_processes)))
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))  # torchrun's own ends it
    logging.disable(logging.CRITICAL)  # torchrun's report of a failure; ours is one line
    options = ["--standalone", "--nproc-per-node", str(num_processes)]
    if "--shutdown-timeout" in torchrun.get_args_parser()._option_string_actions:  # torch 2.8; before: 30 s
        options += ["--shutdown-timeout", str(STOP_SECONDS)]
    with tempfile.TemporaryDirectory(prefix="mefem-") as folder:
        status = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(status)
        try:
            job = torchrun.parse_args([*options, "-m", "mefem_cli"])
            job.training_script_args = list(arguments)  # its parser would take --monitor for --monitor-interval
            torchrun.run(job)
            return 0
        except ChildFailedError as error:
            return int(status.read_text()) if status.exists() else _judge(error.failures, num_processes)
        except SignalException as error:
            return int(status.read_text()) if status.exists() else 128 + error.sigval
        finally:
            del os.environ[STATUS_FILE]
            logging.disable(logging.NOTSET)


def _judge(failures: Mapping[int, Any], num_processes: int) -> int:
    """Return the exit code of a job whose first process left none; raise MefemError for one that was killed.

    A process whose peer is gone ends with code 1, so other codes say more.
    """
    killed = {rank: one for rank, one in failures.items() if one.exitcode < 0 and one.exitcode != -signal.SIGTERM}
    if killed:
        rank, failure = min(killed.items())
        raise MefemError(
            f"process {rank} of {num_processes} was killed by {failure.signal_name()} and the others were stopped; "
            "go on with --resume (SIGKILL is often the system when memory runs out)"
        )
    codes = [one.exitcode for one in failures.values() if one.exitcode > 0]
    return max(codes, default=1)


def write_status(code: int) -> None:
    """Leave the exit code of a launched job's first process where `run_processes` looks for it."""
    if STATUS_FILE in os.environ:
        Path(os.environ[STATUS_FILE]).write_text(str(code))


def is_launched() -> bool:
    """Whether `run_processes` started this process, and tells the user what ended the job."""
    return STATUS_FILE in os.environ


def sbatch_script(num_gpus: int, arguments: Sequence[str], out: str | None) -> str:
    """Return a Slurm job script that runs `mefem ARGUMENTS` on `num_gpus` GPUs of one node and resumes by itself.

    Five minutes before its time is over Slurm sends SIGUSR1; the run saves a checkpoint and exits 75, and the script
    asks for another turn.
    """
    words = _without_launch_options(arguments)
    command = " ".join(shlex.quote(word) for word in words)
    out_given = shlex.quote(out) if out else '"runs/slurm-$SLURM_JOB_ID"'
    named = command if out else f'{command} -o "$out"'
    return f"""#!/bin/bash
#SBATCH --job-name=mefem
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={num_gpus}
#SBATCH --gpus-per-node={num_gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mefem-%j.log

cd {shlex.quote(os.getcwd())}
out={out_given}
if [ -e "$out/config.yaml" ]; then
    srun --kill-on-bad-exit=1 {shlex.quote(sys.executable)} -m mefem_cli pretrain --resume -o "$out"
else
    srun --kill-on-bad-exit=1 {shlex.quote(sys.executable)} -m mefem_cli {named}
fi
code=$?
if [ $code = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def _without_launch_options(arguments: Sequence[str]) -> list[str]:
    words, skip = [], False
    for word in arguments:
        if not skip and not word.startswith(tuple(f"{flag}=" for flag in FLAGS_WITH_VALUE)):
            skip = word in FLAGS_WITH_VALUE
            if not skip and word not in FLAGS:
                words.append(word)
        else:
            skip = False
    return words
