"""What a user can mend: one line with what was given, what is wrong and what to type, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable


class MefemError(Exception):
    """Base of all errors that end a command with one line instead of a traceback."""

    exit_code = 1


class UsageError(MefemError):
    """The command line, a configuration file or a table asks for something that does not exist or make sense."""

    exit_code = 2


class NoInputError(MefemError):
    """There is no usable input, or more of it was rejected than `--max-rejects` allows."""

    exit_code = 3


class OutputError(MefemError):
    """The output exists, was made with other options, or cannot be written."""

    exit_code = 4


class OutOfMemory(MefemError):
    """The device is out of memory even with one image at a time."""

    exit_code = 5


class Diverged(MefemError):
    """Training produced non-finite losses several steps in a row."""

    exit_code = 6


class Stopped(MefemError):
    """A signal asked for a stop; a checkpoint was saved first."""

    exit_code = 75


class Interrupted(Stopped):
    """Ctrl-C asked for a stop; a checkpoint was saved first."""

    exit_code = 130


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the nearest known word, else a list of the known words.

    >>> did_you_mean("strips", ["stripes", "quadrants"])
    '; did you mean "stripes"?'
    """
    from difflib import get_close_matches

    known = sorted(known)
    nearest = get_close_matches(given, known, n=1)
    if nearest:
        return f'; did you mean "{nearest[0]}"?'
    return f"; there is {', '.join(known)}" if known else ""
