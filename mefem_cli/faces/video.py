"""A video -> the frames that were asked for, upright sRGB uint8 [H, W, 3]; what cannot be read says why.

Reading wants PyAV (the extra `video`). Only what a frame needs is decoded: a seek leads near the keyframe before it,
and packets that it does not need pass undecoded. One thread decodes, so the same file gives the same bytes.

- Time 0 is the first frame that can be decoded. The frame of a time is the one on screen then.
- Pixels are square: anamorphic video is stretched along its coarser direction, so nothing stored is thrown away.
- The matrix and range that the stream names are honoured; a stream that names none is BT.709 from 720 lines on, else
  BT.601, limited range, as players take it. BT.709 and BT.601 light counts as sRGB, as browsers show it.
- BT.2020 and P3 colours become sRGB. Of HDR (PQ, HLG), what is darker than 3/4 of the reference white of 203 nits
  (ITU-R BT.2408) keeps its light, and highlights roll off. Interlaced frames stay as they are.
- The file is untrusted: demuxers that open other files are refused, and nothing but the file itself is read.
"""

from __future__ import annotations

import io
import math
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np

from mefem_cli.errors import MefemError, UsageError, did_you_mean
from mefem_cli.faces.images import TOO_LARGE, UNREADABLE, ImageRejected

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".flv"})
VIDEO_SUFFIXES |= {".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".3gp", ".3g2"}
VIDEO_SUFFIXES |= {".f4v", ".ogv", ".h264", ".264", ".hevc", ".h265", ".265"}
NUM_CANDIDATES = 10  # frames among which `best` is chosen
OLDEST_PYAV = (17, 1)  # older ones crash where the streams of a file with options appear late

# Demuxers that read one file and follow no names in it (HLS, DASH, concat, SDP, image sequences and devices would)
FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,h264,hevc,m4v"
ELEMENTARY = frozenset({"h264", "hevc", "mpegvideo", "m4v"})  # formats without times: their frames are counted
DISPOSABLE = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4"})  # codecs that tell what no other frame needs

SLACK = 0.002  # s: containers round times to ms; a frame that begins so little later counts as begun
SEEK_WORTH = 10  # s: what is nearer is reached by reading on
APPROACHES = ((0, True), (3, True), (12, True), (12, False), (60, False))  # s to seek before a time, may packets pass
BROKEN_OFF = 1  # s that may lack at the end before a file counts as truncated
MOST_RETRIES = 12  # seeks in vain in one video
TAIL = 2  # s before the end from which the last frame's time is looked for
MOST_HELD = 32 << 20  # bytes of packets kept undecoded
REORDER = 16  # frames: the longest way between decoding and showing
READ_SIZE = 1 << 16  # bytes
B_FRAME = 3  # FFmpeg's type of a picture that may need one shown later
COVER = 0x400 | 0x800  # dispositions of streams that are no video: an attached picture, thumbnails

# Brands of ISO base media files without video: pictures (HEIF, AVIF, Canon raw, JPEG 2000) and sound
OTHER_BRANDS = frozenset({"heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "mif2", "msf1", "miaf", "avif"})
OTHER_BRANDS |= {"avis", "crx", "jp2", "jpx", "jpm", "M4A", "M4B", "M4P", "F4A"}
OLD_QUICKTIME = frozenset({b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
SIGNATURES = (
    b"\x1a\x45\xdf\xa3",  # EBML: Matroska, WebM
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG-1 and 2 video
    b"\x00\x00\x01\xb0",  # MPEG-4 video
    b"\x00\x00\x00\x01\x67",  # H.264: sequence parameters,
    b"\x00\x00\x01\x67",
    b"\x00\x00\x00\x01\x09",  # or an access unit delimiter before them
    b"\x00\x00\x01\x09",
    b"\x00\x00\x00\x01\x40\x01",  # HEVC: video parameters
    b"\x00\x00\x01\x40\x01",
    b"FLV\x01",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF: WMV
)

# Numbers of ITU-T H.273, which FFmpeg uses
BT709, BT601, UNSPECIFIED, BT2020 = 1, 5, 2, 9
PQ, HLG, P3 = 16, 18, 12
LIMITED_RANGE, FULL_RANGE = 1, 2
SWS_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # matrix -> libswscale's number for it
POINT = 0x10  # libswscale's flags
BICUBIC_EXACT = 0x4 | 0x2000 | 0x40000 | 0x80000  # full chroma, accurate rounding, the same on every processor

TO_SRGB = {  # linear light of primaries -> of sRGB; all have white D65
    BT2020: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    P3: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
HLG_LUMINANCE = (0.2627, 0.6780, 0.0593)  # of BT.2020 light
REFERENCE_WHITE = 203.0  # nits
HLG_PEAK = 1000.0  # nits of the display that HLG is rendered for
KNEE = 0.75  # of reference white: what is darker keeps its light


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


def begins_like_video(start: bytes) -> bool:
    """Return whether the first bytes of a file (64 will do) are those of a video.

    >>> begins_like_video(bytes.fromhex("00000018") + b"ftypisom")
    True
    >>> begins_like_video(bytes.fromhex("00000018") + b"ftypheic")
    False
    """
    if start[4:8] == b"ftyp":
        return start[8:12].decode("latin-1").strip() not in OTHER_BRANDS
    if start.startswith(b"RIFF"):
        return start[8:12] == b"AVI "
    if start.startswith(b"OggS"):
        return b"\x80theora" in start[:64]
    return start.startswith(SIGNATURES) or start[4:8] in OLD_QUICKTIME or _begins_like_transport_stream(start)


def _begins_like_transport_stream(start: bytes) -> bool:
    """Return whether a packet header of MPEG-TS, plain or after a time stamp of 4 bytes (M2TS), stands at the start."""
    if start.startswith(b"GIF8"):
        return False
    for offset, size in ((0, 188), (4, 192)):
        header = start[offset : offset + 4]
        if len(header) < 4 or header[0] != 0x47 or header[1] & 0x80 or header[3] & 0xC0 or not header[3] & 0x30:
            continue
        if len(start) > offset + size:
            return start[offset + size] == 0x47
        return not all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
    return False


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
    `every` gives all that can be decoded before it raises. Raises MefemError where PyAV is missing.
    """
    av = _import_av()
    if isinstance(path, str | PathLike):
        with _rejecting(av), open(path, "rb", buffering=0) as file:
            yield from _read(av, file, choice, max_pixels, segment)
    else:
        with _rejecting(av):
            yield from _read(av, path, choice, max_pixels, segment)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MefemError('videos are read with PyAV, which is missing: pip install "mefem-cli[video]"') from error
    if tuple(map(int, av.__version__.split(".")[:2])) < OLDEST_PYAV:
        wanted = "av>=" + ".".join(map(str, OLDEST_PYAV))
        raise MefemError(f'PyAV {av.__version__} is too old for videos: pip install --upgrade "{wanted}"')
    return av


class _Bytes:
    """A place in a file that others read too, and without its name: what a video is, its content alone decides."""

    def __init__(self, file: Any):
        self._file, self._position = file, 0

    def read(self, size: int) -> bytes:
        self._file.seek(self._position)
        found = self._file.read(size)
        self._position += len(found)
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position


@contextmanager
def _rejecting(av: Any) -> Iterator[None]:
    """Turn whatever a broken file makes the decoders raise into ImageRejected."""
    try:
        yield
    except (ImageRejected, MefemError):
        raise
    except MemoryError as error:
        raise ImageRejected(TOO_LARGE, "not enough memory to decode it") from error
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageRejected(UNREADABLE, f"not a video that can be read: {why[:160]}") from error


def _read(
    av: Any, file: Any, choice: FrameChoice, max_pixels: int, segment: tuple[float, float] | None
) -> Iterator[Frame]:
    video = _Video(av, file, max_pixels)
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


def _wanted_times(video: _Video, choice: FrameChoice, segment: tuple[float, float] | None) -> Iterator[float]:
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


class _Shown(NamedTuple):
    """A decoded picture and the time when it is on screen."""

    time: float  # ticks
    picture: av.VideoFrame
    is_damaged: bool
    num_errors: int  # packets that could not be decoded before it

    @property
    def is_bidirectional(self) -> bool:
        return self.picture.pict_type == B_FRAME


class _Video:
    """The picture on screen at a time, of times that never decrease.

    Times are ticks, the stream's time base, unless they are called seconds. Packets arrive in decoding order; those
    since the last keyframe wait in `_waiting` until one arrives that is shown after the wanted time; a later keyframe
    before that time makes them superfluous. Then they are decoded up to a picture shown after the wanted time.
    """

    def __init__(self, av: Any, file: Any, max_pixels: int):
        self._av, self._file, self._max_pixels = av, file, max_pixels
        self._container: Any = None
        self._position: float | None = None  # the latest time of a packet read
        self._seek_worth: float = SEEK_WORTH
        self._approach, self._retries = 0, MOST_RETRIES
        self._delay = 0  # from decoding to showing, where packets tell only when they are decoded
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the container, not the file."""
        if self._container is not None:
            self._container.close()

    def _begin(self) -> None:
        """Open the file, again or for the first time, and decode its first sound picture."""
        self.close()
        self._container = _open(self._av, self._file, self._max_pixels)
        self._stream = _video_stream(self._container, self._max_pixels)
        self._codec = self._stream.codec_context
        self._is_counted = self._container.format.name in ELEMENTARY
        self.tick = float(self._stream.time_base)  # s
        self.rate = _frame_rate(self._stream)  # 1 / s
        self.slack = min(SLACK, 1 / (4 * self.rate))  # s
        self._duration = 1 / (self.rate * self.tick)  # of a frame whose own is not known
        self._reset(is_start=True)
        first: Any = None
        while not self._ahead and not self._is_read:
            packet = self._read_on(-math.inf)
            first = first or packet
            while self._ahead and self._ahead[0].is_damaged:
                self._ahead.popleft()
        if not self._ahead:
            raise ImageRejected(UNREADABLE, "no frame of the video can be decoded")
        self._origin = self._ahead[0].time
        self._position = math.inf if self._is_counted else self._origin
        if first.pts is None and first.dts is not None:
            self._delay = max(0, math.ceil(self._origin) - first.dts)

    def _reset(self, is_start: bool, may_skip: bool = True) -> None:
        """Forget what was read: the container stands at its start, or anywhere between packets."""
        self._left, self._position = self._position, None
        self._packets = _demux(self._av, self._container)
        self._may_skip = may_skip
        self._is_read = self._is_late = False
        self._is_synchronised = is_start
        self._waiting: list[tuple[Any, float]] = []
        self._num_waiting_bytes = 0
        self._ahead: deque[_Shown] = deque()  # decoded, but shown after the wanted time
        self._held: _Shown | None = None  # the last one decoded of those shown until the wanted time
        self._previous: float | None = None  # time of the last picture decoded
        self._wants_flush = not is_start
        self._is_damaged = self._may_heal = False
        self._num_errors = 0
        self._reach: float = -math.inf  # until when pictures or sound were found
        self.is_over = False  # the wanted time lies behind all that was found

    # Where a time leads

    def index(self, time: float) -> int:
        """Return the number of the frame shown at a time of frames of equal length."""
        return max(0, math.floor((time - self._origin) * self.tick * self.rate + 0.5))

    def seconds(self, time: float) -> float:
        """Return a time in seconds from the first frame."""
        return (time - self._origin) * self.tick

    def _ticks(self, seconds: float) -> float:
        return self._origin + seconds / self.tick

    def shown_at(self, seconds: float) -> _Shown | None:
        """Return the picture on screen at a time from the first frame; None if it is damaged or there is none."""
        wanted = self._ticks(seconds + self.slack)
        target = wanted - REORDER * self._duration  # some containers seek by the time of decoding
        if self._position is None or (target - self._position) * self.tick > self._seek_worth:
            back, may_skip = APPROACHES[self._approach]
            self._seek(target - back / self.tick, may_skip)
        shown = self._walk(wanted)
        for number in range(self._approach, len(APPROACHES)):
            if shown is not None or (self.is_over and self._is_synchronised) or not self._retries:
                break
            back, may_skip = APPROACHES[number]
            self._seek(target - back / self.tick, may_skip)
            shown = self._walk(wanted)
            if shown is None:
                self._retries -= 1
            else:
                self._approach = number
        return shown

    def _seek(self, target: float, may_skip: bool = True) -> None:
        """Go to a keyframe at or before a time, or to the start where that is near or there is no other way."""
        is_near_start = (target - self._origin) * self.tick <= SEEK_WORTH
        if is_near_start or not self._try_seek(target):
            self._begin()
            self._may_skip = may_skip
        else:
            self._reset(is_start=False, may_skip=may_skip)

    def _try_seek(self, target: float) -> bool:
        try:
            self._container.seek(min(math.floor(target), 1 << 62), stream=self._stream)
        except self._av.error.FFmpegError:
            return False
        return True

    def _walk(self, wanted: float) -> _Shown | None:
        """Read on until a picture after the wanted time is decoded; return the one before it."""
        while self._ahead and self._ahead[0].time <= wanted:
            self._held = self._ahead.popleft()
        while not (self._is_settled() or self._is_read or self._is_late):
            self._read_on(wanted)
        self.is_over = self._is_read and wanted >= self._reach
        return None if self.is_over or self._is_doubtful(wanted) else self._held

    def _is_doubtful(self, wanted: float) -> bool:
        """Whether the held picture is damaged, or may not be the wanted one, because others could not be decoded."""
        held = self._held
        if held is None or held.is_damaged:
            return True
        if held.is_bidirectional and any(shown.is_damaged for shown in self._ahead):
            return True
        num_errors = self._ahead[0].num_errors if self._ahead else self._num_errors
        return num_errors > held.num_errors and wanted >= held.time + self._duration

    def _is_settled(self) -> bool:
        """Whether a later picture is decoded, and with a B-frame the later one that it needs, which may be damaged."""
        if self._held is None or not self._held.is_bidirectional:
            return bool(self._ahead)
        return any(not shown.is_bidirectional for shown in self._ahead)

    def next_change(self) -> float:
        """Return seconds up to which nothing but the picture last returned is on screen, as far as is known."""
        time = self._ahead[0].time if self._ahead else self._reach if self._is_read else -math.inf
        return -1 if time == -math.inf else self.seconds(time) - self.slack

    # Packets

    def _read_on(self, wanted: float) -> Any:
        """Take the next packet: keep it, let it pass, or decode what waits. Return it if it is one of pictures."""
        packet = next(self._packets, None)
        if packet is None:
            self._is_read = True
            self._decode_waiting(wanted)
            self._decode(None, wanted)
            return None
        shown = self._note(packet)
        if packet.stream.index != self._stream.index or not packet.size:
            return None
        if shown is None:  # these are counted: nothing may be left out
            self._decode(packet, wanted)
            return packet
        self._position = max(shown, shown if self._position is None else self._position)
        latest = shown if packet.pts is not None else shown + REORDER * self._duration
        if packet.is_keyframe and latest <= wanted and (self._may_skip or not self._is_synchronised):
            self._start_at(packet, shown, wanted)
        elif not self._is_synchronised:
            self._is_late = shown > wanted
        else:
            self._waiting.append((packet, shown))
            self._num_waiting_bytes += packet.size
            if shown > wanted or self._num_waiting_bytes > MOST_HELD:
                self._decode_waiting(wanted)
        return packet

    def _note(self, packet: Any) -> float | None:
        """Return when a packet is shown, if it tells, and note until when the file is known to go on."""
        shown, end = self._span(packet)
        self._reach = max(self._reach, end)
        return shown

    def _span(self, packet: Any) -> tuple[float | None, float]:
        """Return when a packet is shown, None if unknown or not of the stream, and until when, also for sound."""
        time = packet.pts
        if time is None and packet.dts is not None:
            time = packet.dts + self._delay
        if time is None or not packet.size or self._is_counted or packet.stream.type not in ("video", "audio"):
            return None, -math.inf
        if packet.stream.index != self._stream.index:
            return None, time * packet.time_base / self.tick
        return time, time + (packet.duration or self._duration)

    def _start_at(self, packet: Any, shown: float, wanted: float) -> None:
        """Begin anew with a keyframe; what came before it is not needed."""
        if not self._is_synchronised and self._left is not None and shown <= self._left:  # the seek was in vain
            self._seek_worth = max(self._seek_worth, 2 * (wanted - shown) * self.tick)
        self._is_synchronised = self._wants_flush = True
        self._held = None
        self._waiting, self._num_waiting_bytes = [(packet, shown)], packet.size

    # Pictures

    def _decode_waiting(self, wanted: float) -> None:
        """Decode the packets that wait, but not those long before the wanted time that no other needs."""
        waiting, self._waiting, self._num_waiting_bytes = self._waiting, [], 0
        if waiting and self._wants_flush:
            self._codec.flush_buffers()
            self._wants_flush = self._is_damaged = False
        times = sorted(shown for _, shown in waiting if shown <= wanted)
        needed = times[-REORDER] if len(times) >= REORDER and self._codec.name in DISPOSABLE else -math.inf
        for packet, shown in waiting:
            self._codec.skip_frame = "NONREF" if shown < needed else "DEFAULT"
            self._decode(packet, wanted)
        self._codec.skip_frame = "DEFAULT"

    def _decode(self, packet: Any, wanted: float) -> None:
        """Decode a packet, None for what the decoder still holds; keep the last picture until the wanted time."""
        try:
            pictures = self._codec.decode(packet)
        except self._av.error.FFmpegError:
            self._is_damaged, self._may_heal = True, False
            self._num_errors += 1
            return
        self._may_heal |= packet is not None and packet.is_keyframe
        for picture in pictures:
            if picture.key_frame and self._may_heal:
                self._is_damaged = False
            self._is_damaged |= picture.is_corrupt
            shown = _Shown(self._time_of(picture), picture, self._is_damaged, self._num_errors)
            self._reach = max(self._reach, shown.time + self._duration)
            if shown.time <= wanted:
                self._held = shown
            else:
                self._ahead.append(shown)

    def _time_of(self, picture: av.VideoFrame) -> float:
        time: float | None = picture.dts if picture.pts is None else picture.pts
        if time is None or self._is_counted:
            time = 0 if self._previous is None else self._previous + self._duration
        self._previous = time
        return time

    # The end

    def length(self) -> float:
        """Return the seconds from the first frame to the end of the last, as the packets at the end of the file tell.

        A file that breaks off has the length that its header promises.
        """
        promised = self._promised_end()
        end, reach = self._measure(None if promised is None else promised - TAIL / self.tick)
        if promised is not None and (end is None or self._delay or reach < promised - BROKEN_OFF / self.tick):
            end = promised
        if end is None:
            end, _ = self._measure(None)
        return 0.0 if end is None else (end - self._origin) * self.tick

    def _promised_end(self) -> float | None:
        """Return the end that the header tells."""
        if self._is_counted:  # what FFmpeg tells is a guess from the bit rate
            return None
        if self._stream.duration and self._stream.duration > 0:
            return (self._stream.start_time or 0) + self._stream.duration + self._delay
        if self._container.duration and self._container.duration > 0:
            return self._container.duration / 1e6 / self.tick
        return None

    def _measure(self, start: float | None) -> tuple[float | None, float]:
        """Read the packets, from a time or all; return when the last picture ends, and when pictures and sound do."""
        end = reach = -math.inf
        count = 0
        with _open(self._av, self._file, self._max_pixels) as container:
            if start is not None:
                with suppress(self._av.error.FFmpegError):  # what cannot seek is read from its start
                    container.seek(min(math.floor(start), 1 << 62), stream=container.streams[self._stream.index])
            for packet in _demux(self._av, container):
                shown, until = self._span(packet)
                reach = max(reach, until)
                if packet.stream.index == self._stream.index and packet.size:
                    count += 1
                    end = end if shown is None else max(end, until)
        if self._is_counted:
            end = reach = count * self._duration
        return (None if end == -math.inf else end), reach

    def check_whole(self, end: float) -> None:
        """Raise ImageRejected if the file breaks off before `end` seconds, or the end that its header promises."""
        promised = self._promised_end()
        if promised is None:
            return
        wanted = promised if end == math.inf else min(promised, self._ticks(end))
        _, reach = self._measure(None) if self._reach == -math.inf else (None, self._reach)
        if reach < wanted - BROKEN_OFF / self.tick:
            raise ImageRejected(UNREADABLE, self._broken_off(reach, promised))

    def rejected(self, lacking: list[float]) -> ImageRejected:
        """Return the reason why there are no sound frames at some times, in seconds."""
        promised, (_, reach) = self._promised_end(), self._measure(None)
        at = f"{max(0.0, lacking[0]):.2f} s"
        if self._ticks(lacking[0]) < reach:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            return ImageRejected(UNREADABLE, f"the file is damaged: the frame at {at}{more} cannot be decoded")
        if promised is not None and reach < promised - BROKEN_OFF / self.tick:
            return ImageRejected(UNREADABLE, f"nothing at {at}: {self._broken_off(reach, promised)}")
        length = self.length()
        size = f"{self.index(self._ticks(length))} frames, {length:.2f} s"
        return ImageRejected(UNREADABLE, f"nothing at {at}: the video has {size}")

    def _broken_off(self, reach: float, promised: float) -> str:
        return f"the video breaks off at {max(0.0, self.seconds(reach)):.1f} s of {self.seconds(promised):.1f} s"

    def pixels(self, picture: av.VideoFrame) -> np.ndarray:
        """Return a picture as uint8 [H, W, 3]: square pixels, upright, sRGB. Raises ImageRejected `too-large`."""
        width, height = _square(picture.width, picture.height, self._stream.sample_aspect_ratio)
        _check_size(width, height, self._max_pixels)
        return np.ascontiguousarray(_upright(_to_srgb(picture, self._codec, width, height), _display_matrix(picture)))


def _open(av: Any, file: Any, max_pixels: int) -> Any:
    """Return PyAV's container of a file, at its start."""
    file.seek(0)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    if file.read(4) == b"RIFF":  # AVI tells no times of showing, and FFmpeg's guesses are wrong with B-frames
        options["fflags"] = "-genpts"
    reading: dict[str, Any] = {"metadata_errors": "replace", "buffer_size": READ_SIZE}
    return av.open(_Bytes(file), options=_decoder_limit(max_pixels), container_options=options, **reading)


def _demux(av: Any, container: Any) -> Iterator[Any]:
    """Yield the packets from where a container stands to its end, which in a truncated file is an error.

    An IndexError is how PyAV ends where a stream appeared late.
    """
    with suppress(av.error.FFmpegError, IndexError):
        yield from container.demux()


def _decoder_limit(max_pixels: int) -> dict[str, str]:
    """Return the option that keeps decoders from larger pictures; those they make are rounded up to whole blocks."""
    return {"max_pixels": str(2 * max_pixels + (1 << 16))}


def _video_stream(container: Any, max_pixels: int) -> Any:
    """Return the stream to read, its decoder prepared. Raises ImageRejected where there is none, or it is too large."""
    streams = [stream for stream in container.streams.video if not stream.disposition.value & COVER]
    if not streams:
        raise ImageRejected(UNREADABLE, "there is no video in the file")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    codec = stream.codec_context
    if codec is None:
        raise ImageRejected(UNREADABLE, "there is no decoder for its kind of video")
    _check_size(codec.width, codec.height, max_pixels)
    codec.thread_count, codec.thread_type = 1, "NONE"
    codec.options = _decoder_limit(max_pixels)
    return stream


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageRejected(TOO_LARGE, f"{width} x {height} px; --max-pixels is {max_pixels}", width, height)


def _frame_rate(stream: Any) -> float:
    """Return frames per second: the rate that all times of frames fit, if it is near the average one, else that."""
    average, base = stream.average_rate, stream.base_rate
    if average and base and not 0.75 < base / average < 1.33:
        base = average
    return float(base or average or 25)


def _square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Return the size of a picture with square pixels whose stored ones have a width of `aspect` times their height."""
    if not aspect or aspect < 0:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _display_matrix(picture: av.VideoFrame) -> np.ndarray | None:
    """Return how a picture is to be turned: [3, 3], rows times (x, y, 1), with y downwards; None if not at all."""
    tiny = picture.reformat(2, 2, "gray", interpolation=POINT)  # PyAV's side data and frame hold each other alive
    data: Any = tiny.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(data, np.int32).reshape(3, 3)


def _upright(pixels: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Return a view of pixels [H, W, 3] turned and mirrored by a display matrix, to the nearest right angle."""
    if matrix is None:
        return pixels
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # columns become rows
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _to_srgb(picture: av.VideoFrame, codec: Any, width: int, height: int) -> np.ndarray:
    """Return a picture as uint8 [height, width, 3], sRGB."""
    transfer, primaries = codec.color_trc, codec.color_primaries
    is_hdr = transfer in (PQ, HLG)
    if is_hdr and primaries not in TO_SRGB:
        primaries = BT2020
    is_wide = primaries in TO_SRGB
    colours, white = {}, 0xFFFF
    if not picture.format.is_rgb:
        matrix = picture.colorspace
        if matrix == UNSPECIFIED:
            matrix = BT2020 if is_hdr else BT709 if picture.height >= 720 else BT601
        is_full = picture.color_range == FULL_RANGE or picture.format.name.startswith("yuvj")
        white = white if is_full else 0xFF00  # what libswscale makes of limited range in 16 bits
        colours["src_colorspace"], colours["dst_colorspace"] = SWS_MATRICES.get(matrix, BT601), BT601
        colours["src_color_range"] = FULL_RANGE if is_full else LIMITED_RANGE
        colours["dst_color_range"] = FULL_RANGE
    layout = "rgb48le" if is_wide else "rgb24"
    rgb = picture.reformat(width, height, layout, interpolation=BICUBIC_EXACT, **colours).to_ndarray()
    return _narrow(rgb, white, transfer, primaries) if is_wide else rgb


def _narrow(rgb: np.ndarray, white: int, transfer: int, primaries: int) -> np.ndarray:
    """Return uint16 [H, W, 3] of wider primaries as sRGB, uint8 [H, W, 3]; few rows at a time, for memory's sake."""
    to_light, to_srgb = _light(transfer, white), np.array(TO_SRGB[primaries], np.float32)
    narrow = np.empty(rgb.shape, np.uint8)
    for top in range(0, len(rgb), 64):
        light = to_light[rgb[top : top + 64]]
        if transfer == HLG:
            light = _hlg_to_display(light)
        light = np.maximum(light @ to_srgb.T, 0)
        if transfer in (PQ, HLG):
            light = _roll_off(light)
        narrow[top : top + 64] = np.round(255 * _srgb_signal(np.minimum(light, 1)))
    return narrow


@lru_cache(maxsize=4)
def _light(transfer: int, white: int) -> np.ndarray:
    """Return the light of each 16-bit signal, float32 [65536], 1 is reference white; for HLG the light of the scene."""
    signal = np.minimum(np.arange(1 << 16) / white, 1)
    if transfer == PQ:  # SMPTE ST 2084
        power = signal ** (32 / 2523)
        light = (np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305)
        light *= 10_000 / REFERENCE_WHITE
    elif transfer == HLG:  # ITU-R BT.2100, table 5
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


def _hlg_to_display(light: np.ndarray) -> np.ndarray:
    """Apply HLG's system gamma of 1.2 to light of the scene; 1 is then reference white (ITU-R BT.2100, table 5)."""
    luminance = light @ np.array(HLG_LUMINANCE, np.float32)
    return light * (HLG_PEAK / REFERENCE_WHITE) * luminance[..., None] ** np.float32(0.2)


def _roll_off(light: np.ndarray) -> np.ndarray:
    """Bring light of any strength below 1, keeping hues: the strongest channel above the knee approaches 1 slowly."""
    strongest = light.max(axis=-1, keepdims=True)
    above = np.maximum(strongest - KNEE, 0)
    rolled = KNEE + (1 - KNEE) * above / (above + 1 - KNEE)
    return light * np.where(above > 0, rolled / np.maximum(strongest, KNEE), 1)


def _srgb_signal(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
