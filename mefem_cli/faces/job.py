"""A run of `mefem crop`: many sources -> a crops folder, on all cores, to be stopped and continued at any time."""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli import console
from mefem_cli.console import plural
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.faces import images, labels, manifest, packing
from mefem_cli.faces.crop import CropOptions, Cropper
from mefem_cli.faces.inputs import STDIN, Wanted, list_sources
from mefem_cli.faces.journal import FOLDER, Journal, Known, known_sources
from mefem_cli.faces.listing import Listing
from mefem_cli.faces.rows import Row, failed_row
from mefem_cli.faces.source import Source, printable
from mefem_cli.faces.tables import BoxTable
from mefem_cli.faces.workers import Died, available_cores, run_chunks
from mefem_cli.stores import product
from mefem_cli.stores.crops import CONTACT, MANIFEST, OK, PROVENANCE, REJECTED, text_to_path
from mefem_cli.stores.product import ProductOptions

DEFAULT_OUT = "crops"
MEND = {  # what to type where no face is usable, by the most frequent reason
    "border": "--pad edge invents what lies beyond a picture, --detector none takes pictures that are crops already",
    "small": "--min-size takes smaller ones",
    "low-score": "--min-score takes less sure ones",
    "not-one-face": "--faces best takes one face of several",
    "too-large": "--max-pixels takes larger ones",
}
LARGEST_CHUNK = 32  # sources; about a second of work, the most that a kill loses
CHUNKS_PER_WORKER = 4  # at least so many where there are few sources, so that all cores end together


@dataclass
class CropReport:
    """What a crops folder holds after a run, and what the run did."""

    out: Path
    crops: int
    rejects: dict[str, int]  # by reason
    new: int  # sources read by this run
    vanished: int  # sources of earlier runs that are no longer there
    duplicates: int = 0  # rows whose source has the bytes of an earlier one
    skipped: dict[str, int] = field(default_factory=dict)  # files that are no images, by kind
    why_unreadable: str = ""  # what is said of most unreadable sources
    seconds: float = 0.0

    @property
    def counts(self) -> dict[str, object]:
        """What `--json` says beside the path and the time."""
        names = ("crops", "rejects", "new", "vanished", "duplicates", "skipped")
        return {name: getattr(self, name) for name in names}


@dataclass
class Plan:
    """What is to be done: all sources found, and the positions of those to be read."""

    listing: Listing
    pending: np.ndarray
    num_workers: int

    @property
    def sources(self) -> Iterator[Source]:
        """The sources to be read, in order."""
        return self.listing.sources.take(self.pending)


def crop(
    arguments: list[str], options: CropOptions, product_options: ProductOptions, tells_tables: bool = True
) -> CropReport:
    """Crop the faces in the named sources into a crops folder, or take new sources into an existing one.

    `tells_tables`: say which tables of labels beside the pictures could be joined.

    Raises UsageError, NoInputError (no image found, no face usable, or more rejects than `max_rejects`, the folder
    being complete in both latter cases) and OutputError (other options, not a crops folder, disk full).
    """
    begun = time.monotonic()
    out = Path(product_options.out or DEFAULT_OUT)
    check_output(out, product_options.overwrite)
    if not product_options.overwrite:
        refuse_other_options(out, options)
    listing = find_sources(arguments, out, options, product_options.limit)
    tell_about_listing(listing, tells_tables and options.labels is None)
    if options.labels is not None:
        labels.read_labels(Path(options.labels), options.key)  # tell of a bad table before the work, not after it
    journal = Journal(out)
    with journal.locked():
        if product_options.overwrite:
            journal.clear()
        rows = journal.read()
        plan = make_plan(listing, options, known_sources(rows, out), rows)
        if not (out / PROVENANCE).exists():
            write_provenance(out, options, product_options)
        _crop_pending(plan, out, options, journal)
        report = _finish_run(out, options, product_options, journal, plan)
    report.seconds = time.monotonic() - begun
    refuse_too_few(report, options)
    return report


def find_sources(arguments: list[str], out: Path, options: CropOptions, limit: int | None) -> Listing:
    """List the sources. Raises UsageError if none are named, NoInputError if there is no image among them."""
    if not arguments:
        raise UsageError("no photos named; type mefem crop FOLDER, or - to read one path a line from stdin")
    boxes = None if options.boxes is None else BoxTable.read(Path(options.boxes), options.key)
    find_boxes = None if boxes is None else boxes.lookup
    listing = list_sources(arguments, out, Wanted(limit, options.part, find_boxes, options.null))
    if not len(listing.sources):
        skipped = f" (skipped: {counted(listing.skipped)})" if listing.skipped else ""
        where = ", ".join("stdin" if one == STDIN else printable(one) for one in arguments)
        part = "" if options.shard is None else f" for --shard {options.shard}"
        raise NoInputError(f"no images found in {where}{part}{skipped}")
    if boxes is not None:
        boxes.tell()
    return listing


def tell_about_listing(listing: Listing, tells_tables: bool) -> None:
    """Say on stderr what was skipped, and where asked to, that a table of labels lies there unused."""
    if listing.skipped:
        console.note(f"skipped, as no images: {counted(listing.skipped)}")
    if tells_tables:
        for table in listing.label_tables:
            console.note(f"{printable(table)} is not used; --labels {printable(table)} would join it")


def check_output(out: Path, overwrite: bool) -> None:
    """Raise OutputError if `out` is something else than a crops folder, which not even --overwrite may replace."""
    if not out.exists():
        if out.is_symlink():
            raise OutputError(f"{out} is a broken symbolic link; remove it or name another --out")
        return
    is_crops = out.is_dir() and any((out / name).exists() for name in (MANIFEST, PROVENANCE, FOLDER))
    if not is_crops and not (out.is_dir() and not any(out.iterdir())):
        refused = "and --overwrite replaces nothing else" if overwrite else "and is in the way"
        raise OutputError(f"{out} is no crops folder {refused}; name another --out")


def refuse_other_options(out: Path, options: CropOptions) -> None:
    """Raise OutputError if `out` was made with another recipe. Labels may be added or changed, but not forgotten."""
    path = out / PROVENANCE
    if not path.exists():
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["options"]
    except (ValueError, KeyError) as error:
        raise OutputError(f"{path} is damaged; type --overwrite to crop anew") from error
    wanted = {**options.recipe, "shard": options.shard}
    compared = {name: recorded.get(name) for name in wanted}
    if recorded.get("labels") is not None and options.labels is None:
        table = recorded["labels"]
        raise OutputError(f"{out} has labels from {table}; type --labels {table} again, so that they are not lost")
    changes = product.difference(compared, wanted)
    if changes:
        raise OutputError(f"{out} was made with other options: {changes}; type --overwrite or name another --out")


def make_plan(listing: Listing, options: CropOptions, known: Known, rows: pa.Table) -> Plan:
    """Find out which sources are new or have changed; `rows` is the journal.

    Raises UsageError if a name now means another file.
    """
    sources = listing.sources
    before = known.find(sources.names)
    is_known = before >= 0
    pending = ~is_known
    if len(known):
        changed = known.states[before] != sources.states
        _refuse_other_files(listing, known, rows, np.flatnonzero(is_known & (known.places[before] != sources.places)))
        pending |= changed | (known.is_rejected[before] & options.retry_rejected)
    num_pending = int(pending.sum())
    workers = options.workers or available_cores()
    return Plan(listing, np.flatnonzero(pending), max(1, min(workers, num_pending)))


def _refuse_other_files(listing: Listing, known: Known, rows: pa.Table, moved: np.ndarray) -> None:
    """Raise UsageError if a source has the name of another file that is still there."""
    indices = known.row[known.find(listing.sources.names[moved])]
    files = rows["file"].take(pa.array(indices)).to_pylist()
    for source, file, index in zip(listing.sources.take(moved), files, indices.tolist(), strict=True):
        if os.path.lexists(text_to_path(file)):
            both = f"{printable(source.place)} would get the id of {rows['source'][index].as_py()}"
            raise UsageError(f"{both}, which this crops folder holds already; name another --out")


def chunks_of(plan: Plan) -> Iterator[list[Source]]:
    """Cut the pending sources into pieces of work."""
    size = max(1, min(LARGEST_CHUNK, len(plan.pending) // (plan.num_workers * CHUNKS_PER_WORKER)))
    chunk: list[Source] = []
    for source in plan.sources:
        chunk.append(source)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _crop_pending(plan: Plan, out: Path, options: CropOptions, journal: Journal) -> None:
    if not len(plan.pending):
        return
    make_task = functools.partial(Cropper, options, out)
    tally: Counter[str] = Counter()
    with console.progress("crop", len(plan.pending)) as bar:
        for sources, results in run_chunks(make_task, chunks_of(plan), plan.num_workers):
            rows = [row for source, result in zip(sources, results, strict=True) for row in _rows(source, result)]
            tally.update(row["status"] for row in rows)
            journal.append(rows)
            bar.advance(len(sources), f"{plural(tally[OK], 'crop')}, {plural(tally[REJECTED], 'reject')}")


def _rows(source: Source, result: list[Row] | Died) -> list[Row]:
    if isinstance(result, Died):
        return [failed_row(source, "unreadable", f"the process that read it died ({result.how})")]
    return result


def _finish_run(
    out: Path, options: CropOptions, product_options: ProductOptions, journal: Journal, plan: Plan
) -> CropReport:
    journal.close()
    rows = manifest.without_mended_shards(journal.read(), plan.listing.sources)
    rows = manifest.in_source_order(rows, plan.listing.sources)
    return finish(out, options, product_options, journal, plan, rows, {})


def finish(
    out: Path,
    options: CropOptions,
    product_options: ProductOptions,
    journal: Journal,
    plan: Plan | None,
    rows: pa.Table,
    inputs: dict[str, str],
) -> CropReport:
    """Write what a reader sees of the journal's `rows`, the manifest last; nothing if it says all that already."""
    before = journal.crops_before()
    shown = manifest.readable(rows, None if plan is None else plan.listing.sources)
    if options.labels is not None:
        shown = labels.join(shown, Path(options.labels), options.key)
    manifest.refuse_equal_ids(shown)
    if options.shards:
        stale = packing.stale_shards(before, rows)
        rows, shown = packing.pack(out, rows, shown, stale, images.SUFFIXES[options.format])
    journal.join(rows)
    report = report_of(out, shown, plan)
    provenance = _provenance(options, product_options, {**inputs, **_inputs(options)}, report)
    manifest.write(out, rows, shown, options.max_pixels, provenance)
    packing.sweep(out, shown, before)
    journal.sweep(rows)
    return report


def report_of(out: Path, rows: pa.Table, plan: Plan | None) -> CropReport:
    """Return what a manifest's rows amount to, and what a plan had to read."""
    counts = Counter(rows["reason"].to_pylist())
    num_crops = counts.pop("", 0)
    duplicates = sum(bool(one) for one in rows["duplicate_of"].to_pylist())
    gone = manifest.num_vanished(rows)
    report = CropReport(out, num_crops, dict(counts.most_common()), 0, gone, duplicates)
    if images.UNREADABLE in counts:
        details = Counter(rows.filter(pc.equal(rows["reason"], images.UNREADABLE))["detail"].to_pylist())
        detail, count = details.most_common(1)[0]
        report.why_unreadable = detail if 2 * count > details.total() else ""
    if plan is not None:
        report.new, report.skipped = len(plan.pending), dict(plan.listing.skipped)
    return report


def _inputs(options: CropOptions) -> dict[str, str]:
    tables = [Path(one).absolute() for one in (options.labels, options.boxes) if one is not None]
    return {str(table): product.file_sha256(table) for table in tables}


def _provenance(
    options: CropOptions, product_options: ProductOptions, inputs: dict[str, str], report: CropReport | None = None
) -> dict[str, object]:
    recorded = {**resolved(options), "limit": product_options.limit}
    counts = {} if report is None else {"crops": report.crops, "rejects": report.rejects}
    return {**product.provenance(recorded, inputs, product_options.seed), **counts}


def resolved(options: CropOptions) -> dict[str, object]:
    """Return the options that a reader of the folder wants to know."""
    return {**options.recipe, **{name: getattr(options, name) for name in ("labels", "boxes", "key", "shard")}}


def write_provenance(out: Path, options: CropOptions, product_options: ProductOptions) -> None:
    """Record how the folder is made before anything is in it, for a rerun after a kill to compare."""
    product.write_json(out / PROVENANCE, _provenance(options, product_options, _inputs(options)))


def refuse_too_few(report: CropReport, options: CropOptions) -> None:
    """Raise NoInputError where no face is usable, or more are rejected than allowed."""
    num_rejects = sum(report.rejects.values())
    reasons = counted(report.rejects)
    if not report.crops:
        most = next(iter(report.rejects))
        mend = report.why_unreadable if most == images.UNREADABLE else MEND.get(most, "")
        told = f"no usable face: {reasons}; {mend}" if mend else f"no usable face: {reasons}"
        raise NoInputError(f"{told}; {report.out / CONTACT} shows them")
    if options.too_many(num_rejects, num_rejects + report.crops):
        raise NoInputError(
            f"--max-rejects {options.max_rejects} allows fewer than {plural(num_rejects, 'reject')} beside "
            f"{plural(report.crops, 'crop')}: {reasons}; {report.out} is complete all the same, {CONTACT} shows them"
        )


def counted(counts: Counter[str] | dict[str, int]) -> str:
    """Return `3 border, 1 small`, the largest first."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
