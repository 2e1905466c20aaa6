"""Faces laid onto a template by five points, as ArcFace networks (InsightFace's Buffalo) were trained.

The points of a crop are in its px and name points, not pixels: (0, 0) is the corner of its first pixel. The template
is written for OpenCV's `warpAffine`, which means the middle of the first pixel by (0, 0): half a pixel is added to it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mefem_cli.backbones._frozen import ARCFACE, Preprocessing
from mefem_cli.errors import NoInputError
from mefem_cli.stores.crops import KEYPOINTS, Crops

TEMPLATE_SIZE = 112
# Of InsightFace: the eye on the left of the picture (the person's right one), the other eye, nose, mouth corners.
FIVE_POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
MOUTH = (56.14, 92.28)  # between the corners: BlazeFace has one point for the mouth
TEMPLATE = np.array([*FIVE_POINTS[:3], MOUTH]) + 0.5  # [4, 2]
NUM_POINTS = len(TEMPLATE)  # of BlazeFace's six; the ears are left out
COLUMNS = (*KEYPOINTS[: 2 * NUM_POINTS], "crop_x", "crop_y", "crop_side", "angle")  # of the manifest


def crop_keypoints(crops: Crops, model: str) -> np.ndarray:
    """Return both eyes, nose and mouth of every face in px of its crop, float64 [N, 4, 2].

    Raises NoInputError, which names `model`, if a crop has none.
    """
    columns = {name: crops.columns[name].astype(np.float64) for name in COLUMNS}
    points = keypoints_in_crop(columns, crops.size)
    without = np.flatnonzero(~np.isfinite(points).all(axis=(1, 2)))
    if len(without):
        raise NoInputError(
            f"--model {model} lays faces onto a template by keypoints, which {len(without)} of {len(crops)} crops have "
            f"not, such as {crops.describe(int(without[0]))}; make crops with mefem crop and a detector (without "
            "--boxes and --detector none), or choose an encoder that needs no keypoints"
        )
    return points


def keypoints_in_crop(columns: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Map the manifest's keypoints, px of the picture, into crops of `size` px: float64 [N, 4, 2].

    A crop is a square whose top left corner (before it is turned about its middle by `angle` degrees, clockwise) and
    side the manifest tells.
    """
    points = np.stack([columns[name] for name in KEYPOINTS[: 2 * NUM_POINTS]], axis=-1).reshape(-1, NUM_POINTS, 2)
    side = columns["crop_side"][:, None]
    middle = np.stack([columns["crop_x"], columns["crop_y"]], axis=-1)[:, None] + side[..., None] / 2
    right, down = np.moveaxis(points - middle, -1, 0)  # [N, 4] each
    angle = np.radians(np.nan_to_num(columns["angle"]))[:, None]  # an earlier mefem wrote none, and turned none
    across = right * np.cos(angle) + down * np.sin(angle)
    along = down * np.cos(angle) - right * np.sin(angle)
    return (np.stack([across, along], axis=-1) / side[..., None] + 0.5) * size


def similarity(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the similarity that brings points [n, 2] nearest to targets [n, 2], as a matrix [2, 3].

    Least squares over scale, rotation and shift, without reflection; in the plane this is what Umeyama (1991) finds.
    With points z and targets w as complex numbers, less their means, w = a z has the solution
    a = sum(conj(z) w) / sum(|z|^2).

    >>> similarity(np.array([[0, 0], [1, 0]]), np.array([[5, 5], [5, 7]])).round(3).tolist()
    [[0.0, -2.0, 5.0], [2.0, 0.0, 5.0]]
    """
    z, w = (np.asarray(one, dtype=np.float64) @ [1, 1j] for one in (points, targets))
    centred = z - z.mean()
    factor = (centred.conj() @ (w - w.mean())) / (abs(centred) ** 2).sum()
    shift = w.mean() - factor * z.mean()
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])


def aligned(crop: np.ndarray, keypoints: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Lay a crop's face onto the template: uint8 [S, S, 3] -> uint8 [image_size, image_size, 3].

    `keypoints` [4 or 6, 2] are BlazeFace's, px of the crop. Bilinear, without antialiasing, as InsightFace does; what
    lies outside the crop is black.
    """
    assert preprocessing.alignment == ARCFACE
    size = preprocessing.image_size
    matrix = similarity(np.asarray(keypoints)[:NUM_POINTS], TEMPLATE * (size / TEMPLATE_SIZE))
    turned = np.linalg.inv(matrix[:, :2])
    back = np.concatenate([turned, -turned @ matrix[:, 2:]], axis=1)  # from the result to the crop, as Pillow wants it
    result = np.empty((size, size, 3), np.uint8)
    for channel in range(3):  # as floats: of bytes Pillow would round the results down
        values = Image.fromarray(crop[..., channel].astype(np.float32))
        moved = values.transform((size, size), Image.Transform.AFFINE, tuple(back.flat), Image.Resampling.BILINEAR)
        result[..., channel] = np.rint(np.asarray(moved))
    return result
