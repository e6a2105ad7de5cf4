"""Colour augmentation as open_clip's `--aug-cfg` has it (SimCLR's jitter and greys, after SLIP, Mu et al. 2022)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastclip.data.streams import Stream

if TYPE_CHECKING:
    from PIL.Image import Image


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
