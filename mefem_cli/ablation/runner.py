"""Running cells: each step a process of its own, finished steps reused, failures recorded, stops passed on.

A strand is one pretraining with everything that is read from its encoder; strands run side by side, the steps of one
after another. Its folder:

    cells/<key>/run/              the run folder
    cells/<key>/features-<key>.h5
    cells/<key>/scores-<key>/     what `mefem probe -o` writes
    cells/<key>/*.log             stderr of each step
    cells/<key>/seconds.jsonl     how long each took
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from mefem_cli import console
from mefem_cli.ablation import steps, timing
from mefem_cli.ablation.grid import Cell
from mefem_cli.errors import MefemError, OutputError, Stopped

STOP_SECONDS = 60.0  # a step that was asked to stop may take so long to save a checkpoint
PROGRAM = (sys.executable, "-m", "mefem_cli")
STEP_VARIABLES = tuple(f"MEFEM_{step.upper()}_" for step in steps.STEPS)


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
    """One pretraining and the cells that are read from its encoder."""

    folder: Path
    seed: int
    cells: tuple[Cell, ...]
    tasks: tuple[str, ...]

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def store(self, cell: Cell) -> Path:
        """The feature store of a cell."""
        return self.folder / f"features-{cell.embed_key()}.h5"

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
        if (self.run / "model.json").is_file():
            return "trained"
        return "begun" if self.run.exists() else "new"


class StepFailed(Exception):
    """A step ended with an error; the text is its last line."""


class _Stopping(Exception):
    """The driver is stopping; nothing is recorded."""


class Runner:
    """Runs strands, `jobs` at once, each slot with a GPU of its own if there are any.

    Used as a context manager: it holds the folder's lock, which its children inherit, so a step left behind by a
    killed driver is waited for and never trained twice.
    """

    def __init__(self, out: Path, crops: list[Path], jobs: int, gpus: list[str]):
        self.crops = [str(folder.absolute()) for folder in crops]
        self.out, self.jobs = out, jobs
        self._slots: queue.Queue[str | None] = queue.Queue()
        for slot in range(jobs):
            self._slots.put(gpus[slot % len(gpus)] if gpus else None)
        self._lock = threading.Lock()
        self._stopping = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._claim: int | None = None

    def __enter__(self) -> Runner:
        self._claim = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note(
                f"another mefem ablate, or a step it left behind, is at work in {self.out}; waiting for it ..."
            )
            fcntl.flock(self._claim, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._claim is not None
        os.close(self._claim)

    def run(self, strands: list[Strand], done: Callable[[Strand, list[Outcome]], None]) -> None:
        """Run strands, finished ones first, and hand the outcomes of each to `done` in this thread as it ends.

        On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP the steps at work get SIGTERM, so that training saves a checkpoint; then
        KeyboardInterrupt or Stopped is raised.
        """
        pool = ThreadPoolExecutor(self.jobs)
        with _stop_signals():
            try:
                finished_first = sorted(strands, key=lambda strand: not strand.is_finished)
                futures = {pool.submit(self._outcomes, strand): strand for strand in finished_first}
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                self._stop()
                raise
            finally:
                pool.shutdown(cancel_futures=True)

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for process in running:
                process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # too slow, or Ctrl-C pressed again
            for process in running:
                process.kill()

    # One strand, in a thread of the pool --------------------------------------------------------------------------

    def _outcomes(self, strand: Strand) -> list[Outcome]:
        slot = self._slots.get()
        try:
            if not strand.is_finished:
                _make_room(strand)
            failures: dict[Path, str] = {}  # products that could not be made: other cells of the strand want them too
            return [outcome for cell in strand.cells for outcome in self._cell_outcomes(strand, cell, slot, failures)]
        finally:
            self._slots.put(slot)

    def _cell_outcomes(
        self, strand: Strand, cell: Cell, gpu: str | None, failures: dict[Path, str]
    ) -> Iterator[Outcome]:
        failure = ""
        if not all(strand.is_scored(cell, task) for task in strand.tasks):
            failure = _attempt(partial(self._pretrain, strand, cell, gpu), strand.run, failures)
            failure = failure or _attempt(partial(self._embed, strand, cell, gpu), strand.store(cell), failures)
        if failure:
            yield Outcome(cell, strand.seed, "", failure=failure)
        for task in strand.tasks:
            scores = strand.scores(cell, task)
            if not failure:
                task_failure = _attempt(partial(self._probe, strand, cell, task, gpu), scores, failures)
                if task_failure:
                    yield Outcome(cell, strand.seed, task, failure=task_failure)
            if strand.is_scored(cell, task):
                yield Outcome(cell, strand.seed, task, scores=_read_scores(scores))

    def _pretrain(self, strand: Strand, cell: Cell, gpu: str | None) -> None:
        if (strand.run / "model.json").is_file():
            return
        words = ["pretrain", *self.crops, *steps.arguments(cell.pretrain, "pretrain")]
        words += ["--seed", str(strand.seed), "-o", str(strand.run)]
        log = strand.folder / "pretrain.log"
        code = self._launch([*words, *["--resume"] * (strand.run / "config.yaml").is_file()], log, gpu)
        if code == OutputError.exit_code:  # a damaged checkpoint, or crops that have moved
            console.note(f"{strand.run}: cannot be resumed ({_last_line(log, code)}); training anew")
            code = self._launch([*words, "--overwrite"], log, gpu)
        _raise_if_failed(code, log)

    def _embed(self, strand: Strand, cell: Cell, gpu: str | None) -> None:
        from mefem_cli.stores.features import FeatureStore

        store = strand.store(cell)
        try:
            FeatureStore.open(store).close()
            return
        except MefemError:  # absent or damaged
            pass
        words = ["embed", *self.crops, *steps.arguments(cell.embed, "embed"), "--model", str(strand.run)]
        log = store.with_suffix(".log")
        _raise_if_failed(self._launch([*words, "--overwrite", "-o", str(store)], log, gpu), log)

    def _probe(self, strand: Strand, cell: Cell, task: str, gpu: str | None) -> None:
        if strand.is_scored(cell, task):
            return
        scores = strand.scores(cell, task)
        words = ["probe", "--store", str(strand.store(cell)), *steps.arguments(cell.probe, "probe")]
        words += ["--seed", str(strand.seed), "--overwrite", "-o", str(scores), "--", task]
        log = scores.with_suffix(".log")
        _raise_if_failed(self._launch(words, log, gpu), log)

    def _launch(self, words: list[str], log: Path, gpu: str | None) -> int:
        """Run one step to its end and return its exit code; its stderr goes to `log`."""
        assert self._claim is not None
        with self._lock, log.open("wb") as stderr:
            if self._stopping:
                raise _Stopping
            process = subprocess.Popen(
                [*PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=_environment(self.jobs, gpu),
                start_new_session=True,  # a Ctrl-C reaches it through the driver only, once
                pass_fds=[self._claim],
            )
            self._running.add(process)
        begun = time.monotonic()
        code = process.wait()
        timing.note(log, time.monotonic() - begun, code)
        self._running.discard(process)
        return code


def _attempt(step: Callable[[], None], makes: Path, failures: dict[Path, str]) -> str:
    """Run a step unless it failed before; return why it failed, or an empty text."""
    if makes not in failures:
        try:
            step()
        except StepFailed as error:
            failures[makes] = str(error)
    return failures.get(makes, "")


def _make_room(strand: Strand) -> None:
    """Make the folder and remove what a killed step left half-written."""
    strand.folder.mkdir(parents=True, exist_ok=True)
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


def _environment(jobs: int, gpu: str | None) -> dict[str, str]:
    """Return the environment of a step: its share of the cores, its GPU, and no options that a key does not know."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(STEP_VARIABLES)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environment


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(device: str = "auto") -> list[str]:
    """Return the NVIDIA GPUs that steps on `device` may be spread over, as CUDA_VISIBLE_DEVICES names them.

    Asked of the driver's own tool, as importing torch would cost seconds and a GPU context.
    """
    if device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [one.strip() for one in visible.split(",") if one.strip() not in ("", "-1")]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Raise Stopped on SIGTERM, SIGUSR1 and SIGHUP, so that steps are stopped first; Ctrl-C raises by itself."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}; run the same command again to go on")

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
