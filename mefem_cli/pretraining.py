"""A pretraining job: options + crops + objective + engine, put together; what `mefem pretrain` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from mefem_cli import console, parts
from mefem_cli.backbones import _initial, vit
from mefem_cli.engine import allocator, checkpoint, distributed, launch, seeds
from mefem_cli.engine.alarm import Alarm
from mefem_cli.engine.cache import make_cache
from mefem_cli.engine.device import Device, announce, choose_device, cores
from mefem_cli.engine.distributed import World
from mefem_cli.engine.fit import Observer, Trainer
from mefem_cli.engine.monitors import as_groups, split_monitor_faces, why_unwatched
from mefem_cli.engine.order import FaceOrder, split_weights
from mefem_cli.engine.plan import Plan, TrainOptions, make_plan
from mefem_cli.engine.resources import Resources
from mefem_cli.engine.stream import ImageStream
from mefem_cli.engine.track import TensorBoard, refuse_missing
from mefem_cli.errors import OutputError, UsageError
from mefem_cli.evaluation.watch import Probe, Watch, names_to_watch, plan_probes
from mefem_cli.parts import Given
from mefem_cli.reports import health
from mefem_cli.stores import runs
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.product import ProductOptions, difference, provenance, refuse_others
from mefem_cli.stores.runs import Run

RUNS = Path("runs")
SUBJECT_LABELS = ("subject", "patient")
# Options that a resumed run may change, and those that say how a command runs rather than what it makes.
FREE_ON_RESUME = frozenset(
    [
        "workers",
        "cache",
        "device",
        "epochs",
        "checkpoint_every",
        "watch",
        "stop_on_collapse",
        "track",
        "gpus",
        "print_sbatch",
        "out",
        "overwrite",
        "resume",
        "dry_run",
        "quiet",
        "json",
        "config",
        "debug",
    ]
)


@dataclass
class Job:
    """Everything of one training run, ready to train."""

    product: ProductOptions
    train_options: TrainOptions
    config: dict[str, Any]  # the resolved options, as config.yaml records them
    crops: Crops
    order: FaceOrder
    monitor_rows: np.ndarray
    plan: Plan
    device: Device
    stream: ImageStream
    objective: nn.Module
    probes: list[Probe]  # of --watch
    run: Run
    start: _initial.Start | None  # what it starts from, if not from random weights
    given: Given
    build: Callable[[Given], nn.Module]  # makes the objective anew, for other options of the encoder
    processes: int
    cache_bytes: int  # of memory for decoded crops

    @classmethod
    def prepare(cls, folders: list[Path], given: Given, product: ProductOptions) -> Job:
        """Read the options and the crops, plan the run and build the untrained model; nothing is written.

        A resumed run takes what is not given from its own record. Raises MefemError for whatever does not fit.
        """
        recorded: dict[str, Any] = {}
        asked = set(given.values)
        if product.resume:
            named = Path(product.out) if product.out else runs.newest_unfinished(RUNS)
            stopped = Run.open(named.resolve() if named.is_symlink() else named)  # runs/latest is a name for another
            recorded = stopped.config()
            given, folders = _with_record(given, folders, recorded, stopped)
        train_options = given.build("engine.plan", "TrainOptions")
        device_options = given.build("engine.device", "DeviceOptions")
        product = given.build("stores.product", "ProductOptions")
        launch_options = given.build("engine.launch", "LaunchOptions")  # has had its effect by now, but in a dry run
        processes = max(distributed.world().size, launch_options.gpus)
        objective_module = parts.load("objectives", train_options.objective)
        objective_options = given.build(f"objectives.{train_options.objective}")
        backbone_options = given.build("backbones.vit")

        folders, weights = split_weights(folders)
        crops = Crops.open(*folders)
        if product.limit is not None:
            crops = _limited(crops, product.limit)
        training_rows, monitor_rows = split_monitor_faces(
            len(crops), _subjects(crops), train_options.monitor, product.seed
        )
        order = FaceOrder(training_rows, _weights(crops, weights, training_rows))
        plan = make_plan(train_options, len(order), device_options.batch_size, processes)
        ema_planned = getattr(objective_options, "ema", None) == "auto" or bool(recorded.get("ema_planned"))
        objective_options = objective_module.resolve(
            objective_options, plan.batch_size, plan.total_steps, plan.preset == "paper"
        )
        device = choose_device(device_options.device, device_options.precision)

        seeds.seed_initialisation(product.seed)
        build = partial(_build_objective, objective_module, objective_options)
        objective = build(given)
        run = Run(Path(product.out) if product.out else _new_run_path(objective_options, train_options.objective))
        goes_on = product.resume and run.checkpoint_path.exists()  # then that has the weights
        if goes_on:  # told before anything of the run is touched
            state = checkpoint.load(run.checkpoint_path, mapped=True)
            checkpoint.refuse_longer(state, plan.total_steps, plan.epochs, run.checkpoint_path)
        start = None
        if train_options.init and not goes_on:
            start = _initial.start(objective, Path(train_options.init))
        config = {
            "crops": [str(folder.absolute()) for folder in folders],
            "weights": weights,
            **asdict(train_options),
            "init": str(Path(train_options.init).resolve()) if train_options.init else None,
            "init_sha256": start.sha256 if start else recorded.get("init_sha256"),
            **asdict(objective_options),
            **_options_of_parts(given, objective_options),
            **asdict(backbone_options),
            "ema_planned": ema_planned,
            "lr": plan.lr,
            "preset": plan.preset,
            "batch_size": plan.batch_size,
            "precision": "bf16" if "bf" in str(device.dtype) else "fp32",
            "seed": product.seed,
            "limit": product.limit,
            "inputs": crops.inputs(),
        }
        if recorded:
            replanned = {"ema"} if recorded.get("ema_planned") and "ema" not in asked else set()
            unknown_then = config.keys() - recorded.keys() - asked  # options younger than the run
            changes = difference(recorded, config, FREE_ON_RESUME | replanned | unknown_then)
            if changes:
                raise OutputError(
                    f"{product.out}: the run was started with other options: {changes}; resume without them"
                )
        for name in given.unused:
            console.warn(f"--{name.replace('_', '-')} has no effect here")
        if not product.resume:  # before training, and in a dry run too
            if run.path.name == runs.LATEST:
                raise UsageError(f"-o {run.path}: that name is kept for a link to the last finished run; name another")
            refuse_others(run.path, product.overwrite, holds="config.yaml")
        workers = device_options.workers or max(1, cores() // launch.place().local_size)
        cache = make_cache(train_options.cache, len(crops), backbone_options.image_size)
        stream = ImageStream(crops, backbone_options.image_size, workers, cache)
        refuse_missing(train_options.track)
        probes = _probes(train_options.watch, crops, product.seed)
        return cls(
            product=product,
            train_options=train_options,
            config=config,
            crops=crops,
            order=order,
            monitor_rows=monitor_rows,
            plan=plan,
            device=device,
            stream=stream,
            objective=objective,
            probes=probes,
            run=run,
            start=start,
            given=given,
            build=build,
            processes=processes,
            cache_bytes=len(crops) * 3 * backbone_options.image_size**2 if cache else 0,
        )

    def train(self) -> None:
        """Train to the end, or go on where the run stopped, and write the encoders; one process of a job writes."""
        if not self.device.is_cuda:
            allocator.keep_freed_memory()
        world = distributed.world()
        self.run = Run(world.from_first(self.run.path))  # its name may hold the time
        resume = self.product.resume and self.run.checkpoint_path.exists()
        with ExitStack() as lock:
            world.agree(lambda: lock.enter_context(self._open_run(resume, world)) if world.is_first else None)
            self._train(resume, world)
        if world.is_first:
            runs.forget_replaced(self.run.path)

    def _train(self, resume: bool, world: World) -> None:
        """Train in the run folder that the first process has opened."""
        if self.stream.cache is not None:
            self.stream.cache.forget_name()  # all processes have it by now; a kill must not leave it in memory
        trainer = Trainer(
            self.objective,
            self.stream,
            self.order,
            self.plan,
            self.device,
            self.run,
            self.product.seed,
            self.train_options.compile,
            self.train_options.activation_checkpointing,
        )
        about, tracker = health.describe(self), TensorBoard(self.run.path)
        observers = self._observers(about, tracker, resume)
        try:
            trainer.fit(self.monitor_rows, self.train_options.checkpoint_every, resume, observers)
        except BaseException as error:
            if world.is_first:
                health.write_end(self.run, about, error)
            raise
        finally:
            tracker.close()
        if world.is_first:
            self.save_encoders(self.run)
            health.write(self.run, about, "it is finished")
            if self.stream.corrupt:
                counts = f"{len(self.stream.corrupt):,} of {len(self.crops):,} crops"
                console.warn(f"{counts} could not be read; see {self.run.path / 'run.log'}")
                self.run.log(f"crops that could not be read: {', '.join(self.stream.corrupt)}")

    @contextmanager
    def _open_run(self, resume: bool, world: World) -> Iterator[None]:
        """Make or open the run folder, keep others from it, and say what will happen there."""
        kept = None
        if not self.product.resume and refuse_others(self.run.path, self.product.overwrite, holds="config.yaml"):
            kept = runs.set_aside(self.run.path)
        self.run.path.mkdir(parents=True, exist_ok=True)
        with self.run.locked():
            if resume:
                (self.run.path / "model.json").unlink(missing_ok=True)  # until it is done a longer run is not finished
            elif self.product.resume:
                console.warn(f"{self.run.path} has no checkpoint yet; it starts at step 0")
                self.run.truncate_metrics(-1)
            self.run = Run.create(self.run.path, self.config)
            if kept:
                console.note(f"the run that was there is kept as {kept} until this one is finished")
            self._announce(world)
            yield

    def _announce(self, world: World) -> None:
        """Say what will happen, on stderr and in the log."""
        announce(self.device)
        if world.size > 1:
            console.note(f"{world.size} processes, {self.plan.batch_size / world.size:g} faces of each batch for each")
        console.note(describe_plan(self))
        if self.plan.total_steps and not len(self.monitor_rows):
            why = why_unwatched(len(self.crops), self.train_options.monitor)
            console.warn(
                f"nothing will tell whether this run is healthy: {why}; compare its encoder with that of --epochs 0 by "
                "mefem probe"
            )
        self.run.log(f"device {self.device}; {world.size} processes; {self.plan}")
        for line in self.start.lines() if self.start else ():
            console.note(line)
            self.run.log(line)

    def _observers(self, about: health.About, tracker: TensorBoard, resume: bool) -> list[Observer]:
        """Return what looks at the run; the alarm comes last, as it may end it."""
        options = self.train_options
        observers: list[Observer] = [Resources(), Watch(self.probes)]
        if options.keep:
            observers.append(KeepEncoders(self))
        if options.track == "tensorboard":
            observers.append(tracker)
        earlier = list(self.run.metrics()) if resume else []
        alarm = Alarm(self.config, self.plan.warmup_steps, options.stop_on_collapse, earlier)
        return [*observers, health.Reporter(about), alarm]

    def save_encoders(self, run: Run) -> None:
        """Write the encoders and what describes them to a run folder."""
        crop_rule = {"side": "2 * max(box width, box height)", "size": self.crops.size}
        processes = distributed.world().size
        device = f"{processes} x {self.device}" if processes > 1 else str(self.device)
        inputs = self.crops.inputs()
        if self.config["init"]:
            inputs[self.config["init"]] = self.config["init_sha256"]
        record = provenance(self.config, inputs, self.product.seed, device)
        vit.save_encoder(run, self.objective.encoders(), crop_rule, record)  # type: ignore[operator]


class KeepEncoders(Observer):
    """Keeps encoders on the way: `--keep N` of them, at epochs evenly spread, each in `epochs/<epoch>/`."""

    def __init__(self, job: Job):
        self.job = job
        epochs, keep = job.plan.epochs, job.train_options.keep
        self.chosen = {max(1, round(number * epochs / (keep + 1))) for number in range(1, keep + 1)}

    def see(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Write the encoders after a chosen epoch."""
        if row["kind"] == "epoch" and row["epoch"] in self.chosen and trainer.world.is_first:
            self.job.save_encoders(Run(trainer.run.path / "epochs" / f"{row['epoch']:04d}"))


def _build_objective(module: ModuleType, options: Any, given: Given) -> nn.Module:
    """Return an objective of a module in objectives/ around an untrained encoder."""
    encoder = vit.build(given.build("backbones.vit"), module.wants_class_token(options))
    return module.build(options, encoder, given)


def _with_record(given: Given, folders: list[Path], recorded: dict[str, Any], stopped: Run) -> tuple[Given, list[Path]]:
    """Fill what was not given from the run's own record."""
    longer = "epochs" in given and str(given.values["epochs"]) != str(recorded["epochs"])
    if stopped.is_finished and not longer:
        raise OutputError(f"{stopped.path}: is finished; extend it with --epochs, or type --overwrite to train anew")
    no_options = ("crops", "weights", "inputs", "ema_planned", "init_sha256")
    kept = {name: value for name, value in recorded.items() if name not in no_options}
    if longer and recorded.get("ema_planned"):
        del kept["ema"]  # planned anew for the new length
    weights = recorded.get("weights", [1.0] * len(recorded["crops"]))
    crops = [Path(f"{folder}={weight:g}") for folder, weight in zip(recorded["crops"], weights, strict=True)]
    return Given({**kept, **given.values, "out": str(stopped.path)}), folders or crops


def _options_of_parts(given: Given, objective_options: Any) -> dict[str, Any]:
    """Return the resolved options of the mask, if the objective has one."""
    mask = getattr(objective_options, "mask", None)
    return asdict(given.build(f"masks.{mask}")) if mask else {}


def _subjects(crops: Crops) -> np.ndarray | None:
    return next((crops.labels[name] for name in SUBJECT_LABELS if name in crops.labels), None)


def _weights(crops: Crops, weights: list[float], rows: np.ndarray) -> np.ndarray | None:
    """Return the weight of each row, None where all are 1."""
    return None if set(weights) == {1.0} else np.array(weights)[crops.part_of[rows]]


def _probes(watch: list[str], crops: Crops, seed: int) -> list[Probe]:
    names = names_to_watch(watch)
    groups = as_groups(len(crops), _subjects(crops)) if names else np.zeros(0, int)
    return plan_probes(names, crops.labels, groups, seed)


def _new_run_path(objective_options: Any, objective: str) -> Path:
    return RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{getattr(objective_options, 'mask', objective)}"


def _limited(crops: Crops, limit: int) -> Crops:
    """Return the first crops, and say which folders are left out altogether."""
    some = crops.select(range(min(limit, len(crops))))
    for folder in crops.folders[len(np.unique(some.part_of)) :]:
        console.warn(f"--limit {limit} takes the first crops, and none of {folder}")
    return some


def describe_plan(job: Job) -> str:
    """Return one line about what the run does."""
    plan = job.plan
    return (
        f"{len(job.order.rows)} faces to train on, {len(job.monitor_rows)} to watch; batch {plan.batch_size}, "
        f"{plan.epochs} epochs of {plan.steps_per_epoch} steps, learning rate {plan.lr:.2g} ({plan.preset} preset), "
        f"EMA {job.config.get('ema', 'none')}"
    )
