"""From a preset, a grid file and flags to cells: each an assignment of options, no two alike.

What a flag sets wins over a preset or file (`grid_file.py`), `set` gives way to rows, and rows to vary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mefem_cli.ablation import steps
from mefem_cli.ablation.steps import Assignment
from mefem_cli.errors import UsageError

GIVEN_GROUP = "Given encoders"  # the heading over them, where others are trained
EXAMPLES = {"--vary": "mask=stripes,quadrants", "--set": "image_size=112", "--reference": '"mask=stripes width=3"'}
DEFAULT_TASK = "bmi"
COLUMNS_OF_THEIR_OWN = ("head", "features")  # in the results: not part of a cell's name


@dataclass(frozen=True)
class Row:
    """Options that belong together, and what the tables say of them."""

    options: Assignment = field(default_factory=dict)
    group: str = ""  # the heading over it
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> metric -> value, on other data


@dataclass(frozen=True)
class Grid:
    """What was asked for; option names resolved, values parsed."""

    name: str
    vary: dict[str, list[Any]] = field(default_factory=dict)
    fixed: Assignment = field(default_factory=dict)
    rows: list[Row] = field(default_factory=lambda: [Row()])
    forced: Assignment = field(default_factory=dict)  # set by a flag: wins over rows
    tasks: tuple[str, ...] = (DEFAULT_TASK,)
    seeds: int = 1
    epochs: int | None = None  # of the longest cells
    references: list[Assignment] = field(default_factory=list)  # cells to compare with; none: the first
    models: tuple[str, ...] = ()  # encoders that are given, as typed after --model
    only_models: bool = False  # it says that nothing is trained


@dataclass(frozen=True)
class Cell:
    """One assignment of options: what each step is given, beside crops and seed."""

    shown: Assignment  # the options that tell it from other cells, but for head and features
    pretrain: Assignment
    embed: Assignment
    probe: Assignment
    group: str = ""  # the heading over it in the tables
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> metric -> value, on other data
    model: str = ""  # the encoder that is given instead of trained, as typed after --model

    @property
    def name(self) -> str:
        """The cell in results.csv: `mask=stripes width=3`."""
        return " ".join(f"{name}={shown_value(value)}" for name, value in self.shown.items()) or "default"

    @property
    def reads(self) -> str:
        """Heads and features: `attentive on patches`."""
        heads, features = self.probe["head"].replace(",", ", "), self.probe.get("features")
        return f"{heads} on {features}" if features else heads

    def pretrain_key(self, crops: list[str], seed: int) -> str:
        """Return the key of the pretraining on crops whose manifests have these sha256."""
        return steps.key(crops, seed, steps.settled("pretrain", self.pretrain))

    def embed_key(self) -> str:
        """Return the key of the features among those of one encoder."""
        return steps.key(steps.settled("embed", self.embed, self.model))

    def probe_key(self, task: str) -> str:
        """Return the key of the scores among those of one encoder: stored patches change no other feature."""
        features = {**steps.settled("embed", self.embed, self.model), "patches": None}
        return steps.key(task, features, steps.settled("probe", self.probe))


def shown_value(value: Any) -> str:
    """Return a value as it is typed in a shell."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "+".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# Flags ------------------------------------------------------------------------------------------------------------


def as_names(given: Any) -> tuple[str, ...]:
    """Return a name, or each name of a list once."""
    return tuple(dict.fromkeys(str(task) for task in (given if isinstance(given, list | tuple) else [given])))


def whole_number(name: str, value: Any) -> int:
    """Return a count from 1. Raises UsageError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"--{name} {value}: wanted a whole number from 1")
    return value


def parse_vary(typed: str) -> tuple[str, list[Any]]:
    """Return option and values of `--vary option=a,b,c`. Raises UsageError."""
    name, values = _parse_pair("--vary", typed)
    words = [word.strip() for word in values.split(",")]
    if "" in words:
        raise UsageError(f"--vary {typed}: an empty value; wanted such as width=2,3,4")
    return name, unique(steps.parse(name, word) for word in words)


def parse_set(typed: str) -> tuple[str, Any]:
    """Return option and value of `--set option=value`. Raises UsageError."""
    name, value = _parse_pair("--set", typed)
    return name, steps.parse(name, value)


def parse_reference(typed: str) -> Assignment:
    """Return the options of `--reference "mask=stripes width=3"`, a cell as the tables name it. Raises UsageError."""
    found: Assignment = {}
    for word in typed.split():
        if word.startswith(f"{steps.MODEL}="):
            found[steps.MODEL] = word.partition("=")[2]
        else:
            name, value = _parse_pair("--reference", word)
            found[name] = steps.parse(name, value)
    return found


def _parse_pair(flag: str, typed: str) -> tuple[str, str]:
    name, equals, value = typed.partition("=")
    if not equals or not value.strip():
        wanted = EXAMPLES[flag]
        raise UsageError(f"{flag} {typed}: wanted option=value, such as {flag} {wanted}")
    return steps.resolve_name(name), value.strip()


def unique(values: Iterable[Any]) -> list[Any]:
    """Return each value once, in their order; they need no hash."""
    found: list[Any] = []
    return [value for value in values if value not in found and not found.append(value)]  # type: ignore[func-returns-value]


def with_flags(
    grid: Grid,
    vary: dict[str, list[Any]],
    forced: Assignment,
    tasks: list[str],
    seeds: int | None,
    epochs: int | None,
    models: Sequence[str] = (),
) -> Grid:
    """Return the grid as changed by flags; `models` come behind those of the grid.

    Raises UsageError where two of them contradict each other, or where encoders are wanted and none is named.
    """
    if grid.only_models and not [*grid.models, *models]:
        raise UsageError(
            f"{grid.name} compares given encoders; name them, such as --model runs/latest --model farl:PATH"
        )
    for name in vary.keys() & forced.keys():
        raise UsageError(f"--vary {name} and --set {name}: give one of them")
    if epochs is not None and "epochs" in {**vary, **forced}:
        raise UsageError("--epochs and epochs in --vary or --set: give one of them")
    if not forced.keys().isdisjoint(COLUMNS_OF_THEIR_OWN):  # a row's head and features belong together
        rows = [replace(row, options=_without_columns(row.options)) for row in grid.rows]
        grid = replace(grid, rows=rows)
    if "epochs" in {**vary, **forced}:
        grid = replace(grid, epochs=None)
    return replace(
        grid,
        vary={**{name: values for name, values in grid.vary.items() if name not in forced}, **vary},
        forced=forced,
        tasks=as_names(tasks) if tasks else grid.tasks,
        seeds=grid.seeds if seeds is None else whole_number("seeds", seeds),
        epochs=grid.epochs if epochs is None else whole_number("epochs", epochs),
        models=tuple(dict.fromkeys([*grid.models, *models])),
    )


def _without_columns(options: Assignment) -> Assignment:
    return {name: value for name, value in options.items() if name not in COLUMNS_OF_THEIR_OWN}


# Expanding -----------------------------------------------------------------------------------------------------


def expand(grid: Grid) -> list[Cell]:
    """Return the cells in order: rows times the product of what varies, unused options dropped, equal cells merged.

    Given encoders come behind those that are trained; they are alone where no option of a pretraining is asked for.
    Raises UsageError where a head does not take its features, or an encoder does not have them.
    """
    for name in grid.vary:
        if name.rpartition(".")[2] in steps.FREE:
            raise UsageError(f"--vary {name}: it changes no result, so cells cannot differ in it")
    combinations = [dict(zip(grid.vary, values, strict=True)) for values in itertools.product(*grid.vary.values())]
    assignments = [
        (row, {**row.options, **combination}, {**grid.fixed, **row.options, **grid.forced, **combination})
        for row in grid.rows
        for combination in combinations
    ]
    default_epochs = steps.options("pretrain")["epochs"].default
    longest = max(assignment.get("epochs", default_epochs) for *_, assignment in assignments)
    is_training = _is_training(grid)
    cells: dict[str, Cell] = {}
    for model in [*[""] * is_training, *grid.models]:
        for row, told_apart_by, assignment in assignments:
            if grid.epochs is not None and not model:
                own = assignment.get("epochs", default_epochs)
                scaled = max(1, round(own * grid.epochs / longest)) if own else 0  # 0 is the untrained encoder
                assignment = {**assignment, "epochs": scaled}
            group = GIVEN_GROUP if model and is_training else row.group
            cell = replace(_cell(told_apart_by, assignment, model), group=group, published=row.published)
            cells.setdefault(_identity(cell), cell)
    return _storing_patches_together(list(cells.values()))


def _is_training(grid: Grid) -> bool:
    """Return whether a grid trains encoders: not where some are given and it says or changes nothing of pretraining."""
    asked = {*grid.fixed, *grid.forced, *grid.vary, *(name for row in grid.rows for name in row.options)}
    says_how = grid.epochs is not None or any("pretrain" in steps.of(name) for name in asked - steps.SHARED)
    return not grid.models or (says_how and not grid.only_models)


def _cell(told_apart_by: Iterable[str], assignment: Assignment, model: str) -> Cell:
    given = steps.split(assignment, model)
    features = given["probe"].get("features") or ""
    if "cls" in features and not model and not steps.trains_cls(given["pretrain"]):
        raise UsageError(
            f"--features {features}: encoders with cls_prob=none have no CLS token to read; type mean, or "
            "give them rows of their own in a grid file"
        )
    shown = {steps.MODEL: model} if model else {}
    shown |= {
        name: assignment[name]
        for name in told_apart_by
        if name not in COLUMNS_OF_THEIR_OWN and any(name.rpartition(".")[2] in given[step] for step in steps.of(name))
    }
    return Cell(shown, given["pretrain"], given["embed"], given["probe"], model=model)


def _identity(cell: Cell) -> str:
    return steps.key(_encoder(cell), cell.probe_key(""), cell.embed.get("patches", False))


def _encoder(cell: Cell) -> str:
    return cell.model or cell.pretrain_key([], 0)


def _storing_patches_together(cells: list[Cell]) -> list[Cell]:
    """Let cells of one encoder share one feature store: if one of them wants patches, all store them."""

    def encoder(cell: Cell) -> str:
        return steps.key(_encoder(cell), {**steps.settled("embed", cell.embed, cell.model), "patches": None})

    wanted = {encoder(cell) for cell in cells if cell.embed.get("patches")}
    return [replace(cell, embed={**cell.embed, "patches": encoder(cell) in wanted}) for cell in cells]


def without_effect(grid: Grid, cells: list[Cell]) -> list[str]:
    """Return the options asked for that no cell uses."""
    asked = {**grid.fixed, **grid.forced, **grid.vary, **{name: None for row in grid.rows for name in row.options}}
    used = {option for cell in cells for step in steps.STEPS for option in getattr(cell, step)}
    return [name for name in asked if name.rpartition(".")[2] not in used and name != "epochs"]
