"""Running cells: each step a process of its own, finished steps reused, failures recorded.

A strand is one encoder with everything that is read from it; strands run side by side, the steps of one after another.
Its folder:

    cells/<key>/run/              the run folder, where an encoder is trained
    cells/<key>/features-<key>.h5
    cells/<key>/scores-<key>/     what `mefem probe -o` writes
    cells/<key>/*.log             stderr of each step
    cells/<key>/seconds.jsonl     how long each took
    cells/<key>/now.json          the step at work
    cells/<key>/failures.json     what could not be made, and why
    cells/<key>/.lock             held by who is at work in the folder, and by its steps

A given encoder has a folder with its features, and beside it one for each seed, `<key>-seed<seed>`, with scores.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mefem_cli import console
from mefem_cli.ablation import steps, timing
from mefem_cli.ablation.grid import Cell
from mefem_cli.errors import MefemError, OutputError
from mefem_cli.executors import Launch
from mefem_cli.executors.locks import claimed
from mefem_cli.stores import product
from mefem_cli.stores.ablations import CELLS, CellRecord, StrandRecord

NOW, FAILURES = "now.json", "failures.json"


@dataclass(frozen=True)
class Outcome:
    """What came of one cell, seed and task: rows of scores.json, or why there are none."""

    cell: Cell
    seed: int
    task: str  # empty where the failure came before any task
    scores: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True)
class Strand:
    """One encoder, trained or given, with one seed, and the cells that are read from it."""

    folder: Path  # absolute: it may be another machine that works in it
    seed: int
    cells: tuple[Cell, ...]
    tasks: tuple[str, ...]
    crops: tuple[str, ...] = ()  # folders, absolute
    model: str = ""  # the encoder, as typed after --model; empty: it is trained
    shared: Path | None = None  # the folder of a given encoder's features

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def encoder(self) -> str:
        """What `mefem embed --model` is given."""
        return self.model or str(self.run)

    @property
    def is_trained(self) -> bool:
        """Whether the encoder is there."""
        return bool(self.model) or (self.run / "model.json").is_file()

    def store(self, cell: Cell) -> Path:
        """The feature store of a cell."""
        return (self.shared or self.folder) / f"features-{cell.embed_key()}.h5"

    def scores(self, cell: Cell, task: str) -> Path:
        """The folder of a cell's scores."""
        return self.folder / f"scores-{cell.probe_key(task)}"

    def is_scored(self, cell: Cell, task: str) -> bool:
        """Whether a cell has its scores."""
        return (self.scores(cell, task) / "scores.json").is_file()

    @property
    def is_finished(self) -> bool:
        """Whether all cells have their scores."""
        return all(self.is_scored(cell, task) for cell in self.cells for task in self.tasks)

    @property
    def state(self) -> str:
        """`finished`, `trained`, `begun` or `new`."""
        if self.is_finished:
            return "finished"
        if self.is_trained:
            return "trained"
        return "begun" if self.run.exists() else "new"

    @property
    def record(self) -> StrandRecord:
        """What the ablation's provenance.json says of it."""
        epochs = 0 if self.model else steps.settled("pretrain", self.cells[0].pretrain)["epochs"]
        cells = [
            CellRecord(
                cell.name, cell.reads, self.store(cell).name, [self.scores(cell, one).name for one in self.tasks]
            )
            for cell in self.cells
        ]
        return StrandRecord(f"{CELLS}/{self.folder.name}", self.seed, epochs, cells)


class StepFailed(Exception):
    """A step ended with an error; the text is its last line."""


def run_strand(strand: Strand, launch: Launch) -> list[Outcome]:
    """Run what is not finished of a strand and return the outcomes of all its cells.

    Waits for whoever is at work in its folder: a step that a killed process left behind, or an earlier attempt on
    another machine.
    """
    if strand.is_finished:
        return list(_Attempt(strand, launch, None).outcomes())
    strand.folder.mkdir(parents=True, exist_ok=True)
    with claimed(strand.folder, launch) as lock:
        _make_room(strand)
        attempt = _Attempt(strand, launch, lock)
        try:
            return list(attempt.outcomes())
        finally:
            (strand.folder / NOW).unlink(missing_ok=True)


class _Attempt:
    """One go at a strand, which is claimed."""

    def __init__(self, strand: Strand, launch: Launch, lock: int | None):
        self.strand, self._launch_words, self._lock = strand, launch, lock
        self._failures: dict[str, str] = {}  # products that could not be made: other cells of the strand want them too

    def outcomes(self) -> Iterator[Outcome]:
        for cell in self.strand.cells:
            yield from self._cell_outcomes(cell)

    def _cell_outcomes(self, cell: Cell) -> Iterator[Outcome]:
        strand, failure = self.strand, ""
        reads = cell  # with the embedding that it is read from
        if not all(strand.is_scored(cell, task) for task in strand.tasks):
            failure = self._attempt(partial(self._pretrain, cell), strand.run)
            failure = failure or self._attempt(partial(self._embed, cell), strand.store(cell))
            if failure and cell.embed.get("patches") and not steps.reads_patches(cell.probe):
                # Other cells want patches, which this encoder may not have; this one goes on without.
                reads = replace(cell, embed={**cell.embed, "patches": False})
                failure = self._attempt(partial(self._pretrain, cell), strand.run)
                failure = failure or self._attempt(partial(self._embed, reads), strand.store(reads))
        if failure:
            yield Outcome(cell, strand.seed, "", failure=failure)
        for task in strand.tasks:
            scores = strand.scores(cell, task)
            if not failure:
                task_failure = self._attempt(partial(self._probe, cell, reads, task), scores)
                if task_failure:
                    yield Outcome(cell, strand.seed, task, failure=task_failure)
            if strand.is_scored(cell, task):
                yield Outcome(cell, strand.seed, task, scores=_read_scores(scores))

    def _attempt(self, step: Callable[[], None], makes: Path) -> str:
        """Take a step unless it failed before; return why it failed, or an empty text."""
        if makes.name not in self._failures:
            try:
                step()
            except StepFailed as error:
                self._failures[makes.name] = str(error)
                product.write_json(self.strand.folder / FAILURES, self._failures)
        return self._failures.get(makes.name, "")

    def _pretrain(self, cell: Cell) -> None:
        strand = self.strand
        if strand.is_trained:
            return
        words = ["pretrain", *strand.crops, *steps.arguments(cell.pretrain, "pretrain")]
        words += ["--seed", str(strand.seed), "-o", str(strand.run)]
        log = strand.folder / "pretrain.log"
        code = self._launch([*words, *["--resume"] * (strand.run / "config.yaml").is_file()], log)
        if code == OutputError.exit_code:  # a damaged checkpoint, or crops that have moved
            console.note(f"{strand.run}: cannot be resumed ({_last_line(log, code)}); training anew")
            code = self._launch([*words, "--overwrite"], log)
        _raise_if_failed(code, log)

    def _embed(self, cell: Cell) -> None:
        store = self.strand.store(cell)
        if _is_store(store):
            return
        if self.strand.shared is None:
            self._write_store(cell, store, self._lock)
            return
        store.parent.mkdir(parents=True, exist_ok=True)
        with claimed(store.parent, self._launch_words) as lock:  # other seeds read the same features
            if not _is_store(store):
                self._write_store(cell, store, lock)

    def _write_store(self, cell: Cell, store: Path, lock: int | None) -> None:
        words = ["embed", *self.strand.crops, *steps.arguments(cell.embed, "embed"), "--model", self.strand.encoder]
        log = store.with_suffix(".log")
        _raise_if_failed(self._launch([*words, "--overwrite", "-o", str(store)], log, lock), log)

    def _probe(self, cell: Cell, reads: Cell, task: str) -> None:
        strand = self.strand
        if strand.is_scored(cell, task):
            return
        scores = strand.scores(cell, task)
        words = ["probe", "--store", str(strand.store(reads)), *steps.arguments(cell.probe, "probe")]
        words += ["--seed", str(strand.seed), "--overwrite", "-o", str(scores), "--", task]
        log = scores.with_suffix(".log")
        _raise_if_failed(self._launch(words, log), log)

    def _launch(self, words: list[str], log: Path, lock: int | None = None) -> int:
        """Run one step to its end and return its exit code; its stderr goes to `log`."""
        now = {"step": words[0], "makes": log.stem, "since": time.time(), "host": socket.gethostname()}
        product.write_json(self.strand.folder / NOW, now)
        begun = time.monotonic()
        code = self._launch_words(words, log, self._lock if lock is None else lock)
        timing.note(log, time.monotonic() - begun, code)
        return code


def _is_store(path: Path) -> bool:
    """Return whether a complete store is there."""
    from mefem_cli.stores.features import FeatureStore

    try:
        FeatureStore.open(path).close()
    except MefemError:  # absent or damaged
        return False
    return True


def _make_room(strand: Strand) -> None:
    """Remove what is known of earlier failures, and what a killed step left half-written."""
    (strand.folder / FAILURES).unlink(missing_ok=True)
    for leftover in [*strand.folder.glob(".*.tmp"), *strand.run.glob(".*.tmp")]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _raise_if_failed(code: int, log: Path) -> None:
    if code:
        raise StepFailed(_last_line(log, code))


def _last_line(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"stopped by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    return lines[-1] if lines else f"exit code {code}"


def _read_scores(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["row"] == "score"]
