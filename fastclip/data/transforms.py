"""From image files to uint8 pixels (on the loader's cores), and from there to normalised floats (on the device).

Pixels are open_clip's to the last bit: PIL's bicubic or bilinear with antialiasing, torchvision's crops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fastclip.data.augment import ColorAugment, RandomErase
from fastclip.data.decode import BrokenImage, decode_image, jpeg_size, reduced_jpeg
from fastclip.data.faults import BrokenSample
from fastclip.data.streams import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "BrokenImage",
    "Preprocess",
    "TrainTransform",
    "crop_box",
    "decode_image",
    "eval_pixels",
    "normalize_image",
    "train_pixels",
]

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
RATIO = (3 / 4, 4 / 3)
Box = tuple[int, int, int, int]


def eval_pixels(
    image: "Image",
    size: int,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    fill_color: int = 0,
) -> np.ndarray:
    """open_clip's evaluation transform: uint8 (3, S, S).

    "shortest": the shorter side to `size`, the centre cut out; "longest": the longer side, the rest filled;
    "squash": both. The image is resized in its own mode and becomes RGB afterwards, as in open_clip.
    """
    if image.size != (size, size):
        width, height = image.size
        if resize_mode == "squash":
            image = _resized(image, size, size, interpolation)
        elif resize_mode == "longest":
            ratio = max(width, height) / size
            image = _filled(
                _resized(image, round(width / ratio), round(height / ratio), interpolation), size, fill_color
            )
        else:
            short = min(width, height)
            width, height = int(size * width / short), int(size * height / short)
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = _resized(image, width, height, interpolation).crop((left, top, left + size, top + size))
    return _pixels(image)


def train_pixels(
    image: "Image", size: int, scale: tuple[float, float], stream: Stream, ratio: tuple[float, float] = RATIO
) -> np.ndarray:
    """Random resized crop (area share in `scale`, aspect ratio in `ratio`), bicubic: uint8 (3, S, S).

    With `scale` (1, 1) there is nothing to draw: the evaluation transform.
    """
    if scale == (1, 1):
        return eval_pixels(image, size)
    return _pixels(crop_pixels(image, crop_box(image.width, image.height, scale, stream, ratio), size))


def crop_pixels(image: "Image", box: Box, size: int) -> "Image":
    """`box` of `image` cut out, then resized (what lies around the box has no part in it)."""
    return _resized(image if box == (0, 0, *image.size) else image.crop(box), size, size, "bicubic")


def _resized(image: "Image", width: int, height: int, interpolation: Interpolation) -> "Image":
    from PIL import Image

    if image.size == (width, height):
        return image
    way = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    return image.resize((width, height), way)


def _filled(image: "Image", size: int, fill_color: int) -> "Image":
    """`image`, not larger than size x size, in the middle of that."""
    from PIL import ImageOps

    across, down = size - image.width, size - image.height
    border = (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2)
    fill = fill_color if len(image.getbands()) == 1 else (fill_color,) * len(image.getbands())
    return ImageOps.expand(image, border, fill)


def _pixels(image: "Image") -> np.ndarray:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)


def crop_box(
    width: int, height: int, scale: tuple[float, float], stream: Stream, ratio: tuple[float, float] = RATIO
) -> Box:
    """(left, top, right, bottom) of a random crop; torchvision's rule: ten tries, then the largest centred crop."""
    for _ in range(10):
        area = width * height * stream.uniform(*scale)
        shape = math.exp(stream.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = stream.below(width - w + 1), stream.below(height - h + 1)
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class TrainTransform:
    """The bytes of an image file to training pixels, uint8 (3, size, size), with the draws of a `Stream`.

    `fast` decodes a JPEG at the smallest scale that still holds the crop's pixels; where that is its own, torch's SIMD
    kernel resizes it, and some values are off by one or two of 255: for training only.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = RATIO
    color: ColorAugment = field(default_factory=ColorAugment)
    erase: RandomErase = field(default_factory=RandomErase)
    fast: bool = False

    def __call__(self, data: bytes, stream: Stream) -> np.ndarray:
        """Errors: `BrokenSample` with the cause of a `BrokenImage`."""
        try:
            pixels = self._fast(data, stream) if self.fast else None
            if pixels is None:
                pixels = train_pixels(decode_image(data), self.size, self.scale, stream, self.ratio)
        except BrokenImage as error:
            raise BrokenSample(error.cause, error) from error
        return self.erase(self.color(pixels, stream), stream)

    def _fast(self, data: bytes, stream: Stream) -> np.ndarray | None:
        """Like `train_pixels`; None where this is no JPEG, or has no crop to draw. Draws nothing then."""
        size = jpeg_size(data)
        if size is None or self.scale == (1, 1):
            return None
        (width, height), state = size, stream.state
        left, top, right, bottom = crop_box(width, height, self.scale, stream, self.ratio)
        need = max(self.size / (right - left), self.size / (bottom - top))  # of the full scale
        pixels = reduced_jpeg(data, math.ceil(width * min(need, 1)), math.ceil(height * min(need, 1)))
        if pixels is None:
            stream.state = state
            return None
        if pixels.shape[:2] != (height, width):
            return self._from_reduced(pixels, (left, top, right, bottom), size)
        crop = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
        sized = torch.nn.functional.interpolate(crop, (self.size, self.size), mode="bicubic", antialias=True)
        return sized[0].numpy()

    def _from_reduced(self, pixels: np.ndarray, box: Box, full: tuple[int, int]) -> np.ndarray:
        """The crop `box` of an image whose size was `full`; it may begin between two of its pixels now."""
        from PIL import Image

        across, down = pixels.shape[1] / full[0], pixels.shape[0] / full[1]
        reduced = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return _pixels(Image.fromarray(pixels).resize((self.size, self.size), Image.Resampling.BICUBIC, box=reduced))


def normalize_image(
    images: Tensor,  # (..., 3, H, W) uint8
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`(images / 255 - mean) / std` per channel, computed in fp32 on the images' device and returned as `dtype`."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(3, 1, 1)
    return torch.addcmul(shift, images.float(), scale).to(dtype)


@dataclass(frozen=True)
class Preprocess:
    """One PIL image to a normalised float32 (3, S, S): the transform that open_clip's users hand to their data sets.

    With `crop_scale` a random crop is drawn from torch's generator, so DataLoader workers differ as usual.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_scale: tuple[float, float] | None = None
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill_color: int = 0

    def __call__(self, image: "Image") -> Tensor:
        if self.crop_scale is None:
            pixels = eval_pixels(image, self.image_size, self.interpolation, self.resize_mode, self.fill_color)
        else:
            seed = int(torch.randint(2**62, ()))
            pixels = train_pixels(image, self.image_size, self.crop_scale, Stream("preprocess", seed))
        return normalize_image(torch.from_numpy(pixels.copy()), self.mean, self.std)
