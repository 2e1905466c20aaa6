"""The allocator of a CPU step, in a process of its own: the setting stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGE_FAULTS_OF_A_STEP = """
import resource, sys
from mefem_cli.engine import allocator
kept = allocator.keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    for size in (3, 40, 12, 90):  # MB, under and over the largest threshold that glibc can learn
        bytearray(size << 20)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(4):
    step()
after = resource.getrusage(resource.RUSAGE_SELF)
print(kept, (after.ru_minflt - before.ru_minflt) / 4, after.ru_maxrss >> 10)
"""


def measure(choice: str) -> list[str]:
    command = [sys.executable, "-c", PAGE_FAULTS_OF_A_STEP, choice]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_freed_memory_is_used_again_without_page_faults():
    (_, faults, peak), (kept, faults_kept, peak_kept) = measure("default"), measure("keep")
    if kept == "False":
        pytest.skip("this C library is not glibc")
    assert float(faults) > 10_000  # about one per 4 KiB
    assert float(faults_kept) < 100
    assert int(peak_kept) < 1.2 * int(peak)  # MiB
