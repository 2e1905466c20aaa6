"""The main job on imaginary people: photos -> crops -> encoder -> features -> scores; what `mefem demo` runs.

The demo is the other commands: it renders photos of people whose BMI, age, sex and skin tone are known, then runs
`crop`, `pretrain`, `embed` and `probe` on them through the command line itself, so that each line it shows on stderr is
exactly what ran. Pretraining is compared with the same encoder before its first step and with raw pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mefem_cli import console
from mefem_cli.console import ConsoleOptions
from mefem_cli.errors import Interrupted, OutputError, Stopped, UsageError
from mefem_cli.stores import product
from mefem_cli.stores.crops import PROVENANCE, Crops
from mefem_cli.stores.runs import Run

# Options of `mefem pretrain` that the demo trains with: small enough for minutes on two cores.
RECIPE: dict[str, str] = {
    "backbone": "vit_tiny_patch16_224",
    "depth": "4",
    "image_size": "96",
    "patch_size": "16",
    "mask": "quadrants",
    "predictor_depth": "2",
    "batch_size": "32",
    "lr": "5e-4",
    "ema": "1:0.997",  # the target stays as it began for the first half, and follows the source in the second
    "epochs": "24",
}
# Rough times on two cores, for the estimate of a dry run.
RENDERED_PER_SECOND, CROPPED_PER_SECOND, TRAINED_PER_SECOND, OTHER_SECONDS = 20, 60, 300, 30
BYTES_PER_PHOTO, OTHER_BYTES = 120_000, 150_000_000

PRETRAINED, STEP0, PIXELS, CONTROL = "pretrained", "step0", "pixels", "control"
PIXEL_SIDE = 16  # a crop as raw values: 16 x 16 x 3
MIN_PEOPLE = 40  # five folds with both sexes in each
NEVER_UPDATED = "1:1"  # EMA of the control
RECORD = "demo.json"


@dataclass(frozen=True)
class DemoOptions:
    """The demo."""

    out: str = "mefem-demo"  # folder for everything that the demo makes
    people: int = 1000  # imaginary people
    photos_per_person: int = 2  # photos of each
    epochs: int | None = None  # epochs of pretraining; default: the demo's recipe
    seed: int = 0  # the one number that all randomness flows from
    control: bool = False  # train a control as well, whose target encoder is never updated
    workers: int | None = None  # processes and threads that render, crop and read; default: the cores
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    overwrite: bool = False  # replace an earlier demo
    dry_run: bool = False  # say what would happen; touch nothing

    def __post_init__(self) -> None:
        for name, least in (("people", MIN_PEOPLE), ("photos_per_person", 1), ("epochs", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: wanted {least} or more")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: wanted 0 or more")

    @property
    def num_photos(self) -> int:
        """Photos with a label; a few more are broken on purpose."""
        return self.people * self.photos_per_person

    @property
    def recipe(self) -> dict[str, str]:
        """The options of pretraining: RECIPE, with the epochs asked for and a batch that few photos can fill."""
        epochs = RECIPE["epochs"] if self.epochs is None else str(self.epochs)
        batch_size = min(int(RECIPE["batch_size"]), self.num_photos // 2)
        return {**RECIPE, "epochs": epochs, "batch_size": str(batch_size)}

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this demo from another: everything that changes a result."""
        return {
            "people": self.people,
            "photos_per_person": self.photos_per_person,
            "seed": self.seed,
            **self.recipe,
        }


@dataclass(frozen=True)
class Step:
    """One command line of the demo: `mefem` with `arguments` makes `out`."""

    name: str  # of its time
    purpose: str
    arguments: tuple[str, ...]
    out: Path

    @property
    def line(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(["mefem", *self.arguments])


@dataclass
class Demo:
    """All steps of one demo. A second run goes on where the first was stopped and reuses what is complete.

    >>> Demo(DemoOptions(out="faces")).steps[0].line
    'mefem crop faces/photos --labels faces/labels.csv -o faces/crops'
    """

    options: DemoOptions
    talk: ConsoleOptions = field(default_factory=ConsoleOptions)
    seconds: dict[str, float] = field(default_factory=dict)  # of each step, by name

    def __post_init__(self) -> None:
        self.out = Path(self.options.out)
        self.photos, self.labels = self.out / "photos", self.out / "labels.csv"
        self.crops, self.scores = self.out / "crops", self.out / "scores"

    def run_path(self, name: str) -> Path:
        """The run folder of an encoder: `pretrained`, `step0` or `control`."""
        return self.out / "runs" / name

    def store_path(self, name: str) -> Path:
        """The feature store of an encoder, or of `pixels`."""
        return self.out / f"{name}.h5"

    @property
    def encoders(self) -> list[str]:
        """The encoders that are trained and embedded."""
        return [PRETRAINED, STEP0, *[CONTROL] * self.options.control]

    @property
    def stores(self) -> list[Path]:
        """The feature stores that are probed; the first is compared with each of the others."""
        return [self.store_path(name) for name in (PRETRAINED, STEP0, PIXELS, *[CONTROL] * self.options.control)]

    # The steps --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Make everything but the report. Raises OutputError where `out` holds another demo, or anything else."""
        self._claim_folder()
        with self._timed("render"):
            self._render()
        self._run_steps(self.encoder_steps)
        with self._timed("pixels"):
            self._store_pixels()
        self._run_steps(self.probe_steps)
        self._record_seconds()

    def _run_steps(self, steps: list[Step]) -> None:
        for step in steps:
            with self._timed(step.name):
                self._run_step(step)

    @property
    def steps(self) -> list[Step]:
        """All command lines, in order."""
        return self.encoder_steps + self.probe_steps

    @property
    def encoder_steps(self) -> list[Step]:
        """The command lines from photos to features."""
        pretrain = [self._pretrain_step(name) for name in self.encoders]
        return [self._crop_step(), *pretrain, *(self._embed_step(name) for name in self.encoders)]

    def _crop_step(self) -> Step:
        arguments = ("crop", str(self.photos), "--labels", str(self.labels), "-o", str(self.crops), *self._workers())
        return Step("crop", "photos -> face crops", arguments, self.crops)

    def _pretrain_step(self, name: str) -> Step:
        purpose, changes = {
            PRETRAINED: ("face crops -> an encoder, without any label", {}),
            STEP0: ("the same encoder before its first step, to compare with", {"epochs": "0"}),
            CONTROL: ("a control whose target encoder is never updated", {"ema": NEVER_UPDATED}),
        }[name]
        recipe = {**self.options.recipe, **changes, "seed": str(self.options.seed)}
        flags = [word for option, value in recipe.items() for word in (f"--{option.replace('_', '-')}", value)]
        out = self.run_path(name)
        arguments = ("pretrain", str(self.crops), "-o", str(out), *flags, *self._workers(), *self._device())
        return Step(f"pretrain {name}", purpose, arguments, out)

    def _embed_step(self, name: str) -> Step:
        """The control's target encoder is step 0 for ever, so its other encoder is the one that learned."""
        out, model = self.store_path(name), str(self.run_path(name))
        which = ("--encoder", "source") if name == CONTROL else ()
        arguments = ("embed", str(self.crops), "--model", model, *which, "-o", str(out))
        arguments += (*self._workers(), *self._device())
        return Step("embed", f"face crops + {name} encoder -> features", arguments, out)

    @property
    def probe_steps(self) -> list[Step]:
        """The command lines from features to scores: of numbers, and skin tone is one (1 to 10), and of a class."""
        stores = [word for path in self.stores for word in ("--store", str(path))]
        shared = ("--head", "linear", "--features", "mean", *stores, "--seed", str(self.options.seed))
        numbers = ("bmi", "age", "skin_tone", "--kind", "regression", "--by", "sex", "--by", "skin_tone")
        steps = []
        for name, tasks in (("numbers", numbers), ("sex", ("sex",))):
            out = self.scores / name
            arguments = ("probe", *tasks, *shared, "-o", str(out))
            steps.append(Step("probe", "features + labels -> scores with intervals", arguments, out))
        return steps

    def _workers(self) -> tuple[str, ...]:
        return () if self.options.workers is None else ("--workers", str(self.options.workers))

    def _device(self) -> tuple[str, ...]:
        return () if self.options.device == "auto" else ("--device", self.options.device)

    # Going on where an earlier run was stopped ------------------------------------------------------------------

    def check_folder(self) -> None:
        """Raise OutputError where `out` holds another demo, or something that is no demo."""
        record = self.out / RECORD
        if not record.is_file():
            if self.out.is_symlink() or (self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir()))):
                refused = "; --overwrite replaces nothing else" if self.options.overwrite else ""
                raise OutputError(f"{self.out} is in the way and no demo folder{refused}; name another place with -o")
            return
        if self.options.overwrite:
            return
        try:
            recorded = json.loads(record.read_text(encoding="utf-8"))["options"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{record} is damaged; type --overwrite to begin anew") from error
        changes = product.difference(recorded, self.options.identity)
        if changes:
            raise OutputError(f"{self.out} holds another demo: {changes}; type --overwrite or another -o")

    def _claim_folder(self) -> None:
        self.check_folder()
        record = self.out / RECORD
        if self.options.overwrite:
            product.refuse_existing(self.out, overwrite=True, holds=RECORD)
        if not record.exists():
            product.write_json(record, product.provenance(self.options.identity, {}, self.options.seed))

    def _flags_to_go_on(self, step: Step) -> tuple[str, ...] | None:
        """Return what to add to a command line whose product exists already; None where it is complete."""
        command = step.arguments[0]
        if command == "pretrain" and step.out.exists():
            return self._flags_of_run(Run(step.out))
        if command == "probe" and step.out.exists():
            return None if self._scores_are_current(step.out) else ("--overwrite",)
        return ()  # crop and embed find out by themselves

    def _flags_of_run(self, run: Run) -> tuple[str, ...] | None:
        if not run.config_path.is_file():
            return ("--overwrite",)  # stopped before it began
        if not run.is_finished:
            return ("--resume",)
        trained_on = run.config()["inputs"].values()
        if [*trained_on] != [*Crops.open(self.crops).inputs().values()]:
            raise OutputError(f"{self.crops} changed since {run.path} was trained on it; type --overwrite")
        return None

    def _scores_are_current(self, folder: Path) -> bool:
        try:
            record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return [*record["inputs"].values()] == [product.file_sha256(path) for path in self.stores]

    # Running ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    def _run_step(self, step: Step) -> None:
        more = self._flags_to_go_on(step)
        console.note(f"\n# {step.purpose}\n$ {step.line}" + "".join(f" {flag}" for flag in more or ()))
        if more is None:
            console.note("complete already")
            return
        quiet = ("--quiet",) * self.talk.quiet
        try:
            run_command((*step.arguments, *more, *quiet))
        finally:
            console.configure(self.talk)

    def _render(self) -> None:
        from mefem_cli.engine.device import cores
        from mefem_cli.faces.render import DEFECTS, count_defects, render_folder

        options = self.options
        each = "one photo" if options.photos_per_person == 1 else f"{options.photos_per_person} photos"
        console.note(f"# {options.people} imaginary people, {each} of each -> {self.photos}, {self.labels}")
        if self.labels.exists():  # it is written last
            console.note("complete already")
            return
        shown = (options.people, options.photos_per_person)
        num_pictures = options.num_photos + len(DEFECTS) * count_defects(*shown)
        with console.progress("render", num_pictures) as bar:
            render_folder(self.out, *shown, options.seed, options.workers or cores(), bar.advance)

    def _store_pixels(self) -> None:
        crops, path = Crops.open(self.crops), self.store_path(PIXELS)
        console.note(f"\n# raw {PIXEL_SIDE} x {PIXEL_SIDE} pixels of each crop -> {path}")
        write_pixel_store(path, crops, self.options.seed)

    def _record_seconds(self) -> None:
        """Keep the time of each step; where a rerun reused what was there, that of the run that did the work."""
        longest = {name: max(taken, self.recorded_seconds.get(name, 0.0)) for name, taken in self.seconds.items()}
        record = json.loads((self.out / RECORD).read_text(encoding="utf-8"))
        product.write_json(self.out / RECORD, {**record, "seconds": longest})

    @property
    def recorded_seconds(self) -> dict[str, float]:
        """The time that each step took when it did its work, by name."""
        return json.loads((self.out / RECORD).read_text(encoding="utf-8")).get("seconds", {})

    @property
    def rejects(self) -> dict[str, int]:
        """How many pictures gave no crop, by reason."""
        return json.loads((self.crops / PROVENANCE).read_text(encoding="utf-8"))["rejects"]

    def plan(self) -> dict[str, Any]:
        """Return what the demo would do, with rough times for two cores."""
        options, epochs = self.options, int(self.options.recipe["epochs"])
        per_photo = 1 / RENDERED_PER_SECOND + 1 / CROPPED_PER_SECOND
        per_photo += epochs * (1 + options.control) / TRAINED_PER_SECOND
        return {
            "out": str(self.out.absolute()),
            "people": options.people,
            "photos": options.num_photos,
            "estimated_seconds": round(OTHER_SECONDS + options.num_photos * per_photo),
            "estimated_bytes": OTHER_BYTES + options.num_photos * BYTES_PER_PHOTO,
            "options": options.identity,
            "commands": [step.line for step in self.steps],
        }


def run_command(arguments: tuple[str, ...]) -> str:
    """Run a command line of `mefem` in this process and return its stdout; its errors rise.

    Products record the command line that made them, so `sys.argv` is this one meanwhile.
    """
    from mefem_cli import main

    before, stdout = sys.argv, io.StringIO()
    sys.argv = ["mefem", *arguments]
    try:
        with contextlib.redirect_stdout(stdout):
            code = main.dispatch(list(arguments))
    except Interrupted:  # its advice is for a pretraining by itself
        code = main.INTERRUPTED
    except Stopped as error:
        raise Stopped("stopped by a signal; run the same command again to go on") from error
    finally:
        sys.argv = before
    if code == main.INTERRUPTED:
        raise KeyboardInterrupt
    return stdout.getvalue()


def write_pixel_store(path: Path, crops: Crops, seed: int) -> None:
    """Write a feature store whose `mean` features are the crops' colours, 16 x 16 px from 0 to 1, row by row.

    What a ridge reads from these is there without any encoder. A store of the same crops is left as it is.
    """
    from mefem_cli.stores.features import FeatureStore, FeatureWriter

    if path.exists():
        with FeatureStore.open(path) as store:
            if store.provenance["inputs"] == crops.inputs():
                console.note("complete already")
                return
    record = product.provenance({"side": PIXEL_SIDE}, crops.inputs(), seed)
    pixels = np.stack([_shrunk(crops.read_bytes(row)) for row in range(len(crops))])
    with FeatureWriter(path, {**record, "model": {"name": PIXELS}}, embed_dim=pixels.shape[1], has_cls=False) as writer:
        writer.append(crops.ids, mean=pixels)
        writer.finish(crops.labels, {name: values for name, values in crops.columns.items() if name != "id"})


def _shrunk(data: bytes) -> np.ndarray:
    """Return an encoded image as float32 [16 * 16 * 3]; each value is the mean of the pixels that it covers."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB").resize((PIXEL_SIDE, PIXEL_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel() / 255
