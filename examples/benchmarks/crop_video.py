"""Videos of an hour: what one frame costs."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from crop_measure import MEBI, Setting, Skipped, table
from crop_pictures import source_of
from PIL import Image

from mefem_cli.faces.crop import CropOptions, Cropper
from mefem_cli.stores.crops import OK

RATE = 25  # frames a second
HOUR = 3600  # s
PIECE = 16  # s that are encoded, with one keyframe, and repeated: the hour's middle lies between two keyframes
SIZES = {"360p": (640, 360), "720p": (1280, 720)}
CHOICES = ("middle", "first", "best", "79999")  # the last one is farthest from its keyframe


def video(setting: Setting) -> None:
    """Print the seconds from opening a file of an hour to the rows of its crops; the detector is loaded already."""
    try:
        import av
    except ImportError:
        raise Skipped('PyAV is missing; type: pip install "mefem-cli[video]"') from None
    clip = sorted(setting.data("clips").glob("*.mpg"))[0]
    faces = _frames(av, clip)
    rows = []
    for name, size in SIZES.items():
        path = setting.work / f"hour-{name}.mp4"
        _write_hour(av, path, faces, size)
        for choice in CHOICES:
            rows.append([name, path.stat().st_size / MEBI, choice, *_time(path, choice)])
    table(["video", "MiB", "--frame", "first time, s", "again, s", "of it CPU, s", "crops"], rows)


def _time(path: Path, choice: str) -> list[Any]:
    cropper = Cropper(CropOptions(frame=choice, min_size=100, pad="reflect"), None)
    taken, cpu = [], []
    for _ in range(3):
        begun = time.perf_counter(), time.process_time()
        rows = cropper.crop_source(source_of(path))
        taken.append(time.perf_counter() - begun[0])
        cpu.append(time.process_time() - begun[1])
    cropper.close()
    return [taken[0], min(taken), min(cpu), sum(row["status"] == OK for row in rows)]


def _frames(av: Any, clip: Path) -> list[Image.Image]:
    with av.open(str(clip)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def _write_hour(av: Any, path: Path, faces: list[Image.Image], size: tuple[int, int]) -> None:
    """Write an hour of H.264: a talking face to and fro before a grainy ground, a keyframe every PIECE seconds."""
    _encode_piece(av, path.with_suffix(".piece.mp4"), faces, size)
    with av.open(str(path.with_suffix(".piece.mp4"))) as piece, av.open(str(path), "w") as hour:
        stream = hour.add_stream_from_template(piece.streams.video[0])
        packets = [packet for packet in piece.demux(video=0) if packet.dts is not None]
        base = packets[0].time_base
        for repeat in range(HOUR // PIECE):
            piece.seek(0)
            for packet in piece.demux(video=0):
                if packet.dts is None:
                    continue
                packet.pts += round(repeat * PIECE / base)
                packet.dts += round(repeat * PIECE / base)
                packet.stream = stream
                hour.mux(packet)


def _encode_piece(av: Any, path: Path, faces: list[Image.Image], size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    width, height = size
    ground = generator.integers(90, 130, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "27", "g": str(RATE * PIECE), "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(RATE * PIECE):
            index = number % (2 * len(faces) - 2)
            face = faces[min(index, 2 * len(faces) - 2 - index)].resize((height * 5 // 4, height))
            picture = Image.fromarray(ground.copy())
            picture.paste(face, ((width - face.width) // 2, 0))
            frame = av.VideoFrame.from_image(picture)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
