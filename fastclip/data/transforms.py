"""From image files to uint8 pixels (on the loader's cores), and from there to normalised floats (on the device)."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastclip.data.streams import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 27  # a header may promise any size; this is 134 megapixels
_RATIO = (3 / 4, 4 / 3)


def decode_image(data: bytes) -> "Image":
    """The RGB image in a PNG, JPEG, WebP or BMP file. Errors: `ValueError` for everything that is not one."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"image: {image.width} x {image.height} is more than {MAX_PIXELS} pixels")
            return image.convert("RGB")
    except Exception as error:  # on hostile bytes a codec may raise anything
        raise ValueError(f"image: cannot be decoded ({error})") from error


def eval_pixels(image: "Image", size: int) -> np.ndarray:
    """open_clip's evaluation transform: shorter side to `size` (bicubic, antialiased), centre cut; uint8 (3, S, S)."""
    from PIL import Image

    if image.size != (size, size):
        width, height = image.size
        short = min(width, height)
        width, height = int(size * width / short), int(size * height / short)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def train_pixels(image: "Image", size: int, scale: tuple[float, float], stream: Stream) -> np.ndarray:
    """Random resized crop (area share in `scale`, aspect ratio 3/4 to 4/3): uint8 (3, S, S).

    With `scale` (1, 1) there is nothing to draw: the evaluation transform.
    """
    from PIL import Image

    if scale == (1, 1):
        return eval_pixels(image, size)
    box = crop_box(image.width, image.height, scale, stream)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def crop_box(width: int, height: int, scale: tuple[float, float], stream: Stream) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop; torchvision's rule: ten tries, then the largest centred crop."""
    for _ in range(10):
        area = width * height * stream.uniform(*scale)
        ratio = math.exp(stream.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = stream.below(width - w + 1), stream.below(height - h + 1)
            return left, top, left + w, top + h
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


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

    def __call__(self, image: "Image") -> Tensor:
        image = image.convert("RGB")
        if self.crop_scale is None:
            pixels = eval_pixels(image, self.image_size)
        else:
            seed = int(torch.randint(2**62, ()))
            pixels = train_pixels(image, self.image_size, self.crop_scale, Stream("preprocess", seed))
        return normalize_image(torch.from_numpy(pixels.copy()), self.mean, self.std)
