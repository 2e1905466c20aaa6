"""The curves of a training run and how to read each, from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mefem_cli.reports.curves import Curve, Panel

Row = dict[str, Any]
ROUNDING = 1e-12  # a share of the variance under which a direction is none: n faces have n - 1


def panels(steps: Sequence[Row], epochs: Sequence[Row]) -> Iterator[Panel]:
    """Yield all panels; those of measures that the rows lack are empty."""
    yield from _loss_panels(steps, epochs)
    yield from _feature_panels(epochs)
    yield from _watch_panels(epochs)
    yield from _training_panels(steps, epochs)


def start_middle_end(epochs: Sequence[Row]) -> list[Row]:
    """Return the first row, the one halfway and the last, each once."""
    places = sorted({0, len(epochs) // 2, len(epochs) - 1})
    return [epochs[place] for place in places]


def _by_epoch(epochs: Sequence[Row], name: str, label: str = "", colour: int = 0, dashed: bool = False) -> Curve:
    rows = [row for row in epochs if name in row]
    return Curve(label, [row["epoch"] for row in rows], [row[name] for row in rows], colour, dashed=dashed)


def _by_step(steps: Sequence[Row], name: str, label: str = "", colour: int = 0, faint: bool = False) -> Curve:
    rows = [row for row in steps if name in row]
    return Curve(label, [row["step"] for row in rows], [row[name] for row in rows], colour, faint=faint)


def _over_time(epochs: Sequence[Row], name: str, first: float) -> list[Curve]:
    """Return the list-valued `name` at the start, in the middle and at the end; x counts from `first`."""
    rows = [row for row in epochs if name in row]
    return [
        Curve(f"epoch {row['epoch']}", [first + place for place in range(len(row[name]))], row[name], colour)
        for colour, row in enumerate(start_middle_end(rows) if rows else [])
    ]


def _without_rounding(row: Row) -> Row:
    """Return a row whose spectrum ends with the last direction that is one; on a log scale zeros are all one sees."""
    shares = [share for share in row.get("spectrum", []) if share is not None and share > ROUNDING]
    return {**row, "spectrum": shares} if shares else {name: value for name, value in row.items() if name != "spectrum"}


def _loss_panels(steps: Sequence[Row], epochs: Sequence[Row]) -> Iterator[Panel]:
    measured = [row for row in epochs if "monitor_loss" in row]
    held_out = Curve("held-out faces", [row["step"] for row in measured], [row["monitor_loss"] for row in measured], 1)
    yield Panel(
        "loss",
        "Loss",
        "It may rise while the encoder learns, as its targets grow richer, and falls in a collapse: judge by the next.",
        [_by_step(steps, "loss", "training", faint=True), held_out],
        xlabel="step",
    )
    yield Panel(
        "loss_over_position",
        "Loss over that of knowing only the position",
        "1 is a predictor that knows where a patch lies and nothing of the face; it should fall well below and stay.",
        [
            _by_epoch(epochs, "loss_over_position", "all tokens"),
            _by_epoch(epochs, "cls_over_position", "CLS alone", 1),
            _by_epoch(epochs, "loss_over_mean", "over one mean for all", 2, dashed=True),
        ],
        log=True,
        mark=1,
    )
    yield Panel(
        "rings",
        "The same by distance from the centre",
        "Each ring of patches for itself: the rings with weight in the loss (inside) should fall first and furthest.",
        _over_time(epochs, "rings_over_position", 0.5),
        xlabel="distance from the centre, patches",
        mark=1,
    )
    yield Panel(
        "loss_rings",
        "Loss by distance from the centre",
        "Unweighted; a ring with a high loss holds what differs most between faces or is hardest to guess.",
        _over_time(epochs, "loss_rings", 0.5),
        xlabel="distance from the centre, patches",
    )


def _feature_panels(epochs: Sequence[Row]) -> Iterator[Panel]:
    yield Panel(
        "rankme",
        "RankMe: how many directions the features use",
        "It dips as learning begins, then should rise or hold; near 1, or under 2 about the mean face, is a collapse.",
        [
            _by_epoch(epochs, "rankme_centred", "mean of patches, about the mean face"),
            _by_epoch(epochs, "rankme_centred_cls", "CLS, about the mean face", 1),
            _by_epoch(epochs, "rankme", "mean of patches", 0, dashed=True),
            _by_epoch(epochs, "rankme_cls", "CLS", 1, dashed=True),
        ],
    )
    yield Panel(
        "feature_std",
        "Standard deviation of the features over faces",
        "How much the encoder's answer differs from face to face; towards 0 it says the same of everyone.",
        [_by_epoch(epochs, "feature_std", "mean of patches"), _by_epoch(epochs, "feature_std_cls", "CLS", 1)],
    )
    yield Panel(
        "spectrum",
        "Spectrum of the features",
        "Shares of the variance by direction, largest first; a cliff after the first one or two is a collapse.",
        _over_time([_without_rounding(row) for row in epochs], "spectrum", 1),
        xlabel="direction",
        log=True,
    )
    yield Panel(
        "ema_distance",
        "Distance of the source encoder from the target encoder",
        "Relative, over all weights: it rises while the source runs ahead of its average, and settles in the end.",
        [_by_epoch(epochs, "ema_distance")],
    )


def _watch_panels(epochs: Sequence[Row]) -> Iterator[Panel]:
    """One panel a watched label; its name may hold anything, so it stays out of the drawing."""
    last = epochs[-1] if epochs else {}
    labels = [name.removeprefix("watch_").removesuffix("_n") for name in last if _is_watch_count(name)]
    for number, label in enumerate(labels):
        prefix = f"watch_{label}_"
        kind = "r2" if f"{prefix}ridge_r2" in last else "accuracy"
        guess = "0 is the mean of all" if kind == "r2" else "the dashed line is the most frequent class"
        yield Panel(
            f"watch_{number}",
            f"Watched label: {label}",
            f"{'R²' if kind == 'r2' else 'Accuracy'} of quick probes on {last[prefix + 'n']} faces, each of a person "
            f"that the probe has not seen; {guess}. It should rise above its value at epoch 0.",
            [
                _by_epoch(epochs, f"{prefix}ridge_{kind}", "ridge"),
                _by_epoch(epochs, f"{prefix}knn_{kind}", "nearest neighbours", 1),
                _by_epoch(epochs, f"{prefix}majority_{kind}", "", 2, dashed=True),
            ],
        )


def _is_watch_count(name: str) -> bool:
    return name.startswith("watch_") and name.endswith("_n")


def _training_panels(steps: Sequence[Row], epochs: Sequence[Row]) -> Iterator[Panel]:
    yield Panel(
        "grad_norm",
        "Gradient norm",
        "Single spikes are harmless; a steady climb by orders of magnitude announces that the run will diverge.",
        [_by_step(steps, "grad_norm")],
        xlabel="step",
        log=True,
    )
    yield Panel(
        "schedules",
        "Learning rate and EMA momentum",
        "As planned: the rate rises, then falls to nearly 0; the momentum moves from its start to its end.",
        [_by_step(steps, "lr", "learning rate")],
        xlabel="step",
        right=[_by_step(steps, "ema", "EMA momentum", 1)],
    )
    waits = [100 * row["data_wait"] if row.get("data_wait") is not None else None for row in epochs]
    yield Panel(
        "throughput",
        "Speed",
        "Faces per second, and the share of the time in which the device waited for pictures: it should be near 0.",
        [_by_epoch(epochs, "images_per_second", "faces per second")],
        right=[Curve("data wait, %", [row["epoch"] for row in epochs], waits, 1)],
    )
    yield Panel(
        "memory",
        "Peak memory, MiB",
        "The most that was held so far: it should be flat after the first epochs.",
        [_by_epoch(epochs, "memory_mib", "host"), _by_epoch(epochs, "cuda_memory_mib", "GPU", 1)],
    )
