"""contact.html: a sheet of crops, and of rejects by reason with the face box and the crop square drawn."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mefem_cli.console import plural
from mefem_cli.faces import images, reading, video
from mefem_cli.faces.source import Source, printable
from mefem_cli.reports import html
from mefem_cli.stores.crops import OK, read_crop, text_to_path

NUM_CROPS, NUM_REJECTS = 60, 12  # pictures shown, of crops and of each reject reason
CROP_PX, REJECT_PX = 160, 320  # longest side of embedded pictures
QUALITY = 85
LONGEST_NAME = 60  # characters; the whole name appears under the pointer
REASONS_IN_WORDS = {
    "border": "The square around the face leaves the picture.",
    "small": "The square around the face has fewer pixels than wanted.",
    "no-face": "No face was found.",
    "low-score": "The best hit is not sure enough to be called a face.",
    "not-one-face": "There is more than one face, and only pictures with one were wanted.",
    "unreadable": "The file is no image, is damaged, or cannot be read.",
    "too-large": "The picture has more pixels than allowed.",
    "bad-box": "The given box is no box in the picture.",
}
STYLE = """<style>
.rejects { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.rejects figure { margin: 0; width: 11rem; } .rejects figcaption { font-size: .78rem; overflow-wrap: anywhere; }
.rejects svg { width: 100%; height: auto; max-height: 15rem; display: block; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; }
.rejects rect { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
rect.box { stroke: #ffb000; } rect.square { stroke: #ff4d6d; stroke-dasharray: 6 4; }
.key { display: inline-block; width: 1.4rem; height: 0; vertical-align: middle; border-top: 3px solid #ffb000; }
.key.square { border-top: 3px dashed #ff4d6d; } ul.plain { padding-left: 1.1rem; overflow-wrap: anywhere; }
</style>"""
KEY = """<p class="soft"><span class="key"></span> face box &nbsp; <span class="key square"></span> crop square</p>"""


def page(out: Path, rows: pa.Table, shown: pa.Table, max_pixels: int) -> str:
    """Return the sheet of a crops folder: `shown` is its manifest, `rows` are the same rows of its journal.

    It needs no network and no file beside it.
    """
    rows = _with_places(rows, shown)
    reasons = Counter(rows["reason"].to_pylist())
    num_crops = reasons.pop("", 0)
    counts = f"{plural(num_crops, 'crop')}, {plural(reasons.total(), 'reject')}"
    lead = f"{counts}. Samples are evenly spaced over the sources."
    body = [STYLE]
    if reasons:
        body.append(html.table(["reason", "rejects", "meaning"], _reason_lines(reasons)))
    if num_crops:
        body.append(html.heading(f"Crops ({_shown(num_crops, NUM_CROPS)})"))
        body.append(html.tiles(_crops(out, rows)))
    if reasons:
        body.append(KEY)
    for reason, count in reasons.most_common():
        body.append(html.heading(f"{reason} ({_shown(count, NUM_REJECTS)})"))
        body.append(html.paragraph(REASONS_IN_WORDS[reason]))
        body += _rejects(_spread(rows.filter(pc.equal(rows["reason"], reason)), NUM_REJECTS), max_pixels)
    return html.page("mefem crop", lead, body)


def _with_places(rows: pa.Table, shown: pa.Table) -> pa.Table:
    """Return the manifest's rows with what says where the bytes of their sources lie."""
    for name in ("file", "member_offset", "member_bytes"):
        shown = shown.append_column(name, rows[name])
    return shown


def _reason_lines(reasons: Counter[str]) -> list[tuple[str, int, str]]:
    return [(reason, count, REASONS_IN_WORDS[reason]) for reason, count in reasons.most_common()]


def _shown(count: int, limit: int) -> str:
    return str(count) if count <= limit else f"{limit} of {count}"


def _spread(rows: pa.Table, limit: int) -> pa.Table:
    if len(rows) <= limit:
        return rows
    return rows.take(pa.array(np.linspace(0, len(rows) - 1, limit).astype(np.int64)))


def _crops(out: Path, rows: pa.Table) -> Iterator[tuple[bytes, str, str]]:
    for row in _spread(rows.filter(pc.equal(rows["status"], OK)), NUM_CROPS).to_pylist():
        try:
            content = read_crop(out, row["path"], row["crop_offset"], row["crop_bytes"])
            pixels = images.decode(content, max_pixels=1 << 30).pixels
        except (OSError, images.ImageRejected):  # removed by hand: the manifest still tells
            continue
        yield images.encode_jpeg(images.thumbnail(pixels, CROP_PX), QUALITY), *_names(row)


def _names(row: dict) -> tuple[str, str]:
    """Return a file's name with its folder's, and the whole name of the source; a video's with the frame."""
    frame = f" frame {row['frame']}" if row["frame"] else ""
    whole = printable(text_to_path(row["source"]))
    below = whole.split("/")[1:] or [whole]  # all sources of one argument share its first part
    return _shortened("/".join(below[-2:])) + frame, whole + frame


def _shortened(name: str) -> str:
    """Leave out the middle of a name that would fill more than a few lines.

    >>> _shortened("b" * 100 + "/photo.jpg").count("b")
    50
    """
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2]}…{name[-(LONGEST_NAME // 2) :]}"


def _rejects(rows: pa.Table, max_pixels: int) -> Iterator[str]:
    """Yield a picture of each reject that can be shown, then a list of the others."""
    figures, lines = [], []
    for row in rows.to_pylist():
        name, whole, detail = *map(escape, _names(row)), escape(row["detail"])
        drawing = _drawing(row, max_pixels) if row["width"] and row["reason"] != "too-large" else None
        if drawing is None:
            lines.append(f'<li title="{whole}"><code>{name}</code> {detail}</li>')
        else:
            caption = f'<figcaption>{name}<br><span class="soft">{detail}</span></figcaption>'
            figures.append(f'<figure title="{whole}">{drawing}{caption}</figure>')
    if figures:
        yield f'<div class="rejects">{"".join(figures)}</div>'
    if lines:
        yield f'<ul class="plain">{"".join(lines)}</ul>'


def _drawing(row: dict, max_pixels: int) -> str | None:
    """Return an SVG of the source with box and square; its view is wide enough to show where the square leaves."""
    pixels = _source_pixels(row, max_pixels)
    if pixels is None:
        return None
    data = base64.b64encode(images.encode_jpeg(images.thumbnail(pixels, REJECT_PX), QUALITY)).decode()
    left, top, right, bottom = 0.0, 0.0, float(row["width"]), float(row["height"])
    shapes = [f'<image href="data:image/jpeg;base64,{data}" width="{right:g}" height="{bottom:g}"/>']
    if row["box_x"] is not None:
        shapes.append(_rectangle("box", row["box_x"], row["box_y"], row["box_w"], row["box_h"]))
    if row["crop_x"] is not None:
        x, y, side = row["crop_x"], row["crop_y"], row["crop_side"]
        shapes.append(_rectangle("square", x, y, side, side))
        left, top, right, bottom = min(left, x), min(top, y), max(right, x + side), max(bottom, y + side)
    margin = 0.02 * max(right - left, bottom - top)
    view = (left - margin, top - margin, right - left + 2 * margin, bottom - top + 2 * margin)
    return f'<svg viewBox="{" ".join(f"{value:.6g}" for value in view)}" role="img">{"".join(shapes)}</svg>'


def _source_pixels(row: dict, max_pixels: int) -> np.ndarray | None:
    """Return the picture that a row tells of, None where it is gone or has changed."""
    path, size, offset = text_to_path(row["file"]), row["member_bytes"], row["member_offset"]
    try:
        with reading.opened(Source("", path, size, offset=offset), max_pixels) as file:
            if not file.is_video:
                return images.decode(file.content, max_pixels).pixels
            wanted = video.parse_frame_choice(str(row["frame"]))
            return next(video.read_frames(file.file, wanted, max_pixels)).pixels
    except (images.ImageRejected, StopIteration):
        return None


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.6g}" y="{y:.6g}" width="{width:.6g}" height="{height:.6g}"/>'
