"""One core: what a picture takes, against its parts timed alone in the same process on the same arguments."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import simplejpeg
from crop_measure import Setting, table
from crop_pictures import phone_photos, portraits, source_of

from mefem_cli.faces import geometry, images
from mefem_cli.faces.crop import CropOptions, Cropper
from mefem_cli.faces.source import Source

ROUNDS = 7  # of which the fastest counts: whatever else runs only adds
PARTS = ("decode", "detect", "resample", "encode")


def speed(setting: Setting) -> None:
    """Print the milliseconds of each part and of the whole, per picture."""
    photos = portraits(setting, setting.folder("portraits"), 24)
    phone = phone_photos(setting, setting.folder("phone"), 4)
    rows = []
    for detector in ("auto", "short"):
        for name, files in (("1024 px", photos), ("12 megapixels", phone)):
            rows += _rows(setting, f"{name}, {detector}", files, detector)
    header = ["pictures", "clock", *(f"{part}, ms" for part in PARTS), "parts, ms", "whole, ms", "parts / whole"]
    table(header, rows)
    for name, files in (("1024 px", photos), ("12 megapixels", phone)):
        print(f"{name}: {sum(file.stat().st_size for file in files) / len(files) / 1024:.0f} KiB a file")


def _rows(setting: Setting, name: str, files: list[Path], detector: str) -> list[list[Any]]:
    cropper = Cropper(CropOptions(detector=detector), _new_crops_folder(setting))  # type: ignore[arg-type]
    sources = [source_of(file) for file in files]
    calls = _record(cropper, sources)

    def whole() -> None:
        cropper.out = _new_crops_folder(setting)  # to replace files takes longer than to write them
        cropper(sources)

    works = {part: lambda part=part: _replay(calls[part]) for part in PARTS} | {"whole": whole}
    clocks = {"CPU": time.process_time, "wall": time.perf_counter}
    best = _fastest(works, list(clocks.values()), len(files))
    cropper.close()
    rows = []
    for index, clock in enumerate(clocks):
        times = [best[part][index] for part in PARTS]
        rows.append([name, clock, *times, sum(times), best["whole"][index], sum(times) / best["whole"][index]])
    return rows


def _new_crops_folder(setting: Setting) -> Path:
    folder = Path(tempfile.mkdtemp(dir=setting.work))
    (folder / ".parts").mkdir()
    return folder


Calls = list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


def _record(cropper: Cropper, sources: list[Source]) -> dict[str, Calls]:
    """Crop all sources; return what was called of each part, with its arguments."""
    calls: dict[str, Calls] = {part: [] for part in PARTS}
    detector = cropper._detector
    places = {"decode": (simplejpeg, "decode_jpeg"), "detect": (detector, "detect")}
    places |= {"resample": (geometry, "resize"), "encode": (images, "encode")}
    with ExitStack() as stack:
        for part, (owner, name) in places.items():
            stack.enter_context(mock.patch.object(owner, name, _noting(getattr(owner, name), calls[part])))
        cropper(sources)
    assert all(calls.values()), "a part was not called: is its place right?"
    return calls


def _noting(function: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    def noting(*arguments: Any, **options: Any) -> Any:
        calls.append((function, arguments, options))
        return function(*arguments, **options)

    return noting


def _replay(calls: Calls) -> None:
    for function, arguments, options in calls:
        function(*arguments, **options)


def _fastest(
    works: dict[str, Callable[[], Any]], clocks: list[Callable[[], float]], num_pictures: int
) -> dict[str, list[float]]:
    """Return the ms per picture of each work on each clock: the least of ROUNDS, works taking turns."""
    best = {name: [float("inf")] * len(clocks) for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            begun = [clock() for clock in clocks]
            work()
            taken = [(clock() - before) * 1000 / num_pictures for clock, before in zip(clocks, begun, strict=True)]
            best[name] = [min(pair) for pair in zip(best[name], taken, strict=True)]
    return best
