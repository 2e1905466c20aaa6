"""A folder for one at a time: a lock on a file in it, held by processes that may outlive the one that took it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mefem_cli import console
from mefem_cli.executors import Launch
from mefem_cli.stores import product

LOCK = ".lock"
RETRY_SECONDS = 0.3


@contextmanager
def claimed(folder: Path, launch: Launch) -> Iterator[int]:
    """Hold the lock of a folder; yield the descriptor that holds it, for `launch`. Waits where another one has it.

    That is another attempt, or a command that one left behind when it was killed.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        told = False
        while not product.lock(lock):
            if not told:
                console.note(f"another mefem, or a step it left behind, is at work in {folder}; waiting for it ...")
                told = True
            launch.wait(RETRY_SECONDS)
        yield lock
    finally:
        os.close(lock)


def is_claimed(folder: Path) -> bool:
    """Return whether somebody is at work in a folder."""
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not product.lock(lock, shared=True)
    finally:
        os.close(lock)
