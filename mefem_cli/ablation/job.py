"""What `mefem ablate` runs: a grid, checked before anything is trained, then its cells, then its tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mefem_cli import console
from mefem_cli.ablation import differences, grid_file, models, results, steps, summary, tables
from mefem_cli.ablation import grid as grids
from mefem_cli.ablation.grid import Cell, Grid
from mefem_cli.ablation.runner import Outcome, Strand, run_strand
from mefem_cli.ablation.tasks import LabelledFaces, usable_tasks
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.executors import Lost
from mefem_cli.executors.choice import open_executor
from mefem_cli.executors.local import visible_gpus
from mefem_cli.executors.locks import LOCK, RETRY_SECONDS
from mefem_cli.executors.options import OnOptions
from mefem_cli.parts import Given
from mefem_cli.stores import ablations
from mefem_cli.stores import product as products
from mefem_cli.stores.ablations import CELLS, PROVENANCE
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.product import ProductOptions

ABLATIONS = Path("ablations")
MOST_LETTERS = 120  # of a command line in an error
RESULTS = "results.csv"


@dataclass(frozen=True)
class AblateOptions:
    """The grid."""

    vary: list[str] = field(
        default_factory=list
    )  # OPTION=A,B,C of pretrain, embed or probe; several: every combination
    set: list[str] = field(default_factory=list)  # OPTION=VALUE for all cells; wins over a preset or file
    task: list[str] = field(default_factory=list)  # what the encoders are scored on; default: the preset's, else bmi
    model: list[str] = field(default_factory=list)  # a given encoder, as in mefem embed, also several: each is embedded
    # once and scored as the others; alone where the grid says nothing of pretraining
    head: str | None = None  # heads of every cell, as in mefem probe; default: the preset's, else linear and mlp
    features: str | None = None  # features of every cell, as in mefem probe
    seeds: int | None = None  # repetitions of each cell, from --seed on; default: the preset's, else 1
    epochs: int | None = None  # epochs of the longest cells; shorter ones scale in proportion
    reference: list[str] = field(default_factory=list)  # cell that others are compared with, as "mask=stripes width=3";
    # several: each group of a preset with its own; default: the preset's, else the first cell
    crops: list[str] = field(default_factory=list)  # crops folder, also several; default: crops/
    status: bool = False  # show how far it is, also from another terminal while it runs; touches nothing
    jobs: int | None = None  # pretrainings at once; default: one for each GPU, else 1; on Ray what it has room for

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "jobs"):
            if getattr(self, name) is not None:
                grids.whole_number(name, getattr(self, name))


def read_grid(named: list[str], options: AblateOptions, machine: dict[str, Any]) -> Grid:
    """Return the grid of a preset or file with flags over it. `machine`: what DeviceOptions and --limit set.

    Raises UsageError for whatever is unknown or contradicts itself.
    """
    if len(named) > 1:
        raise UsageError(f"one preset or grid file at a time; given {', '.join(named)}")
    if not named and not options.vary and not options.model:
        known = ", ".join(grid_file.presets())
        raise UsageError(f"name a preset ({known}), a grid file, or --vary, such as --vary mask=stripes,quadrants")
    vary = _once("--vary", [grids.parse_vary(one) for one in options.vary])
    forced = _once("--set", [grids.parse_set(one) for one in options.set])
    flags = {**machine, "head": options.head, "features": options.features}
    typed = {name: steps.parse(name, value) for name, value in flags.items() if value is not None}
    for name in forced.keys() & typed.keys():
        raise UsageError(f"--set {name} and --{name}: give one of them")
    forced |= typed
    grid = grid_file.read_grid(named[0]) if named else Grid("-".join(vary) or "models")
    if options.reference:
        grid = replace(grid, references=[grids.parse_reference(one) for one in options.reference])
    return grids.with_flags(grid, vary, forced, options.task, options.seeds, options.epochs, options.model)


def _once(flag: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(
                f"{flag} {name} is given twice; " + ("join the values with commas" if flag == "--vary" else "give one")
            )
        found[name] = value
    return found


def folder_of(grid: Grid, out: str | None) -> Path:
    """Return where a grid's products go."""
    return Path(out) if out else ABLATIONS / grid.name


@dataclass
class Job:
    """A grid on crops, ready to run."""

    grid: Grid
    cells: list[Cell]
    crops: Crops
    product: ProductOptions
    out: Path
    where: OnOptions
    jobs: int | None  # cells at once; None: as many as the cluster has room for
    gpus: list[str]
    strands: list[Strand]

    @classmethod
    def prepare(
        cls,
        named: list[str],
        options: AblateOptions,
        machine: dict[str, Any],
        product: ProductOptions,
        where: OnOptions | None = None,
    ) -> Job:
        """Read grid and crops and check all that can be checked before training; nothing is written.

        Raises UsageError for options, NoInputError where crops or a task's label are missing.
        """
        where = where or OnOptions()
        where.require_ray()
        grid = read_grid(named, options, machine)
        cells = grids.expand(grid)
        is_changed = any((options.vary, options.set, options.model, options.head, options.features, options.epochs))
        known = differences.known_references(grid.references, cells, bool(options.reference) or not is_changed)
        grid = replace(grid, references=known)
        for cell in cells:
            Given(cell.pretrain).build("engine.plan", "TrainOptions")  # raises for values out of range
            Given(cell.embed).build("engine.device", "DeviceOptions")
        if options.epochs and all(cell.model for cell in cells):
            console.warn("--epochs has no effect: nothing is trained")
        for name in grids.without_effect(grid, cells):
            console.warn(f"--{name.replace('_', '-')} has no effect in any cell")
        crops = _open_crops(options.crops, product.limit)
        may_drop = bool(named) and named[0] in grid_file.presets() and not options.task
        grid = replace(grid, tasks=usable_tasks(LabelledFaces(crops), grid.tasks, cells, product.seed, may_drop))
        out = folder_of(grid, product.out)
        strands = _strands(cells, crops, grid, product.seed, out)
        gpus = visible_gpus(grid.forced.get("device", "auto")) if where.is_local else []
        jobs = options.jobs or ((len(gpus) or 1) if where.is_local else None)
        return cls(grid, cells, crops, product, out, where, jobs and min(jobs, len(strands)), gpus, strands)

    @property
    def seeds(self) -> list[int]:
        """The seed of each repetition."""
        return [self.product.seed + number for number in range(self.grid.seeds)]

    def run(self) -> dict[str, int]:
        """Run what is not finished; write results.csv after each pretraining's cells, at the end the tables.

        Returns counts: `cells`, `pretrainings` and, of cells times seeds, `failed` and `reused`. Raises NoInputError if
        no cell has a result.
        """
        self._claim_folder()
        reused = sum(len(strand.cells) for strand in self.strands if strand.is_finished)
        outcomes: list[Outcome] = []
        total = sum(len(strand.cells) for strand in self.strands)
        wants_gpu = self.grid.forced.get("device", "auto") in ("auto", "cuda")
        with self._alone(), console.progress("ablate", total) as bar:
            self._write_provenance()
            executor = open_executor(self.where, self.jobs, self.gpus, wants_gpu, self.out / PROVENANCE)

            def take(strand: Strand, result: list[Outcome] | Lost) -> None:
                found = _lost(strand, result) if isinstance(result, Lost) else result
                outcomes.extend(found)
                results.write(self.out, results.rows_of(self._ordered(outcomes)))
                _tell(found)
                bar.advance(len(strand.cells))

            finished_first = sorted(self.strands, key=lambda strand: not strand.is_finished)
            executor.run(run_strand, finished_first, take)
            ordered = self._ordered(outcomes)
            faces = LabelledFaces(self.crops)
            found = summary.write(self.out, self.grid, self.cells, self.strands, ordered, faces, self._notes())
        failures = [outcome for outcome in ordered if outcome.failure]
        if not any(outcome.scores for outcome in ordered):
            raise NoInputError(f"no cell has a result; the first: {failures[0].failure} (all in {self.out / RESULTS})")
        failed = {(outcome.cell.name, outcome.cell.probe_key(""), outcome.seed) for outcome in failures}
        self._show(found)
        return {"cells": len(self.cells), "pretrainings": len(self.strands), "failed": len(failed), "reused": reused}

    def _claim_folder(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out}: is a file; name another folder with -o")
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / CELLS).is_dir():
            raise OutputError(f"{self.out}: holds something else than an ablation; name another folder with -o")
        if self.product.overwrite:
            products.refuse_existing(self.out, overwrite=True, holds=CELLS)
        elif other := self.other_grid():
            raise OutputError(other)
        (self.out / CELLS).mkdir(parents=True, exist_ok=True)

    def other_grid(self) -> str:
        """Say what would be lost: the tables of a grid of which this one has not all, in a folder that nobody named."""
        if self.product.out or not (self.out / RESULTS).is_file():
            return ""
        try:
            there = ablations.read(self.out)
        except NoInputError:  # damaged: there is nothing to tell them by
            return ""
        if ablations.scores_of(there.strands) <= ablations.scores_of(strand.record for strand in self.strands):
            return ""
        what = "another grid" if there.inputs == self.crops.inputs() else "other crops"
        command = there.command if len(there.command) <= MOST_LETTERS else f"{there.command[:MOST_LETTERS]} ..."
        return (
            f"{self.out}: holds the tables of {what} ({command}); name a folder for this one, "
            f"such as -o {self.out}-2, or type -o {self.out} to replace them: what both train is trained once there"
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock: two drivers would write the tables in turns. Waits for the other one."""
        with (self.out / LOCK).open("a") as file:
            if not products.lock(file):
                console.note(f"another mefem ablate is at work in {self.out}; waiting for it ...")
                while not products.lock(file):
                    time.sleep(RETRY_SECONDS)
            yield

    def _ordered(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Sort by cell, seed and task, so that the tables do not depend on what finished first."""
        tasks = ["", *self.grid.tasks]
        return sorted(outcomes, key=lambda one: (self.cells.index(one.cell), one.seed, tasks.index(one.task)))

    def _write_provenance(self) -> None:
        options = {**asdict(self.grid), "jobs": self.jobs}
        record = products.provenance(
            options, self.crops.inputs(), self.product.seed, self.grid.forced.get("device", "auto")
        )
        strands = [(strand, strand.record) for strand in self.strands]
        cells = [
            {
                "cell": cell.name,
                **{step: getattr(cell, step) for step in steps.STEPS},
                "folders": [one.folder for strand, one in strands if cell in strand.cells],
            }
            for cell in self.cells
        ]
        described = {"cells": cells, "strands": [asdict(one) for _, one in strands]}
        products.write_json(self.out / PROVENANCE, {**record, **described})

    def _notes(self) -> list[str]:
        fixed = {**self.grid.fixed, **self.grid.forced}
        shown = ", ".join(f"{name}={grids.shown_value(value)}" for name, value in fixed.items())
        record = products.provenance({}, {}, self.product.seed)
        commit = f", commit {record['git_commit'][:12]}" if record["git_commit"] else ""
        return [
            f"`{' '.join(record['command'])}`",
            f"mefem {record['mefem']}{commit}, torch {record['versions']['torch']}; more in {PROVENANCE}",
            f"all cells: {shown or 'the defaults of mefem pretrain, embed and probe'}",
            f"seeds: {', '.join(map(str, self.seeds))}",
            *(f"crops: {folder}, manifest sha256 {digest}" for folder, digest in self.crops.inputs().items()),
            f"{len(self.crops)} faces",
        ]

    def _show(self, found: list[tables.Table]) -> None:
        """Show a short table on stderr: stdout is for the path."""
        from rich.console import Console

        terminal = Console(stderr=True)
        if not terminal.is_terminal:
            terminal = Console(stderr=True, width=tables.WIDTH)
        with terminal.capture() as captured:
            for table in found[: tables.MOST_ON_TERMINAL]:
                terminal.print(tables.to_terminal(table, terminal.width))
        console.note(captured.get().rstrip("\n"))


def _open_crops(named: list[str], limit: int | None) -> Crops:
    folders = [Path(one) for one in named] or [Path("crops")]
    if not named and not folders[0].exists():
        raise NoInputError("crops/: no such folder; make it with mefem crop, or name one with --crops")
    crops = Crops.open(*folders)
    return crops if limit is None else crops.select(range(min(limit, len(crops))))


def _strands(cells: list[Cell], crops: Crops, grid: Grid, seed: int, out: Path) -> list[Strand]:
    """Group cells by their encoder; all cells of the first seed come first, so that a whole table is early."""
    manifests = list(crops.inputs().values())
    folders = tuple(str(folder.absolute()) for folder in crops.folders)
    at = out.absolute() / CELLS
    given = {model: at / steps.key(manifests, models.identity(model)) for model in grid.models}
    strands = []
    for number in range(seed, seed + grid.seeds):
        groups: dict[tuple[str, Path], list[Cell]] = {}
        for cell in cells:
            shared = given.get(cell.model)
            folder = at / cell.pretrain_key(manifests, number) if shared is None else _of_seed(shared, number)
            groups.setdefault((cell.model, folder), []).append(cell)
        strands += [
            Strand(folder, number, tuple(group), grid.tasks, folders, _absolute(model), given.get(model))
            for (model, folder), group in groups.items()
        ]
    return strands


def _of_seed(shared: Path, seed: int) -> Path:
    """Return where the scores of a given encoder go, beside the folder with its features."""
    return shared.with_name(f"{shared.name}-seed{seed}")


def _absolute(model: str) -> str:
    """Return an encoder as it is named from any folder, on any machine that shares the file system."""
    if not model:
        return ""
    from mefem_cli.backbones import _frozen

    return _frozen.absolute(model)


def _lost(strand: Strand, result: Lost) -> list[Outcome]:
    return [Outcome(cell, strand.seed, "", failure=result.reason) for cell in strand.cells]


def _tell(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        where = f"{outcome.cell.name}, seed {outcome.seed}"
        if outcome.failure:
            console.note(f"{where}: failed: {outcome.failure}")
        for score in outcome.scores:
            metric, found = next(iter(score["metrics"].items()))
            value = "undefined" if found["value"] is None else f"{found['value']:.3f}"
            console.note(f"{where}: {score['task']} {metric} {value} ({score['head']} on {score['features']})")
