"""A video -> the frames that were asked for, upright sRGB uint8 [H, W, 3]; what cannot be read says why.

Reading wants PyAV (the extra `video`). Time 0 is the first frame that can be decoded. The frame of a time is the one
on screen then. `video_stream.py` leads to the pictures, `video_colour.py` makes sRGB of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO, Literal

import numpy as np

from mefem_cli.errors import UsageError, did_you_mean
from mefem_cli.faces.images import TOO_LARGE, UNREADABLE, ImageRejected
from mefem_cli.faces.video_stream import Video

NUM_CANDIDATES = 10  # frames among which `best` is chosen
THEN = "then crop again with --retry-rejected"
OLDEST_PYAV = (17, 1)  # older ones crash where the streams of a file with options appear late


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are wanted."""

    kind: Literal["middle", "first", "best", "every", "number"]
    number: int = 0  # the frame's, from 0
    step: float = 0.0  # s between the frames of `every`

    @property
    def is_best(self) -> bool:
        """Whether the frames are candidates, among which the caller chooses one."""
        return self.kind == "best"


@dataclass(frozen=True)
class Frame:
    """One frame: `index` counts from the video's first at its frame rate, `pixels` is uint8 [H, W, 3], upright sRGB."""

    index: int
    seconds: float  # from the video's first frame
    pixels: np.ndarray


def parse_frame_choice(text: str) -> FrameChoice:
    """Read `middle`, `first`, `best`, `every:2s` (ms, s, m or h) or a frame number. Raises UsageError.

    >>> parse_frame_choice("every:500ms").step
    0.5
    """
    words: dict[str, Literal["middle", "first", "best"]] = {"middle": "middle", "first": "first", "best": "best"}
    if text in words:
        return FrameChoice(words[text])
    if re.fullmatch(r"[0-9]{1,12}", text):
        return FrameChoice("number", int(text))
    match = re.fullmatch(r"every:([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)", text)
    if match and (step := float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2]]):
        return FrameChoice("every", step=step)
    if text.startswith("every"):
        raise UsageError(f"--frame {text[:40]}: wanted a time above 0 with its unit (ms, s, m, h), as in every:2s")
    raise UsageError(f"--frame {text[:40]}: not the number of a frame{did_you_mean(text, [*words, 'every:2s'])}")


def read_frames(
    path: str | PathLike[str] | BinaryIO,
    choice: FrameChoice,
    max_pixels: int,
    segment: tuple[float, float] | None = None,
) -> Iterator[Frame]:
    """Yield the chosen frames of a video, a path or an open binary file that can seek, each once, in their order.

    `first` is the frame on screen at the start, `middle` at half of the length, `best` yields up to NUM_CANDIDATES
    evenly spaced frames for the caller to choose from, `every` the frames on screen at 0, 1, 2 ... steps, a number the
    frame with that index (where the frame rate varies, the one on screen then). `segment` (start, end in seconds)
    stands for the whole video, also for a number, and may end at infinity; `Frame.index` and `Frame.seconds` stay those
    of the whole.

    Raises ImageRejected `unreadable` where a wanted frame is damaged or lies behind the end of a truncated file, and
    `too-large` before a frame of more than `max_pixels` is decoded. `best` gives what can be decoded of its candidates;
    `every` gives all that can be decoded before it raises. Without PyAV every video is `unreadable`.
    """
    av = _import_av()
    if isinstance(path, str | PathLike):
        with _rejecting(), open(path, "rb", buffering=0) as file:
            yield from _read(av, file, choice, max_pixels, segment)
    else:
        with _rejecting():
            yield from _read(av, path, choice, max_pixels, segment)


def _import_av() -> Any:
    """Return PyAV. Raises ImageRejected where it is missing or too old; photos beside videos are cropped."""
    try:
        import av
    except ImportError as error:
        detail = f'videos are read with PyAV, which is missing; type: pip install "mefem-cli[video]", {THEN}'
        raise ImageRejected(UNREADABLE, detail) from error
    if tuple(map(int, av.__version__.split(".")[:2])) < OLDEST_PYAV:
        wanted = "av>=" + ".".join(map(str, OLDEST_PYAV))
        detail = f'PyAV {av.__version__} is too old for videos; type: pip install --upgrade "{wanted}", {THEN}'
        raise ImageRejected(UNREADABLE, detail)
    return av


@contextmanager
def _rejecting() -> Iterator[None]:
    """Turn whatever a broken file makes the decoders raise into ImageRejected."""
    try:
        yield
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected(TOO_LARGE, "not enough memory to decode it") from error
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageRejected(UNREADABLE, f"not a video that can be read: {why[:160]}") from error


def _read(
    av: Any, file: Any, choice: FrameChoice, max_pixels: int, segment: tuple[float, float] | None
) -> Iterator[Frame]:
    video = Video(av, file, max_pixels)
    lacking: list[float] = []
    last, index = None, -1
    try:
        for seconds in _wanted_times(video, choice, segment):
            shown = video.shown_at(seconds)
            if shown is None and choice.kind == "every" and video.is_over:
                video.check_whole(math.inf if segment is None else segment[1])
                break
            if shown is None:
                lacking.append(seconds)
            elif shown.time != last:
                last, index = shown.time, max(video.index(shown.time), index + 1)
                yield Frame(index, video.seconds(shown.time), video.pixels(shown.picture))
        if lacking and (last is None or not choice.is_best):
            raise video.rejected(lacking)
    finally:
        video.close()


def _wanted_times(video: Video, choice: FrameChoice, segment: tuple[float, float] | None) -> Iterator[float]:
    """Yield the times, in seconds from the first frame, whose frames are wanted."""
    begin, end = (0.0, math.inf) if segment is None else segment
    if segment is not None and not 0 <= begin < end:
        raise ImageRejected(UNREADABLE, f"no segment goes from {begin:g} to {end:g} s")
    if choice.kind == "first":
        yield begin
    elif choice.kind == "number":
        number = choice.number + math.floor((begin + video.slack) * video.rate)
        time = (number + 0.499) / video.rate - video.slack
        if time >= end:
            raise ImageRejected(UNREADABLE, f"the segment from {begin:g} to {end:g} s has no frame {choice.number}")
        yield time
    elif choice.kind == "every":
        number = 0
        while (time := begin + number * choice.step) < end:
            yield time
            number = max(number + 1, math.ceil((video.next_change() - begin) / choice.step))
    else:
        length = video.length()
        span = min(end, length) - begin
        if span <= 0:
            raise ImageRejected(UNREADABLE, f"there is nothing at {begin:.1f} s: the video ends at {length:.1f} s")
        count = NUM_CANDIDATES if choice.is_best else 1
        for part in range(count):
            yield begin + span * (2 * part + 1) / (2 * count)
