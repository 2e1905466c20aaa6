"""Processes that die cost one item; exceptions end the run."""

from __future__ import annotations

import os
import signal

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
