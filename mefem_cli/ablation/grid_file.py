"""Presets and grid files, as YAML.

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

Presets are such files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mefem_cli import parts
from mefem_cli.ablation import steps
from mefem_cli.ablation.grid import DEFAULT_TASK, Grid, Row, as_names, unique, whole_number
from mefem_cli.ablation.steps import Assignment
from mefem_cli.errors import UsageError, did_you_mean

PRESETS = Path(__file__).parent / "presets"
FILE_KEYS = ("vary", "set", "rows", "task", "seeds", "epochs", "model", "reference")
TABLE_KEYS = ("group", "published")  # of a row, beside options: they change no result and are in no key


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
            raise UsageError(f'{path}: a grid has no key "{one}"{_hint(str(one))}')
    rows = content.get("rows", [{}])
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{path}: `rows` wants a list of options, such as `- {{mask: stripes, width: 3}}`")
    try:
        tasks = as_names(content.get("task") or DEFAULT_TASK)
        return Grid(
            name,
            vary={one: unique(values) for one, values in _parse_table(content, "vary").items()},
            fixed=_parse_table(content, "set"),
            rows=_under_headings([_parse_row(row, tasks) for row in rows]),
            tasks=tasks,
            seeds=whole_number("seeds", content.get("seeds", 1)),
            epochs=whole_number("epochs", content["epochs"]) if "epochs" in content else None,
            references=_parse_references(content.get("reference") or []),
            models=as_names(content.get("model") or []),
            only_models="model" in content,
        )
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from error


def _hint(key: str) -> str:
    """Return where a word belongs that is no key of a grid."""
    if any(key.replace("-", "_") in steps.options(step) for step in steps.STEPS):
        return f"; options of all cells stand under `set`, as in `set: {{{key}: ...}}`"
    return did_you_mean(key, FILE_KEYS)


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
