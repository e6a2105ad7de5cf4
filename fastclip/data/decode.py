"""Image files to RGB pixels: PIL's, to the last bit, or (opt-in) a JPEG at a reduced scale."""

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 26  # a header may promise any size; this is 67 megapixels, 268 MB while it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_JPEG = b"\xff\xd8\xff"


class BrokenImage(ValueError):
    """An image that cannot be used; `cause`: empty_image, too_many_pixels or unreadable_image."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def decode_image(data: bytes) -> "Image":
    """The RGB image in a PNG, JPEG, WebP, BMP or GIF file, whatever its name says; the first frame of an animation.

    What PIL's `convert("RGB")` gives, as WebDataset's "pilrgb" does: an EXIF orientation is not applied, transparency
    is dropped. JPEGs are decoded by simplejpeg (the same libjpeg-turbo, without PIL's detours) where it is installed.
    Errors: `BrokenImage`, a `ValueError`, for everything that is no image or is too large.
    """
    from PIL import Image

    if (pixels := _jpeg_pixels(data)) is not None:
        return Image.fromarray(pixels)
    if not data:
        raise BrokenImage("empty_image", "image: cannot be decoded (the file is empty)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.width, image.height)
            return image.convert("RGB")
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:  # PIL has a cap of its own
        raise BrokenImage("too_many_pixels", f"image: cannot be decoded ({error})") from error
    except Exception as error:  # on hostile bytes a codec may raise anything
        raise BrokenImage("unreadable_image", f"image: cannot be decoded ({error})") from error


def check_size(width: int, height: int) -> None:
    """Raises `BrokenImage` for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        message = f"image: cannot be decoded ({width} x {height} is more than {MAX_PIXELS} pixels)"
        raise BrokenImage("too_many_pixels", message)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a grey or colour JPEG that simplejpeg reads as PIL does, else None."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None or not data.startswith(_JPEG):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception:  # a KeyError for a header of a kind it does not know
        return None
    return (width, height) if colors in ("YCbCr", "Gray") else None


def reduced_jpeg(data: bytes, width: int, height: int) -> np.ndarray | None:
    """A JPEG at the smallest of libjpeg's scales (n/8) that is at least `width` x `height`: uint8 (H, W, 3)."""
    return _jpeg_pixels(data, min_height=height, min_width=width)


def _jpeg_pixels(data: bytes, **scale: int) -> np.ndarray | None:
    """The pixels of a JPEG; None leaves it to PIL: it is no JPEG, of a rare kind, damaged, or simplejpeg is missing."""
    size = jpeg_size(data)
    if size is None:
        return None
    check_size(*size)
    try:
        return _simplejpeg().decode_jpeg(data, "RGB", **scale)
    except Exception:  # at the slightest damage; PIL has the last word on it
        return None


def _simplejpeg():
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
