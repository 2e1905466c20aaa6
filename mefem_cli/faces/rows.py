"""Rows on their way to the manifest: its columns, and what the journal knows of their source beside."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from mefem_cli.faces.source import NOTHING, Given, Label, Source, hash63
from mefem_cli.stores.crops import REJECTED, SCHEMA, face_id, path_to_text

STILL_FRAME = 0
CONTENT = "content"  # in a row before it is written: the encoded crop, where it goes into a shard
Row = dict[str, Any]

JOURNAL_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("file", pa.string()),  # the source's path, or its shard's
        ("member_offset", pa.int64()),  # where the source's content begins in its shard, -1 without one
        ("member_bytes", pa.int64()),
        ("hash", pa.int64()),  # of the name that makes the id
        ("place_hash", pa.int64()),
        ("state", pa.int64()),  # another one means that the source has changed
        ("labels", pa.string()),  # of tables and sidecars, as JSON
        ("packed", pa.int64()),  # hash of what the JSON beside the crop in a shard says; none: not in a shard
    ]
)
EMPTY: Row = {one.name: "" if one.type == pa.string() else None for one in JOURNAL_SCHEMA}


def new_row(source: Source, frame: int, face: int | None, given: Given = NOTHING, **known: Any) -> Row:
    """Return a row of a source with nothing in it but its names and `known`; without a reason it is no reject yet."""
    labels: dict[str, Label] = dict(given.labels or {})
    if given.faces and face is not None:
        labels |= given.faces[face].labels or {}
    return {
        **EMPTY,
        "id": face_id(source.name, frame, face or 0),
        "source": path_to_text(source.place),
        "frame": frame,
        "face": face,
        "status": REJECTED,
        "file": path_to_text(source.path),
        "member_offset": source.offset,
        "member_bytes": source.size,
        "hash": hash63(source.name),
        "place_hash": hash63(source.path, source.member),
        "state": source.state,
        "labels": Given(labels=labels or None).to_json(),
        **known,
    }


def failed_row(source: Source, reason: str, detail: str, **known: Any) -> Row:
    """Return the row of a source that could not be read."""
    return new_row(source, STILL_FRAME, None, Given.from_json(source.given), reason=reason, detail=detail, **known)
