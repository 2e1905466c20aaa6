"""A run's encoder for other libraries: timm, Hugging Face transformers, ONNX, or one folder of safetensors.

Writes a folder with the weights, a model card (data, recipe, metrics, what it must not be used for) and a record. It
is loaded back and compared with the run's encoder before it gets its name. RUN is a run folder or one of its
.safetensors files; default: the pipe, else runs/latest.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mefem_cli.parts import Given

ARGUMENT = ("run", "A run folder or its model.safetensors; default: the pipe, else runs/latest.")
OPTIONS = ("exporting:ExportOptions", "console:ConsoleOptions")


def run(arguments: list[str], given: Given) -> None:
    """Export one encoder."""
    from pathlib import Path

    from mefem_cli import console
    from mefem_cli.errors import UsageError
    from mefem_cli.stores import runs

    begun = time.monotonic()
    if len(arguments) > 1:
        raise UsageError(f"one run at a time, not {len(arguments)}; type mefem export {arguments[0]}")
    if arguments:
        path = Path(arguments[0])
    elif console.stdin_is_pipe():
        path = console.read_pipe("a run")
    else:
        path = runs.latest_run(Path("runs"))  # raises before torch is loaded
    from mefem_cli import exporting

    out = exporting.export(path, given.build("exporting", "ExportOptions"))
    console.product(out, time.monotonic() - begun)
