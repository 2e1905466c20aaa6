"""One file with everything for an exact resume; read with `weights_only=True`, so it cannot run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from mefem_cli.errors import OutputError
from mefem_cli.stores import product

FORMAT, VERSION = "mefem-checkpoint", 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    with product.writing(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises OutputError for a missing, damaged, foreign or newer file."""
    if not path.is_file():
        raise OutputError(f"{path}: no checkpoint to resume from; type --overwrite to train anew")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise OutputError(f"{path}: damaged or not a checkpoint; type --overwrite to train anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise OutputError(f"{path}: not a mefem checkpoint; type --overwrite to train anew")
    if state["version"] > VERSION:
        raise OutputError(
            f"{path}: version {state['version']} is from a newer mefem; upgrade with pip install -U mefem-cli"
        )
    return state


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
