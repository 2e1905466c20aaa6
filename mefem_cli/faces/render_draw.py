"""Draws one portrait of an imaginary person: forms as height fields, lit, textured and seen through a camera.

Everything is drawn in the head frame: the origin lies between the eyes, x points to the picture's right, y down, and
one unit is the distance from the eye line to the chin of an average adult (about 115 mm). Colours are linear light
(gamma 2, so that encoding is a square root), images are planar float32 [3, height, width] until the camera.
"""

import numpy as np

from mefem_cli.faces.render_canvas import Canvas
from mefem_cli.faces.render_face import draw_face
from mefem_cli.faces.render_hair import draw_back_hair, draw_front_hair, draw_glasses
from mefem_cli.faces.render_head import draw_body, draw_ears, draw_second_chin, outline, view_head
from mefem_cli.faces.render_person import Person, Scene
from mefem_cli.faces.render_scene import draw_background, photograph


def draw_portrait(person: Person, scene: Scene) -> np.ndarray:
    """One photo of `person` in `scene`: uint8 [height, width, 3], RGB."""
    rng = np.random.default_rng(scene.texture_seed)
    canvas = Canvas(draw_background(scene, rng), scene)
    head = view_head(canvas, outline(person))
    draw_back_hair(canvas, rng)
    draw_body(canvas, person, head, rng)
    draw_second_chin(canvas, person, head, rng)
    draw_ears(canvas, person, head)
    draw_face(canvas, person, head, rng)
    draw_front_hair(canvas, person, head, rng)
    draw_glasses(canvas, person, head, rng)
    return photograph(canvas.image, scene, rng)
