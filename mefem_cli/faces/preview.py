"""`mefem crop --dry-run`: what a run would do, from a few sources cropped in memory; nothing is written."""

from __future__ import annotations

import functools
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mefem_cli.faces import job, labels, manifest
from mefem_cli.faces.crop import CropOptions, Cropper
from mefem_cli.faces.journal import Journal, known_sources
from mefem_cli.faces.listing import SourceList
from mefem_cli.faces.rows import JOURNAL_SCHEMA, STILL_FRAME, new_row
from mefem_cli.faces.source import Given, Source
from mefem_cli.faces.workers import Died, run_chunks
from mefem_cli.stores.crops import OK
from mefem_cli.stores.product import ProductOptions

NUM_SAMPLES = 24
MOST_JOINED = 100_000  # sources to which labels are joined for a look
BYTES_PER_PIXEL = 0.55  # of a JPEG crop at quality 95, measured on faces; enough for an estimate
START_SECONDS = 1.5  # until the processes have loaded MediaPipe


def preview(arguments: list[str], options: CropOptions, product_options: ProductOptions) -> dict[str, Any]:
    """Return what `job.crop` would do with the same arguments. Raises the same errors for bad input and output."""
    out = Path(product_options.out or job.DEFAULT_OUT)
    job.check_output(out, product_options.overwrite)
    if not product_options.overwrite:
        job.refuse_other_options(out, options)
    listing = job.find_sources(arguments, out, options, product_options.limit)
    job.tell_about_listing(listing, options.labels is None)
    journal = Journal(out).read()
    rows = journal.slice(0, 0) if product_options.overwrite else journal
    known = known_sources(rows, out)
    if options.labels is not None:
        labels.join(_rows_to_be(listing.sources), Path(options.labels), options.key)  # says on stderr what fits
    plan = job.make_plan(listing, options, known, rows)
    kinds = Counter(os.path.splitext(source.place)[1].lower() or "no suffix" for source in listing.sources)
    return {
        "out": str(out.absolute()),
        "state": _state(out, plan, product_options.overwrite),
        "sources": len(listing.sources),
        "kinds": dict(kinds.most_common()),
        "skipped": dict(listing.skipped),
        "to_read": len(plan.pending),
        "known": len(known),
        "workers": plan.num_workers,
        **_estimate(plan, options),
        "options": job.resolved(options),
    }


def _rows_to_be(sources: SourceList) -> pa.Table:
    """Return a row for each of the first sources, as a manifest has them, with the labels that they bring along."""
    first = sources.take(np.arange(min(len(sources), MOST_JOINED)))
    rows = [new_row(source, STILL_FRAME, None, Given.from_json(source.given)) for source in first]
    return manifest.readable(pa.Table.from_pylist(rows, schema=JOURNAL_SCHEMA), None)


def _state(out: Path, plan: job.Plan, overwrite: bool) -> str:
    if not out.exists():
        return "new"
    if overwrite:
        return "is replaced"
    return "goes on" if len(plan.pending) else "is complete"


def _estimate(plan: job.Plan, options: CropOptions) -> dict[str, Any]:
    """Crop a few pending sources in memory, evenly spaced, and extrapolate time, disk space and rejects."""
    if not len(plan.pending):
        return {"sampled": 0, "seconds": 0.0, "megabytes": 0.0, "expected_rejects": {}}
    indices = np.unique(np.linspace(0, len(plan.pending) - 1, NUM_SAMPLES).astype(int))
    samples = list(plan.listing.sources.take(plan.pending[indices]))
    reasons, seconds_each = _sample(samples, options)
    scale_up = len(plan.pending) / len(samples)
    num_crops = reasons.pop("", 0) * scale_up
    seconds = START_SECONDS + seconds_each * len(plan.pending) / plan.num_workers
    return {
        "sampled": len(samples),
        "seconds": round(seconds, 1),
        "megabytes": round(num_crops * BYTES_PER_PIXEL * options.size**2 / 1e6, 1),
        "expected_rejects": {reason: math.ceil(count * scale_up) for reason, count in reasons.items()},
    }


def _sample(samples: list[Source], options: CropOptions) -> tuple[Counter[str], float]:
    """Return the reject reasons ("" for crops) of some sources and the seconds that one takes one process."""
    reasons: Counter[str] = Counter()
    begun = None
    chunks = [samples[:1], samples[1:]] if len(samples) > 1 else [samples]
    for _, results in run_chunks(functools.partial(Cropper, options, None), chunks, num_workers=1):
        for result in results:
            if isinstance(result, Died):
                reasons["unreadable"] += 1
            else:
                reasons.update("" if row["status"] == OK else row["reason"] for row in result)
        if begun is None:
            begun, elapsed = time.monotonic(), 0.05  # the first picture also loads the models
        else:
            elapsed = (time.monotonic() - begun) / (len(samples) - 1)
    return reasons, elapsed
