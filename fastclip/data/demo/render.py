"""From a scene to pixels: anti-aliased shapes on a plain ground, uint8 (64, 64, 3).

A shape is tested at 8 x 8 points per pixel with sums, products and comparisons only (corners, which need sines, are
rounded to 1/1024 of the radius), and drawn with integers: the pixels are the same on every machine.
"""

import math
from functools import cache

import numpy as np

from fastclip.data.demo.scenes import PLACES, Scene
from fastclip.data.streams import Stream

IMAGE_SIZE = 64
RADIUS = {"small": 4.5, "medium": 7.0, "large": 10.0}  # pixels
JITTER = {"small": 4, "medium": 3, "large": 1}  # half pixels each way from the middle of the cell
COLOUR = {
    "red": (226, 36, 44),
    "orange": (250, 130, 14),
    "yellow": (252, 214, 20),
    "green": (38, 158, 64),
    "cyan": (44, 208, 218),
    "blue": (36, 84, 224),
    "purple": (152, 58, 206),
    "pink": (252, 130, 186),
}
GROUND = {"white": (248, 248, 246), "gray": (168, 170, 174), "black": (16, 16, 20), "brown": (84, 56, 38)}

_CELL_CENTERS = (22, 64, 106)  # half pixels
_PATCH = 24  # pixels; holds the largest shape at any half-pixel offset
_SUPERSAMPLE = 8


def _corners(radii: tuple[float, ...], count: int) -> list[tuple[float, float]]:
    """`count` corners on circles of the given radii in turn, the first one on top, rounded to 1/1024."""
    angles = [2 * math.pi * k / count for k in range(count)]
    polar = [(radii[k % len(radii)], angle) for k, angle in enumerate(angles)]
    return [(round(1024 * r * math.sin(t)) / 1024, round(-1024 * r * math.cos(t)) / 1024) for r, t in polar]


def _inside_polygon(corners: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd rule."""
    inside = np.zeros_like(x, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        side = (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
        inside ^= ((y0 > y) != (y1 > y)) & ((side < 0) == (y1 > y0))
    return inside


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the shape of radius 1 around the origin (x to the right, y down)."""
    if shape == "circle":
        return x * x + y * y <= 0.875
    if shape == "ring":
        return (x * x + y * y <= 1) & (x * x + y * y >= 0.25)
    if shape == "square":
        return (abs(x) <= 0.8125) & (abs(y) <= 0.8125)
    if shape == "cross":
        return ((abs(x) <= 0.3125) & (abs(y) <= 1)) | ((abs(y) <= 0.3125) & (abs(x) <= 1))
    corners = {
        "triangle": [(0.0, -0.9375), (1.0, 0.8125), (-1.0, 0.8125)],
        "diamond": [(0.0, -1.0625), (0.75, 0.0), (0.0, 1.0625), (-0.75, 0.0)],
        "pentagon": _corners((1.0,), 5),
        "star": _corners((1.125, 0.4375), 10),
    }
    return _inside_polygon(corners[shape], x, y)


@cache
def _coverage(shape: str, size: str, half_x: int, half_y: int) -> np.ndarray:
    """How much of each pixel of a patch the shape covers, 0..64: int32 (_PATCH, _PATCH, 1)."""
    points = (np.arange(_PATCH * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - _PATCH / 2
    y, x = np.meshgrid(points - half_y / 2, points - half_x / 2, indexing="ij")
    inside = _inside(shape, x / RADIUS[size], y / RADIUS[size])
    cells = inside.reshape(_PATCH, _SUPERSAMPLE, _PATCH, _SUPERSAMPLE)
    return cells.sum(axis=(1, 3), dtype=np.int32)[:, :, None]


def render_scene(scene: Scene, stream: Stream) -> np.ndarray:
    """Draw `scene`: uint8 (64, 64, 3). The stream moves each object a little inside its cell."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int32)
    image[:] = GROUND[scene.background]
    for item in scene.objects:
        row, column = divmod(PLACES.index(item.place), 3)
        jitter = JITTER[item.size]
        x = _CELL_CENTERS[column] - jitter + stream.below(2 * jitter + 1)
        y = _CELL_CENTERS[row] - jitter + stream.below(2 * jitter + 1)
        coverage = _coverage(item.shape, item.size, x % 2, y % 2)
        left, top = x // 2 - _PATCH // 2, y // 2 - _PATCH // 2
        clip_x, clip_y = max(0, -left), max(0, -top)
        patch = image[max(0, top) : top + _PATCH, max(0, left) : left + _PATCH]
        coverage = coverage[clip_y : clip_y + patch.shape[0], clip_x : clip_x + patch.shape[1]]
        patch += (np.array(COLOUR[item.colour], dtype=np.int32) - patch) * coverage // _SUPERSAMPLE**2
    return image.astype(np.uint8)
