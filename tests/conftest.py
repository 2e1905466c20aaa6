"""What several test files need."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mefem_cli import console

# A busy machine is no failure: examples may take their time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test pictures beside the checkout; it never enters the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there are no test pictures in {folder}")
    return folder


@pytest.fixture(autouse=True)
def talkative() -> None:
    """What a command of an earlier test was asked for (--quiet, --json) lasts as long as the process."""
    console.configure(console.ConsoleOptions())
