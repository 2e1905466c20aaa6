"""AVSpeech: a CSV without a header, `youtube_id,start,end,x,y`, and the clips that a downloader left beside it.

A row names a segment of a video in seconds and the speaker's place in it, as shares of width and height. Downloaders
keep whole videos (`<id>.mp4`, `<title> [<id>].mkv`) or cut clips, named after the segment (`<id>_90.0_93.5.mp4`,
`<id>_090.000000-093.500000.mp4`, `<id>_90.0_93.5_video.mp4`, `<id>_90.mp4`).
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mefem_cli.faces.source import hash63
from mefem_cli.faces.video_kinds import VIDEO_SUFFIXES
from mefem_cli.stores.tables import HashIndex, to_numbers

COLUMNS = ["youtube_id", "start", "end", "x", "y"]
SECONDS = r"(\d{1,7}(?:\.\d+)?)"
CUT = re.compile(rf"(.+)[_-]{SECONDS}[_-]{SECONDS}(?:_video)?", re.DOTALL)
CUT_START = re.compile(rf"(.+)[_-]{SECONDS}", re.DOTALL)
TITLED = re.compile(r".*\[([\w-]{11})\]", re.DOTALL)
ROUNDED = 1.0  # s; times in names may be cut to whole seconds
NAMES_BATCH = 1 << 16


def columns(first_row: list[str]) -> list[str] | None:
    """Return AVSpeech's columns if a table begins with a row of it.

    >>> columns(["-1YbJtO5Oo0", "90.0", "93.5", "0.5", "0.3"])
    ['youtube_id', 'start', 'end', 'x', 'y']
    >>> columns(["path", "age", "sex", "x", "y"])
    """
    if len(first_row) != len(COLUMNS) or not first_row[0] or not all(first_row[1:]):
        return None
    return COLUMNS if to_numbers(pa.array(first_row[1:])) is not None else None


class Clips:
    """The videos in a folder and below it, by the id and the segment that their names tell; some 100 bytes each."""

    def __init__(self, folder: str):
        self._hashes, self._starts, self._ends, self._files = array("q"), array("d"), array("d"), array("q")
        self._paths = pa.chunked_array(list(self._indexed(folder)), pa.binary())
        self._by_id = HashIndex(np.frombuffer(self._hashes, np.int64))

    def _indexed(self, folder: str) -> Iterator[pa.Array]:
        """Yield the paths of the videos below a folder, noting what their names say."""
        names: list[bytes] = []
        for number, path in enumerate(_videos(folder)):
            self._note(os.path.splitext(os.path.basename(path))[0], number)
            names.append(os.fsencode(os.path.relpath(path, folder)))
            if len(names) == NAMES_BATCH:
                yield pa.array(names, pa.binary())
                names = []
        yield pa.array(names, pa.binary())

    def _note(self, name: str, file: int) -> None:
        """A name can be read in several ways, as ids have dashes and digits; only that of a row's id will be asked."""
        ways = [(name, math.nan, math.nan)]
        if match := TITLED.fullmatch(name):
            ways.append((match[1], math.nan, math.nan))
        if match := CUT.fullmatch(name):
            ways.append((match[1], float(match[2]), float(match[3])))
        if match := CUT_START.fullmatch(name):
            ways.append((match[1], float(match[2]), math.nan))
        for youtube_id, start, end in ways:
            self._hashes.append(hash63(youtube_id))
            self._starts.append(start)
            self._ends.append(end)
            self._files.append(file)

    def find(self, youtube_id: str, start: float, end: float) -> tuple[str, bool] | None:
        """Return the file, from the folder, and whether it is cut to the segment; None if there is none.

        A clip that is cut goes before a whole video, and of several the one whose times are nearest.
        """
        best: tuple[float, int] | None = None
        for way in self._by_id.find(hash63(youtube_id)).tolist():
            distance = self._distance(way, start, end)
            if distance is not None and (best is None or distance < best[0]):
                best = (distance, way)
        if best is None:
            return None
        return os.fsdecode(self._paths[self._files[best[1]]].as_py()), not math.isinf(best[0])

    def _distance(self, way: int, start: float, end: float) -> float | None:
        """How far a clip's times are from a segment, s: infinite for a whole video, None for another segment's clip."""
        if math.isnan(self._starts[way]):
            return math.inf
        apart = [abs(self._starts[way] - start)]
        if not math.isnan(self._ends[way]):
            apart.append(abs(self._ends[way] - end))
        return sum(apart) if max(apart) < ROUNDED else None


def _videos(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders.sort(key=os.fsencode)
        for name in sorted(names, key=os.fsencode):
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield f"{place}/{name}"
