"""The figures of the demo's report, each drawn twice: for a light page and for a dark one."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from mefem_cli import parts
from mefem_cli.backbones import vit
from mefem_cli.engine import seeds
from mefem_cli.masks import Split
from mefem_cli.reports.demo_results import Row, number
from mefem_cli.stores.runs import Run

Panel = tuple[str, Sequence[Row], float | None]  # title, an interval for each row, a value to compare with

DPI = 150
HEATMAP_FACES = 20_000  # masks drawn for the heat map: within half a percent
NUM_EXAMPLES = 4  # masks that are drawn
TILE_PX = 224


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; its background is the page."""

    ink: str
    soft: str
    first: str
    second: str
    cmap: str


LIGHT = Theme("#1d2330", "#8a8f9c", "#2a6fdb", "#d9622b", "Blues")
DARK = Theme("#e8e8ee", "#7d8494", "#6ea3f5", "#f08a55", "bone")


def themed(draw: Callable[[Theme], Figure]) -> tuple[bytes, bytes]:
    """Return a figure as PNG for a light and for a dark page."""
    light, dark = (_png(draw, theme) for theme in (LIGHT, DARK))
    return light, dark


def _png(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    style: Any = {
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "axes.edgecolor": theme.soft,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "font.size": 9,
        "legend.frameon": False,
    }
    buffer = io.BytesIO()
    with rc_context(style):
        draw(theme).savefig(buffer, format="png", dpi=DPI, transparent=True)
    return buffer.getvalue()


# Masks --------------------------------------------------------------------------------------------------------------


def masks(run: Run, crops: Sequence[bytes]) -> Callable[[Theme], Figure]:
    """Draw four masks of a run, each on a crop, and how often each patch is in the source."""
    config = run.config()
    objective, encoder = _objective(config)
    grid = encoder.grid_size
    draws = objective.draw(HEATMAP_FACES, seeds.torch_generator(config["seed"], seeds.MASKS))
    split = objective.splits(draws)[0]
    visible, cls_in_source = _visible_patches(split, grid)
    share = visible.mean(axis=0)
    examples = _examples(visible, cls_in_source if encoder.class_token else None)
    pictures = [_veiled(data, shown, encoder.image_size) for data, (_, shown) in zip(crops, examples, strict=False)]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(9.6, 2.35), layout="constrained")
        axes = figure.subplots(1, len(pictures) + 1)
        for axis, picture, (title, _) in zip(axes, pictures, examples, strict=False):
            axis.imshow(picture, extent=(0, grid, grid, 0), interpolation="antialiased")
            axis.set_title(title, fontsize=9)
            _without_axes(axis)
        image = axes[-1].imshow(share, extent=(0, grid, grid, 0), cmap=theme.cmap, vmin=0)
        axes[-1].set_title("P(source)", fontsize=9)
        _without_axes(axes[-1])
        figure.colorbar(image, ax=axes[-1], shrink=0.8).outline.set_visible(False)
        return figure

    return draw


def _objective(config: Row) -> tuple[Any, vit.ViTEncoder]:
    """Return the objective of a run, untrained, and its encoder."""
    given = parts.Given({name: value for name, value in config.items() if value is not None})
    module = parts.load("objectives", config["objective"])
    options = given.build(f"objectives.{config['objective']}")
    encoder = vit.build(given.build("backbones.vit"), module.wants_class_token(options))
    return module.build(options, encoder, given), encoder


def _visible_patches(split: Split, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Return masks, True: the patch [faces, L, L] or the CLS token [faces] belongs to the source."""
    num_cls = split.source.shape[1] + split.target.shape[1] - grid * grid
    tokens = torch.zeros(len(split.source), num_cls + grid * grid, dtype=torch.bool).scatter_(1, split.source, True)
    return tokens[:, num_cls:].reshape(-1, grid, grid).numpy(), tokens[:, :num_cls].any(dim=1).numpy()


def _examples(visible: np.ndarray, cls_in_source: np.ndarray | None) -> list[tuple[str, np.ndarray]]:
    """Return four (title, visible patches [L, L]) that show different places, CLS in turn a target and a source."""
    found: list[tuple[str, np.ndarray]] = []
    seen = np.zeros(visible.shape[1:])  # how often each patch is shown so far
    for turn in range(NUM_EXAMPLES):
        overlap = (visible * seen).sum(axis=(1, 2)).astype(float)
        title = ""
        if cls_in_source is not None:
            wanted = bool(turn % 2)
            title = "CLS is a source" if wanted else "CLS is a target"
            overlap[cls_in_source != wanted] = np.inf
        chosen = visible[np.argmin(overlap)]
        seen += chosen
        found.append((title, chosen))
    return found


def _veiled(data: bytes, visible: np.ndarray, image_size: int) -> np.ndarray:
    """Return a crop as the encoder gets it, float [S, S, 3], behind a veil but for the visible patches [L, L]."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)) / 255
    patch = image_size // len(visible)
    in_source = np.kron(visible, np.ones((patch, patch)))[..., None]
    return np.where(in_source, pixels, 0.25 * pixels.mean(axis=2, keepdims=True) + 0.55)


def _without_axes(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


# Training -----------------------------------------------------------------------------------------------------------


def training(run: Run, epochs: int) -> Callable[[Theme], Figure]:
    """Draw the loss, RankMe and the loss over that of a predictor that knows only the position."""
    rows = list(run.metrics())
    steps = [row for row in rows if row["kind"] == "step"]
    measured = [row for row in rows if row["kind"] == "epoch" and "rankme" in row]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(9.6, 2.7), layout="constrained")
        axes = figure.subplots(1, 3 if measured else 1, squeeze=False)[0]
        at_epoch = [row["step"] * epochs / steps[-1]["step"] for row in steps]
        axes[0].plot(at_epoch, [row["loss"] for row in steps], color=theme.first, lw=1)
        axes[0].set(title="Training loss", xlabel="epoch", ylim=(0, None))
        for axis in axes:
            axis.locator_params(axis="x", integer=True)
        if measured:
            at = [row["epoch"] for row in measured]
            _two_curves(axes[1], at, measured, theme)
            axes[2].plot(at, [row["loss_over_position"] for row in measured], ".-", color=theme.first)
            axes[2].axhline(1, color=theme.soft, lw=1, ls="--")
            axes[2].set(title="Loss / loss of knowing\nonly the position", xlabel="epoch")
        return figure

    return draw


def _two_curves(axis: Any, at: list[int], measured: list[Row], theme: Theme) -> None:
    curves = (("rankme", theme.first, "as they are"), ("rankme_centred", theme.second, "minus the mean face"))
    for name, colour, label in curves:
        axis.plot(at, [row[name] for row in measured], ".-", color=colour, label=label)
    axis.set(title="RankMe: directions\nthat the features use", xlabel="epoch", ylim=(0, None))
    axis.legend(fontsize=8)


# Scores -------------------------------------------------------------------------------------------------------------


def predictions(panels: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Callable[[Theme], Figure]:
    """Draw predicted against true BMI: (title, truth, prediction) of each panel."""
    values = np.concatenate([np.concatenate(pair) for _, *pair in panels])
    low, high = np.floor(values.min()) - 1, np.ceil(values.max()) + 1

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (title, truth, predicted) in zip(axes, panels, strict=True):
            axis.plot([low, high], [low, high], color=theme.soft, lw=1, ls="--")
            axis.scatter(truth, predicted, s=9, alpha=0.55, color=theme.first, linewidths=0)
            axis.set(title=title, xlabel="true BMI, kg/m2", xlim=(low, high), ylim=(low, high), aspect="equal")
            axis.locator_params(nbins=4)
        axes[0].set_ylabel("predicted BMI, kg/m2")
        return figure

    return draw


def intervals(panels: Sequence[Panel], names: Sequence[str]) -> Callable[[Theme], Figure]:
    """Draw values with their intervals as rows of dots."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(9.6, 0.8 + 0.26 * len(names)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, found, line) in zip(axes, panels, strict=True):
            if line is not None:
                axis.axvline(line, color=theme.soft, lw=1, ls="--")
            for row, interval in enumerate(found):
                colour = theme.first if row == 0 else theme.ink
                if interval["low"] is not None:
                    axis.plot([interval["low"], interval["high"]], [row, row], color=colour, lw=1.6, alpha=0.7)
                axis.plot(interval["value"], row, "o", color=colour, ms=4.5)
            axis.set_title(title)
            axis.locator_params(axis="x", nbins=4)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        return figure

    return draw


def panel_title(name: str, score: Row) -> str:
    """Return a panel's title, with r2 and error in a second line."""
    found = score["metrics"]
    return f"{name}\nr2 {number(found['r2']['value'])}, MAE {found['mae']['value']:.2f} kg/m2"


# Photos -------------------------------------------------------------------------------------------------------------


def reject_picture(row: Row, path: Path) -> bytes | None:
    """Return a rejected photo as JPEG with face box and crop square, on a canvas that holds both.

    None where the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            photo = image.convert("RGB")
    except OSError:
        return None
    left, top, right, bottom = 0.0, 0.0, float(photo.width), float(photo.height)
    rectangles = [(row["box_x"], row["box_y"], row["box_w"], row["box_h"], "#ffb000")]
    rectangles += [(row["crop_x"], row["crop_y"], row["crop_side"], row["crop_side"], "#ff4d6d")]
    known = [(x, y, x + width, y + height, colour) for x, y, width, height, colour in rectangles if x is not None]
    for x, y, end_x, end_y, _ in known:
        left, top, right, bottom = min(left, x), min(top, y), max(right, end_x), max(bottom, end_y)
    side = int(np.ceil(max(right - left, bottom - top))) + 6
    offset = 3 - left, 3 - top
    canvas = Image.new("RGB", (side, side), "#80858f")
    canvas.paste(photo, (round(offset[0]), round(offset[1])))
    pen = ImageDraw.Draw(canvas)
    for x, y, end_x, end_y, colour in known:
        corners = (x + offset[0], y + offset[1], end_x + offset[0], end_y + offset[1])
        pen.rectangle(corners, outline=colour, width=max(2, side // 70))
    canvas.thumbnail((TILE_PX, TILE_PX))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
