"""New photos + a head from `mefem probe --save` -> predictions with intervals.

Photos are cropped and embedded as the head's training faces were; a crops folder or a feature store will do too.
Prints CSV, or with --json one object per line: prediction, the ends of an interval that is to hold the truth of 90 % of
people like those learned from, and a warning where a face lies far from them. Rejected photos are rows with the reason.
-n prints the head's card. Research only: it must not be used to diagnose or to decide anything about a person.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from mefem_cli.evaluation.saved import Head
    from mefem_cli.parts import Given
    from mefem_cli.predicting import Prediction

ARGUMENT = ("sources", "Photos as for mefem crop, or a crops folder, or a feature store.")
OPTIONS = (
    "predicting:PredictOptions",
    "engine.device:DeviceOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)
ROOMS = ("backbones",)
LEFT_OUT = ("backbones.vit",)  # its options build an encoder to train; here they come with the run


def run(arguments: list[str], given: Given) -> None:
    """Predict, or with `--dry-run` print the card of the head."""
    import time
    from pathlib import Path

    from mefem_cli import console, predicting
    from mefem_cli.errors import OutputError
    from mefem_cli.stores import product

    begun = time.monotonic()
    options = given.build("predicting", "PredictOptions")
    machine = given.build("engine.device", "DeviceOptions")
    output = given.build("stores.product", "ProductOptions")
    head = predicting.open_head(options)
    if output.dry_run:
        if console.wants_json():
            console.emit(predicting.describe(head))
        else:
            print(predicting.card(head))
        return
    if output.resume:
        console.warn("--resume has no effect here")
    found = predicting.predict(arguments, options, machine, output, given)
    if not output.out:
        import sys

        _refuse_none(_write(sys.stdout, found, head), "the column reject")
        return
    out = Path(output.out)
    if out.is_dir() or (out.exists() and not output.overwrite):
        raise OutputError(f"{out} exists; type --overwrite to replace it or -o for another place")
    with product.writing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        predicted, rejected = _write(file, found, head)
    _refuse_none((predicted, rejected), f"the column reject of {out}")
    console.product(out, time.monotonic() - begun, faces=predicted + rejected)


def _refuse_none(counts: tuple[int, int], where: str) -> None:
    """Raise NoInputError where all faces were rejected; the rows that say why are written by then."""
    from mefem_cli.errors import NoInputError

    if not counts[0]:
        raise NoInputError(f"no face could be used; {where} says why")


def _write(file: TextIO, found: Iterable[Prediction], head: Head) -> tuple[int, int]:
    """Write rows as they come; return how many faces were predicted, and how many rejected."""
    import csv
    import json

    from mefem_cli import console, predicting

    columns = predicting.columns(head)
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    predicted = rejected = 0
    for one in found:
        if console.wants_json():
            file.write(json.dumps(predicting.as_json(one, head), allow_nan=False) + "\n")
        else:
            if not predicted + rejected:
                writer.writeheader()  # not before: where encoder or head are refused, stdout stays empty
            writer.writerow(predicting.as_row(one))
        predicted, rejected = predicted + (not one.reject), rejected + bool(one.reject)
    file.flush()
    return predicted, rejected
