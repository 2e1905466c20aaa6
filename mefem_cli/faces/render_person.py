"""An imaginary person and the circumstances of one photo, as numbers that the drawing follows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    """One imaginary person: labels, and what their face is drawn from.

    `height_cm` and `weight_kg` give `bmi` (kg/m2); `age` is in years, `skin_tone` runs from 1 (light) to 10 (dark).
    All other numbers are drawing parameters in standard units: 0 is average, 1 is one standard deviation, except
    those marked [0, 1]. The first block follows body fat, the others do not.
    """

    subject: str
    age: float
    sex: str
    skin_tone: int
    height_cm: float
    weight_kg: float

    cheek_fullness: float
    lower_face_width: float
    jaw_softness: float
    double_chin: float
    submental_fullness: float
    neck_girth: float
    eye_puffiness: float

    bone_width: float
    face_length: float
    jaw_width: float
    chin_width: float
    chin_length: float
    cheekbones: float
    neck_frame: float
    masculinity: float  # [0, 1] roughly: brow ridge, jaw and neck of the male pattern
    brow_height: float
    brow_thickness: float
    eye_size: float
    eye_spacing: float
    eye_tilt: float
    nose_width: float
    nose_length: float
    mouth_width: float
    lip_fullness: float

    wrinkle_depth: float  # [0, 1]
    sagging: float  # [0, 1]
    hair_greyness: float  # [0, 1]
    hair_recession: float  # [0, 1]
    redness: float
    freckles: float  # [0, 1]

    @property
    def bmi(self) -> float:
        """Body mass index, kg/m2."""
        return self.weight_kg / (self.height_cm / 100) ** 2


@dataclass(frozen=True)
class Scene:
    """What changes from photo to photo: pose, light, expression, hair, clothing, background and camera."""

    size: tuple[int, int]  # width, height, px
    pixels_per_unit: float
    origin: tuple[float, float]  # of the head frame, px
    yaw: float  # radians, like pitch and roll
    pitch: float
    roll: float
    stretch: float  # width over height of the head, as lens and distance change it
    keystone: float  # how much wider the picture gets per unit downwards: a camera below or above the face
    shoulder_drop: float  # units
    light: tuple[float, float, float]  # towards the key light; y is negative above the head, z points to the camera
    key: tuple[float, float, float]  # linear RGB strength of the key light
    fill: tuple[float, float, float]  # of the light from everywhere
    smile: float
    mouth_open: float
    brow_raise: float
    eye_open: float
    gaze: tuple[float, float]
    eye_colour: tuple[float, float, float]
    hair_style: str
    hair_colour: tuple[float, float, float]
    hair_volume: float
    hair_length: float
    hair_part: float
    hair_cover: float
    beard_length: float
    beard_density: float
    makeup: float
    glasses: float  # 0: none, else the frame's roundness
    neckline: str
    cloth: tuple[float, float, float]
    second_cloth: tuple[float, float, float]
    background: str
    exposure: float
    contrast: float
    white_balance: tuple[float, float, float]
    saturation: float
    blur: float  # px, used at full detail
    noise: float  # of 1
    vignette: float
    detail: float  # the picture is sampled at this share of its size, as after heavy compression
    texture_seed: int
