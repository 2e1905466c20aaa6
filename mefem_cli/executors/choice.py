"""From --on to the executor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mefem_cli.executors import Executor
from mefem_cli.executors.local import Local
from mefem_cli.executors.on_ray import OnRay
from mefem_cli.executors.options import OnOptions


def open_executor(options: OnOptions, jobs: int | None, gpus: Sequence[str], wants_gpu: bool, shared: Path) -> Executor:
    """Return the executor for `--on`, `jobs` pieces of work at once (None: as many as it has room for).

    `gpus` are those of this machine; `wants_gpu`: a piece of work on Ray gets one if the cluster has some. `shared` is
    a file of the product by which all machines of a cluster are asked whether they see it.
    """
    if options.is_local:
        return Local(jobs or len(gpus) or 1, list(gpus))
    return OnRay(options.on, jobs, wants_gpu, shared)
