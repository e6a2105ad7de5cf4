"""JPEGs that workers only read: crops are drawn there, but decoded, cut out and resized where the model trains."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastclip.data.decode import BrokenImage, check_size, decode_image, jpeg_size
from fastclip.data.faults import BrokenSample, Tally
from fastclip.data.streams import Stream
from fastclip.data.transforms import Box, TrainTransform, crop_box, crop_pixels

GRAY = 128  # of an image that nothing can decode
GROUP_PIXELS = 1 << 27  # decoded at once, 400 MB; of the photographs of a large batch together it would be gigabytes
_END = b"\xff\xd9"

# Files (uint8, in host memory) and a device to the RGB pixels there, uint8 (3, H, W) each. Raises `RuntimeError` where
# it cannot decode one of them.
Decode = Callable[[list[Tensor], torch.device], list[Tensor]]


class JpegCrop(NamedTuple):
    """A JPEG file, the width and height in its header, and the box that is cut out of it."""

    data: bytes
    size: tuple[int, int]
    box: Box


class Encoded(NamedTuple):
    """The N JPEGs of a batch, in few tensors: each that crosses processes takes a file descriptor."""

    places: Tensor  # int64 (N,), of their images in the batch, ascending
    data: Tensor  # uint8 (bytes,), one file behind the other
    ends: Tensor  # int64 (N,), of the files in it
    sizes: Tensor  # int64 (N, 2), width and height
    boxes: Tensor  # int64 (N, 4), left, top, right and bottom


def jpeg_crop(data: bytes, transform: TrainTransform, stream: Stream) -> JpegCrop | None:
    """What `transform` cuts out of a plain JPEG, with the same draws.

    None, and nothing drawn, for what a worker decodes itself: other files, JPEGs beside grey and YCbCr, those that do
    not end as a JPEG does (most are cut off, which a GPU may not notice), and all where there is no crop to draw.
    Errors: `BrokenSample`, too_many_pixels.
    """
    size = jpeg_size(data)
    if size is None or transform.scale == (1, 1) or not data.endswith(_END):
        return None
    try:
        check_size(*size)
    except BrokenImage as error:
        raise BrokenSample(error.cause, error) from error
    return JpegCrop(data, size, crop_box(*size, transform.scale, stream, transform.ratio))


def packed(crops: dict[int, JpegCrop]) -> Encoded:
    """Crops by their place in the batch, which ascends."""
    return Encoded(
        torch.tensor(list(crops), dtype=torch.int64),
        torch.from_numpy(np.frombuffer(bytearray().join(crop.data for crop in crops.values()), np.uint8)),
        torch.tensor([len(crop.data) for crop in crops.values()], dtype=torch.int64).cumsum(0),
        torch.tensor([crop.size for crop in crops.values()], dtype=torch.int64).view(-1, 2),
        torch.tensor([crop.box for crop in crops.values()], dtype=torch.int64).view(-1, 4),
    )


@dataclass(frozen=True)
class DeviceDecoder:
    """Decodes a rank's batch on `device`; see `nvjpeg` for the `decode` of a GPU.

    A file that `decode` refuses is decoded on the CPU instead (cpu_decoded_image); one that cannot be decoded there
    either is mid-gray and counts as broken (grayed_image): its batch is made by then, and nothing can take its place.
    """

    device: torch.device
    decode: Decode

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A reader's batch, whose "image" holds what workers have decoded: uint8 (B - N, 3, S, S), and "encoded" the
        others. Returns it without "encoded", with "image" uint8 (B, 3, S, S) on the device."""
        keys, image_size = batch["keys"], batch["image"].shape[-1]
        encoded: Encoded = batch.pop("encoded")
        places, sizes, boxes = encoded.places.tolist(), encoded.sizes.tolist(), encoded.boxes.tolist()
        files = [encoded.data[start:end] for start, end in pairwise([0, *encoded.ends.tolist()])]
        images = torch.empty(len(keys), 3, image_size, image_size, dtype=torch.uint8, device=self.device)
        is_decoded = torch.ones(len(keys), dtype=torch.bool)
        is_decoded[encoded.places] = False
        images[is_decoded.to(self.device)] = batch["image"].to(self.device)
        tally = Tally.of(batch)
        for group in _groups([width * height for width, height in sizes]):
            for number, found in zip(group, self._decoded([files[number] for number in group]), strict=True):
                place, box = places[number], boxes[number]
                try:
                    images[place] = _resized_crop(found, sizes[number], box, image_size)
                except RuntimeError as error:
                    images[place] = _by_cpu(files[number], box, image_size, keys[place], error, tally)
        return batch | tally.in_batch() | {"image": images}

    def _decoded(self, files: list[Tensor]) -> list[Tensor | RuntimeError]:
        """The pixels of each file, or why there are none: a decoder that refuses one does not say which."""
        try:
            return [*self.decode(files, self.device)]
        except RuntimeError as error:
            if len(files) == 1:
                return [error]
            half = len(files) // 2
            return self._decoded(files[:half]) + self._decoded(files[half:])


def _groups(pixels: Sequence[int]) -> Iterator[range]:
    """Neighbours that have at most `GROUP_PIXELS` together, or are alone."""
    start, total = 0, 0
    for number, count in enumerate(pixels):
        if number > start and total + count > GROUP_PIXELS:
            yield range(start, number)
            start, total = number, 0
        total += count
    if pixels:
        yield range(start, len(pixels))


def _resized_crop(found: Tensor | RuntimeError, size: list[int], box: list[int], image_size: int) -> Tensor:
    """`transforms.crop_pixels` on the pixels' device, to a level of 255: uint8 (3, S, S). Errors: `RuntimeError`."""
    if isinstance(found, RuntimeError):
        raise found
    if list(found.shape) != [3, size[1], size[0]]:
        raise RuntimeError(f"decoded to {tuple(found.shape)}, its header says {size[0]} x {size[1]}")
    left, top, right, bottom = box
    crop = found[None, :, top:bottom, left:right].float()  # torch resizes integers on the CPU alone
    for height in (bottom - top, image_size):  # across, then down: PIL rounds between the two, which is up to 7 levels
        crop = interpolate(crop, (height, image_size), mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return crop[0].to(torch.uint8)


def _by_cpu(file: Tensor, box: list[int], image_size: int, key: str, error: RuntimeError, tally: Tally) -> Tensor:
    """The crop as a worker makes it, or mid-gray: uint8 (3, S, S); which of them is counted."""
    left, top, right, bottom = box
    try:
        image = crop_pixels(decode_image(file.numpy().tobytes()), (left, top, right, bottom), image_size)
    except BrokenImage as broken:
        tally.add("grayed_image", f"{key!r} ({broken})")
        tally.replaced += 1
        return torch.full((3, image_size, image_size), GRAY, dtype=torch.uint8)
    tally.add("cpu_decoded_image", f"{key!r} ({error})")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
