"""How long the steps of a strand took: `seconds.jsonl` in its folder, a line for each process that ended."""

from __future__ import annotations

import json
from pathlib import Path

SECONDS = "seconds.jsonl"
ADDED = frozenset({"pretrain"})  # goes on where it was stopped: all its processes count


def note(log: Path, seconds: float, code: int) -> None:
    """Write down how long a step's process took; a step is named as its log. `code` is the process's exit code."""
    with (log.parent / SECONDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": log.stem, "seconds": round(seconds, 3), "code": code}) + "\n")


def read(folder: Path) -> dict[str, float]:
    """Return the seconds of each step that ended well: of its last process, of pretraining those of all of them."""
    found: dict[str, float] = {}
    so_far: dict[str, float] = {}
    try:
        lines = (folder / SECONDS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            step, seconds, code = str(row["step"]), float(row["seconds"]), int(row["code"])
        except (ValueError, KeyError, TypeError):  # a line cut short by a power cut
            continue
        so_far[step] = seconds + (so_far.get(step, 0.0) if step in ADDED else 0.0)
        if code == 0:
            found[step] = so_far[step]
    return found
