"""Images made worse on the fly: noise, blur, contrast, JPEG, pixelate at five severities (Hendrycks & Dietterich 2019).

Applied to the pixels that the model gets, as ImageNet-C was made for 224 pixels; blur is scaled with the image's size.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastclip.evaluation.sets import ImageSource

SEVERITIES = (1, 2, 3, 4, 5)
# What ImageNet-C uses at severity 1 to 5.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of a range of 1
BLUR = (1, 2, 3, 4, 6)  # standard deviation in pixels of a 224 x 224 image
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # of the distance from the channel's mean
JPEG = (25, 18, 15, 10, 7)  # quality
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # of the width and height
MADE_FOR = 224

Corruption = Callable[[np.ndarray, int, int], np.ndarray]


def noise(pixels: np.ndarray, severity: int, number: int) -> np.ndarray:
    """Gaussian noise, drawn from the image's number."""
    drawn = np.random.default_rng([number, severity]).normal(0, 255 * NOISE[severity - 1], pixels.shape)
    return _rounded(pixels + drawn)


def blur(pixels: np.ndarray, severity: int, number: int) -> np.ndarray:
    """Gaussian blur, cut at four deviations, edges repeated."""
    from scipy.ndimage import gaussian_filter

    deviation = BLUR[severity - 1] * pixels.shape[0] / MADE_FOR
    return _rounded(gaussian_filter(pixels.astype(np.float64), (deviation, deviation, 0), mode="nearest"))


def contrast(pixels: np.ndarray, severity: int, number: int) -> np.ndarray:
    """Every channel drawn towards its mean."""
    mean = pixels.mean((0, 1), keepdims=True)
    return _rounded((pixels - mean) * CONTRAST[severity - 1] + mean)


def jpeg(pixels: np.ndarray, severity: int, number: int) -> np.ndarray:
    """Saved as JPEG of low quality and read again."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG[severity - 1])
    return np.asarray(Image.open(file).convert("RGB"))


def pixelate(pixels: np.ndarray, severity: int, number: int) -> np.ndarray:
    """Made smaller by box averaging and larger again by repetition."""
    from PIL import Image

    image, share = Image.fromarray(pixels), PIXELATE[severity - 1]
    small = image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST))


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "jpeg": jpeg,
    "pixelate": pixelate,
}


class Corrupted:
    """An `ImageSource` whose images are made worse. The same images on every rank and in any batch."""

    def __init__(self, source: ImageSource, name: str, severity: int) -> None:
        if name not in CORRUPTIONS:
            raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, was {name!r}")
        if severity not in SEVERITIES:
            raise ValueError(f"severity must be 1 to 5, was {severity}")
        self._source, self._corrupt, self._severity = source, CORRUPTIONS[name], severity
        self.keys, self.image_file = source.keys, source.image_file
        self.skipped: Counter[str] = source.skipped

    def __len__(self) -> int:
        return len(self._source)

    def images(self, start: int, stop: int) -> Tensor:
        """See `ImageSource`."""
        pixels = self._source.images(start, stop).permute(0, 2, 3, 1).numpy()
        worse = [self._corrupt(image, self._severity, start + row) for row, image in enumerate(pixels)]
        return torch.from_numpy(np.stack(worse)).permute(0, 3, 1, 2).contiguous()


def _rounded(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels).clip(0, 255).astype(np.uint8)
