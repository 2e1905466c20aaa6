"""One file with everything for an exact resume; read with `weights_only=True`, so it cannot run code."""

from __future__ import annotations

import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mefem_cli.errors import OutputError
from mefem_cli.stores import product

FORMAT, VERSION = "mefem-checkpoint", 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name and rename it. Raises OutputError if the disk is full."""
    try:
        with product.writing(path) as temporary:
            torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)
    except (RuntimeError, OSError) as error:  # torch's writer raises RuntimeErrors without the system's reason
        reason = getattr(error, "strerror", None) or "the disk seems full"
        raise OutputError(f"{path}: cannot be written ({reason}); free some space and type --resume") from error


class Writer:
    """Writes checkpoints in a thread, one at a time, while training goes on. Use it as a context.

    What the thread raises rises at the next `save` or at the end of the context.
    """

    def __init__(self, path: Path):
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Copy the state to host memory and write it; waits for the checkpoint before."""
        self.wait()
        for left_by_a_kill in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            left_by_a_kill.unlink(missing_ok=True)
        self._pending = self._thread.submit(save, self.path, _host_copy(state))

    def wait(self) -> None:
        """Return when all is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:  # else that one is the news
            self.wait()


def _host_copy(tree: Any) -> Any:
    """Copy every tensor nested in dicts, lists and tuples to host memory; the rest is kept."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _host_copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_host_copy(value) for value in tree)
    return tree


def load(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with `mapped` leaving its tensors on disk until they are used.

    Raises OutputError for a missing, damaged, foreign or newer file.
    """
    if not path.is_file():
        raise OutputError(f"{path}: no checkpoint to resume from; type --overwrite to train anew")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise OutputError(f"{path}: damaged or not a checkpoint; type --overwrite to train anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise OutputError(f"{path}: not a mefem checkpoint; type --overwrite to train anew")
    if state["version"] > VERSION:
        raise OutputError(
            f"{path}: version {state['version']} is from a newer mefem; upgrade with pip install -U mefem-cli"
        )
    return state


def refuse_longer(state: dict[str, Any], total_steps: int, epochs: int, path: Path) -> None:
    """Raise OutputError for a checkpoint that has done more steps than are planned."""
    if state["step"] > total_steps:
        raise OutputError(
            f"{path}: has done {state['step']} steps, more than the {total_steps} of --epochs {epochs}; "
            "type a larger number"
        )


def load_into(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a module's state; every name and shape must fit. Raises OutputError that names the first misfits."""
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    reshaped = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    if missing or unexpected or reshaped:
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(reshaped)}
        described = "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names)
        raise OutputError(f"{path}: does not fit the options; tensors {described}")
    module.load_state_dict(state)
