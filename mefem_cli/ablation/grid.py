"""From a preset, a grid file and flags to cells: each an assignment of options, no two alike.

A grid file is YAML with the keys of `Grid`:

    vary: {mask: [stripes, quadrants], width: [2, 3]}     every combination
    set: {backbone: vit_tiny_patch16_224}                 the same for all
    rows: [{mask: stripes, width: 3}, {mask: quadrants}]  instead of vary, or times vary
    task: bmi                                             or a list
    seeds: 3
    epochs: 66                                            of the longest rows; all scale in proportion
    model: [runs/a, farl:FaRL.pth]                        given encoders, as in mefem embed: nothing is trained
    reference: {mask: stripes, width: 3}                  the cell that others are compared with; or a list: each group
                                                          of rows with its own, groups without one with the first

Beside options a row may have two keys that only the tables read: `group: The mask`, a heading over it and the rows
below it, and `published: {r2: 0.41}`, what others report of other data. (The probe's own option is `probe.group`.)

Presets are such files. What a flag sets wins over the file, `set` gives way to rows, and rows to vary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mefem_cli import parts
from mefem_cli.ablation import steps
from mefem_cli.ablation.steps import Assignment
from mefem_cli.errors import UsageError, did_you_mean

PRESETS = Path(__file__).parent / "presets"
FILE_KEYS = ("vary", "set", "rows", "task", "seeds", "epochs", "model", "reference")
GIVEN_GROUP = "Given encoders"  # the heading over them, where others are trained
TABLE_KEYS = ("group", "published")  # of a row, beside options: they change no result and are in no key
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


# Reading -----------------------------------------------------------------------------------------------------------


def presets() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_grid(named: str) -> Grid:
    """Return a preset, or a grid file. Raises UsageError for an unknown name and for what is wrong in a file."""
    if named in presets():
        return _parse_file(PRESETS / f"{named}.yaml", named)
    path = Path(named)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _parse_file(path, path.stem)
    hint = did_you_mean(named, presets())
    raise UsageError(f'there is no preset and no grid file "{named}"{hint}')


def _parse_file(path: Path, name: str) -> Grid:
    import yaml

    try:
        content = parts.parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150]
        raise UsageError(f"{path}: cannot be read as YAML ({reason})") from error
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{path}: wanted a grid, such as `vary: {{mask: [stripes, quadrants]}}`")
    for one in content:
        if one not in FILE_KEYS:
            raise UsageError(f'{path}: a grid has no key "{one}"{did_you_mean(str(one), FILE_KEYS)}')
    rows = content.get("rows") or [{}]
    if not isinstance(rows, list):
        raise UsageError(f"{path}: `rows` wants a list of options, such as `- {{mask: stripes, width: 3}}`")
    try:
        tasks = _names(content.get("task") or DEFAULT_TASK)
        return Grid(
            name,
            vary={one: _unique(values) for one, values in _parse_table(content, "vary").items()},
            fixed=_parse_table(content, "set"),
            rows=_under_headings([_parse_row(row, tasks) for row in rows]),
            tasks=tasks,
            seeds=whole_number("seeds", content.get("seeds", 1)),
            epochs=whole_number("epochs", content["epochs"]) if "epochs" in content else None,
            references=_parse_references(content.get("reference") or []),
            models=_names(content.get("model") or []),
            only_models="model" in content,
        )
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from error


def _parse_table(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return the options of a section of a grid file; under `vary`, each with its list of values."""
    table = content.get(section) or {}
    if not isinstance(table, Mapping):
        raise UsageError(f"`{section}` wants options with values, such as `width: 3`; given {table!r:.60}")
    parsed = {}
    for typed, value in table.items():
        name = steps.resolve_name(str(typed))
        if section == "vary":
            parsed[name] = [steps.parse(name, one) for one in (value if isinstance(value, list) else [value])]
            if not parsed[name]:
                raise UsageError(f"`vary`: {typed} has no values; wanted such as `{typed}: [2, 3]`")
        else:
            parsed[name] = steps.parse(name, value)
    return parsed


def _parse_row(content: Any, tasks: tuple[str, ...]) -> Row:
    """Return a row's options, its heading and published values; these are of the grid's task, or each under its own."""
    if not isinstance(content, Mapping):
        raise UsageError(f"`rows` wants options with values, such as `width: 3`; given {content!r:.60}")
    options = {name: value for name, value in content.items() if name not in TABLE_KEYS}
    group, published = content.get("group") or "", content.get("published") or {}
    if not isinstance(group, str):
        raise UsageError(f"`group` wants a heading, such as `group: The mask`; given {group!r:.60}")
    if not isinstance(published, Mapping):
        raise UsageError(
            f"`published` wants metrics with values, such as `published: {{r2: 0.41}}`; given {published!r:.60}"
        )
    by_task = published if any(isinstance(one, Mapping) for one in published.values()) else {tasks[0]: published}
    if by_task is not published and published and len(tasks) > 1:
        raise UsageError(f"`published` of a grid with several tasks wants them by task: {{{tasks[0]}: {{r2: 0.41}}}}")
    values = {str(task): _published(found) for task, found in by_task.items() if found}
    return Row(_parse_table({"rows": options}, "rows"), group.strip(), values)


def _under_headings(rows: list[Row]) -> list[Row]:
    """Let a heading stand over the rows below it too, up to the next."""
    heading, found = "", []
    for row in rows:
        heading = row.group or heading
        found.append(replace(row, group=heading))
    return found


def _parse_references(content: Any) -> list[Assignment]:
    found = []
    for one in content if isinstance(content, list) else [content]:
        options = {name: value for name, value in one.items() if name != steps.MODEL} if isinstance(one, dict) else one
        model = {steps.MODEL: str(one[steps.MODEL])} if options is not one and steps.MODEL in one else {}
        found.append({**model, **_parse_table({"reference": options}, "reference")})
    return [one for one in found if one]


def _published(values: Any) -> dict[str, float]:
    from mefem_cli.evaluation import metrics

    known = (*metrics.REGRESSION, *metrics.CLASSIFICATION)
    if not isinstance(values, Mapping):
        raise UsageError(f"`published` wants metrics with values under each task; given {values!r:.60}")
    for metric, value in values.items():
        if metric not in known:
            raise UsageError(f'`published`: there is no metric "{metric}"{did_you_mean(str(metric), known)}')
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"`published`: {metric} wants a number; given {value!r:.60}")
    return {metric: float(value) for metric, value in values.items()}


def _names(given: Any) -> tuple[str, ...]:
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
    return name, _unique(steps.parse(name, word) for word in words)


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


def _unique(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    return [value for value in values if value not in found and not found.append(value)]  # type: ignore[func-returns-value]


# Flags over a file ---------------------------------------------------------------------------------------------


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
        tasks=_names(tasks) if tasks else grid.tasks,
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
    if "cls" in features and not model and not steps.has_cls(given["pretrain"]):
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
