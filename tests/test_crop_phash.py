"""The perceptual hash: against its definition, against the imagehash library where it is installed, and in its use."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mefem_cli.faces.phash import distance, phash


def waves(seed: int, size: int = 224) -> np.ndarray:
    """A smooth picture, unlike that of any other seed: uint8 [size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def by_definition(pixels: np.ndarray) -> str:
    """Coefficient by coefficient, as sums over all pixels."""
    gray = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    place = (2 * np.arange(32) + 1) * np.pi / 64
    low = [
        (gray * np.cos(place[:, None] * row) * np.cos(place * column)).sum() for row in range(8) for column in range(8)
    ]
    middle = sum(sorted(low)[31:33]) / 2
    return f"{int(''.join('1' if value > middle else '0' for value in low), 2):016x}"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 32, 112, 224]))
def test_hash_follows_its_definition(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    assert phash(pixels) == by_definition(pixels)


def test_hash_is_that_of_imagehash(shared_data):
    imagehash = pytest.importorskip("imagehash", reason="imagehash is not installed")
    for path in sorted((shared_data / "faces" / "t2i").iterdir())[::40]:
        image = Image.open(path).convert("RGB")
        assert phash(np.asarray(image)) == str(imagehash.phash(image))


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_flat_pictures_have_one_hash_on_every_machine(level):
    """All coefficients but the mean are zero in theory, and must not be told apart by rounding errors."""
    expected = "8000000000000000" if level else "0000000000000000"
    assert phash(np.full((224, 224, 3), level, np.uint8)) == expected


def test_hash_survives_what_does_not_change_the_picture():
    pixels = waves(1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
    versions = {
        "recompressed": np.asarray(Image.open(buffer)),
        "smaller": np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)),
        "darker": (pixels * 0.8).astype(np.uint8),
        "not contiguous": np.asfortranarray(pixels),
    }
    for name, version in versions.items():
        assert distance(phash(pixels), phash(version)) <= 4, name


def test_other_pictures_have_other_hashes():
    hashes = [phash(waves(seed)) for seed in range(40)]
    distances = [distance(one, other) for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(distances) > 8
    assert 28 < np.mean(distances) < 36  # of 64 bits: half of them by chance


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_distance_counts_bits(first, second):
    expected = sum((first >> bit & 1) != (second >> bit & 1) for bit in range(64))
    assert distance(f"{first:016x}", f"{second:016x}") == expected
