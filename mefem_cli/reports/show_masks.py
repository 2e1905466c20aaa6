"""`mefem show masks`: draws of each mask over a face, and how often a patch is source and target.

The masks are those that training draws: an objective is built around a tiny encoder of the same grid, and its `draw`
and `splits` are asked, so CLS token and the border patch that makes room for it are where training has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mefem_cli import console, parts
from mefem_cli.backbones import vit
from mefem_cli.engine import seeds
from mefem_cli.errors import UsageError, did_you_mean
from mefem_cli.masks import Split
from mefem_cli.objectives import mefem
from mefem_cli.reports.show_face import crop_pixels, rendered_face
from mefem_cli.reports.show_sheet import Row, Sheet, Tile, axes_at, without_axes

if TYPE_CHECKING:
    from mefem_cli.parts import Given
    from mefem_cli.showing import ShowOptions

NUM_SAMPLES = 5
NUM_DRAWS = 20_000  # behind P of a mask that does not state its distribution: within 0.004, one standard error
PATCH_PX = 16
SAMPLE_INCHES, HEAT_INCHES, LEGEND_INCHES = 1.2, 1.62, (6.9, 0.33)
# Not the colours of a page: what lies over the face is the same in light and dark. Sky blue and white over grey are
# told apart by every kind of colour vision and, as light, lighter and hatched, in print without colour.
EDGE, TARGET, NEITHER, HATCH = "#14171d", (0.56, 0.80, 0.96), (1.0, 1.0, 1.0), "#8b93a1"
UNIT = 1 / 14  # of a grid: what is beside the patches is as large on any other as on 14 x 14
HEADROOM = 2.4 * UNIT  # above the grid, where the CLS token is


@dataclass(frozen=True)
class Mode:
    """What training draws of one mask in one of its modes; True: the patch belongs there."""

    mask: str
    name: str  # of the mode, "" where there is one
    source: np.ndarray  # [n, L, L] bool
    target: np.ndarray  # [n, L, L] bool
    moved: np.ndarray  # [n, L, L] bool: the source patch that moved to the target, as CLS took its place
    cls_in_source: np.ndarray | None  # (n,) bool; None: no CLS token
    p_source: np.ndarray  # [L, L]
    p_target: np.ndarray  # [L, L]
    is_exact: bool  # whether both P are known, not counted over draws


def sheet(options: ShowOptions, given: Given) -> Sheet:
    """Return draws and P of each mask. Raises UsageError for a mask that is none or does not fit the grid."""
    names = _names(options.mask)
    face = crop_pixels(Path(options.crops), PATCH_PX * options.grid) if options.crops else None
    modes = [mode for name in names for mode in _fitting(name, options, given)]
    if not modes:
        raise UsageError(f"--grid {options.grid}: no mask fits it; try --grid 14")
    if face is None:
        face = rendered_face(PATCH_PX * options.grid)
    largest = max(mode.p_source.max() for mode in modes), max(mode.p_target.max() for mode in modes)
    rows = [Row("", [Tile("", _legend(modes), size=LEGEND_INCHES)])]
    rows += [_row(mode, face, options, largest) for mode in modes]
    lead = (
        f"What the encoder sees and what it must predict, on a grid of {options.grid} x {options.grid} patches. "
        f"Draws 1 to {options.samples or NUM_SAMPLES} of seed {options.seed}, not chosen by hand."
    )
    if len(modes) > 1:
        lead += f" P(source) has one scale of colours in all rows, 0 to {largest[0]:.2f}, P(target) another, 0 to "
        lead += f"{largest[1]:.2f}."
    return Sheet("Masks of pretraining", lead, rows)


def _names(asked: list[str]) -> list[str]:
    known = parts.names("masks")
    names = [name for one in asked for name in one.split(",") if name]
    for name in names:
        if name not in known:
            raise UsageError(f'there is no mask "{name}"{did_you_mean(name, known)}')
    default = mefem.Options().mask
    return list(dict.fromkeys(names)) or sorted(known, key=lambda name: (name != default, name))


def _fitting(name: str, options: ShowOptions, given: Given) -> list[Mode]:
    """Return the modes of a mask; none where nobody asked for it and it does not fit the grid."""
    asked = bool(options.mask) or any(one.name in given for one in parts.read_fields(f"masks.{name}"))
    try:
        return list(modes_of(name, options, given))
    except UsageError as error:
        if asked:
            raise
        console.warn(f"left out: {error}")
        return []


# What training draws --------------------------------------------------------------------------------------------------


def modes_of(name: str, options: ShowOptions, given: Given) -> Iterator[Mode]:
    """Yield the modes of a mask, with `options.samples` draws of each."""
    objective = _objective(name, options, given)
    splits = objective.splits(objective.draw(NUM_DRAWS, seeds.torch_generator(options.seed, seeds.MASKS)))
    num_tokens = objective.source_encoder.num_tokens
    has_cls = options.cls_prob is not None
    num_shown = options.samples or NUM_SAMPLES
    for split, mode_name in zip(splits, _mode_names(name, len(splits)), strict=True):
        if objective.table:  # every split there is, with its probability
            chance = objective.table.probability.numpy()
            p_source, p_target = (chance @ one for one in _is_token(objective.table.splits, num_tokens))
        else:
            p_source, p_target = (one.mean(axis=0) for one in _is_token(split, num_tokens))
        shown = Split(split.source[:num_shown], split.target[:num_shown])
        source, target = _is_token(shown, num_tokens)
        yield Mode(
            mask=name,
            name=mode_name,
            source=_patches(source, options.grid),
            target=_patches(target, options.grid),
            moved=_patches(_moved(shown, num_tokens, has_cls), options.grid),
            cls_in_source=source[:, 0] if has_cls else None,
            p_source=_patches(p_source, options.grid),
            p_target=_patches(p_target, options.grid),
            is_exact=objective.table is not None,
        )


def _objective(name: str, options: ShowOptions, given: Given) -> mefem.MeFEm:
    """Return an objective around an encoder that has the grid and next to no weights."""
    tiny = vit.Options("vit_tiny_patch16_224", PATCH_PX * options.grid, PATCH_PX, depth=1, embed_dim=4, num_heads=1)
    settings = mefem.Options(mask=name, cls_prob=options.cls_prob, predictor_depth=0, predictor_width=4)
    return mefem.build(settings, vit.build(tiny, mefem.wants_class_token(settings)), replace(given))


def _mode_names(name: str, count: int) -> list[str]:
    modes = getattr(parts.load("masks", name), "MODES", ())
    if len(modes) != count:
        return [""] if count == 1 else [f"mode {number}" for number in range(1, count + 1)]
    return [f"{mode.num_blocks} blocks of {100 * mode.block_share:.0f} %" for mode in modes]


def _is_token(split: Split, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each token is in the source and in the target, bool [n, N] each, CLS first where there is one."""

    def among(side: torch.Tensor) -> np.ndarray:
        return torch.zeros(len(side), num_tokens, dtype=torch.bool).scatter_(1, side.long(), True).numpy()

    return among(split.source), among(split.target)


def _patches(tokens: np.ndarray, grid: int) -> np.ndarray:
    """Return [..., N] of tokens as [..., L, L] of patches."""
    return tokens[..., tokens.shape[-1] - grid**2 :].reshape(*tokens.shape[:-1], grid, grid)


def _moved(split: Split, num_tokens: int, has_cls: bool) -> np.ndarray:
    """Return the patch that gave its place in the source to CLS, bool [n, N]; none where CLS is in the target.

    `mefem.place_class_token` puts either CLS or that patch last into the target.
    """
    moved = np.zeros((len(split.target), num_tokens), bool)
    if has_cls:
        moved[np.arange(len(moved)), split.target[:, -1].numpy()] = True
        moved[:, 0] = False
    return moved


# Drawing --------------------------------------------------------------------------------------------------------------


def _row(mode: Mode, face: np.ndarray, options: ShowOptions, largest: tuple[float, float]) -> Row:
    """Return the draws and chances of a mode; `largest` chances of source and target end the scales of colours."""
    tiles = [
        Tile("", _sample(mode, number, face), size=(SAMPLE_INCHES, SAMPLE_INCHES * (1 + HEADROOM)))
        for number in range(len(mode.source))
    ]
    size = (HEAT_INCHES, SAMPLE_INCHES * (1 + HEADROOM))
    chances = (("P(source)", mode.p_source), ("P(target)", mode.p_target))
    heat = [Tile("", _heat(*one, end), size=size) for one, end in zip(chances, largest, strict=True)]
    title = f"{mode.mask}, {mode.name}" if mode.name else mode.mask
    return Row(title, tiles, _caption(mode, options), together=heat)


def _caption(mode: Mode, options: ShowOptions) -> str:
    num_cls = int(mode.cls_in_source is not None)
    tokens = "tokens" if num_cls else "patches"
    in_source = int(mode.cls_in_source[0]) if mode.cls_in_source is not None else 0
    num_source = int(mode.source[0].sum()) + in_source
    num_target = int(mode.target[0].sum()) + num_cls - in_source
    left = options.grid**2 + num_cls - num_source - num_target
    how = "exact, from the mask's table of splits" if mode.is_exact else f"counted over {NUM_DRAWS:,} draws"
    middle, corner = (options.grid // 2, options.grid // 2), (0, 0)
    return (
        f"{num_source} source and {num_target} target {tokens}"
        + (f", {left} in neither" if left else "")
        + f". P: {how}; source {mode.p_source[middle]:.3f} in the middle, {mode.p_source[corner]:.3f} in the top left "
        f"corner; target {mode.p_target[middle]:.3f} and {mode.p_target[corner]:.3f}. {_what_it_does(mode.mask)}"
    )


def _what_it_does(name: str) -> str:
    return parts.summary(f"masks.{name}").partition(": ")[2].capitalize()


def composite(face: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return a face, uint8 [S, S, 3]: as it is where patches [L, L] are source, grey under blue where target."""
    patch = len(face) // len(source)
    is_source, is_target = (np.kron(one, np.ones((patch, patch)))[..., None].astype(bool) for one in (source, target))
    grey = face.mean(axis=2, keepdims=True) / 255
    veiled = np.where(is_target, 0.25 * grey + 0.75 * np.array(TARGET) * (0.78 + 0.22 * grey), 0.06 * grey + 0.94)
    return np.where(is_source, face, (255 * veiled).clip(0, 255).astype(np.uint8))


def _sample(mode: Mode, number: int, face: np.ndarray) -> Callable[[Any], None]:
    source, target, moved = mode.source[number], mode.target[number], mode.moved[number]
    cls = None if mode.cls_in_source is None else bool(mode.cls_in_source[number])

    def draw(figure: Any) -> None:
        grid = len(source)
        axis = without_axes(axes_at(figure, 0, 0, 1, 1))
        axis.imshow(composite(face, source, target), extent=(0, grid, grid, 0), interpolation="none")
        thin = min(1.0, 1 / (UNIT * grid))  # lines that do not thin with the patches would cover those of a fine grid
        _hatch(axis, ~(source | target), thin)
        _outline(axis, source, thin)
        _mark_moved(axis, moved, thin)
        if cls is not None:
            _cls_token(axis, cls, UNIT * grid)
        edge = 0.1 * UNIT * grid  # room for the frame of the source
        axis.set(xlim=(-edge, grid + edge), ylim=(grid + edge, -HEADROOM * grid), aspect="equal")

    return draw


def _outline(axis: Any, patches: np.ndarray, thin: float = 1.0) -> None:
    """Draw a line around patches [L, L], `thin` times as wide as on a grid of 14 x 14."""
    from matplotlib.collections import LineCollection

    padded = np.pad(patches, 1).astype(int)
    across, down = np.diff(padded, axis=1) != 0, np.diff(padded, axis=0) != 0
    lines = [[(column, row - 1), (column, row)] for row, column in np.argwhere(across)]
    lines += [[(column - 1, row), (column, row)] for row, column in np.argwhere(down)]
    axis.add_collection(LineCollection(lines, colors=EDGE, linewidths=1.3 * thin, capstyle="projecting", clip_on=False))


def _hatch(axis: Any, patches: np.ndarray, thin: float = 1.0) -> None:
    """Draw a slash through patches [L, L] that are in neither side."""
    from matplotlib.collections import LineCollection

    lines = [[(column + 0.2, row + 0.8), (column + 0.8, row + 0.2)] for row, column in np.argwhere(patches)]
    axis.add_collection(LineCollection(lines, colors=HATCH, linewidths=0.7 * thin))


def _mark_moved(axis: Any, patches: np.ndarray, thin: float = 1.0) -> None:
    """Draw a cross in a dashed square on a patch that moved from the source to the target."""
    from matplotlib.patches import Rectangle

    for row, column in np.argwhere(patches):
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=EDGE, linewidth=0.9 * thin,
                                 linestyle=(0, (2, 1)), clip_on=False))  # fmt: skip
        axis.plot([column + 0.2, column + 0.8], [row + 0.2, row + 0.8], color=EDGE, linewidth=1.1 * thin)
        axis.plot([column + 0.2, column + 0.8], [row + 0.8, row + 0.2], color=EDGE, linewidth=1.1 * thin)


def _cls_token(axis: Any, in_source: bool, unit: float) -> None:
    """Draw the CLS token above the grid: framed like the source, or blue like the target, and in words.

    `unit` is that of lengths, in patches.
    """
    from matplotlib.patches import Rectangle

    colour = (1.0, 1.0, 1.0) if in_source else TARGET
    edge = {"edgecolor": EDGE, "linewidth": 1.3} if in_source else {"edgecolor": "none"}
    axis.add_patch(
        Rectangle((0.1 * unit, -2.1 * unit), 3.4 * unit, 1.65 * unit, facecolor=colour, clip_on=False, **edge)
    )
    axis.text(1.8 * unit, -1.25 * unit, "CLS", size=6.5, weight="bold", color=EDGE, ha="center", va="center_baseline")
    axis.text(4.0 * unit, -1.25 * unit, "in source" if in_source else "in target", size=7, va="center_baseline")


def _legend(modes: Sequence[Mode]) -> Callable[[Any], None]:
    """Draw what the patches mean, of the kinds that the draws have."""
    skin = (0.83, 0.64, 0.53)
    kinds = [("source: seen", skin), ("target: to be predicted", TARGET)]
    if any(mode.moved.any() for mode in modes):
        kinds.append(("moved to the target for CLS", TARGET))
    if any((~(mode.source | mode.target)).any() for mode in modes):
        kinds.append(("in neither", NEITHER))

    def draw(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        axis = without_axes(axes_at(figure, 0, 0, 1, 1))
        axis.set(xlim=(-0.1, 25), ylim=(1.1, -0.1), aspect="equal", anchor="W")
        place = 0.0
        for word, colour in kinds:
            square = np.pad(np.ones((1, 1), bool), ((0, 0), (int(place), 0)))
            axis.add_patch(Rectangle((int(place), 0), 1, 1, facecolor=colour))
            if word == "in neither":
                axis.add_patch(Rectangle((int(place), 0), 1, 1, fill=False, edgecolor=HATCH, linewidth=0.6))
                _hatch(axis, square)
            elif word.startswith("source"):
                _outline(axis, square)
            elif word.startswith("moved"):
                _mark_moved(axis, square)
            axis.text(int(place) + 1.3, 0.53, word, size=8.5, va="center_baseline")
            place += 2.3 + 0.225 * len(word)

    return draw


def _heat(name: str, chance: np.ndarray, largest: float) -> Callable[[Any], None]:
    """Draw probabilities [L, L] from 0 to `largest`, as high as the face beside it."""
    share = 1 / (1 + HEADROOM)  # of the height, as the CLS token stands above the face

    def draw(figure: Any) -> None:
        heat_map(figure, chance, name, largest, share)

    return draw


def heat_map(figure: Any, values: np.ndarray, name: str, largest: float, share: float = 1.0) -> None:
    """Draw values [L, L] from 0, with a colour bar; viridis keeps its order without colours.

    `share` of the figure's height is the grid, the name stands above it.
    """
    grid = len(values)
    width = share * SAMPLE_INCHES * (1 + HEADROOM) / HEAT_INCHES  # of a square, in shares of the figure
    axis = without_axes(axes_at(figure, 0, 0, width, share))
    image = axis.imshow(values, extent=(0, grid, grid, 0), cmap="viridis", vmin=0, vmax=largest, interpolation="none")
    axis.text(0, -0.35 * UNIT * grid, name, size=8, va="bottom")
    bar = figure.colorbar(image, cax=axes_at(figure, width + 0.03, 0.1 * share, 0.045, 0.8 * share))
    bar.outline.set_visible(False)
    bar.ax.grid(False)
    bar.ax.tick_params(labelsize=6.5, length=2, pad=1)
    bar.ax.locator_params(nbins=4)
