"""Samples of a tar shard in webdataset layout, and the labels that stand in their sidecars.

Files that share a path up to the first dot of the base name, one after the other, are a sample: `00/17.jpg`,
`00/17.json` and `00/17.seg.png` are the files `jpg`, `json` and `seg.png` of the sample `00/17`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mefem_cli.stores.shards import DamagedShard, Member, members

Label = str | float | None

MAX_FILES_A_SAMPLE = 1024  # names with many dots can make a whole shard one sample; this bounds the memory
MAX_SIDECAR_BYTES = 1 << 20
MAX_FIELDS = 256  # of a json sidecar; each becomes a column
MAX_FIELD_NAME = 200  # characters
EXACT_INTEGERS = 1 << 53  # a larger one loses digits as float64, and is an identifier, not a measure
NOT_LABELS = frozenset({"exif"})  # downloaders copy it into the json; it holds places and names
HIDDEN = re.compile(r"(?:^|/)\.(?!\.?(?:/|$))")  # a part that begins with a dot, but . and ..
WEBDATASET_OWN = re.compile("__[^/]*__(?:$|/)")


class Sample(NamedTuple):
    """Files that belong together, by extension in lower case; `""` is that of a name without a dot."""

    key: str
    files: dict[str, Member]


def samples(path: str | Path, skipped: Counter[str] | None = None) -> Iterator[Sample]:
    """Yield a shard's samples: files with one key, next to each other (webdataset's rule).

    A file without a dot in its base name is a sample of its own and does not part its neighbours. A second file with
    the same extension begins another sample with the same key. Hidden files (macOS adds `._17.jpg`) and webdataset's
    own `__name__` files are none; `skipped` counts them. Raises DamagedShard as `members` does, after the last sample.
    """
    skipped = Counter() if skipped is None else skipped
    current = Sample("", {})
    try:
        for member in members(path, skipped):
            if reason := why_not_data(member.name):
                skipped[reason] += 1
                continue
            key, extension = key_and_extension(member.name)
            if not extension:
                yield Sample(key, {"": member})
                continue
            if key != current.key or extension in current.files or len(current.files) == MAX_FILES_A_SAMPLE:
                if current.files:
                    yield current
                current = Sample(key, {})
            current.files[extension] = member
    except DamagedShard:
        if current.files:
            yield current
        raise
    if current.files:
        yield current


def why_not_data(name: str) -> str:
    if (name.startswith(".") or "/." in name) and HIDDEN.search(name):
        return "hidden"
    return "webdataset's own" if name.startswith("__") and WEBDATASET_OWN.match(name) else ""


def key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def sample_labels(sample: Sample, descriptor: int) -> tuple[dict[str, Label], str]:
    """Return the labels in a sample's sidecars, and a remark about what could not be used ("" if nothing).

    `descriptor` is the open shard. `.txt`: the label `txt`, its text. `.cls`: the label `cls`, a number or text.
    `.json`: an object whose fields are labels: numbers as float (true is 1, larger ones than 2 ** 53 stay text), null
    as None, objects and lists as JSON text; `exif` is left out. A field wins over a label of the same name.
    """
    labels: dict[str, Label] = {}
    remarks = []
    for extension, read in SIDECARS.items():
        member = sample.files.get(extension)
        if member is None:
            continue
        if member.size > MAX_SIDECAR_BYTES:
            remarks.append(f"{extension} is not used, it has {member.size} bytes")
            continue
        found, remark = read(os.pread(descriptor, member.size, member.offset))
        labels |= found
        remarks += [f"{extension} {remark}"] if remark else []
    return labels, "; ".join(remarks)


def _txt_labels(content: bytes) -> tuple[dict[str, Label], str]:
    return {"txt": _text(content)}, ""


def _cls_labels(content: bytes) -> tuple[dict[str, Label], str]:
    text = _text(content)
    return {"cls": float(text) if re.fullmatch(r"[+-]?[0-9]{1,15}", text) else text}, ""


def _json_labels(content: bytes) -> tuple[dict[str, Label], str]:
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict):
            return {}, "is no JSON object"
        names = [name for name in fields if name and len(name) <= MAX_FIELD_NAME and name not in NOT_LABELS]
        labels = {_clean(name): _label(fields[name]) for name in names[:MAX_FIELDS]}
    except (ValueError, RecursionError):  # also where it is not UTF-8, or nested too deeply to be read or written again
        return {}, "is no JSON"
    return labels, f"has {len(names)} fields, {MAX_FIELDS} are used" if len(names) > MAX_FIELDS else ""


def _label(value: Any) -> Label:
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, int) and abs(value) > EXACT_INTEGERS:
        return str(value)
    return float(value) if isinstance(value, int | float) else _clean(json.dumps(value, ensure_ascii=False))


def _text(content: bytes) -> str:
    return _clean(content.decode("utf-8-sig", "replace").strip())


def _clean(text: str) -> str:
    """Return text that Parquet and HDF5 can hold: without zeros, and without the half surrogate pairs of JSON."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


# What a sidecar's content says, by its extension: labels and a remark.
SIDECARS = {"txt": _txt_labels, "cls": _cls_labels, "json": _json_labels}
