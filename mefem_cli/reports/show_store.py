"""`mefem show store FILE`: a summary, how many directions the features use, and a map of the faces.

The map shows the two directions along which the features vary most (PCA). A page shows a face's crop under the
pointer; it holds the pictures itself and needs nothing else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mefem_cli import store_tools
from mefem_cli.console import plural
from mefem_cli.errors import NoInputError, UsageError, did_you_mean
from mefem_cli.reports import html
from mefem_cli.reports.curves import COLOURS, INK
from mefem_cli.reports.probe_faces import Faces, jpeg
from mefem_cli.reports.show_crops import UNKNOWN, clipped, shown, told
from mefem_cli.reports.show_sheet import Row, Sheet, Tile, axes_at, plain
from mefem_cli.stores.features import FeatureStore

if TYPE_CHECKING:
    from mefem_cli.showing import ShowOptions

MOST_MEASURED, MOST_DRAWN = 20_000, 2_000  # faces behind the numbers; on a page's map, each with its crop
LEAST_FACES = 3
THUMBNAIL_PX = 64
MOST_CLASSES = 8
HASHED_BYTES = 1 << 30  # a larger store is told by its encoder and ids, not by the hash of all its bytes
# Eight colours that people with any kind of colour vision tell apart (Okabe and Ito 2008; its black is grey here).
CLASSES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a8f9c")
LOW = 0.12  # of viridis: its darkest colours do not show on a dark page
MAP, SPECTRUM = (6.4, 4.6), (4.6, 2.6)  # inches
VIEW = (900, 640, 14)  # of the map on a page: width, height, margin
AXIS_NAME = 24  # of the same units, for the name of an axis beside it
STYLE = """<style>
.map text { font-size: 13px; fill: var(--soft); }
.map { position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.map svg { display: block; width: 100%; height: auto; touch-action: manipulation; }
.map circle { stroke: var(--card); stroke-width: .8; } .map circle.on { stroke: var(--ink); stroke-width: 2; }
.card { position: absolute; display: none; pointer-events: none; background: var(--paper); color: var(--ink);
  border: 1px solid var(--line); border-radius: 6px; padding: .35rem; font-size: .75rem; line-height: 1.3; width: 9rem;
  box-shadow: 0 2px 10px #0004; overflow-wrap: anywhere; white-space: pre-line; z-index: 1; }
.card img { display: block; width: 112px; height: 112px; border-radius: 4px; margin: 0 auto .25rem; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; font-size: .85rem; margin: .5rem 0; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .35rem;
  vertical-align: -.1rem; } .key .bar { width: 12rem; height: .7rem; border-radius: 3px; }
</style>"""
SCRIPT = """<script>
(() => {
  const faces = JSON.parse(document.getElementById("faces").textContent);
  const map = document.querySelector(".map"), card = map.querySelector(".card");
  const picture = card.querySelector("img"), words = card.querySelector("span");
  let current = null;
  const show = event => {
    const point = event.target.closest("circle");
    if (point === current) return;
    if (current) current.classList.remove("on");
    current = point;
    if (!point) { card.style.display = "none"; return; }
    point.classList.add("on");
    const [text, data] = faces[point.dataset.i];
    words.textContent = text;
    picture.style.display = data ? "block" : "none";
    if (data) picture.src = "data:image/jpeg;base64," + data;
    card.style.display = "block";
    const frame = map.getBoundingClientRect(), at = point.getBoundingClientRect();
    const x = at.left - frame.left + 14, y = at.top - frame.top + 14;
    card.style.left = Math.max(0, x + card.offsetWidth > frame.width ? x - card.offsetWidth - 22 : x) + "px";
    card.style.top = Math.max(0, y + card.offsetHeight > frame.height ? y - card.offsetHeight - 22 : y) + "px";
  };
  map.addEventListener("pointermove", show);
  map.addEventListener("pointerdown", show);
  map.addEventListener("pointerleave", show);
})();
</script>"""


@dataclass(frozen=True)
class Components:
    """Principal components of features [n, D]."""

    points: np.ndarray  # [n, 2]: the features along the first two
    shares: np.ndarray  # (k,): of the variance along each, largest first; they sum to 1


def components(features: np.ndarray) -> Components:
    """Return scikit-learn's PCA of features [n, D], n and D at least 2."""
    from sklearn.decomposition import PCA

    num, width = features.shape
    model = PCA(svd_solver="covariance_eigh" if num > width else "full").fit(features.astype(np.float64))
    return Components(model.transform(features)[:, :2], model.explained_variance_ratio_)


def directions_for(shares: np.ndarray, wanted: float) -> int:
    """Return how many directions hold a share of the variance."""
    return int(np.searchsorted(np.cumsum(shares), wanted * (1 - 1e-12)) + 1)


def sheet(path: Path, options: ShowOptions, is_page: bool) -> Sheet:
    """Return what is in a store. Raises NoInputError for what is none, UsageError for an unknown label."""
    known = store_tools.summary(path)
    with FeatureStore.open(path) as store:
        kind = _kind(store, options.features)
        by = _label(store, options.by)
        if len(store) < LEAST_FACES:
            raise NoInputError(f"{path}: has {plural(len(store), 'face')}; a map wants {LEAST_FACES} or more")
        rng = np.random.default_rng(options.seed)
        rows = np.sort(rng.permutation(len(store))[:MOST_MEASURED])
        chosen = store if len(rows) == len(store) else store.select(rows)
        features = chosen.read(kind)
        if not np.isfinite(features).all():
            raise NoInputError(f"{path}: some of its {kind} features are not finite; make it anew with mefem embed")
        if not np.ptp(features, axis=0).any():
            raise NoInputError(f"{path}: its {kind} features are the same for all faces: there is nothing to map")
        found = components(features)
        drawn = np.sort(rng.permutation(len(rows))[: MOST_DRAWN if is_page else MOST_MEASURED])
        lead = f"{len(store):,} faces, {kind} features of {store.model_name}, {store.embed_dim} values each."
        figures = [
            _map_row(chosen, found, drawn, by, _sampled(len(store), len(rows), len(drawn)), is_page),
            _spectrum_row(features, found, kind),
        ]
        inputs = {str(path.absolute()): store.sha256 if known["bytes"] <= HASHED_BYTES else "too large to hash"}
    table = html.table(("", ""), store_tools.summary_rows(known))
    return Sheet(f"Feature store {path.name}", lead, figures, [html.heading("Summary"), table], inputs)


def _kind(store: FeatureStore, asked: str | None) -> str:
    vectors = [kind for kind in ("mean", "cls") if store.has(kind)]
    if not vectors:
        raise NoInputError(f"{store.path}: has patches only; a map wants cls or mean features")
    if asked is not None and asked not in vectors:
        raise UsageError(f"--features {asked}: {store.path} has {' and '.join(vectors)} only")
    return asked or vectors[0]


def _label(store: FeatureStore, asked: str | None) -> str | None:
    """Return the label that colours the map: as asked, else the first of those that are told first."""
    if asked is not None and asked not in store.labels:
        raise UsageError(f"--by {asked}: {store.path} has no such label{did_you_mean(asked, store.labels)}")
    names = [name for name in told(list(store.labels), None) if _is_colour(store.labels[name])]
    return asked or next(iter(names), None)


def _is_colour(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" or len(np.unique(values[values != ""])) <= MOST_CLASSES


def _sampled(total: int, measured: int, drawn: int) -> str:
    """Say which faces were left out."""
    said = []
    if measured < total:
        said.append(f"The directions are those of {measured:,} faces, chosen at random from {total:,} (--seed).")
    if drawn < measured:
        said.append(f"{drawn:,} of them are drawn.")
    return " ".join(said)


# Colours --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Colouring:
    """What a colour means."""

    colours: np.ndarray  # (n,) "#rrggbb"
    classes: Sequence[tuple[str, str]]  # name and colour; of a number none
    limits: tuple[float, float] | None  # of a number: the values of the ends of the bar
    name: str
    chosen: str = ""  # of more classes than there are colours: which have one

    @property
    def order(self) -> np.ndarray:
        """The order to draw in, (n,): what has no colour of its own covers nothing."""
        return np.argsort(self.colours != UNKNOWN, kind="stable")


def colouring(name: str | None, values: np.ndarray | None, num: int) -> Colouring:
    """Return the colours of faces (num,): numbers by viridis between the 2nd and 98th percentile, classes by kind."""
    if name is None or values is None:
        return Colouring(np.full(num, COLOURS[0], dtype=object), (), None, "")
    colours = np.full(num, UNKNOWN, dtype=object)
    if values.dtype.kind == "f":
        is_known = np.isfinite(values)
        if not is_known.any():
            return Colouring(colours, (("no value", UNKNOWN),), None, name)
        low, high = np.percentile(values[is_known], [2, 98])
        share = np.clip((values[is_known] - low) / (high - low if high > low else 1.0), 0, 1)
        colours[is_known] = _viridis(share)
        return Colouring(
            colours, (("no value", UNKNOWN),) if not is_known.all() else (), (float(low), float(high)), name
        )
    found, counts = np.unique(values[values != ""].astype(str), return_counts=True)
    names = found[np.argsort(-counts, kind="stable")]
    others = len(names) > MOST_CLASSES
    kept = names[: MOST_CLASSES - 1] if others else names
    for one, colour in zip(kept, CLASSES, strict=False):
        colours[values == one] = colour
    classes = list(zip(map(str, kept), CLASSES, strict=False))
    how = "the first by name, as each is there once" if counts.max(initial=1) == 1 else "the most frequent"
    chosen = f"{len(kept)} of {len(names):,} values are coloured, {how}; the others are grey."
    rest = [f"{len(names) - len(kept)} other values"] if others else []
    rest += ["no value"] if (values == "").any() else []
    return Colouring(colours, [*classes, *([(", ".join(rest), UNKNOWN)] if rest else [])], None, name, chosen * others)


def _viridis(share: np.ndarray) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(one) for one in colormaps["viridis"](LOW + (1 - LOW) * share)]


# Figures --------------------------------------------------------------------------------------------------------------


def _map_row(
    store: FeatureStore, found: Components, drawn: np.ndarray, by: str | None, sampled: str, is_page: bool
) -> Row:
    points = found.points[drawn]
    values = None if by is None else store.labels[by][drawn]
    colours = colouring(by, values, len(drawn))
    caption = (
        "Each point is a face; near ones have similar features. Along the two directions in which the features vary "
        f"most, which hold {100 * found.shares[0]:.0f} and {100 * found.shares[1]:.0f} % of the variance: what lies "
        "together here may lie apart in the others."
    )
    hint = "A face's crop shows under the pointer; crops that are gone or have changed show none." if is_page else ""
    caption = " ".join(filter(None, (caption, sampled, colours.chosen, hint)))
    title = f"Map of faces by {by}" if by else "Map of faces"
    page = _page_map(store, points, drawn, colours, found.shares) if is_page else ""
    return Row(title, [Tile("", _drawn_map(points, colours, found.shares), size=MAP)], caption, page=page)


def _drawn_map(points: np.ndarray, colours: Colouring, shares: np.ndarray) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axis = axes_at(figure, 0.09, 0.11, 0.72, 0.87)
        size = 14 if len(points) <= 2000 else 5
        order = colours.order
        axis.scatter(*points[order].T, c=list(colours.colours[order]), s=size, linewidths=0, alpha=0.8, rasterized=True)
        axis.set_axisbelow(True)
        first, second = _direction_names(shares)
        axis.set(xlabel=first, ylabel=second)
        axis.tick_params(labelsize=7.5)
        if colours.limits:
            _bar(figure, colours)
        if colours.classes:
            for name, colour in colours.classes:
                axis.plot([], [], "o", color=colour, label=plain(clipped(name, 22)))
            below = 0.3 if colours.limits else 1.0
            axis.legend(loc="upper left", bbox_to_anchor=(1.01, below), handletextpad=0.1, borderpad=0)

    return draw


def _direction_names(shares: np.ndarray) -> list[str]:
    names = ("first", "second")
    return [f"{name} direction ({100 * share:.0f} % of variance)" for name, share in zip(names, shares, strict=False)]


def _bar(figure: Any, colours: Colouring) -> None:
    assert colours.limits is not None
    axis = axes_at(figure, 0.845, 0.42, 0.022, 0.45)
    gradient = np.linspace(0, 1, 128)
    rgb = np.array([[int(one[place : place + 2], 16) for place in (1, 3, 5)] for one in _viridis(gradient)], np.uint8)
    low, high = colours.limits
    axis.imshow(rgb[::-1, None], extent=(0, 1, low, high if high > low else low + 1), aspect="auto")
    axis.set(xticks=[])
    axis.yaxis.tick_right()
    axis.grid(False)
    axis.tick_params(labelsize=7.5, length=2)
    axis.set_title(plain(clipped(colours.name, 20)), size=8.5, loc="left")


def _page_map(
    store: FeatureStore, points: np.ndarray, drawn: np.ndarray, colours: Colouring, shares: np.ndarray
) -> str:
    """Return the map as inline SVG with a card that shows a face's crop and labels under the pointer."""
    width, height, margin = VIEW
    low, high = points.min(axis=0), points.max(axis=0)
    spread = np.where(high > low, high - low, 1)
    placed = margin + (points - low) / spread * (np.array([width, height]) - 2 * margin)
    radius = 5 if len(points) <= 800 else 3.6
    circles = "".join(
        f'<circle data-i="{place}" cx="{placed[place, 0]:.1f}" cy="{height - placed[place, 1]:.1f}" r="{radius}" '
        f'fill="{colours.colours[place]}"/>'
        for place in colours.order
    )
    first, second = _direction_names(shares)
    names = (
        f'<text x="{width / 2}" y="{height + 16}" text-anchor="middle">{first}</text>'
        f'<text transform="translate(-8 {height / 2}) rotate(-90)" text-anchor="middle">{second}</text>'
    )
    box = f"{-AXIS_NAME} 0 {width + AXIS_NAME} {height + AXIS_NAME}"
    svg = f'<svg viewBox="{box}" role="img" aria-label="map of faces">{circles}{names}</svg>'
    card = '<div class="card"><img alt=""><span></span></div>'
    data = json.dumps(_cards(store, drawn), ensure_ascii=True).replace("<", "\\u003c")
    return (
        f'{STYLE}{_key(colours)}<div class="map">{svg}{card}</div>'
        f'<script type="application/json" id="faces">{data}</script>{SCRIPT}'
    )


def _cards(store: FeatureStore, drawn: np.ndarray) -> list[tuple[str, str]]:
    """Return of each face what its card says, and its crop as JPEG, "" where it is gone."""
    faces = Faces(store)
    labels: Mapping[str, np.ndarray] = {name: store.labels[name] for name in store.labels}
    cards = []
    for row in drawn.tolist():
        name = str(store.ids[row])
        lines = [Path(faces.names.get(name, name)).name[-60:]]
        lines += [f"{label}: {shown(values[row])}" for label, values in list(labels.items())[:8]]
        pixels = faces.pixels(name)
        small = b"" if pixels is None else jpeg(_reduced(pixels))
        cards.append(("\n".join(lines), base64.b64encode(small).decode()))
    return cards


def _reduced(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS))


def _key(colours: Colouring) -> str:
    items = [
        f'<span><i style="background: {colour}"></i>{escape(clipped(name, 40))}</span>'
        for name, colour in colours.classes
    ]
    if colours.limits:
        stops = ", ".join(_viridis(np.linspace(0, 1, 9)))
        low, high = (f"{one:.4g}" for one in colours.limits)
        bar = f'<span class="bar" style="background: linear-gradient(to right, {stops})"></span>'
        items.insert(0, f"<span>{escape(colours.name)}</span><span>{low}</span>{bar}<span>{high}</span>")
    return f'<div class="key">{"".join(items)}</div>' if items else ""


def _spectrum_row(features: np.ndarray, found: Components, kind: str) -> Row:
    import torch

    from mefem_cli.engine import monitors

    tensor = torch.from_numpy(features)
    plain_rank, centred = monitors.rankme(tensor), monitors.rankme(tensor, centred=True)
    half, most, nearly = (directions_for(found.shares, share) for share in (0.5, 0.9, 0.99))
    caption = (
        f"Share of the variance along each direction, largest first. Half of it lies in {half}, 90 % in {most}, 99 % "
        f"in {nearly} of {features.shape[1]} directions. RankMe, the effective number of directions: {centred:.1f} "
        f"about the mean face, {plain_rank:.1f} of the {kind} features as they are; at most "
        f"{min(features.shape)} for {len(features):,} faces. A cliff after one or two directions is a collapse."
    )
    return Row("Spectrum", [Tile("", _spectrum(found.shares, (half, most, nearly)), size=SPECTRUM)], caption)


def _spectrum(shares: np.ndarray, marks: Sequence[int]) -> Callable[[Any], None]:
    positive = shares[shares > shares[0] * 1e-12]
    at = np.arange(1, len(positive) + 1)

    def draw(figure: Any) -> None:
        axis = axes_at(figure, 0.16, 0.18, 0.82, 0.74)
        axis.plot(at, positive, color=COLOURS[0], linewidth=1.6, marker="o" if len(at) < 12 else "", markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="direction", ylabel="share of variance")
        for number, words in zip(marks, ("50 %", "90 %", "99 %"), strict=True):
            axis.axvline(number, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.text(number, 1.02, words, size=7.5, ha="center", transform=axis.get_xaxis_transform())
        axis.xaxis.set_major_formatter(lambda value, place: f"{value:g}")

    return draw
