"""`mefem show parts`: every choice in the rooms of the package and its options, read without importing any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mefem_cli import parts
from mefem_cli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

    from mefem_cli.reports.show_sheet import Sheet

# How a choice is typed; of backbones, encoders made elsewhere say themselves (`SPEC`).
TYPED = {
    "masks": "--mask {}",
    "objectives": "--objective {}",
    "backbones": "--model {}",
    "probes": "--head {}",
    "tasks": "mefem probe {}",
}
OURS = "vit"  # the backbone that is trained; it is typed by the name of a timm ViT
OURS_TYPED = "--backbone NAME"


@dataclass(frozen=True)
class Part:
    """A choice on the command line: a file in a room."""

    room: str
    name: str
    typed: str
    summary: str
    options: Sequence[parts.Field]


def every_part(rooms: Sequence[str] = ()) -> list[Part]:
    """Return the parts of some rooms, of all where none is named. Raises UsageError for a room that is none."""
    for room in rooms:
        if room not in TYPED:
            raise UsageError(f'there are no parts called "{room}"{did_you_mean(room, TYPED)}')
    return [_part(room, name) for room in rooms or TYPED for name in parts.names(room)]


def _part(room: str, name: str) -> Part:
    module = f"{room}.{name}"
    typed = TYPED[room].format(name)
    if room == "backbones":
        typed = OURS_TYPED if name == OURS else f"--model {parts.read_constant(module, 'SPEC')}"
    return Part(room, name, typed, parts.first_paragraph(module), parts.read_fields(module))


def as_json(found: Sequence[Part]) -> dict[str, Any]:
    """Return parts as one object: room -> list of parts with their options."""
    rooms: dict[str, list[dict[str, Any]]] = {}
    for part in found:
        options = [
            {"flag": one.flag, "values": one.metavar, "default": one.default, "help": one.help} for one in part.options
        ]
        described = {"name": part.name, "typed": part.typed, "summary": part.summary, "options": options}
        rooms.setdefault(part.room, []).append(described)
    return rooms


def table(found: Sequence[Part]) -> Table:
    """Return parts as a table: a line for each part, then one for each of its options."""
    from rich.table import Column, Table
    from rich.text import Text

    shown = Table(Column("part", no_wrap=True), Column("typed", no_wrap=True), "what it is", show_edge=False)
    room = ""
    for part in found:
        if part.room != room:
            shown.add_section()
            room = part.room
            shown.add_row(Text(room.upper(), style="bold"))
        shown.add_row(*(Text(one) for one in (part.name, part.typed, part.summary)))
        for typed, words in _options(part):
            shown.add_row(*(Text(cell, style="dim") for cell in ("", f"  {typed}", words)))
    return shown


def sheet(rooms: Sequence[str]) -> Sheet:
    """Return parts as a page, a table for each room. Raises UsageError for a room that is none."""
    from mefem_cli.reports import html
    from mefem_cli.reports.show_sheet import Sheet

    tail = []
    for room in rooms or TYPED:
        lines = []
        for part in every_part([room]):
            lines.append((part.name, part.typed, part.summary))
            lines += [("", typed, words) for typed, words in _options(part)]
        tail += [html.heading(room.capitalize()), html.table(("part", "typed", "what it is"), lines)]
    return Sheet("Parts", "What is installed, how it is typed, and its options.", [], tail)


def _options(part: Part) -> Iterator[tuple[str, str]]:
    """Yield how each option of a part is typed, and what it is, with its default."""
    for one in part.options:
        default = f" (default {one.default_text})" if one.default_text else ""
        yield f"{one.flag} {one.metavar}".rstrip(), one.help + default
