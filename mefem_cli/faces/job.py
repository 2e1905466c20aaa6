"""A run of `mefem crop`: many sources -> a crops folder, on all cores, to be stopped and continued at any time."""

from __future__ import annotations

import csv
import functools
import io
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
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.faces import contact, labels
from mefem_cli.faces.crop import CropOptions, Cropper, Row, failed_row
from mefem_cli.faces.inputs import Listing, Source, list_sources, printable
from mefem_cli.faces.journal import FOLDER, Journal, Known, known_sources
from mefem_cli.faces.workers import Died, available_cores, run_chunks
from mefem_cli.stores import product
from mefem_cli.stores.crops import (
    CONTACT,
    MANIFEST,
    OK,
    PROVENANCE,
    REJECTED,
    REJECTS,
    SCHEMA,
    path_to_text,
    read_manifest,
    text_to_path,
    write_manifest,
)
from mefem_cli.stores.product import ProductOptions

DEFAULT_OUT = "crops"
LARGEST_CHUNK = 32  # sources; about a second of work, the most that a kill loses
CHUNKS_PER_WORKER = 4  # at least so many where there are few sources, so that all cores end together
VANISHED = "source vanished"


@dataclass
class CropReport:
    """What a crops folder holds after a run, and what the run did."""

    out: Path
    crops: int
    rejects: dict[str, int]  # by reason
    new: int  # sources read by this run
    vanished: int  # sources of earlier runs that are no longer there
    skipped: dict[str, int] = field(default_factory=dict)  # files that are no images, by kind
    seconds: float = 0.0

    @property
    def counts(self) -> dict[str, object]:
        """What `--json` says beside the path and the time."""
        return {name: getattr(self, name) for name in ("crops", "rejects", "new", "vanished", "skipped")}


@dataclass
class Plan:
    """What is to be done: all sources found, and those of them to be read."""

    listing: Listing
    pending: list[Source]
    num_workers: int


def crop(arguments: list[str], options: CropOptions, product_options: ProductOptions) -> CropReport:
    """Crop the faces in the named sources into a crops folder, or take new sources into an existing one.

    Raises UsageError, NoInputError (no image found, no face usable, or more rejects than `max_rejects`, the folder
    being complete in both latter cases) and OutputError (other options, not a crops folder, disk full).
    """
    begun = time.monotonic()
    out = Path(product_options.out or DEFAULT_OUT)
    listing = find_sources(arguments, out, product_options.limit)
    tell_about_listing(listing, options)
    check_output(out, product_options.overwrite)
    if not product_options.overwrite:
        refuse_other_options(out, options)
    if options.labels is not None:
        labels.read_labels(Path(options.labels), options.key)  # tell of a bad table before the work, not after it
    journal = Journal(out)
    with journal.locked():
        if product_options.overwrite:
            journal.clear()
        plan = make_plan(listing, options, known_sources(journal.read()))
        if not (out / PROVENANCE).exists():
            _write_provenance(out, options, product_options)
        _crop_pending(plan, out, options, journal)
        report = _finish(plan, out, options, product_options, journal)
    report.seconds = time.monotonic() - begun
    _refuse_too_few(report, options)
    return report


def find_sources(arguments: list[str], out: Path, limit: int | None) -> Listing:
    """List the sources. Raises UsageError if none are named, NoInputError if there is no image among them."""
    if not arguments:
        raise UsageError("no photos named; type mefem crop FOLDER, or - to read one path a line from stdin")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: wanted 1 or more")
    listing = list_sources(arguments, out, limit)
    if not listing.sources:
        skipped = f" (skipped: {counted(listing.skipped)})" if listing.skipped else ""
        raise NoInputError(f"no images found in {', '.join(map(printable, arguments))}{skipped}")
    real_out = os.path.realpath(out)
    for source in listing.sources:
        if os.path.realpath(source.path).startswith(real_out + os.sep):
            raise UsageError(f"{printable(source.path)} lies in the output {out}; name another --out")
    return listing


def tell_about_listing(listing: Listing, options: CropOptions) -> None:
    """Say on stderr what was skipped, and that a table of labels lies there unused."""
    if listing.skipped:
        console.note(f"skipped, as no images: {counted(listing.skipped)}")
    if options.labels is None:
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
    wanted = options.recipe
    compared = {name: recorded.get(name) for name in wanted}
    if recorded.get("labels") is not None and options.labels is None:
        compared, wanted = {**compared, "labels": recorded["labels"]}, {**wanted, "labels": None}
    changes = product.difference(compared, wanted)
    if changes:
        raise OutputError(f"{out} was made with other options: {changes}; type --overwrite or name another --out")


def make_plan(listing: Listing, options: CropOptions, known: dict[str, Known]) -> Plan:
    """Find out which sources are new or have changed. Raises UsageError if a name now means another file."""
    pending = []
    for source in listing.sources:
        before = known.get(path_to_text(source.name))
        if before is None or _needs_reading(source, before, options.retry_rejected):
            pending.append(source)
    workers = options.workers or available_cores()
    return Plan(listing, pending, max(1, min(workers, len(pending))))


def _needs_reading(source: Source, before: Known, retry_rejected: bool) -> bool:
    """A source is unchanged if its path, its size and its time of modification are."""
    path = path_to_text(source.path)
    if before.path != path and os.path.lexists(text_to_path(before.path)):
        both = f"{printable(source.path)} would get the id of {before.path}"
        raise UsageError(f"{both}, which this crops folder holds already; name another --out")
    unchanged = (before.path, before.size, before.mtime) == (path, source.size, source.mtime)
    return not unchanged or (retry_rejected and before.is_rejected)


def chunks_of(plan: Plan) -> Iterator[list[Source]]:
    """Cut the pending sources into pieces of work."""
    size = max(1, min(LARGEST_CHUNK, len(plan.pending) // (plan.num_workers * CHUNKS_PER_WORKER)))
    for start in range(0, len(plan.pending), size):
        yield plan.pending[start : start + size]


def _crop_pending(plan: Plan, out: Path, options: CropOptions, journal: Journal) -> None:
    if not plan.pending:
        return
    make_task = functools.partial(Cropper, options, out)
    tally: Counter[str] = Counter()
    with console.progress("crop", len(plan.pending)) as bar:
        for sources, results in run_chunks(make_task, chunks_of(plan), plan.num_workers):
            rows = [row for source, result in zip(sources, results, strict=True) for row in _rows(source, result)]
            journal.append(rows)
            tally.update(row["status"] for row in rows)
            bar.advance(len(sources), f"{tally[OK]} crops, {tally[REJECTED]} rejects")


def _rows(source: Source, result: list[Row] | Died) -> list[Row]:
    if isinstance(result, Died):
        return [failed_row(source, "unreadable", f"the process that read it died ({result.how})")]
    return result


def _finish(
    plan: Plan, out: Path, options: CropOptions, product_options: ProductOptions, journal: Journal
) -> CropReport:
    """Write what a reader sees, the manifest last; write nothing if it says all that already."""
    journaled = journal.read()
    rows, num_vanished = _in_source_order(journaled, plan.listing)
    if options.labels is not None:
        rows = labels.join(rows, Path(options.labels), options.key)
    _refuse_equal_ids(rows)
    report = _report(out, rows, plan, num_vanished)
    if not _is_written(out, rows):
        product.write_text(out / REJECTS, _rejects_csv(rows))
        product.write_text(out / CONTACT, contact.page(out, rows, options.max_pixels))
        _write_provenance(out, options, product_options, report)
        write_manifest(out, rows)
    _remove_stale_crops(out, rows, journal)
    journal.join(journaled)
    return report


def _in_source_order(rows: pa.Table, listing: Listing) -> tuple[pa.Table, int]:
    """Sort rows as the sources are listed, then those of other runs; mark vanished sources and return their number."""
    position = {path_to_text(source.name): index for index, source in enumerate(listing.sources)}
    names = rows["name"].to_pylist()
    order = np.argsort([position.get(name, len(position)) for name in names], kind="stable")
    rows = rows.take(pa.array(order))
    unlisted = {
        (name, path)
        for name, path in zip(rows["name"].to_pylist(), rows["source"].to_pylist(), strict=True)
        if name not in position
    }
    gone = {name for name, path in unlisted if not os.path.lexists(text_to_path(path))}
    details = [
        "; ".join(filter(None, (detail, VANISHED))) if name in gone else detail
        for name, detail in zip(rows["name"].to_pylist(), rows["detail"].to_pylist(), strict=True)
    ]
    rows = rows.set_column(rows.schema.get_field_index("detail"), "detail", pa.array(details, pa.string()))
    return rows.select(SCHEMA.names), len(gone)


def _refuse_equal_ids(rows: pa.Table) -> None:
    ids = rows["id"].to_pylist()
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        both = rows.filter(pc.equal(rows["id"], twice))["source"].to_pylist()
        raise UsageError(f"{printable(both[0])} and {printable(both[1])} have one id, {twice}; rename one of them")


def _is_written(out: Path, rows: pa.Table) -> bool:
    if not all((out / name).exists() for name in (MANIFEST, REJECTS, CONTACT, PROVENANCE)):
        return False
    try:
        return read_manifest(out).equals(rows, check_metadata=False)
    except NoInputError:  # damaged: write it again
        return False


def _report(out: Path, rows: pa.Table, plan: Plan, num_vanished: int) -> CropReport:
    counts = Counter(rows["reason"].to_pylist())
    num_crops = counts.pop("", 0)
    rejects = dict(counts.most_common())
    return CropReport(out, num_crops, rejects, len(plan.pending), num_vanished, dict(plan.listing.skipped))


def _rejects_csv(rows: pa.Table) -> str:
    rejected = rows.filter(pc.equal(rows["status"], REJECTED)).select(["id", "source", "reason", "detail"])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rejected.column_names)
    writer.writerows(zip(*rejected.to_pydict().values(), strict=True))
    return text.getvalue()


def _write_provenance(
    out: Path, options: CropOptions, product_options: ProductOptions, report: CropReport | None = None
) -> None:
    """Record how the folder is made: at the start, for a rerun after a kill to compare, and at the end with counts."""
    resolved = {**options.recipe, "labels": options.labels, "key": options.key, "limit": product_options.limit}
    table = None if options.labels is None else Path(options.labels).absolute()
    inputs = {} if table is None else {str(table): product.file_sha256(table)}
    record = product.provenance(resolved, inputs, product_options.seed)
    counts = {} if report is None else {"crops": report.crops, "rejects": report.rejects}
    product.write_json(out / PROVENANCE, {**record, **counts})


def _remove_stale_crops(out: Path, rows: pa.Table, journal: Journal) -> None:
    """Remove crops of sources that were read again and have fewer faces now."""
    for path in journal.all_crop_paths() - set(rows["path"].to_pylist()):
        (out / path).unlink(missing_ok=True)


def _refuse_too_few(report: CropReport, options: CropOptions) -> None:
    num_rejects = sum(report.rejects.values())
    reasons = counted(report.rejects)
    if not report.crops:
        raise NoInputError(f"no usable face: {reasons}; {report.out / CONTACT} shows them")
    if options.too_many(num_rejects, num_rejects + report.crops):
        raise NoInputError(
            f"{num_rejects} rejects beside {report.crops} crops are more than --max-rejects {options.max_rejects}: "
            f"{reasons}; {report.out} is complete all the same, {CONTACT} shows them"
        )


def counted(counts: Counter[str] | dict[str, int]) -> str:
    """Return `3 border, 1 small`, the largest first."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
