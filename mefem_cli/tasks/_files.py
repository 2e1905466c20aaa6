"""Files that come with a data set: found beside its photos or named by an option, and read as hostile text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mefem_cli.errors import NoInputError

FOLDERS = ("", "Anno", "Eval", "labels", "annotations")  # where data sets keep them, below one of the photos' parents
NUM_PARENTS = 4


def find(task: str, names: Sequence[str], annotations: str | None, sources: np.ndarray) -> list[Path]:
    """Return the named files, from the folder (or the folder of the file) that the option names, else near the photos.

    Raises NoInputError that names the first file that is missing.
    """
    folders = _named(annotations) if annotations else _near(sources)
    found = []
    for name in names:
        places = [folder / below / name for folder in folders for below in FOLDERS]
        path = next((place for place in places if _is_file(place)), None)
        if path is None:
            where = annotations or "above the photos' folder"
            hint = f"type --annotations with the folder that holds {' and '.join(names)}"
            raise NoInputError(f"task {task}: there is no {name} in {where}; {hint}")
        found.append(path)
    return found


def _named(annotations: str) -> list[Path]:
    path = Path(annotations)
    return [path.parent if _is_file(path) else path]


def _near(sources: np.ndarray) -> list[Path]:
    first = next((str(source) for source in sources if source), "")
    return [*list(Path(first).parents)[:NUM_PARENTS], Path(".")] if first else [Path(".")]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that the file system cannot hold
        return False


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Raises NoInputError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise NoInputError(f"{path}: {error.strerror}; wanted a text file") from error
    return [line for line in text.splitlines() if line and not line.isspace()]


def last_parts(sources: np.ndarray, count: int = 1) -> list[str]:
    """Return the last parts of each source's path, lower case: `train/1.jpg` for two of them.

    >>> last_parts(np.array(["/data/Train/1.JPG", ""]), 2)
    ['train/1.jpg', '']
    """
    return ["/".join(str(source).rsplit("/", count)[-count:]).lower() for source in sources]


def stems(names: Sequence[str]) -> list[str]:
    """Return names without their suffix.

    >>> stems(["000001.jpg", ""])
    ['000001', '']
    """
    return [name.rpartition(".")[0] or name for name in names]
