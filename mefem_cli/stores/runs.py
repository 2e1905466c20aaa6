"""A run folder: resolved options, metrics, log, checkpoint, encoders, report. Knows paths and files, not tensors."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.stores import product

MODEL_FORMAT, MODEL_VERSION = "mefem-model", 1
ENCODER_FILES = {"target": "model.safetensors", "source": "source.safetensors"}
LATEST = "latest"  # the link to the last run that finished, beside the runs


class Run:
    """One training run on disk. Everything but the metrics and the log is written under a temporary name first."""

    def __init__(self, path: Path):
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoint_path = path / "last.ckpt"
        self.figures = path / "figures"

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> Run:
        """Make the folder and write its configuration."""
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        product.write_text(run.config_path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run folder. Raises NoInputError if it is none."""
        run = cls(path)
        if not run.config_path.is_file():
            raise NoInputError(f"{path}: no run folder (it has no config.yaml); mefem pretrain makes one")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run. Raises OutputError where one does already."""
        with (self.path / "run.log").open("a", encoding="utf-8") as file:
            if not product.lock(file):
                raise OutputError(
                    f"{self.path}: another mefem pretrain is at work there; wait for it or name another -o"
                )
            yield

    @property
    def is_finished(self) -> bool:
        """Whether the encoder has been written."""
        return (self.path / "model.json").is_file()

    def config(self) -> dict[str, Any]:
        """Return the resolved options. Raises OutputError for a damaged file."""
        try:
            content = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise OutputError(f"{self.config_path}: damaged; type --overwrite to train anew") from error
        if not isinstance(content, dict) or "crops" not in content:
            raise OutputError(f"{self.config_path}: damaged; type --overwrite to train anew")
        return content

    def log(self, message: str) -> None:
        """Append a line with the time to run.log."""
        with (self.path / "run.log").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one JSON line to metrics.jsonl; what is not finite becomes null, as JSON has no NaN."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl; a last line that a kill cut short is left out."""
        if not self.metrics_path.exists():
            return
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run will write again."""
        kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
        product.write_text(self.metrics_path, "".join(kept))

    def write_model(self, description: dict[str, Any]) -> None:
        """Write model.json, which says that the encoders are complete."""
        product.write_json(self.path / "model.json", {"format": MODEL_FORMAT, "version": MODEL_VERSION, **description})

    def become_latest(self) -> None:
        """Point `latest` beside the run folder at it, unless something else than a link has that name."""
        latest = self.path.parent / LATEST
        if latest.exists() and not latest.is_symlink():
            return
        temporary = self.path.parent / f".{LATEST}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.path.name)
        os.replace(temporary, latest)


def set_aside(path: Path) -> Path | None:
    """Make way for a run that replaces the one at `path`; return where the old one is kept until the new is finished.

    None where there is nothing to keep. A run that was replacing another and never finished is not kept: the one
    before it still is. Raises OutputError for what is no run, and where one is being trained.
    """
    if not product.refuse_others(path, overwrite=True, holds="config.yaml"):
        return None
    if (path / "run.log").exists():
        with Run(path).locked():
            pass  # nobody trains it
    aside = _replaced(path)
    if not any(path.iterdir()) or (aside.exists() and not Run(path).is_finished):
        shutil.rmtree(path)
        return aside if aside.exists() else None
    product.refuse_existing(aside, overwrite=True, holds="config.yaml")
    path.rename(aside)
    return aside


def forget_replaced(path: Path) -> None:
    """Remove what a finished run replaced."""
    product.refuse_existing(_replaced(path), overwrite=True, holds="config.yaml")


def _replaced(path: Path) -> Path:
    whole = Path(os.path.abspath(path))  # `.` has no name
    return whole.with_name(f".{whole.name}.replaced")


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, in lists too, by None."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_model(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a run's folder and its model.json, given the folder or one of its .safetensors files.

    Raises NoInputError where there is no finished model and UsageError for one from a newer mefem.
    """
    folder = path.parent if path.suffix == ".safetensors" else path
    if not folder.exists():
        raise NoInputError(f"{path}: no such run; mefem pretrain makes one, or name it with --model")
    description_path = folder / "model.json"
    if not description_path.is_file():
        hint = (
            "it is not finished: go on with mefem pretrain --resume -o"
            if (folder / "config.yaml").exists()
            else "it is no run folder; give one with --model"
        )
        raise NoInputError(f"{folder}: has no model.json; {hint} {folder if 'resume' in hint else ''}".rstrip())
    try:
        description = json.loads(description_path.read_text(encoding="utf-8"))
        if description["format"] != MODEL_FORMAT or not isinstance(description["version"], int):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise NoInputError(f"{description_path}: not the description of a mefem model") from error
    if description["version"] > MODEL_VERSION:
        raise UsageError(
            f"{description_path}: version {description['version']} is from a newer mefem (this one reads "
            f"{MODEL_VERSION}); upgrade with pip install -U mefem-cli"
        )
    return folder, description


def latest_run(root: Path) -> Path:
    """Return `root/latest`. Raises NoInputError where no run has finished there."""
    path = root / LATEST
    if not path.exists():
        raise NoInputError(f"{path}: no finished run; start one with mefem pretrain, or name a model with --model")
    return path.resolve()


def newest_unfinished(root: Path) -> Path:
    """Return the unfinished run folder in `root` that was changed last. Raises NoInputError if there is none.

    Links and hidden folders are passed over: `latest`, and runs that --overwrite set aside.
    """
    folders = [path.parent for path in root.glob("[!.]*/config.yaml") if not path.parent.is_symlink()]
    unfinished = [folder for folder in folders if not Run(folder).is_finished]
    if not unfinished:
        raise NoInputError(f"{root}: no unfinished run to resume; name one with -o")
    return max(unfinished, key=lambda path: path.stat().st_mtime)
