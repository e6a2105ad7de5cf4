"""Augmentation behind the crop as open_clip's `--aug-cfg` has it.

SimCLR's jitter and greys (after SLIP, Mu et al. 2022), and random erasing (Zhong et al. 2020).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastclip.data.streams import Stream, uniforms

if TYPE_CHECKING:
    from PIL.Image import Image

AREA, TALLEST = (0.02, 1 / 3), 1 / 0.3  # of an erased rectangle: share of the image, height over width


@dataclass(frozen=True)
class ColorAugment:
    """uint8 (3, H, W) to the same, with the draws of a `Stream`; nothing is drawn where nothing is asked for.

    `jitter`: strengths of brightness, contrast, saturation (factors in [1 - s, 1 + s], at least 0) and hue (a share of
    the circle in [-s, s]), applied in random order with probability `jitter_prob`; then grey with `gray_prob`.
    The four adjustments are torchvision's on PIL images, to the last bit.
    """

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_prob: float = 0.0
    gray_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("jitter_prob", "gray_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be in [0, 1], was {getattr(self, name)}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter: strengths must be at least 0, and of the hue at most 0.5, were {self.jitter}")

    def __call__(self, pixels: np.ndarray, stream: Stream) -> np.ndarray:
        from PIL import Image

        jitters = bool(self.jitter_prob and any(self.jitter)) and stream.uniform() < self.jitter_prob
        grays = bool(self.gray_prob) and stream.uniform() < self.gray_prob
        if not jitters and not grays:
            return pixels
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        if jitters:
            image = self._jittered(image, stream)
        if grays:
            image = image.convert("L").convert("RGB")
        return np.asarray(image).transpose(2, 0, 1)

    def _jittered(self, image: "Image", stream: Stream) -> "Image":
        for which in stream.sample(range(4), 4):
            strength = self.jitter[which]
            if strength:
                low, high = (-strength, strength) if which == 3 else (max(0.0, 1 - strength), 1 + strength)
                image = adjusted(image, which, stream.uniform(low, high))
        return image


def adjusted(image: "Image", which: int, factor: float) -> "Image":
    """Brightness (0), contrast (1) or saturation (2) times `factor`, or hue (3) turned by that share of a circle."""
    from PIL import Image, ImageEnhance

    if which < 3:
        return (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which](image).enhance(factor)
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.int32(factor * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


@dataclass(frozen=True)
class RandomErase:
    """uint8 (3, H, W) to the same, with rectangles of noise in it: one to `count` of them with probability `prob`.

    A rectangle has 2 % to a third of the area, divided by their number, and a height of 0.3 to 3.3 times its width; one
    that does not fit in ten tries is left out. That is timm's rule, whose noise open_clip draws behind the
    normalisation: normal, of `mean` and `std`, the model's (of pixels in [0, 1]).
    """

    prob: float = 0.0
    count: int = 1
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise ValueError(f"erase_prob: must be in [0, 1], was {self.prob}")
        if self.count < 1:
            raise ValueError(f"erase_count: must be at least 1, was {self.count}")

    def __call__(self, pixels: np.ndarray, stream: Stream) -> np.ndarray:
        if not self.prob or stream.uniform() >= self.prob:
            return pixels
        pixels, count = pixels.copy(), 1 + stream.below(self.count)
        for _ in range(count):
            box = self._box(pixels.shape[1], pixels.shape[2], count, stream)
            if box is not None:
                top, left, height, width = box
                pixels[:, top : top + height, left : left + width] = self._noise(height, width, stream)
        return pixels

    def _box(self, rows: int, columns: int, count: int, stream: Stream) -> tuple[int, int, int, int] | None:
        for _ in range(10):
            area = stream.uniform(*AREA) * rows * columns / count
            shape = math.exp(stream.uniform(-math.log(TALLEST), math.log(TALLEST)))
            height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < height < rows and 0 < width < columns:
                return stream.below(rows - height + 1), stream.below(columns - width + 1), height, width
        return None

    def _noise(self, height: int, width: int, stream: Stream) -> np.ndarray:
        """uint8 (3, height, width) by Box and Muller's method."""
        drawn = uniforms(np.arange(2 * 3 * height * width), "erase", stream.bits())
        radius, angle = drawn.reshape(2, 3, height, width)
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)
        mean, std = (255 * np.array(values)[:, None, None] for values in (self.mean, self.std))
        return (mean + std * normal).round().clip(0, 255).astype(np.uint8)
