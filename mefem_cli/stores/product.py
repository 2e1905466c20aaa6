"""What every product on disk shares: its options, atomic writes, provenance, and the refusal to mix two runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mefem_cli import __version__
from mefem_cli.errors import OutputError, UsageError

RECORDED_PACKAGES = ("torch", "timm", "mediapipe", "numpy", "scikit-learn", "h5py", "pillow", "simplejpeg")
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ProductOptions:
    """The product."""

    out: str | None = None  # path of the product
    overwrite: bool = False  # replace the product if it exists
    resume: bool = False  # go on where an earlier run stopped (crop, embed and ablate always do)
    dry_run: bool = False  # say what would happen; touch nothing
    limit: int | None = None  # use only the first N inputs
    seed: int = 0  # the one number that all randomness flows from

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: wanted 0 or more")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit}: wanted 1 or more")


def parse_shard(typed: str | None) -> tuple[int, int]:
    """Return which part of how many `--shard i/N` means, (1, 1) without it. Raises UsageError.

    >>> parse_shard("2/4"), parse_shard(None)
    ((2, 4), (1, 1))
    """
    if typed is None:
        return 1, 1
    if match := re.fullmatch(r"(\d+)/(\d+)", typed):
        index, count = int(match[1]), int(match[2])
        if 1 <= index <= count:
            return index, count
    raise UsageError(f"--shard {typed}: wanted i/N with i from 1 to N, as in 1/4, 2/4, 3/4 and 4/4")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` if the block ends well, else remove it.

    A reader sees the old file or the complete new one. Works for a file or a folder that does not exist yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Ask for the bytes to reach the disk before the rename, so that a power cut cannot leave an empty file."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may hold any bytes


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def provenance(options: Mapping[str, Any], inputs: Mapping[str, str], seed: int, device: str = "cpu") -> dict[str, Any]:
    """Return what a product records about its making.

    `options` are the resolved options; `inputs` maps the path of each input product to the sha256 of its defining
    file (a crops folder's manifest.parquet, a run's model.safetensors, a store's file).
    """
    return {
        "mefem": __version__,
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": dict(options),
        "seed": seed,
        "versions": {name: _version(name) for name in RECORDED_PACKAGES},
        "python": sys.version.split()[0],
        "device": device,
        "inputs": dict(inputs),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def difference(recorded: Mapping[str, Any], wanted: Mapping[str, Any], ignore: frozenset[str] = frozenset()) -> str:
    """Describe where two sets of options differ, `mask was stripes, is quadrants`; empty where they agree."""
    changes = [
        f"{name.replace('_', '-')} was {recorded.get(name)}, is {wanted.get(name)}"
        for name in sorted({*recorded, *wanted} - ignore)
        if recorded.get(name) != wanted.get(name)
    ]
    return "; ".join(changes)


def refuse_existing(path: Path, overwrite: bool, holds: str) -> None:
    """Make way for a new product, a folder that holds a file of the name `holds`. Raises as `refuse_others` does."""
    if refuse_others(path, overwrite, holds):
        shutil.rmtree(path)


def refuse_others(path: Path, overwrite: bool, holds: str) -> bool:
    """Return whether there is something at `path` that a new product may replace.

    Raises OutputError if `path` exists and may not be overwritten, or is not an empty folder or such a product:
    nobody's photos, crops or home are removed by a slip of the keyboard.
    """
    if not path.exists() and not path.is_symlink():
        return False
    if not overwrite:
        raise OutputError(f"{path} exists; type --overwrite to replace it or -o for another place")
    if path.is_symlink() or not path.is_dir() or (any(path.iterdir()) and not (path / holds).exists()):
        raise OutputError(f"{path}: is not what this command makes (no {holds} in it), so it stays; name another -o")
    return True


def lock(file: Any, shared: bool = False) -> bool:
    """Lock an open file until it is closed; return whether it was free. It does not wait.

    A `shared` lock may be held by several at once, but not beside one that is not.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no lock, what is written is atomic all the same
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True
