"""Pictures to look at: masks, loss weights, crops, runs, feature stores, attention, and every part there is.

mefem show masks | weights: what pretraining hides and how it counts. mefem show crops FOLDER. mefem show run RUN...:
the health page of a run, or the curves of several. mefem show store FILE: a map of its faces. mefem show attention RUN
CROP...: where an encoder looks. mefem show parts: every mask, objective, backbone, probe and task, as a table.

Try: mefem show masks --width 2 -o masks.png
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mefem_cli.parts import Given

ARGUMENT = ("kind what", "masks, weights, crops, run, store, attention or parts; then what it shows.")
OPTIONS = ("showing:ShowOptions", "console:ConsoleOptions")
ROOMS = ("masks",)


def run(arguments: list[str], given: Given) -> None:
    """Draw what the first argument says."""
    from mefem_cli import showing
    from mefem_cli.errors import UsageError, did_you_mean

    if not arguments:
        raise UsageError(f"name what to show: {', '.join(showing.USES)}, as in mefem show masks")
    kind, *rest = arguments
    if kind not in showing.USES:
        raise UsageError(f'there is no picture of "{kind}"{did_you_mean(kind, showing.USES)}')
    options = given.build("showing", "ShowOptions")
    _warn_of_no_effect(kind, given)
    if kind == "parts" and options.out is None:
        _parts(rest)
    else:
        _picture(kind, rest, options, given)


def _picture(kind: str, arguments: list[str], options: Any, given: Given) -> None:
    from pathlib import Path

    from mefem_cli import console, showing
    from mefem_cli.reports import show_sheet

    begun = time.monotonic()
    arguments = arguments or _piped(kind)
    if kind == "run" and len(arguments) <= 1 and options.out is None:
        from mefem_cli.reports import show_runs

        page = show_runs.health_page(Path(arguments[0]) if arguments else None)
        console.product(page, time.monotonic() - begun)
        return
    out = Path(options.out) if options.out else showing.default_out(kind)
    show_sheet.check(out, options.overwrite)
    sheet = showing.draw(kind, arguments, options, given, is_page=out.suffix.lower() == ".html")
    show_sheet.write(sheet, out, showing.resolved(kind, options, given), options.seed)
    console.product(out, time.monotonic() - begun)


def _piped(kind: str) -> list[str]:
    """Return what the command before this one in a pipe made."""
    from mefem_cli import console

    awaited = {"crops": "a crops folder", "run": "a run", "store": "a feature store"}
    if kind not in awaited or not console.stdin_is_pipe():
        return []
    return [str(path) for path in console.read_pipe_all(awaited[kind])]


def _parts(arguments: list[str]) -> None:
    from mefem_cli import console
    from mefem_cli.reports import show_parts

    found = show_parts.every_part(arguments)
    if console.wants_json():
        console.emit(show_parts.as_json(found))
    else:
        console.table(show_parts.table(found), wraps=True)


def _warn_of_no_effect(kind: str, given: Given) -> None:
    from mefem_cli import console, parts, showing

    of_masks = {one.name for part in parts.names("masks") for one in parts.read_fields(f"masks.{part}")}
    known = {one.name for one in parts.read_fields("showing", "ShowOptions")} | of_masks
    used = {*showing.USES[kind], "out", "overwrite"}
    used |= of_masks if kind == "masks" else set()
    for name in sorted((known - used) & set(given.values)):
        console.warn(f"--{name.replace('_', '-')} has no effect with {kind}")
