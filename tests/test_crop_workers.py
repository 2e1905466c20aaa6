"""Processes that die cost one item; exceptions end the run."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys

import pytest

from mefem_cli.errors import MefemError, OutputError
from mefem_cli.faces.workers import Died, run_chunks


class Square:
    """A task that squares numbers; negative ones do harm."""

    def __call__(self, items):
        return [self.one(item) for item in items]

    def one(self, item):
        if item == -1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == -2:
            raise OutputError("disk full")
        if item == -3:
            os._exit(7)
        return item * item

    def close(self):
        pass


class Unstartable:
    def __init__(self):
        os._exit(3)


def results(chunks, num_workers=2):
    return {
        item: result
        for chunk, answers in run_chunks(Square, chunks, num_workers)
        for item, result in zip(chunk, answers, strict=True)
    }


def test_every_item_has_its_result():
    chunks = [list(range(start, start + 7)) for start in range(0, 70, 7)]
    assert results(chunks) == {item: item * item for item in range(70)}
    assert results([]) == {}


def test_a_crash_costs_one_item():
    found = results([[1, 2, -1, 3], [4, 5], [-3]])
    assert found == {1: 1, 2: 4, 3: 9, 4: 16, 5: 25, -1: Died("SIGSEGV"), -3: Died("exit code 7")}


def test_an_exception_rises():
    with pytest.raises(OutputError, match="disk full"):
        results([[1], [2, -2], [3]])


def test_workers_that_cannot_start_do_not_condemn_the_items():
    with pytest.raises(MefemError, match="died while it started: exit code 3"):
        list(run_chunks(Unstartable, [[1]], 1))


FAULTS = """
import resource
from mefem_cli.faces.workers import run_chunks

class Allocate:
    def __call__(self, items):
        return [self.faults() for _ in items]

    def faults(self):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(8 << 20) for _ in range(3)]
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def close(self):
        pass

if __name__ == "__main__":
    [(_, faults)] = run_chunks(Allocate, [list(range(10))], 1)
    print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are those of glibc")
def test_memory_of_one_item_is_there_for_the_next(tmp_path):
    """Three blocks of 2048 pages each; by default glibc gives them back as soon as they are free."""
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    printed = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True).stdout
    first, *later = map(int, printed.split())
    assert min(later) < 500 < first
