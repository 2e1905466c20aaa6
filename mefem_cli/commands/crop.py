"""Photos and videos -> 224 px face crops + a manifest.

Finds faces with BlazeFace, cuts the square of twice the face box, and writes crops/ with manifest.parquet, rejects.csv
and contact.html. Run it again to take new photos in, or to go on where it was stopped.

Try: mefem crop photos/ --labels photos/labels.csv
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mefem_cli.faces.crop import CropOptions
    from mefem_cli.faces.job import CropReport
    from mefem_cli.parts import Given

OPTIONS = (
    "faces.crop:CropOptions",
    "executors.options:PartsOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)
ARGUMENT = (
    "sources",
    "Folders (recursive), photos, videos, tar shards, CSV or Parquet tables with a column path, or quoted globs; "
    "- reads one path a line from stdin.",
)
LOSSLESS = "png"
NOT_FOR_MERGING = ("shard", "boxes", "retry_rejected", "null", "limit", "workers")
NEEDS_A_DETECTOR = ("min_score", "faces", "scale", "pad")


def run(arguments: list[str], given: Given) -> None:
    """Crop, say on stderr what came out, and print the folder's path."""
    from mefem_cli import console
    from mefem_cli.faces import cluster, job, merge, preview

    begun = time.monotonic()
    options = given.build("faces.crop", "CropOptions")
    product_options = given.build("stores.product", "ProductOptions")
    on = given.build("executors.options", "PartsOptions")
    _warn_of_idle_options(options, given)
    if product_options.dry_run:
        preview_of = merge.preview if options.merge else preview.preview
        _print_preview(preview_of(arguments, options, product_options))
        return
    if not on.where.is_local:
        report = cluster.crop(sys.modules[__name__], arguments, given, options, product_options, on)
    else:
        report = (merge.merge if options.merge else job.crop)(arguments, options, product_options)
    _tell(report, options.merge)
    console.product(report.out, time.monotonic() - begun, **report.counts)


def _warn_of_idle_options(options: CropOptions, given: Given) -> None:
    from mefem_cli import console

    if options.merge:
        names = (*options.recipe, *NOT_FOR_MERGING)
        idle, why = [name for name in names if name in given], "--merge: the folders have their recipe"
    elif options.detector == "none":
        idle, why = [name for name in NEEDS_A_DETECTOR if name in given], "--detector none"
    elif options.format == LOSSLESS:
        idle, why = [name for name in ("quality",) if name in given], "--format png"
    else:
        return
    for name in idle:
        console.warn(f"--{name.replace('_', '-')} has no effect with {why}")


def _tell(report: CropReport, merged: bool) -> None:
    from mefem_cli import console

    console.note(f"{report.crops:7d} crop{'' if report.crops == 1 else 's'}")
    for reason, count in sorted(report.rejects.items(), key=lambda item: -item[1]):
        why = f", most of them: {report.why_unreadable}" if reason == "unreadable" and report.why_unreadable else ""
        console.note(f"{count:7d} {reason}{why if count > 1 else ''}")
    if report.duplicates:
        console.note(f"{report.duplicates:7d} exact duplicates among them (duplicate_of in the manifest)")
    if report.vanished:
        console.note(f"{report.vanished:7d} vanished since; what is known of them is kept, and detail says so")
    if report.new == 0 and not merged:
        console.note("nothing new to read")


def _print_preview(plan: dict[str, Any]) -> None:
    from mefem_cli import console

    if console.wants_json():
        console.emit(plan)
        return
    for name, value in plan.items():
        shown = ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else str(value)
        print(f"{name.replace('_', ' '):17s}{_hanging(shown) if name == 'options' else shown}")


def _hanging(text: str) -> str:
    """Break a list into lines that go beside its name."""
    import textwrap

    return textwrap.fill(text, 110, initial_indent=" " * 17, subsequent_indent=" " * 17, break_on_hyphens=False)[17:]
