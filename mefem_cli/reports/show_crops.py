"""`mefem show crops FOLDER...`: a contact sheet, how labels and sizes are distributed, and why faces were rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mefem_cli.console import plural
from mefem_cli.errors import UsageError, did_you_mean
from mefem_cli.faces.contact import REASONS_IN_WORDS
from mefem_cli.faces.source import printable
from mefem_cli.reports import html
from mefem_cli.reports.curves import COLOURS, INK
from mefem_cli.reports.show_face import crop_of, each_readable
from mefem_cli.reports.show_sheet import Row, Sheet, Tile, axes_at, plain
from mefem_cli.stores.crops import CONTACT, Crops, read_manifest, text_to_path

if TYPE_CHECKING:
    from mefem_cli.showing import ShowOptions

NUM_FACES, FACE_PX, FACE_INCHES = 48, 160, 0.92
PANEL = (2.35, 1.55)  # inches
MOST_LABELS, MOST_CLASSES, MOST_LETTERS = 12, 10, 18
MOST_OTHERS = 0.9  # of the crops: bars beside that of the others could not be seen
NUM_BINS = 24
LARGEST = 1e300  # number in a histogram: the width of an axis must not overflow
UNKNOWN = "#9aa0ab"  # what has no colour of its own
TOLD_FIRST, MOST_TOLD = ("bmi", "age", "sex", "gender"), 2  # labels below a face, where --by names none


def sheet(folders: Sequence[Path], options: ShowOptions) -> Sheet:
    """Return what is in crops folders. Raises NoInputError for what is none, UsageError for an unknown label."""
    crops = Crops.open(*folders)
    if options.by is not None and options.by not in crops.labels:
        raise UsageError(f"--by {options.by}: these crops have no such label{did_you_mean(options.by, crops.labels)}")
    reasons = rejects(crops.folders)
    num_shown = min(options.samples or NUM_FACES, len(crops))
    chosen = np.sort(np.random.default_rng(options.seed).permutation(len(crops))[:num_shown])
    faces = _faces(crops, chosen, options.by)
    rows = [Row(f"Crops ({len(faces)} of {len(crops):,})", faces, _faces_caption(chosen, crops, options.by))]
    labels = [_panel_of(name, crops.labels[name]) for name in list(crops.labels)[:MOST_LABELS]]
    if labels:
        num_more = len(crops.labels) - MOST_LABELS
        more = f" Not shown: {plural(num_more, 'more label')}." if num_more > 0 else ""
        caption = f"How many crops have which value, of many the {MOST_CLASSES} most frequent; in brackets, how many "
        rows.append(Row("Labels", labels, f"{caption}have one.{more}"))
    rows.append(Row("Sizes and scores", list(_measures(crops)), _sizes_caption(crops)))
    tail = []
    if reasons:
        bars = _bars("rejects", [(name, count) for name, count in reasons.most_common()])
        rows.append(Row("Rejects", [Tile("", bars, size=(4.8, 0.75 + 0.17 * len(reasons)))], _rejects_caption(crops)))
        lines = [(name, f"{count:,}", REASONS_IN_WORDS.get(name, "")) for name, count in reasons.most_common()]
        tail.append(html.table(["reason", "rejects", "meaning"], lines))
    lead = f"{len(crops):,} crop{'s' * (len(crops) != 1)} of {crops.size} px, {plural(reasons.total(), 'reject')}, in "
    lead += ", ".join(printable(str(folder)) for folder in crops.folders)
    return Sheet("Crops", lead, rows, tail, crops.inputs())  # fmt: skip


def rejects(folders: Sequence[Path]) -> Counter[str]:
    """Return how many faces and sources of some crops folders were rejected for each reason."""
    counts: Counter[str] = Counter()
    for folder in folders:
        if folder.is_dir():
            counts.update(read_manifest(folder, ["reason"])["reason"].to_pylist())
    return Counter({reason: count for reason, count in counts.items() if reason})


# Faces ----------------------------------------------------------------------------------------------------------------


def _faces(crops: Crops, rows: np.ndarray, by: str | None) -> list[Tile]:
    names = told(list(crops.labels), by)
    sources = crops.columns["source"]
    tiles = []
    for row, pixels in each_readable(rows.tolist(), lambda row: crop_of(crops, row, FACE_PX)):
        values = {name: shown(crops.labels[name][row]) for name in crops.labels}
        caption = ", ".join(values[name] for name in names)
        whole = printable(text_to_path(sources[row])) or crops.describe(row)
        hover = "\n".join([whole, *(f"{name}: {value}" for name, value in values.items())])
        tiles.append(Tile(clipped(caption or whole[-30:], 30), None, pixels, (FACE_INCHES, FACE_INCHES), hover))
    return tiles


def told(labels: Sequence[str], by: str | None) -> list[str]:
    """Return the labels whose values stand below a face."""
    if by is not None:
        return [by]
    first = [name for start in TOLD_FIRST for name in [one for one in labels if one.startswith(start)][:1]]
    return list(dict.fromkeys([*first, *(name for name in labels if not name.startswith("subject"))]))[:MOST_TOLD]


def shown(value: Any) -> str:
    """Return a label's value in a few letters, `-` where there is none."""
    if isinstance(value, float | np.floating):
        return "-" if np.isnan(value) else f"{value:.4g}"
    return clipped(str(value)) if value != "" else "-"


def clipped(text: str, most: int = MOST_LETTERS) -> str:
    """Return a text of at most so many letters; a longer one lacks its middle, as names often differ in their ends.

    >>> clipped("FLUX1_dev_image_00012.png", 16)
    'FLUX1_de…012.png'
    """
    return text if len(text) <= most else f"{text[: most // 2]}…{text[most // 2 + 1 - most :]}"


def _faces_caption(rows: np.ndarray, crops: Crops, by: str | None) -> str:
    how = "All of them" if len(rows) == len(crops) else "Chosen at random (--seed), in the order of the manifest"
    names = told(list(crops.labels), by)
    return f"{how}. Below each: {', '.join(names) or 'its source'}; - where there is no value."


# Distributions --------------------------------------------------------------------------------------------------------


def _panel_of(name: str, values: np.ndarray) -> Tile:
    """Return a histogram of numbers, or bars for the most frequent classes and one for all others.

    Of names of people, where even the most frequent are few, how many there are.
    """
    if values.dtype.kind == "f":
        known = values[np.isfinite(values)]
        return Tile("", histogram(f"{clipped(name)} ({len(known):,})", known), size=PANEL)
    known = values[values != ""]
    counts = Counter(known.tolist())
    title = f"{clipped(name)} ({len(known):,})"
    bars = counts.most_common(MOST_CLASSES)
    num_others = len(counts) - len(bars)
    if num_others:
        rest = len(known) - sum(count for _, count in bars)
        if rest > MOST_OTHERS * len(known):
            words = f"{len(counts):,} values,\neach {plural(bars[0][1], 'time')} at most"
            return Tile("", _words(title, words), size=PANEL)
        bars.append((plural(num_others, "other"), rest))
    return Tile("", _bars(title, bars, last_is_rest=num_others > 0), size=PANEL)


def histogram(title: str, values: np.ndarray, mark: float | None = None) -> Callable[[Any], None]:
    """Draw how many values (n,) fall into each of some bins, and a line at `mark`."""
    values = np.clip(values, -LARGEST, LARGEST)

    def draw(figure: Any) -> None:
        axis = _axis(figure, title)
        edges = bin_edges(values, mark) if len(values) else np.zeros(1)
        if len(values):
            axis.hist(values, bins=edges, color=COLOURS[0])
        if mark is not None:
            axis.axvline(mark, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        has_room = np.abs(edges).max() < 10_000  # for the numbers below the axis
        axis.locator_params(axis="x", nbins=5 if has_room else 3, integer=_is_whole(values), min_n_ticks=1)
        axis.locator_params(axis="y", nbins=4, integer=True)

    return draw


def bin_edges(values: np.ndarray, mark: float | None = None) -> np.ndarray:
    """Return the edges of bins that hold values (n,), n > 0, as wide as they have to be to be seen beside `mark`.

    Bins of whole numbers hold equally many of these: 1, 2, 5, 10 ..., from a multiple of that on.
    """
    known = values if mark is None else np.append(values, mark)
    low, high = float(known.min()), float(known.max())
    if _is_whole(values):
        widths = (step * 10.0**power for power in range(16) for step in (1, 2, 5))
        width = next(width for width in widths if (high - low) / width < 2 * NUM_BINS)
        first, last = np.floor(low / width), np.floor(high / width)
        return np.arange(first, last + 2) * width - 0.5
    if low == high:
        return low + abs(low) * np.array([-0.05, 0.05])
    count = len(np.unique(values)) if mark is None else NUM_BINS
    return np.linspace(low, high, min(NUM_BINS, count) + 1)


def _is_whole(values: np.ndarray) -> bool:
    return bool((np.abs(values) < 1e15).all() and (values == np.round(values)).all())


def _bars(title: str, counts: Sequence[tuple[str, int]], last_is_rest: bool = False) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        width, height = _inches(figure)
        axis = _axis(figure, title, left=1.05 / width, bottom=0.3 / height)
        places = range(len(counts))
        colours = [COLOURS[0]] * (len(counts) - last_is_rest) + [UNKNOWN] * last_is_rest
        axis.barh(places, [count for _, count in counts], color=colours, height=0.7)
        axis.set_yticks(places, [plain(clipped(name, 14)) for name, _ in counts])
        axis.tick_params(axis="y", labelsize=7.5 if len(counts) <= 8 else 6)
        axis.set_ylim(max(len(counts), 2) - 0.5, -0.5)
        axis.grid(False, axis="y")
        axis.locator_params(axis="x", nbins=4, integer=True)

    return draw


def _words(title: str, words: str) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axis = _axis(figure, title)
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, words, ha="center", va="center", transform=axis.transAxes)

    return draw


def _inches(figure: Any) -> tuple[float, float]:
    box = figure.bbox
    dpi = figure.dpi
    return box.width / dpi, box.height / dpi


def _axis(figure: Any, title: str, left: float | None = None, bottom: float | None = None) -> Any:
    width, height = _inches(figure)
    left = 0.42 / width if left is None else left
    bottom = 0.3 / height if bottom is None else bottom
    axis = axes_at(figure, left, bottom, 0.95 - left, 1 - bottom - 0.26 / height)
    axis.set_title(plain(title), size=8.5, loc="left", pad=4)
    axis.tick_params(labelsize=7.5, length=2)
    axis.set_axisbelow(True)
    return axis


def _measures(crops: Crops) -> list[Tile]:
    wanted = {
        "crop_side": "side of the square, px",
        "width": "width of the picture, px",
        "height": "height of the picture, px",
        "score": "score of the detector",
    }
    tiles = []
    for name, title in wanted.items():
        values = np.asarray(crops.columns[name], np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            mark = float(crops.size) if name == "crop_side" else None
            tiles.append(Tile("", histogram(title, values, mark), size=PANEL))
    return tiles


def _sizes_caption(crops: Crops) -> str:
    side = np.asarray(crops.columns["crop_side"], np.float64)
    side = side[np.isfinite(side)]
    if not len(side):
        return "Nothing is recorded of where these crops come from."
    much = 100 * float((side >= 2 * crops.size).mean())
    return (
        f"Dashed: the side of a crop, {crops.size} px. A larger square of the picture loses detail in its crop; "
        f"{much:.0f} % are at least twice as large."
    )


def _rejects_caption(crops: Crops) -> str:
    sheets = [folder / CONTACT for folder in crops.folders if (folder / CONTACT).is_file()]
    places = ", ".join(printable(str(one.absolute())) for one in sheets)
    return f"Pictures of rejects, with face box and crop square: {places}." if sheets else ""
