"""Frames of videos are compared with decoding everything: each frame of a test video shows its own number."""

from __future__ import annotations

import gc
import io
import math
import re
import struct
import subprocess
import sys
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefem_cli.errors import UsageError
from mefem_cli.faces import images, video_stream
from mefem_cli.faces.images import ImageRejected
from mefem_cli.faces.video import Frame, parse_frame_choice, read_frames
from mefem_cli.faces.video_kinds import VIDEO_SUFFIXES, begins_like_video

av = pytest.importorskip("av")

WIDTH, HEIGHT, BITS = 120, 48, 10
MAX_PIXELS = 1_000_000
NUM_FRAMES = 60
H264 = {"preset": "veryfast", "g": "12", "bf": "2", "sc_threshold": "0"}
OPEN_GOP = H264 | {"x264-params": "open-gop=1:keyint=12:bframes=3:b-pyramid=2:scenecut=0"}


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return uint8 [H, W, 3]: white bars for the ones of the binary number, and noise, so that no two decode alike."""
    picture = np.random.default_rng(number).integers(0, 40, (height, width, 3), np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            picture[:, bit * width // BITS : (bit + 1) * width // BITS] += 200
    return picture


def number_in(pixels: np.ndarray) -> int:
    bars = np.array_split(pixels[4:-4].mean(axis=(0, 2)), BITS)
    return sum(1 << bit for bit, bar in enumerate(bars) if bar[2:-2].mean() > 128)


def encode(path: Path, codec: str, pictures: Iterator[np.ndarray] | Sequence[np.ndarray], **kwargs: Any) -> Path:
    """Write pictures as a video and return its path.

    `size` is (width, height), `given` the layout of the pictures, `layout` that of the video, `times` in 1/rate s;
    `stream_` and `codec_` precede attributes to set; what is left are options of the container.
    """
    width, height = kwargs.pop("size", (WIDTH, HEIGHT))
    rate, times = kwargs.pop("rate", 25), kwargs.pop("times", None)
    given, layout = kwargs.pop("given", "rgb24"), kwargs.pop("layout", "yuv420p")
    options, container_format = kwargs.pop("options", {}), kwargs.pop("format", None)
    attributes = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("codec_")}
    with av.open(str(path), "w", format=container_format, options=kwargs) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        for name, value in attributes.items():
            setattr(stream.codec_context, name.removeprefix("codec_"), value)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=given)
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered_video(path: Path, codec: str = "libx264", count: int = NUM_FRAMES, **kwargs: Any) -> Path:
    if codec == "libx264":
        kwargs.setdefault("options", H264)
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot encode {codec}")
    return encode(path, codec, [numbered(number) for number in range(count)], **kwargs)


def decode_all(path: Path) -> list[np.ndarray]:
    """Return every frame of a video, uint8 [H, W, 3], by PyAV's own loop; the reference for which frame is which."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return [frame.to_ndarray(format="gray") for frame in container.decode(stream)]


def read(source: Any, choice: str, **kwargs: Any) -> list[Frame]:
    return list(read_frames(source, parse_frame_choice(choice), MAX_PIXELS, **kwargs))


def numbers(source: Any, choice: str, **kwargs: Any) -> list[int]:
    return [number_in(frame.pixels) for frame in read(source, choice, **kwargs)]


def rejection(source: Any, choice: str = "middle", max_pixels: int = MAX_PIXELS, **kwargs: Any) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        list(read_frames(source, parse_frame_choice(choice), max_pixels, **kwargs))
    return caught.value


CONTAINERS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264.mov": {},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.flv": {},
    "h264.avi": {},
    "h264.h264": {},
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "live.mkv": {"live": "1"},
    "open_gop.mp4": {"options": OPEN_GOP},
    "open_gop.ts": {"options": OPEN_GOP},
    "intra_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12:scenecut=0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12:pools=1"}},
    "hevc.hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12:pools=1"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "2M"}},
    "mpeg1.mpg": {"codec": "mpeg1video", "options": {"g": "12", "b": "4M"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "2M"}},
    "mpeg2.m2v": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "2M"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "12", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "wmv2.wmv": {"codec": "wmv2", "options": {"g": "12", "b": "2M"}},
    "mjpeg.avi": {"codec": "mjpeg", "layout": "yuvj420p"},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session")
def get_video(folder: Path) -> Callable[[str], Path]:
    """Return what makes, once, the video of a name in CONTAINERS."""

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else numbered_video(path, **CONTAINERS[name])

    return get


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_choice_gives_the_frame_that_decoding_everything_shows(
    name: str, get_video: Callable[[str], Path]
) -> None:
    path = get_video(name)
    everything = decode_all(path)
    assert [number_in(frame[..., None]) for frame in everything] == list(range(NUM_FRAMES))
    expected = {
        "first": [0],
        "middle": [30],
        "0": [0],
        "11": [11],
        "12": [12],
        "13": [13],
        "23": [23],
        "46": [46],
        "47": [47],
        "59": [59],
        "best": [3, 9, 15, 21, 27, 33, 39, 45, 51, 57],
        "every:400ms": [0, 10, 20, 30, 40, 50],
        "every:0.04s": list(range(NUM_FRAMES)),
    }
    for choice, wanted in expected.items():
        frames = read(path, choice)
        assert [number_in(frame.pixels) for frame in frames] == wanted, choice
        assert [frame.index for frame in frames] == wanted
        assert [frame.seconds for frame in frames] == pytest.approx([index / 25 for index in wanted], abs=0.0011)
        for frame in frames:  # the same decoded picture, not only the same number
            difference = frame.pixels @ np.array([0.299, 0.587, 0.114]) - everything[frame.index]
            assert np.abs(difference - difference.mean()).max() < 20, (choice, frame.index)
    assert "video has 60 frames, 2.40 s" in rejection(path, "60").detail


@pytest.mark.parametrize("name", ["open_gop.ts", "hevc.mp4", "mpeg4.avi", "h264.h264"])
def test_a_segment_stands_for_the_whole_video(name: str, get_video: Callable[[str], Path]) -> None:
    segment = (0.8, 1.61)
    assert numbers(get_video(name), "first", segment=segment) == [20]
    assert numbers(get_video(name), "middle", segment=segment) == [30]
    assert numbers(get_video(name), "5", segment=segment) == [25]
    assert numbers(get_video(name), "every:400ms", segment=segment) == [20, 30, 40]
    assert numbers(get_video(name), "best", segment=(0.8, 1.2)) == list(range(20, 30))
    assert [frame.index for frame in read(get_video(name), "middle", segment=segment)] == [30]


def test_segments_that_leave_the_video(get_video: Callable[[str], Path]) -> None:
    path = get_video("h264.mp4")
    assert numbers(path, "middle", segment=(2.0, 100.0)) == [55]
    assert numbers(path, "every:200ms", segment=(2.0, 100.0)) == [50, 55]
    assert numbers(path, "middle", segment=(2.0, math.inf)) == [55]
    assert numbers(path, "every:200ms", segment=(2.0, math.inf)) == [50, 55]
    assert "has 60 frames" in rejection(path, "first", segment=(2.5, 3.0)).detail
    assert "ends at 2.4 s" in rejection(path, "middle", segment=(2.5, 3.0)).detail
    assert "has no frame 15" in rejection(path, "15", segment=(0.8, 1.2)).detail
    for start, end in ((2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (math.inf, math.inf)):
        assert "no segment" in rejection(path, "middle", segment=(start, end)).detail


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_where_the_frame_rate_varies_the_frame_on_screen_is_taken(name: str, tmp_path: Path) -> None:
    times = sorted(np.random.default_rng(5).choice(100, 40, replace=False).tolist())
    path = numbered_video(tmp_path / name, count=40, times=times)
    begins = [(time - times[0]) / 25 for time in times]
    with av.open(str(path)) as container:  # how long the last one stays is up to the container
        packets = [packet for packet in container.demux(video=0) if packet.size]
        length = max(float((packet.pts + packet.duration) * packet.time_base) for packet in packets) - times[0] / 25

    def on_screen(seconds: float) -> int:
        return bisect_right(begins, seconds + 0.002) - 1

    assert numbers(path, "middle") == [on_screen(length / 2)]
    steps = [on_screen(step * 0.2) for step in range(math.ceil(length / 0.2 - 0.001))]
    assert numbers(path, "every:200ms") == sorted(set(steps))  # a frame that stays on screen comes once
    frames = read(path, "every:10ms")
    assert [number_in(frame.pixels) for frame in frames] == list(range(40))
    assert [frame.seconds for frame in frames] == pytest.approx(begins, abs=0.0011)
    indices = [frame.index for frame in frames]
    assert indices == sorted(set(indices))  # ids of crops hold them


@pytest.mark.parametrize("name", ["late.ts", "late.mkv", "late.mp4"])
def test_time_begins_with_the_first_frame(name: str, tmp_path: Path) -> None:
    path = numbered_video(tmp_path / name, times=[182 + number for number in range(NUM_FRAMES)])
    assert numbers(path, "middle") == [30]
    assert [(frame.index, frame.seconds) for frame in read(path, "10")] == [(10, pytest.approx(0.4, abs=0.0011))]


def test_what_an_edit_list_hides_does_not_count(tmp_path: Path) -> None:
    """Negative times in an MP4 become an edit list; decoders must decode those frames, players do not show them."""
    path = numbered_video(tmp_path / "cut.mp4", times=[number - 20 for number in range(NUM_FRAMES)])
    shown = [number_in(frame[..., None]) for frame in decode_all(path)]
    assert shown[-1] == 59
    assert numbers(path, "every:40ms") == shown
    assert numbers(path, "first") == shown[:1]
    assert numbers(path, "middle") == [shown[len(shown) // 2]]


def test_one_frame_or_less_of_time(tmp_path: Path) -> None:
    for suffix in ("mp4", "mkv", "ts", "avi", "h264"):
        path = numbered_video(tmp_path / f"single.{suffix}", count=1)
        for choice in ("first", "middle", "0", "best", "every:1s"):
            assert numbers(path, choice) == [0], (suffix, choice)


class Work(Counter):
    """Counts what a video reader does."""


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    counts = Work()
    for name in ("_decode", "_try_seek"):
        original = getattr(video_stream.Video, name)

        def counting(self: Any, *args: Any, name: str = name, original: Callable = original) -> Any:
            counts[name] += args[0] is not None
            return original(self, *args)

        monkeypatch.setattr(video_stream.Video, name, counting)
    return counts


@pytest.fixture(scope="session")
def long_videos(folder: Path) -> dict[str, Path]:
    """900 frames, 90 s: with a keyframe every 20 frames, every 4, and only at the start."""
    pictures = [numbered(number, 80, 32) for number in range(900)]
    paths = {}
    for name, interval in (("long.mp4", 20), ("long.mkv", 20), ("long.ts", 20), ("short.mp4", 4), ("one.mp4", 10000)):
        options = H264 | {"g": str(interval), "preset": "ultrafast", "bf": "2"}
        paths[name] = encode(folder / name, "libx264", pictures, size=(80, 32), rate=10, options=options)
    return paths


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.ts"])
def test_only_what_is_needed_is_decoded(name: str, long_videos: dict[str, Path], work: Work) -> None:
    path = long_videos[name]
    for choice, wanted in (("middle", [450]), ("439", [439]), ("899", [899]), ("440", [440])):
        work.clear()
        assert numbers(path, choice) == wanted
        assert work["_decode"] < 20 + 12, choice  # a group of pictures, and what the decoder holds back
        assert 1 <= work["_try_seek"] <= 3
    work.clear()
    assert numbers(path, "every:20s") == [0, 200, 400, 600, 800]
    assert work["_decode"] < 5 * (20 + 12) and work["_try_seek"] >= 4
    work.clear()
    assert len(numbers(path, "best")) == 10
    assert work["_decode"] < 10 * (20 + 12)


def test_short_steps_do_not_seek_back_and_forth(long_videos: dict[str, Path], work: Work) -> None:
    assert numbers(long_videos["long.mp4"], "every:300ms") == list(range(0, 900, 3))
    assert work["_try_seek"] == 0 and work["_decode"] <= 905  # nothing is decoded twice
    work.clear()
    assert numbers(long_videos["short.mp4"], "every:3s") == list(range(0, 900, 30))
    assert work["_try_seek"] == 0 and work["_decode"] < 900 * 0.4  # groups between the steps pass undecoded


def test_a_long_group_of_pictures_is_not_decoded_for_every_step(long_videos: dict[str, Path], work: Work) -> None:
    assert numbers(long_videos["one.mp4"], "every:15s") == list(range(0, 900, 150))
    assert work["_decode"] < 1.4 * 900


def test_frames_that_no_other_needs_are_skipped_without_trace(long_videos: dict[str, Path]) -> None:
    skipping = read(long_videos["one.mp4"], "300")[0]
    everything = read(long_videos["one.mp4"], "every:100ms", segment=(0, 30.1))
    assert np.array_equal(skipping.pixels, everything[300].pixels)


def test_a_keyframe_that_seeking_misses_is_found_from_further_back(long_videos: dict[str, Path]) -> None:
    """Containers that seek by bytes land behind the keyframe; here seeking always lands late, or fails."""
    original = video_stream.Video._try_seek
    with pytest.MonkeyPatch.context() as patch:
        for seconds in (2, 9):
            patch.setattr(
                video_stream.Video, "_try_seek", lambda self, to, by=seconds: original(self, to + by / self.tick)
            )
            for choice in ("450", "441", "459", "899"):
                assert numbers(long_videos["long.mp4"], choice) == [int(choice)]
        patch.setattr(video_stream.Video, "_try_seek", lambda self, target: False)
        assert numbers(long_videos["long.mp4"], "459") == [459]


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mpeg1.mpg"])
def test_paths_open_files_and_tar_members_read_alike(
    name: str, get_video: Callable[[str], Path], tmp_path: Path
) -> None:
    path = get_video(name)
    misnamed = tmp_path / "photo.jpg"
    misnamed.write_bytes(path.read_bytes())
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(path, "clip")
    pixels = [read(path, "middle")[0].pixels, read(str(misnamed), "middle")[0].pixels]
    file = io.BytesIO(path.read_bytes())
    pixels += [read(file, "middle")[0].pixels for _ in range(2)]
    with tarfile.open(tmp_path / "shard.tar") as tar:
        pixels.append(read(tar.extractfile("clip"), "middle")[0].pixels)
    assert not file.closed
    assert all(np.array_equal(pixels[0], other) for other in pixels)
    assert pixels[0].dtype == np.uint8 and pixels[0].flags.c_contiguous


# Orientation, shape and colour

DISPLAY_MATRICES = {  # EXIF orientation -> (a, b, c, d): x' = a x + c y, y' = b x + d y
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def with_display_matrix(content: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """Return an MP4 file whose track header has that matrix."""
    start = content.index(b"tkhd") + 44
    matrix = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    return content[:start] + struct.pack(">8i", *matrix) + content[start + 32 :]


@pytest.fixture(scope="session")
def quarters(folder: Path) -> bytes:
    """An MP4 of 64 x 48 px whose quarters are red, green, blue and white."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32], picture[24:] = [255, 0, 0], [0, 255, 0], [0, 0, 255], 255
    picture[24:, :32] = [0, 0, 255]
    return encode(folder / "quarters.mp4", "libx264", [picture] * 3, size=(64, 48), options={"qp": "5"}).read_bytes()


def quarter_colours(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    corners = [pixels[y * height // 4, x * width // 4] for y in (1, 3) for x in (1, 3)]
    return np.array(corners) > 128


@pytest.mark.parametrize("orientation", DISPLAY_MATRICES)
def test_a_turned_or_mirrored_video_stands_upright(orientation: int, quarters: bytes) -> None:
    stored = read(io.BytesIO(quarters), "first")[0].pixels
    assert quarter_colours(stored).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    matrix = DISPLAY_MATRICES[orientation]
    upright = read(io.BytesIO(with_display_matrix(quarters, *matrix)), "first")[0].pixels
    assert np.array_equal(upright, images.turn_upright(stored, orientation))


def test_a_slightly_turned_video_stays(quarters: bytes) -> None:
    turned = with_display_matrix(quarters, 0.995, 0.0998, -0.0998, 0.995)
    assert np.array_equal(read(io.BytesIO(turned), "first")[0].pixels, read(io.BytesIO(quarters), "first")[0].pixels)


@pytest.mark.parametrize(("aspect", "size"), [((4, 3), (85, 48)), ((3, 4), (64, 64)), ((1, 1), (64, 48))])
def test_pixels_are_square(aspect: tuple[int, int], size: tuple[int, int], tmp_path: Path) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[12:36, 16:48] = 255
    settings = {"size": (64, 48), "codec_sample_aspect_ratio": Fraction(*aspect), "options": {"qp": "5"}}
    path = encode(tmp_path / "shape.mp4", "libx264", [picture] * 2, **settings)
    pixels = read(path, "first")[0].pixels
    assert pixels.shape == (size[1], size[0], 3)
    is_white = pixels[..., 1] > 128
    assert abs(is_white.any(axis=0).sum() - size[0] / 2) <= 1 and abs(is_white.any(axis=1).sum() - size[1] / 2) <= 1
    path.write_bytes(with_display_matrix(path.read_bytes(), *DISPLAY_MATRICES[6]))
    assert read(path, "first")[0].pixels.shape == (size[0], size[1], 3)  # stretched first, then turned


def test_absurd_pixels_are_too_large(tmp_path: Path) -> None:
    settings = {"size": (64, 48), "codec_sample_aspect_ratio": Fraction(20, 1)}
    path = encode(tmp_path / "wide.mp4", "libx264", [np.zeros((48, 64, 3), np.uint8)], **settings)
    rejected = rejection(path, "first", max_pixels=50_000)
    assert rejected.reason == images.TOO_LARGE and (rejected.width, rejected.height) == (64 * 20, 48)


LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # K_R and K_B of H.273


def to_yuv(rgb: Sequence[float], matrix: int, full_range: bool, peak: int = 255) -> list[float]:
    """Return Y', C_B and C_R of R', G' and B' in [0, 1], by the formulas of ITU-T H.273."""
    red, green, blue = rgb
    of_red, of_blue = LUMA[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    differences = [(blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)]
    if full_range:
        return [peak * luma, *(peak * (difference + 0.5) for difference in differences)]
    unit = (peak + 1) / 256
    return [unit * (16 + 219 * luma), *(unit * (128 + 224 * difference) for difference in differences)]


def patch(
    path: Path, values: Sequence[float], bits: int = 8, size: tuple[int, int] = (64, 48), **tags: int
) -> list[int]:
    """Encode a picture of one colour without loss, read it, return its one colour."""
    planes = np.empty((3, size[1], size[0]), np.uint8 if bits == 8 else np.uint16)
    planes[:] = np.round(values)[:, None, None]
    picture = planes if bits == 8 else np.moveaxis(planes, 0, -1)
    layout = "yuv444p" if bits == 8 else "yuv444p16le"
    encode(path, "ffv1", [picture] * 2, size=size, given=layout, layout=layout, **tags)
    pixels = read(path, "first")[0].pixels.reshape(-1, 3).astype(int)
    assert np.ptp(pixels, axis=0).max() == 0
    return pixels[0].tolist()


COLOUR = (200, 100, 50)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 6, 9])
def test_the_matrix_and_range_of_the_stream_are_honoured(matrix: int, full_range: bool, tmp_path: Path) -> None:
    values = to_yuv(np.array(COLOUR) / 255, matrix, full_range)
    tags = {"codec_colorspace": matrix, "codec_color_range": 2 if full_range else 1}
    assert patch(tmp_path / "colour.mkv", values, **tags) == pytest.approx(COLOUR, abs=2)


@pytest.mark.parametrize(("height", "matrix"), [(576, 6), (720, 1)])
def test_a_stream_without_a_matrix_has_that_of_its_size(height: int, matrix: int, tmp_path: Path) -> None:
    values = to_yuv(np.array(COLOUR) / 255, matrix, False)
    assert patch(tmp_path / "colour.mkv", values, size=(64, height)) == pytest.approx(COLOUR, abs=2)


def pq_signal(nits: float) -> float:
    """The inverse EOTF of SMPTE ST 2084, as its text has it."""
    power = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_signal(nits: float) -> float:
    """The inverse of HLG's EOTF of a 1,000 nit display for gray, ITU-R BT.2100."""
    scene = (nits / 1000) ** (1 / 1.2)
    return math.sqrt(3 * scene) if scene <= 1 / 12 else 0.17883277 * math.log(12 * scene - 0.28466892) + 0.55991073


def srgb(light: float) -> float:
    return 255 * (light * 12.92 if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("transfer", "signal"), [(16, pq_signal), (18, hlg_signal)])
def test_hdr_keeps_the_light_of_what_is_not_a_highlight(
    transfer: int, signal: Callable[[float], float], tmp_path: Path
) -> None:
    tags = {"codec_colorspace": 9, "codec_color_primaries": 9, "codec_color_trc": transfer, "codec_color_range": 1}
    grays = {}
    for nits in (2, 20, 100, 150, 203, 400, 1000):
        values = to_yuv([signal(nits)] * 3, 9, False, peak=65535)
        colour = patch(tmp_path / f"{nits}.mkv", values, bits=16, **tags)
        assert max(colour) - min(colour) <= 1
        grays[nits] = colour[1]
    for nits in (2, 20, 100, 150):
        assert grays[nits] == pytest.approx(srgb(nits / 203), abs=1.5)
    assert srgb(0.75) < grays[203] < grays[400] < grays[1000] < 256


def test_wide_primaries_become_srgb(tmp_path: Path) -> None:
    """sRGB's own red, written with other primaries, comes back as red: (1, 0, 0) by ITU-R BT.2087, and in P3 D65."""
    light = {9: (0.627404, 0.069097, 0.016391), 12: (0.822462, 0.033194, 0.017083)}
    for primaries, red in light.items():
        values = to_yuv([srgb(channel) / 255 for channel in red], 9, False, peak=65535)
        tags = {
            "codec_colorspace": 9,
            "codec_color_primaries": primaries,
            "codec_color_trc": 13,
            "codec_color_range": 1,
        }
        assert patch(tmp_path / f"{primaries}.mkv", values, bits=16, **tags) == pytest.approx((255, 0, 0), abs=4)


# Broken and hostile files


def sound_only(path: Path, with_cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"no video at all", b"<!doctype html><html>404</html>", bytes(5000), b"\0\0\0\x18ftypisom" + bytes(40)]
    + [b"\x1a\x45\xdf\xa3", b"\0\0\1\xba" + bytes(3000), b"RIFF\x10\0\0\0AVI LIST", b"G" * 2000],
)
def test_what_is_no_video_is_unreadable(content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    assert rejection(io.BytesIO(content)).reason == images.UNREADABLE
    assert capfd.readouterr() == ("", "")


def test_videos_without_pictures_are_unreadable(tmp_path: Path, get_video: Callable[[str], Path]) -> None:
    assert "no video" in rejection(sound_only(tmp_path / "sound.mp4")).detail
    assert rejection(encode(tmp_path / "empty.mkv", "ffv1", [])).reason == images.UNREADABLE
    assert rejection(tmp_path / "missing.mp4").detail.endswith("No such file or directory")
    assert rejection(tmp_path).reason == images.UNREADABLE


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "cover.mkv", "mjpeg", [numbered(0)], layout="yuvj420p")
    content = sound_only(tmp_path / "sound.mp4").read_bytes()
    assert content  # a cover in a sound file is a stream of pictures with the disposition "attached picture"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.disposition = av.stream.Disposition.attached_pic
        with pytest.raises(ImageRejected, match="no video"):
            video_stream._video_stream(container, MAX_PIXELS)


@pytest.fixture(scope="session", params=["mp4", "mkv"])
def cut_off(request: pytest.FixtureRequest, folder: Path) -> bytes:
    """A file whose header promises 10 s, cut off at a good third of its pictures."""
    options = {"movflags": "faststart"} if request.param == "mp4" else {}
    content = numbered_video(folder / f"ten_seconds.{request.param}", count=250, **options).read_bytes()
    start = max(content.find(b"mdat"), 0)
    return content[: start + (len(content) - start) * 36 // 100]


def test_a_truncated_video_gives_what_it_has(cut_off: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    assert numbers(io.BytesIO(cut_off), "first") == [0]
    assert numbers(io.BytesIO(cut_off), "50") == [50]
    assert numbers(io.BytesIO(cut_off), "middle", segment=(1.0, 2.0)) == [37]
    assert [frame.index for frame in read(io.BytesIO(cut_off), "best")] == [12, 37, 62]
    assert capfd.readouterr() == ("", "")


def test_a_truncated_video_does_not_pass_another_frame_off_as_the_wanted(cut_off: bytes) -> None:
    for choice in ("middle", "120", "249"):
        rejected = rejection(io.BytesIO(cut_off), choice)
        assert rejected.reason == images.UNREADABLE
        assert re.search(r"nothing at \d+\.\d\d s: the video breaks off at 3\.\d s of 10\.0 s", rejected.detail)
    found = []
    with pytest.raises(ImageRejected, match=r"breaks off at 3\.\d s of 10\.0 s"):
        for frame in read_frames(io.BytesIO(cut_off), parse_frame_choice("every:1s"), MAX_PIXELS):
            found.append(number_in(frame.pixels))
    assert found == [0, 25, 50, 75]


def without(path: Path, packets: slice, parts: slice) -> io.BytesIO:
    """Return a video whose packets, in decoding order, have zeros in some of their tenths."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in [packet for packet in container.demux(video=0) if packet.size][packets]:
            begin, end = (packet.pos + packet.size * part // 10 for part in (parts.start, parts.stop))
            content[begin:end] = bytes(end - begin)
    return io.BytesIO(bytes(content))


@pytest.mark.parametrize(
    ("name", "packets", "parts"),
    [("h264.mp4", slice(16, 19), slice(0, 10)), ("h264.mp4", slice(16, 17), slice(0, 10))]
    + [("mpeg4.avi", slice(16, 19), slice(3, 6)), ("mpeg4.avi", slice(16, 17), slice(3, 6))]
    + [("mpeg2.ts", slice(16, 19), slice(3, 6))],
)
def test_damage_is_told_and_ends_with_the_next_keyframe(
    name: str, packets: slice, parts: slice, get_video: Callable[[str], Path]
) -> None:
    whole = [frame.pixels for frame in read(get_video(name), "every:40ms")]
    damaged, found = without(get_video(name), packets, parts), []
    with pytest.raises(ImageRejected, match=r"damaged: the frame at 0\.\d\d s.* cannot be decoded"):
        for frame in read_frames(damaged, parse_frame_choice("every:40ms"), MAX_PIXELS):
            assert np.array_equal(frame.pixels, whole[frame.index])
            found.append(frame.index)
    assert {*range(10), *range(30, NUM_FRAMES)} <= set(found) < set(range(NUM_FRAMES))
    lost = min(set(range(NUM_FRAMES)) - set(found))
    assert "damaged: the frame at 0." in rejection(damaged, str(lost)).detail
    assert numbers(damaged, "35") == [35]
    assert 4 <= len(read(damaged, "best")) < 10


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.mp4"])
def test_a_lost_group_of_pictures_is_not_replaced_by_an_earlier_frame(
    name: str, get_video: Callable[[str], Path]
) -> None:
    damaged = without(get_video(name), slice(24, 36), slice(0, 10))
    for number in (24, 30, 35):
        assert "damaged: the frame at" in rejection(damaged, str(number)).detail
    assert numbers(damaged, "20") == [20]
    assert numbers(damaged, "36") == [36]


def test_large_frames_are_rejected_before_they_are_decoded(
    get_video: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_stream.Video, "_decode", lambda *args: pytest.fail("it was decoded"))
    rejected = rejection(get_video("h264.mp4"), "first", max_pixels=WIDTH * HEIGHT - 1)
    assert (rejected.reason, rejected.width, rejected.height) == (images.TOO_LARGE, WIDTH, HEIGHT)


def test_frames_that_grow_on_the_way_are_rejected(tmp_path: Path) -> None:
    small = numbered_video(tmp_path / "small.h264", count=25)
    for width, reason in ((320, images.TOO_LARGE), (1280, images.UNREADABLE)):  # the decoder refuses to make the latter
        black = [np.zeros((240, width, 3), np.uint8)] * 25
        large = encode(tmp_path / "large.h264", "libx264", black, size=(width, 240))
        joined = io.BytesIO(small.read_bytes() + large.read_bytes())
        assert [frame.pixels.shape for frame in read(joined, "first")] == [(HEIGHT, WIDTH, 3)]
        assert rejection(joined, "40", max_pixels=WIDTH * HEIGHT).reason == reason


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile clip.ts\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\nclip.ts\n#EXT-X-ENDLIST\n",
    "hls of the network": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".m3u8"])
def test_playlists_open_no_other_file(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, get_video: Callable[[str], Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.ts").write_bytes(get_video("h264.ts").read_bytes())
    playlist = tmp_path / f"list{suffix}"
    playlist.write_text(PLAYLISTS[kind])
    if kind == "ffconcat" or (kind, suffix) == ("hls", ".m3u8"):  # so FFmpeg would follow it
        with av.open(str(playlist)) as container:
            assert next(container.decode(video=0)).width == WIDTH
    assert rejection(playlist).reason == images.UNREADABLE
    assert rejection(io.BytesIO(playlist.read_bytes())).reason == images.UNREADABLE


def test_only_listed_formats_are_read(tmp_path: Path) -> None:
    path = encode(tmp_path / "video.nut", "mpeg4", [numbered(0)] * 3)
    assert len(decode_all(path)) == 3
    assert rejection(path).reason == images.UNREADABLE


@pytest.mark.parametrize("name", ["frame%03d.mp4", "concat:a|b", "file:clip", "-", "http:", "?.mp4", "*.mp4"])
def test_names_mean_nothing_but_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, get_video: Callable[[str], Path]
) -> None:
    (tmp_path / name).write_bytes(get_video("h264.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert numbers(name, "middle") == [30]
    (tmp_path / name).unlink()
    assert rejection(name).detail.endswith("No such file or directory")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_broken_bytes_raise_nothing_but_a_rejection(data: st.DataObject, get_video: Callable[[str], Path]) -> None:
    name = data.draw(st.sampled_from(["h264.mp4", "h264.mkv", "h264.ts", "mpeg1.mpg", "mpeg4.avi", "wmv2.wmv"]))
    content = bytearray(get_video(name).read_bytes())
    for _ in range(data.draw(st.integers(1, 12))):
        place = data.draw(st.integers(0, min(len(content), 1500) - 1)) * data.draw(st.sampled_from([1, -1]))
        content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    try:
        frames = read(io.BytesIO(bytes(content)), data.draw(st.sampled_from(["first", "middle", "best", "every:1s"])))
    except ImageRejected as rejected:
        assert rejected.reason in (images.UNREADABLE, images.TOO_LARGE) and "\n" not in rejected.detail
    else:
        assert frames and all(frame.pixels.dtype == np.uint8 and frame.pixels.ndim == 3 for frame in frames)


def test_frames_are_freed_without_the_garbage_collector(get_video: Callable[[str], Path]) -> None:
    """PyAV's frames and their side data hold each other alive; hours of video would fill the memory."""
    gc.collect()
    gc.disable()
    try:
        read(get_video("h264.mp4"), "best")
        kinds = [type(thing) for thing in gc.get_objects()]
        held = [thing for thing in gc.get_objects() if type(thing) is av.VideoFrame and thing.width > 2]
        assert not held and av.container.InputContainer not in kinds
    finally:
        gc.enable()


# What it is called with


def test_the_grid_clips(shared_data: Path) -> None:
    for path in sorted((shared_data / "clips").glob("*.mpg"))[:2]:
        assert begins_like_video(path.read_bytes()[:64])
        everything = decode_all(path)
        (frame,) = read_frames(path, parse_frame_choice("middle"), MAX_PIXELS)
        assert (frame.index, frame.seconds, frame.pixels.shape) == (37, pytest.approx(1.48), (288, 360, 3))
        gray = frame.pixels @ np.array([0.299, 0.587, 0.114])
        distances = [np.abs(gray - other).mean() for other in everything]
        assert int(np.argmin(distances)) == 37


@pytest.mark.parametrize("name", CONTAINERS)
def test_videos_are_known_by_their_beginning(name: str, get_video: Callable[[str], Path]) -> None:
    assert begins_like_video(get_video(name).read_bytes()[:64])
    assert get_video(name).suffix in VIDEO_SUFFIXES


@pytest.mark.parametrize(
    "start", ["0000001466747970 71742020", "00000008 77696465 000000006d646174", "474011100042f025"]
)
def test_other_beginnings_of_videos(start: str) -> None:
    assert begins_like_video(bytes.fromhex(start).ljust(64, b"\0"))


@pytest.mark.parametrize(
    "start",
    [b"", b"G", b"GIF89a\x01\0\x01\0\x80\0\0", b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]
    + [b"RIFF\x24\0\0\0WEBPVP8 ", b"RIFF\x24\0\0\0WAVEfmt ", b"\0\0\0\x18ftypheic", b"\0\0\0\x1cftypavif", b"BM\x36\0"]
    + [b"\0\0\0\x18ftypmif1", b"\0\0\0\x18ftypcrx ", b"\0\0\0\x20ftypM4A ", b"\0\0\x01\0\x01\0\x10\x10", b"II*\0"]
    + [b"Graz, 12 of May\n", b"G,1,2 and more text of a table", b"OggS" + bytes(24) + b"\x01vorbis", bytes(64)]
    + [b"path,age\na.jpg,3\n", b"PAR1", b"PK\x03\x04", b"\0\0\0\x0cJXL \r\n\x87\n", b"\0\0\0\x0cjP  \r\n\x87\n"],
)
def test_beginnings_that_are_no_video(start: bytes) -> None:
    assert not begins_like_video(start.ljust(64, b"\0") if b"\0" in start else start)


@pytest.mark.parametrize(
    ("text", "kind", "number", "step"),
    [("middle", "middle", 0, 0), ("first", "first", 0, 0), ("best", "best", 0, 0), ("0", "number", 0, 0)]
    + [("0012", "number", 12, 0), ("every:2s", "every", 0, 2), ("every:500ms", "every", 0, 0.5)]
    + [("every:1.5m", "every", 0, 90), ("every:1h", "every", 0, 3600)],
)
def test_choices(text: str, kind: str, number: int, step: float) -> None:
    choice = parse_frame_choice(text)
    assert (choice.kind, choice.number, choice.step) == (kind, number, pytest.approx(step))
    assert choice.is_best == (text == "best")


@pytest.mark.parametrize(
    ("text", "hint"),
    [("midle", 'did you mean "middle"'), ("every", "as in every:2s"), ("every:2", "as in every:2s")]
    + [("every:0s", "above 0"), ("every:-1s", "above 0"), ("every:nan", "above 0"), ("First", 'did you mean "first"')]
    + [(text, "not the number of a frame; there is best, every:2s") for text in ("", "-1", "1.5", "9" * 5000, "\u0663")]
    + [("every:1s\n", "above 0"), ("1\n", "not the number")],
)
def test_wrong_choices_say_what_to_type(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(hint)) as caught:
        parse_frame_choice(text)
    assert str(caught.value).startswith("--frame ") and len(str(caught.value)) < 300


@pytest.mark.parametrize("long_box", [False, True])
def test_an_mp4_that_was_cut_before_its_index_says_so(get_video: Callable[[str], Path], long_box: bool) -> None:
    content = get_video("h264.mp4").read_bytes()
    at = content.index(b"mdat") - 4
    assert content.index(b"moov") > at  # the index is at the end
    if long_box:
        content = content[:at] + struct.pack(">I4sQ", 1, b"mdat", len(content)) + content[at + 8 :]
    for end in (at + 20, content.index(b"moov") - 4):
        assert "index is missing" in rejection(io.BytesIO(content[:end])).detail
    for other in (content[:at] + b"\0\0\0\5junk", b"", b"\0\0\0\x08free" * 5000, content[:at] + b"\0\0\0\x08moov"):
        assert "index is missing" not in rejection(io.BytesIO(other)).detail


def test_without_pyav_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageRejected, match=re.escape('pip install "mefem-cli[video]", then crop again with --retry')):
        next(read_frames(io.BytesIO(b""), parse_frame_choice("first"), MAX_PIXELS))


def test_an_old_pyav_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "__version__", "17.0.1")
    with pytest.raises(ImageRejected, match=r'PyAV 17\.0\.1 is too old .* pip install --upgrade "av>=17\.1", then'):
        next(read_frames(io.BytesIO(b""), parse_frame_choice("first"), MAX_PIXELS))


def test_pyav_is_imported_when_a_video_is_read() -> None:
    code = "import sys, mefem_cli.faces.video; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
