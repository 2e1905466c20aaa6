"""The pictures of an opened video: seeking near a time, decoding what it needs, measuring how long the video is.

Only what a picture needs is decoded: a seek leads near the keyframe before it, and packets that it does not need pass
undecoded. One thread decodes, so the same file gives the same bytes. The file is untrusted: demuxers that open other
files are refused, and nothing but the file itself is read.
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mefem_cli.faces.images import TOO_LARGE, UNREADABLE, ImageRejected
from mefem_cli.faces.video_colour import square, upright_srgb
from mefem_cli.faces.video_kinds import lacks_index

if TYPE_CHECKING:
    import av

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


class Shown(NamedTuple):
    """A decoded picture and the time when it is on screen."""

    time: float  # ticks
    picture: av.VideoFrame
    is_damaged: bool
    num_errors: int  # packets that could not be decoded before it

    @property
    def is_bidirectional(self) -> bool:
        return self.picture.pict_type == B_FRAME


class Video:
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
        self._ahead: deque[Shown] = deque()  # decoded, but shown after the wanted time
        self._held: Shown | None = None  # the last one decoded of those shown until the wanted time
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

    def shown_at(self, seconds: float) -> Shown | None:
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

    def _walk(self, wanted: float) -> Shown | None:
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
            shown = Shown(self._time_of(picture), picture, self._is_damaged, self._num_errors)
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
        width, height = square(picture.width, picture.height, self._stream.sample_aspect_ratio)
        _check_size(width, height, self._max_pixels)
        return upright_srgb(picture, self._codec, width, height)


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


def _open(av: Any, file: Any, max_pixels: int) -> Any:
    """Return PyAV's container of a file, at its start."""
    file.seek(0)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    if file.read(4) == b"RIFF":  # AVI tells no times of showing, and FFmpeg's guesses are wrong with B-frames
        options["fflags"] = "-genpts"
    reading: dict[str, Any] = {"metadata_errors": "replace", "buffer_size": READ_SIZE}
    try:
        return av.open(_Bytes(file), options=_decoder_limit(max_pixels), container_options=options, **reading)
    except av.error.InvalidDataError as error:
        if not lacks_index(file):
            raise
        detail = "damaged: its index is missing, as where a recording or a download was cut short"
        raise ImageRejected(UNREADABLE, detail) from error


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
