"""What `mefem show` draws: the options, and for each kind the sheet that its file in reports/ makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mefem_cli import parts
from mefem_cli.errors import UsageError

if TYPE_CHECKING:
    from mefem_cli.parts import Given
    from mefem_cli.reports.show_sheet import Sheet

CROPS, STORE, RUNS = Path("crops"), Path("features.h5"), Path("runs")


@dataclass(frozen=True)
class ShowOptions:
    """The picture."""

    out: str | None = None  # path of the picture; .html, .png or .svg decides its form; default: mefem-KIND.html
    overwrite: bool = False  # replace a file that mefem show did not draw (what it drew it draws anew)
    samples: int | None = None  # masks: draws a row, default 5; crops: faces, default 48; attention: of a folder, 6
    seed: int = 0  # masks: of the draws; crops, store: of the faces that are chosen
    mask: list[str] = field(default_factory=list)  # masks: strategies to draw, a,b or repeated; default: all
    crops: str | None = None  # masks: the face behind them, a crop or a crops folder; default: a rendered face
    cls_prob: float | None = 0.5  # masks: probability that the CLS token joins the source; none: no CLS token
    grid: int = 14  # masks, weights: patches on a side
    r0: float = 5.5  # weights: radius at which the weight is 1/2, patches of a 14 x 14 grid
    sigma: float = 1.5  # weights: steepness, per patch of a 14 x 14 grid
    by: str | None = None  # store: the label that colours the map; crops: that chooses the captions
    features: Literal["cls", "mean"] | None = None  # store: which features; default: mean where there are any
    head: str | None = None  # attention: an attentive head from mefem probe --save, to see where it looks
    encoder: Literal["target", "source"] = "target"  # attention: which of a run's two encoders

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"--samples {self.samples}: wanted 1 or more")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: wanted 0 or more")
        if not 2 <= self.grid <= 64:
            raise UsageError(f"--grid {self.grid}: wanted 2 to 64 patches on a side")
        if self.cls_prob is not None and not 0 <= self.cls_prob <= 1:
            raise UsageError(f"--cls-prob {self.cls_prob}: wanted a probability from 0 to 1, or none")
        if not (0 < self.sigma < math.inf and 0 < self.r0 < math.inf):
            raise UsageError(f"--sigma {self.sigma} --r0 {self.r0}: wanted a positive steepness and radius")


# Which options a kind takes, besides --out and --overwrite.
USES = {
    "masks": ("samples", "seed", "mask", "crops", "cls_prob", "grid"),
    "weights": ("grid", "r0", "sigma"),
    "crops": ("samples", "seed", "by"),
    "run": (),
    "store": ("seed", "by", "features"),
    "attention": ("samples", "head", "encoder"),
    "parts": (),
}


def default_out(kind: str) -> Path:
    """Return where a picture goes that nobody named a place for."""
    return Path(f"mefem-{kind}.html")


def draw(kind: str, arguments: Sequence[str], options: ShowOptions, given: Given, is_page: bool) -> Sheet:
    """Return the sheet of a kind; `is_page`: it becomes a page, not a picture.

    `given` holds the options of the masks. Raises what the kind's own function raises.
    """
    makers: dict[str, Callable[[], Sheet]] = {
        "masks": lambda: _masks(arguments, options, given),
        "weights": lambda: _weights(arguments, options),
        "crops": lambda: _crops(arguments, options),
        "run": lambda: _runs(arguments),
        "store": lambda: _store(arguments, options, is_page),
        "attention": lambda: _attention(arguments, options),
        "parts": lambda: _parts(arguments, is_page),
    }
    return makers[kind]()


def resolved(kind: str, options: ShowOptions, given: Given) -> dict[str, object]:
    """Return the options that a kind uses, as its picture records them; of masks those that were given."""
    used: dict[str, object] = {name: value for name, value in asdict(options).items() if name in USES[kind]}
    if kind == "masks":
        fields = [one for name in parts.names("masks") for one in parts.read_fields(f"masks.{name}")]
        used |= {one.name: one.parse(given.values[one.name]) for one in fields if one.name in given}
    return used


def _refuse_arguments(kind: str, arguments: Sequence[str], instead: str) -> None:
    if arguments:
        raise UsageError(f"{kind} takes no {arguments[0]}; type mefem show {kind} {instead}".rstrip())


def _masks(arguments: Sequence[str], options: ShowOptions, given: Given) -> Sheet:
    _refuse_arguments("masks", arguments, f"--crops {arguments[0]}" if arguments else "")
    from mefem_cli.reports import show_masks

    return show_masks.sheet(options, given)


def _weights(arguments: Sequence[str], options: ShowOptions) -> Sheet:
    _refuse_arguments("weights", arguments, "")
    from mefem_cli.reports import show_weights

    return show_weights.sheet(options.grid, options.r0, options.sigma)


def _crops(arguments: Sequence[str], options: ShowOptions) -> Sheet:
    from mefem_cli.reports import show_crops

    return show_crops.sheet([Path(one) for one in arguments] or [CROPS], options)


def _runs(arguments: Sequence[str]) -> Sheet:
    from mefem_cli.reports import show_runs

    return show_runs.sheet([Path(one) for one in arguments])


def _store(arguments: Sequence[str], options: ShowOptions, is_page: bool) -> Sheet:
    from mefem_cli.reports import show_store

    if len(arguments) > 1:
        raise UsageError(f"store: one feature store at a time, not {len(arguments)}; type mefem show store FILE")
    return show_store.sheet(Path(arguments[0]) if arguments else STORE, options, is_page)


def _parts(arguments: Sequence[str], is_page: bool) -> Sheet:
    from mefem_cli.reports import show_parts

    if not is_page:
        raise UsageError("parts are words, no picture; name a page, as in mefem show parts -o parts.html")
    return show_parts.sheet(arguments)


def _attention(arguments: Sequence[str], options: ShowOptions) -> Sheet:
    from mefem_cli.reports import show_attention

    return show_attention.sheet(arguments, options)
