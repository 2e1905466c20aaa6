"""Given encoders: what tells one from another, so that the features of each are made once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mefem_cli.errors import NoInputError
from mefem_cli.stores import product, runs

CONFIG = "config.json"  # beside the weights of timm and transformers
NO_FILES = ("hf", "timm")  # choices that may name a model without a file of this machine


def identity(spec: str) -> dict[str, Any]:
    """Return, as JSON, what determines the features of an encoder typed after --model: of its files the sha256.

    A model that lies elsewhere (`hf:OWNER/NAME`) is known by its name. Raises NoInputError where a file is missing, and
    UsageError for a choice that does not exist.
    """
    from mefem_cli.backbones import _frozen  # loads torch

    choice, argument = _frozen.split(spec)
    if choice == _frozen.OURS:
        return _of_run(Path(argument))
    path = Path(argument.rpartition("@")[2] if choice == "timm" else argument)
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_name(CONFIG)]
    if path.exists():
        architecture = argument.rpartition("@")[0] if choice == "timm" else ""
        return {"choice": choice, "architecture": architecture, "files": _digests(files)}
    if choice in NO_FILES:
        return {"spec": spec}
    raise NoInputError(f"--model {spec}: there is no {path}; name the file with its weights")


def _of_run(path: Path) -> dict[str, Any]:
    """Return the weights of a run by their sha256, and what model.json says but for how it came about."""
    folder, description = runs.describe_model(path)
    known = {name: value for name, value in description.items() if name != "provenance"}
    return {"model": known, "files": _digests(folder / name for name in runs.ENCODER_FILES.values())}


def _digests(paths: Iterable[Path]) -> list[str]:
    return [product.file_sha256(path) for path in paths if path.is_file()]
