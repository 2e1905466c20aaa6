"""What several test files need."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mefem_cli import console
from mefem_cli.main import main

# A busy machine is no failure: examples may take their time. They are the same in every run, so that what failed fails
# again; `pytest --hypothesis-profile explore` looks for new ones.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")


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


@pytest.fixture
def mefem_command(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in a folder of its own: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mefem_cli.console.stdin_is_pipe", lambda: False)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mefem", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run
