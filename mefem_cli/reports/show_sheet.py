"""A sheet of figures as one file: an HTML page that reads well in light and dark, or one PNG or SVG picture.

A sheet has rows, a row has tiles side by side and a caption that says what is seen. What a tile draws is the same in
all three forms.
"""

from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mefem_cli.errors import OutputError, UsageError
from mefem_cli.reports import curves, fonts, html
from mefem_cli.stores import product

if TYPE_CHECKING:
    import numpy as np

FORMS = (".html", ".png", ".svg")
MARK = "mefem show"  # in the first bytes of what this makes: such a file may be drawn anew
MARK_WITHIN = 4096  # bytes
MOST_TILES = 400  # of a picture: matplotlib lays each out for itself
PICTURE_WIDTH = 9.8  # inches; a longer row goes on in the next line
DPI, PAGE_DPI = 150, 96
GAP = 0.07  # inches between tiles
LINE, TITLE_LINE = 0.165, 0.30  # inches of a line of text, of a title with the space above it
BASELINE, NAME_LINE = 0.105, 0.13  # inches from a tile to the first line of its title, and from line to line
LETTERS = 15.5  # of a caption to an inch
PAPER, SOFT = "#ffffff", "#5d6472"
STYLE = (
    f"<style>{curves.VARIABLES}"
    + """
.row { display: flex; flex-wrap: wrap; gap: .4rem; align-items: flex-start; }
.row figure { margin: 0; max-width: 100%; }
.together { display: flex; gap: .4rem; max-width: 100%; }
.row svg, .row img { display: block; width: 100%; height: auto; } .row img { border-radius: 4px; }
.row figcaption { font-size: .76rem; overflow-wrap: anywhere; line-height: 1.3; min-height: 1.3em; }
.row + p.soft { margin-top: .5rem; font-size: .9rem; } details { margin-top: 2rem; } summary { color: var(--soft); }
td { overflow-wrap: anywhere; min-width: 4.5rem; } td:first-child { min-width: 7rem; }
</style>"""
)


@dataclass(frozen=True)
class Tile:
    """One figure of a row. It is drawn by `draw` or, a photo, it is `pixels`, uint8 [H, W, 3]."""

    title: str = ""
    draw: Callable[[Any], None] | None = None  # into a matplotlib Figure or SubFigure, with `axes_at`
    pixels: np.ndarray | None = None
    size: tuple[float, float] = (1.2, 1.2)  # inches, without its title
    hover: str = ""  # what a page shows under the pointer


@dataclass(frozen=True)
class Row:
    """Tiles side by side."""

    title: str
    tiles: Sequence[Tile]
    caption: str = ""
    together: Sequence[Tile] = ()  # more tiles, which stay side by side
    page: str = ""  # HTML that a page shows instead of the tiles

    @property
    def all_tiles(self) -> list[Tile]:
        """All tiles, in their order."""
        return [*self.tiles, *self.together]


@dataclass(frozen=True)
class Sheet:
    """All that a picture or page shows."""

    title: str
    lead: str
    rows: Sequence[Row]
    tail: Sequence[str] = ()  # HTML that only a page shows, below the rows
    inputs: Mapping[str, str] = field(default_factory=dict)  # for the provenance: path -> sha256


def check(path: Path, overwrite: bool) -> None:
    """Raise UsageError for a form that is none, OutputError where `path` holds what is not ours to replace."""
    if path.suffix.lower() not in FORMS:
        raise UsageError(f"-o {path}: its ending decides the form; wanted {', '.join(FORMS)}, such as {path.stem}.html")
    if path.is_dir():
        raise OutputError(f"-o {path}: is a folder; name a file, such as {path / 'figure.html'}")
    if path.exists() and not overwrite and not is_ours(path):
        raise OutputError(f"{path} exists and was not drawn by mefem show; type --overwrite or name another -o")


def is_ours(path: Path) -> bool:
    """Whether a file was made here, so that drawing it anew loses nothing."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(MARK_WITHIN)


def write(sheet: Sheet, path: Path, options: Mapping[str, Any], seed: int = 0) -> None:
    """Write a sheet in the form that the path's ending names; it says inside how it was made."""
    record = product.provenance(options, sheet.inputs, seed)
    if path.suffix.lower() == ".html":
        product.write_text(path, page(sheet, record))
        return
    form = path.suffix.lower()[1:]
    with product.writing(path) as temporary:
        _write_picture(sheet, temporary, form, record)


# Page -----------------------------------------------------------------------------------------------------------------


def page(sheet: Sheet, record: Mapping[str, Any]) -> str:
    """Return the sheet as one self-contained page."""
    body = [STYLE]
    for row in sheet.rows:
        body += [html.heading(row.title)] if row.title else []
        body.append(row.page or _row_of_page(row))
        body += [f'<p class="soft">{escape(row.caption)}</p>'] if row.caption else []
    body += [*sheet.tail, _making(record)]
    whole = html.page(sheet.title, sheet.lead, body)
    return whole.replace("<head>", f'<head><meta name="generator" content="{MARK}">', 1)


def _row_of_page(row: Row) -> str:
    together = "".join(map(_tile_of_page, row.together))
    pair = f'<div class="together">{together}</div>' if together else ""
    return f'<div class="row">{"".join(map(_tile_of_page, row.tiles))}{pair}</div>'


def _tile_of_page(tile: Tile) -> str:
    if tile.pixels is not None:
        content = f'<img alt="{escape(tile.title, quote=True)}" src="{data_uri(tile.pixels)}">'
    else:
        assert tile.draw is not None
        content = curves.svg_element(tile.draw, tile.size)
    hover = f' title="{escape(tile.hover, quote=True)}"' if tile.hover else ""
    caption = f"<figcaption>{escape(tile.title)}</figcaption>" if tile.title else ""
    return f'<figure style="width: {PAGE_DPI * tile.size[0]:.0f}px"{hover}>{content}{caption}</figure>'


def data_uri(pixels: np.ndarray) -> str:
    """Return uint8 pixels [H, W, 3] as a JPEG that stands in the page itself."""
    from mefem_cli.reports.probe_faces import jpeg

    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(pixels)).decode()}"


def _making(record: Mapping[str, Any]) -> str:
    options = {name: value for name, value in record["options"].items() if value not in (None, [], "", False)}
    rows = [("mefem", f"{record['mefem']} (commit {record['git_commit'] or 'unknown'})"), *options.items()]
    rows += [(f"input {path}", f"sha256 {digest}") for path, digest in record["inputs"].items()]
    command = " ".join(str(word) for word in record["command"])
    return f"<details><summary>How this was made</summary>{html.code([command])}{html.table(('', ''), rows)}</details>"


# Picture --------------------------------------------------------------------------------------------------------------


def _write_picture(sheet: Sheet, path: Path, form: str, record: Mapping[str, Any]) -> None:
    """Draw all rows one below the other."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_tiles = sum(len(row.all_tiles) for row in sheet.rows)
    if num_tiles > MOST_TILES:
        raise UsageError(f"{num_tiles} tiles are too many for one picture; name a page, -o {path.stem}.html, or fewer")
    blocks = _blocks(sheet)
    widest = max((_width(tiles) for _, tiles, _ in blocks), default=PICTURE_WIDTH)
    heights = [height for height, _, _ in blocks]
    with rc_context(curves.STYLE), fonts.letters_may_lack():
        figure = Figure(figsize=(max(widest, 5.0) + 0.2, sum(heights) + 0.1), facecolor=PAPER)
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (_, tiles, lines) in zip(parts, blocks, strict=True):
            if tiles:
                _draw_tiles(part, tiles, max(widest, 5.0))
            else:
                _draw_lines(part, *lines)
        if form == "png":  # whoever opens an SVG finds a font himself: its text is text
            fonts.warn(fonts.lend(figure))
        look = {"dpi": DPI, "facecolor": PAPER, "bbox_inches": "tight", "pad_inches": 0.15}
        figure.savefig(path, format=form, metadata=_metadata(form, record), **look)  # type: ignore[arg-type]


def _metadata(form: str, record: Mapping[str, Any]) -> dict[str, Any]:
    if form == "png":
        return {"Software": MARK, "mefem": json.dumps(record)}
    return {"Creator": MARK, "Description": json.dumps(record), "Date": None}


Lines = tuple[str, float, str, str]  # text, font size, weight, colour


def _blocks(sheet: Sheet) -> list[tuple[float, list[Tile], Lines]]:
    """Return what stands below one another: height in inches, and tiles or lines of text."""
    no_text: Lines = ("", 0, "", "")
    width = max([5.0, *(_width(line) for row in sheet.rows for line in _lines_of(row))])
    blocks = [_text(sheet.title, 13, "bold", curves.INK, width), _text(sheet.lead, 9, "normal", SOFT, width)]
    for row in sheet.rows:
        blocks += [_text(row.title, 10, "bold", curves.INK, width)] if row.title else []
        for tiles in _lines_of(row):
            blocks.append((max(tile.size[1] for tile in tiles) + _title_height(tiles), tiles, no_text))
        blocks += [_text(row.caption, 8, "normal", SOFT, width)] if row.caption else []
    return blocks


def _text(text: str, size: float, weight: str, colour: str, width: float) -> tuple[float, list[Tile], Lines]:
    wrapped = textwrap.fill(text, int(LETTERS * width * 8.5 / size))
    num_lines = wrapped.count("\n") + 1
    height = TITLE_LINE if weight == "bold" else 0.09 + LINE * num_lines
    return height, [], (wrapped, size, weight, colour)


def _title_height(tiles: Sequence[Tile]) -> float:
    return 0.05 + NAME_LINE * max(len(_wrapped(tile).splitlines()) for tile in tiles)


def _wrapped(tile: Tile) -> str:
    return textwrap.fill(tile.title, max(8, int(14.5 * tile.size[0])))


def _width(tiles: Sequence[Tile]) -> float:
    return sum(tile.size[0] + GAP for tile in tiles)


def _lines_of(row: Row) -> list[list[Tile]]:
    """Return the tiles of a row in lines that are as wide as a picture; `row.together` are in one of them."""
    lines: list[list[Tile]] = []
    for group in [*([tile] for tile in row.tiles), *([list(row.together)] if row.together else [])]:
        if lines and _width([*lines[-1], *group]) <= PICTURE_WIDTH:
            lines[-1] += group
        else:
            lines.append(group)
    return lines


def _draw_lines(part: Any, text: str, size: float, weight: str, colour: str) -> None:
    """Write text: a title just above what follows, other text just below what it is about."""
    y, align = (0.12, "bottom") if weight == "bold" else (0.94, "top")
    part.text(0, y, plain(text), size=size, weight=weight, color=colour, va=align)


def _draw_tiles(part: Any, tiles: Sequence[Tile], width: float) -> None:
    """Draw a line of tiles from the left; what is left of the width stays empty."""
    widths = [size for tile in tiles for size in (tile.size[0], GAP)]
    rest = max(width - sum(widths), 1e-3)
    heights = [max(tile.size[1] for tile in tiles), max(_title_height(tiles), 1e-3)]
    cells = part.subfigures(2, len(widths) + 1, width_ratios=[*widths, rest], height_ratios=heights, squeeze=False)
    for place, tile in enumerate(tiles):
        if tile.draw is not None:
            tile.draw(cells[0, 2 * place])
        else:
            photo(cells[0, 2 * place], tile.pixels)
        for number, line in enumerate(_wrapped(tile).splitlines()):  # each at its height, whatever its letters
            y = 1 - (BASELINE + NAME_LINE * number) / heights[1]
            cells[1, 2 * place].text(0.02, y, plain(line), va="baseline", size=7.5)


def axes_at(figure: Any, left: float, bottom: float, width: float, height: float) -> Any:
    """Return an axis at a place in a Figure or SubFigure, in shares of it.

    Letting matplotlib find the place (constrained layout) takes minutes for some tens of nested figures.
    """
    if hasattr(figure, "set_layout_engine"):
        figure.set_layout_engine("none")
    return figure.add_axes((left, bottom, width, height))


def photo(figure: Any, pixels: Any) -> None:
    """Draw uint8 pixels [H, W, 3], nothing else."""
    axis = without_axes(axes_at(figure, 0, 0, 1, 1))
    axis.imshow(pixels, interpolation="antialiased")


def without_axes(axis: Any) -> Any:
    """Return an axis that shows what is drawn and nothing of its own."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return axis


def plain(text: str) -> str:
    """Return a text for matplotlib, which would read "$" as mathematics, without letters that cannot be drawn."""
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in text).replace("$", r"\$")
