"""Photos -> 224 px face crops + a manifest.

Finds faces with BlazeFace, cuts the square of twice the face box, and writes crops/ with manifest.parquet, rejects.csv
and contact.html. Run it again to take new photos in, or to go on where it was stopped.

Try: mefem crop photos/ --labels photos/labels.csv
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mefem_cli.faces.job import CropReport
    from mefem_cli.parts import Given

OPTIONS = ("faces.crop:CropOptions", "stores.product:ProductOptions", "console:ConsoleOptions")
ARGUMENT = ("sources", "Folders (recursive), files or quoted globs; - reads one path a line from stdin.")
NEEDS_A_DETECTOR = ("min_score", "faces", "scale", "pad")


def run(arguments: list[str], given: Given) -> None:
    """Crop, say on stderr what came out, and print the folder's path."""
    from mefem_cli import console
    from mefem_cli.faces import job, preview

    begun = time.monotonic()
    options = given.build("faces.crop", "CropOptions")
    product_options = given.build("stores.product", "ProductOptions")
    if options.detector == "none":
        for name in NEEDS_A_DETECTOR:
            if name in given:
                console.warn(f"--{name.replace('_', '-')} has no effect with --detector none")
    if product_options.dry_run:
        _print_preview(preview.preview(arguments, options, product_options))
        return
    report = job.crop(arguments, options, product_options)
    _tell(report)
    console.product(report.out, time.monotonic() - begun, **report.counts)


def _tell(report: CropReport) -> None:
    from mefem_cli import console

    console.note(f"{report.crops:7d} crops")
    for reason, count in sorted(report.rejects.items(), key=lambda item: -item[1]):
        console.note(f"{count:7d} {reason}")
    if not report.new:
        console.note("nothing new to read")


def _print_preview(plan: dict[str, Any]) -> None:
    from mefem_cli import console

    if console.wants_json():
        console.emit(plan)
        return
    for name, value in plan.items():
        shown = ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):17s}{shown}")
